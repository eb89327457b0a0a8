"""Which blocks have experts, what windows see, what further tokens and the z-loss are: against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from turnout.models import BERT, GPT, T5, BERTConfig, GPTConfig, T5Config, next_token_loss, recompute
from turnout.models.blocks import Context, rotary
from turnout.models.loss import head_z_loss
from turnout.models.multi_token import further_targets
from turnout.models.planner import Architecture
from turnout.moe import MoE, Residual, aux_loss

SMALL = GPTConfig(
    vocab=32, dim=16, layers=4, heads=4, kv_heads=2, hidden=12, seq_len=10, num_experts=4, moe={"balance": 0.0}
)
IDS = torch.randint(32, (3, 11), generator=torch.Generator().manual_seed(1))
TOKENS, TARGETS = IDS[:, :-1], IDS[:, 1:]


def build(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(SMALL, **options)).double()


@pytest.mark.parametrize(
    ("moe_every", "blocks"),
    [(0, []), (1, [0, 1, 2, 3]), (3, [2]), (5, []), (range(2, 5), [1, 2, 3]), ([4, 1], [0, 3]), ([], [])],
    ids=str,
)
def test_blocks_with_experts(moe_every, blocks):
    model = build(moe_every=moe_every)
    found = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    assert found == model.config.moe_layers() == [f"blocks.{index}.feed_forward" for index in blocks]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_every": [5]}, "moe_every has the block 5, but the last one is 4"),
        ({"moe_every": [0, 1]}, "numbers of blocks from 1; got 0 in it"),
        ({"moe_every": -1}, "moe_every must be 0 or more"),
        ({"windows": (4, -1)}, "windows must be numbers of positions, 0 for full attention; got -1"),
        ({"mtp": -1}, "mtp must be 0 or more; got -1"),
        ({"z_loss": float("nan")}, "z_loss must be 0 or more; got nan"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_a_t5_has_experts_in_blocks_of_its_longer_half():
    model = T5(T5Config(dim=16, layers=1, decoder_layers=3, heads=2, hidden=8, num_experts=2, moe_every=[3]))
    assert [name for name, m in model.named_modules() if isinstance(m, MoE)] == ["decoder.2.feed_forward"]


@pytest.mark.parametrize("how", ["none", "selective"])
def test_a_token_sees_its_window(how):
    model = recompute(build(windows=(3,), layers=1, moe_every=0), how)
    other = TOKENS.clone()
    other[:, 4] = (other[:, 4] + 1) % 32
    differs = (model(TOKENS) - model(other)).abs().amax(dim=(0, 2)) > 1e-9
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_windows_repeat_and_one_that_is_too_wide_sees_all():
    assert [replace(SMALL, windows=(3, 0, 5)).window(index) for index in range(4)] == [3, 0, 5, 3]
    assert [SMALL.window(index) for index in range(2)] == [0, 0]
    torch.testing.assert_close(build(windows=(10,))(TOKENS), build()(TOKENS))
    assert not torch.allclose(build(windows=(9,))(TOKENS), build()(TOKENS))
    spans = build().flops_per_token() - build(windows=(4, 0)).flops_per_token()
    assert spans == 2 * 12 * 16 * (10 - 4)


def test_biases_add_to_every_projection():
    model = build(attention_bias=True)
    names = [name for name, p in model.named_parameters() if name.startswith("blocks.0.attention") and "bias" in name]
    assert names == [f"blocks.0.attention.{part}.bias" for part in ("query", "key", "value", "out")]
    without = build()
    model.load_state_dict(without.state_dict(), strict=False)
    before = model(TOKENS)
    torch.testing.assert_close(before, without(TOKENS))
    with torch.no_grad():
        model.blocks[0].attention.value.bias.add_(0.1)
    assert not torch.allclose(model(TOKENS), before)


def test_z_loss_is_the_mean_square_of_log_normalisers():
    logits = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, -100, 2], [3, 4, -100]])
    totals = [logits[i, j].exp().sum().log() ** 2 for i, j in ((0, 0), (0, 2), (1, 0), (1, 1))]
    expected = torch.stack(totals).mean()
    torch.testing.assert_close(head_z_loss(logits, targets), expected)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (head_z_loss(logits, targets), expected))
    torch.testing.assert_close(ours, theirs)


def test_a_z_loss_that_is_left_out_is_warned_of():
    model = build(z_loss=0.5, moe_every=0)
    next_token_loss(model(TOKENS, targets=TARGETS), TARGETS).backward()
    with pytest.warns(UserWarning, match=r"the loss of HeadLosses was left out of the last step: .* aux_loss\(model\)"):
        logits = model(TOKENS, targets=TARGETS)
    torch.testing.assert_close(aux_loss(model), 0.5 * head_z_loss(logits, TARGETS), msg="of this step alone")


def test_z_loss_comes_with_the_auxiliary_losses():
    model = build(z_loss=0.5)
    logits = model(TOKENS, targets=TARGETS)
    torch.testing.assert_close(aux_loss(model), 0.5 * head_z_loss(logits, TARGETS))


def further_losses(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Loss of each depth, a sum where there is a target over all positions: eq. 21-24 of arXiv:2412.19437."""
    hidden = []
    handle = model.blocks.register_forward_hook(lambda *call: hidden.append(call[-1]))
    model.eval()(tokens)
    handle.remove()
    states, losses = hidden[0], []
    for number, depth in enumerate(model.mtp):
        length = tokens.shape[1] - 1 - number
        nexts = model.embed(targets[:, number : number + length])
        pair = [depth.join.hidden_norm(states[:, :length]), depth.join.embedding_norm(nexts)]
        cos, sin = rotary(length, model.config.head_size)
        states = depth.blocks[0](torch.cat(pair, dim=-1) @ depth.join.project.weight.T, Context(cos=cos, sin=sin))
        logits = F.linear(depth.norm(states), model.embed.weight)
        total = F.cross_entropy(logits.flatten(0, 1), targets[:, number + 1 :].flatten(), reduction="sum")
        losses.append(total / targets.numel())
    model.train()
    return losses


