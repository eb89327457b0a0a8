"""Distillation: the loss of a student, and what it inherits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from turnout.models import BERT, GPT, BERTConfig, GPTConfig, distillation_loss, inherit, next_token_loss
from turnout.moe import MoE

CONFIG = GPTConfig(vocab=32, dim=16, layers=4, heads=2, hidden=8, seq_len=8, num_experts=4)
generator = torch.Generator().manual_seed(0)
LOGITS, TAUGHT = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
TARGETS = torch.tensor([[0, 3, -100, 6, 1], [2, -100, -100, 5, 4]])


def test_the_loss_is_a_mixture_of_hard_and_soft_targets():
    logits = LOGITS.clone().requires_grad_()
    found = distillation_loss(logits, TAUGHT, TARGETS, alpha=0.3)
    known = TARGETS != -100
    hard = F.one_hot(TARGETS.clamp(min=0), 7).double()
    mixture = 0.7 * hard + 0.3 * TAUGHT.softmax(-1)  # Switch Transformers: one cross entropy with mixed targets
    expected = F.cross_entropy(logits[known], mixture[known])
    entropy = -(TAUGHT.softmax(-1) * TAUGHT.log_softmax(-1)).sum(-1)[known].mean()
    torch.testing.assert_close(found, expected - 0.3 * entropy)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(distillation_loss(LOGITS, TAUGHT, TARGETS, 0.0), next_token_loss(LOGITS, TARGETS))


def test_a_temperature_softens_both():
    found = distillation_loss(LOGITS, TAUGHT, TARGETS, alpha=1.0, temperature=2.0)
    soft, known = (TAUGHT / 2).softmax(-1), TARGETS != -100
    apart = (soft * (soft.log() - (LOGITS / 2).log_softmax(-1))).sum(-1)[known].mean()
    torch.testing.assert_close(found, 4 * apart)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], and temperature above 0; got 1.5 and 1.0"),
        ({"temperature": 0.0}, "temperature above 0; got 0.25 and 0.0"),
        ({"logits": LOGITS[0], "teacher_logits": TAUGHT[0]}, r"must be \[B, S, vocab\]"),
        ({"targets": TARGETS[:1]}, r"targets \[B, S\]; got \(2, 5, 7\) and \(1, 5\)"),
        ({"teacher_logits": TAUGHT[..., :5]}, r"logits of the student are \(2, 5, 7\), and of the teacher \(2, 5, 5\)"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{"logits": LOGITS, "teacher_logits": TAUGHT, "targets": TARGETS, **change})


def test_what_the_teacher_says_where_no_target_is_does_not_matter():
    expected, grads = distillation_loss(LOGITS, TAUGHT, TARGETS), []
    for said in (TAUGHT, TAUGHT.masked_fill((TARGETS == -100).unsqueeze(-1), torch.nan)):
        logits = LOGITS.clone().requires_grad_()
        loss = distillation_loss(logits, said, TARGETS)
        assert torch.equal(loss, expected)
        grads += torch.autograd.grad(loss, logits)
    assert torch.equal(*grads)


def test_ids_that_teacher_and_student_rule_out_change_nothing():
    logits = LOGITS.clone().requires_grad_()
    wide, taught = (F.pad(x, (0, 2), value=-torch.inf) for x in (logits, TAUGHT))
    loss = distillation_loss(wide, taught, TARGETS)
    torch.testing.assert_close(loss, distillation_loss(LOGITS, TAUGHT, TARGETS))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize(("kind", "config"), [(GPT, CONFIG), (BERT, BERTConfig(dim=16, heads=2, layers=4, hidden=8))])
def test_a_dense_student_has_all_but_the_experts(kind, config):
    teacher, student = kind(config), kind(replace(config, moe_every=0))
    assert not any(isinstance(module, MoE) for module in student.modules())
    left = inherit(student, teacher)
    assert left == [f"blocks.{b}.feed_forward.{name}.weight" for b in (1, 3) for name in ("up", "gate", "down")]
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        assert (name in theirs and torch.equal(p, theirs[name])) == (name not in left)
        assert name not in theirs or p.data_ptr() != theirs[name].data_ptr()


def test_a_shallow_student_has_the_first_blocks_with_their_experts():
    teacher, student = GPT(CONFIG), GPT(replace(CONFIG, layers=2))
    assert inherit(student, teacher) == []
    assert torch.equal(student.blocks[1].feed_forward.experts.w_up, teacher.blocks[1].feed_forward.experts.w_up)


def test_a_student_of_another_width_inherits_nothing():
    with pytest.raises(ValueError, match="the student has no parameter of the teacher"):
        inherit(GPT(replace(CONFIG, dim=24, vocab=16, moe_every=0)), GPT(CONFIG))