@pytest.mark.parametrize("how", ["none", "full"])
def test_further_tokens_are_those_of_deepseek_v3(how):
    model = recompute(build(mtp=2, mtp_weight=0.4, moe_every=1), how)
    expected = 0.4 * torch.stack(further_losses(model, TOKENS, TARGETS)).mean()
    logits = model(TOKENS, targets=TARGETS)
    found = aux_loss(model)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logits, build(moe_every=1)(TOKENS), msg="the model itself is as without")
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    (next_token_loss(logits, TARGETS) * 0 + found).backward()
    for (name, p), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert (gradient is None) == (p.grad is None or not p.grad.any()), name
        if gradient is not None:
            torch.testing.assert_close(p.grad, gradient, msg=name)


def test_further_tokens_do_not_cross_documents():
    targets = torch.tensor([[5, 6, 0, 7, 8, 9]])  # 0 begins the next document
    assert further_targets(targets, 1, eod=0).tolist() == [[6, 0, -100, 8, 9, -100]]
    assert further_targets(targets, 2, eod=0).tolist() == [[0, -100, -100, 9, -100, -100]]
    model, tokens = build(mtp=2, eod=0, moe_every=1), torch.tensor([[4, 5, 6, 0, 7, 8]])
    other, changed = tokens.clone(), targets.clone()
    other[0, 4:], changed[0, 3:] = 20, 20  # another second document

    def first_document(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen = []
        hook = model.head_losses.register_forward_pre_hook(lambda module, args: seen.extend(args[2]))
        model(tokens, targets=targets)
        hook.remove()
        return torch.stack([seen[0][:, :2], seen[1][:, :2]])  # those with a target at depth 1, and one more

    before, after = first_document(tokens, targets), first_document(other, changed)
    torch.testing.assert_close(before[0], after[0])
    torch.testing.assert_close(before[1][:, :1], after[1][:, :1])


def test_further_tokens_behind_the_end_go_to_no_expert():
    model = build(mtp=1, moe_every=1)
    seen = []
    model.mtp[0].blocks[0].feed_forward.gate.register_forward_hook(lambda *call: seen.append(call[-1]))
    targets = TARGETS.clone()
    targets[:, 6] = -100
    model(TOKENS, targets=targets)
    routed = model.mtp[0].blocks[0].feed_forward.stats
    assert int(routed.tokens_per_expert.sum()) == 2 * 3 * 9  # two experts for each of 3 sequences' 9 known next tokens


def test_training_needs_targets_and_evaluation_does_not():
    model = build(mtp=1)
    with pytest.raises(ValueError, match=r"mtp and z_loss need the targets in training: call model\(tokens, targets="):
        model(TOKENS)
    assert model.eval()(TOKENS).shape == (3, 10, 32)
    assert float(aux_loss(model)) == 0


def test_flops_of_further_tokens_are_counted():
    model = build(mtp=1, moe_every=0, dim=32, heads=2)
    with FlopCounterMode(display=False) as counter:
        logits = model(TOKENS, targets=TARGETS)
        (next_token_loss(logits, TARGETS) + aux_loss(model)).backward()
    counted, said = counter.get_total_flops() / TOKENS.numel(), model.flops_per_token()
    assert 0.9 < counted / said < 1.1


def test_biases_and_lists_of_blocks_are_for_all_models():
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    bert = BERT(BERTConfig(dim=16, heads=2, layers=2, hidden=8, num_experts=2, attention_bias=True, moe_every=[1]))
    assert bert(tokens).shape == (1, 4, 264)
    assert isinstance(bert.blocks[0].feed_forward, MoE)


@pytest.mark.parametrize(
    ("shared", "number"),
    [(0, 0), (2, 2), (Residual(1), 1), (torch.nn.Identity(), 0), (Residual(torch.nn.Identity()), 0)],
)
def test_dense_blocks_are_as_wide_as_the_experts_of_a_token(shared, number):
    config = GPTConfig(dim=8, layers=2, heads=2, hidden=4, num_experts=4, top_k=2, moe={"shared": shared})
    assert config.shared_experts == number
    assert GPT(config).blocks[0].feed_forward.up.out_features == 4 * (2 + number)
    assert Architecture.of(config).shared == number
