"""A layer's life in any order: settings, copies, checkpoints, dtypes, adapters, steps. See tests/moe/test_life.py."""

from __future__ import annotations

import copy
import io
import pickle
import random
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import reference
import reference_layer as oracle
import torch
import torch.distributed as dist
from fuzz import WIDTH, Layer, layer
from fuzz_model import LORA, capacity, moe
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference_routes import BALANCED
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import FlatDispatcher, HierarchicalDispatcher, LocalDispatcher, NodeDispatcher, OverlapDispatcher
from turnout.moe import aux_loss, load, update_expert_biases
from turnout.moe.adapters import add_lora, lora_parameters, merge_lora, unmerge_lora

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}
FACTORS = st.sampled_from([None, 0.5, 0.8, 1.0, 1.7, 6.0])
SEEDS = st.integers(0, 999)


class Loss(NamedTuple):
    """Of one forward, by the oracle."""

    value: torch.Tensor
    graph: bool
    dtype: torch.dtype


@cache
def dispatchers():
    """All that one rank can have; their groups are made once."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("node", "local"))
    inner = [FlatDispatcher(dist.group.WORLD), HierarchicalDispatcher.of(mesh), NodeDispatcher.of(mesh)]
    return [LocalDispatcher(), OverlapDispatcher(LocalDispatcher(), 2), *inner, OverlapDispatcher(inner[2], 3)]


class Life(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**16))
    def born(self, seed):
        self.made: Layer = layer(random.Random(seed))
        self.settings, self.dtype, self.merged = self.made.settings, torch.float64, False
        torch.manual_seed(seed)
        self.layer, self.age = self.new(), 0
        self.pending: list[Loss] = []  # of the step
        self.under_way = False  # the next training forward is of the same step
        self.evaluation: Loss | None = None  # of the last forward, if that was in eval mode
        self.load = torch.zeros(self.settings.choices, dtype=torch.int64)  # since biases moved
        self.counted = self.load.clone()  # since `load` was called

    @torch.no_grad()
    def new(self):
        made = moe(self.made).to(self.dtype)
        for name, p in [*made.gate.named_parameters(), *made.gate.named_buffers()]:
            if p.dtype != torch.int64 and name != "temperature":
                p.copy_(torch.randn_like(p) * 0.5)
        return made

    # ---- settings

    @rule(seed=SEEDS)
    def set_top_k(self, seed):
        name, options = self.settings.gate, self.settings.options
        most = self.settings.choices * options.get("top_groups", 1) // options.get("groups", 1)
        if name in ("switch", "base", "gshard", "hierarchical"):
            return  # these have theirs
        top_k = 1 + seed % min(most, 4)
        self.layer.top_k, self.settings = top_k, replace(self.settings, top_k=top_k)

    @rule(factor=FACTORS, at_evaluation=FACTORS)
    def set_capacity(self, factor, at_evaluation):
        self.settings = replace(self.settings, capacity_factor=factor, eval_capacity_factor=at_evaluation)
        self.layer.capacity = capacity(self.settings, self.made.pad and factor is not None)

    @rule(weight=st.sampled_from([0.0, 0.1, 0.4]))
    def set_balance(self, weight):
        self.settle()
        self.layer.balance, self.settings = weight, replace(self.settings, aux_loss_weight=weight)

    @rule(which=st.integers(0, 5))
    def set_dispatcher(self, which):
        self.layer.dispatcher = dispatchers()[which]

    @rule(training=st.booleans(), recompute=st.booleans())
    def set_mode(self, training, recompute):
        self.layer.train(training)
        self.layer.experts.recompute = recompute

    # ---- copies

    @rule()
    def copied(self):
        old, self.layer = self.layer, copy.deepcopy(self.layer)
        self.forget(old)

    @rule()
    def pickled(self):
        if self.layer.dispatcher.groups:
            with pytest.raises(TypeError, match=r"save model\.state_dict\(\)"):
                pickle.dumps(self.layer)
            self.layer.dispatcher = LocalDispatcher()
        old, self.layer = self.layer, pickle.loads(pickle.dumps(self.layer))
        self.forget(old)

    @precondition(lambda self: not self.merged)
    @rule(assign=st.booleans())
    def saved_and_loaded(self, assign):
        file, old = io.BytesIO(), self.layer
        torch.save(old.state_dict(), file)
        file.seek(0)
        self.layer = self.new()
        if lora_parameters(old):
            add_lora(self.layer, router=old.gate.lora is not None, **LORA)
        self.layer.load_state_dict(torch.load(file), assign=assign)
        self.layer.train(old.training)
        self.layer.dispatcher, self.layer.top_k = old.dispatcher, old.top_k
        self.layer.experts.recompute = old.experts.recompute
        self.layer.capacity, self.layer.balance = old.capacity, old.balance
        self.load.zero_()  # not in a state dict
        self.forget(old)

    def forget(self, old):
        """A layer in the place of another has its weights, and nothing of its past."""
        new = self.layer.state_dict()
        assert all(torch.equal(t.to(new[name].dtype), new[name]) for name, t in old.state_dict().items())
        self.pending, self.under_way, self.evaluation = [], False, None
        self.counted.zero_()
        with pytest.raises(RuntimeError, match="no statistics yet"):
            self.layer.stats.dropped.item()

    @rule(dtype=st.sampled_from(list(TOLERANCE)))
    def cast(self, dtype):
        self.settle()
        self.layer, self.dtype = self.layer.to(dtype), dtype

    # ---- adapters, and what is trained

    @precondition(lambda self: isinstance(self.settings.experts, str) and not lora_parameters(self.layer))
    @rule(router=st.booleans())
    def adapt(self, router):
        self.settle()
        add_lora(self.layer, router=router, **LORA)
        with torch.no_grad():
            for p in lora_parameters(self.layer).values():
                p.copy_(torch.randn_like(p) * 0.2)

    @precondition(lambda self: lora_parameters(self.layer))
    @rule(keep=st.booleans())
    def merge(self, keep):
        self.settle()
        before = self.effective()
        if self.merged and keep:
            unmerge_lora(self.layer)
        else:
            merge_lora(self.layer, keep)
        self.merged = keep and not self.merged
        for name, tensor in self.effective().items():
            assert reference.close(tensor, before[name], TOLERANCE[self.dtype]), f"{name} must stay the same"

    def effective(self):
        """Tensors with what adapters add."""
        return oracle.adapted(self.state(), LORA["alpha"] / LORA["rank"], self.merged)

    @rule(seed=SEEDS)
    def freeze(self, seed):
        self.settle()
        for i, p in enumerate(self.layer.parameters()):
            p.requires_grad_(random.Random(seed + i).random() < 0.7)

    # ---- forwards

    @rule(seed=SEEDS, sequences=st.integers(0, 3), masked=st.booleans(), grad=st.booleans(), ask=st.booleans())
    def look(self, seed, sequences, masked, grad, ask):
        with torch.set_grad_enabled(grad):
            self.forward(seed, sequences, masked, self.state())
            if ask:
                self.settle()

    @rule(seed=SEEDS, sequences=st.lists(st.integers(0, 3), min_size=1, max_size=2), masked=st.booleans())
    def step(self, seed, sequences, masked):
        self.gradients(seed, sequences, masked)
        torch.optim.SGD(self.layer.parameters(), lr=0.02).step()

    @precondition(lambda self: "expert_bias" in dict(self.layer.gate.named_buffers()))
    @rule()
    def move_biases(self):
        before, rate = self.layer.gate.expert_bias.clone(), self.layer.gate.rate
        update_expert_biases(self.layer)
        mean = self.load.double().mean()
        wanted = before + rate * (mean - self.load).sign()
        assert torch.allclose(self.layer.gate.expert_bias.double(), wanted, atol=1e-6)
        self.load.zero_()

    @rule()
    def count(self):
        assert load(self.layer)[""].tokens_per_expert.equal(self.counted)
        self.counted.zero_()

    # ---- what must hold

    @invariant()
    def is_what_is_written_down(self):
        if not self.under_way:  # otherwise losses wait to be asked for
            self.age += 1
            self.gradients(self.age, [2], masked=self.age % 2 == 0)

    def gradients(self, seed, sequences, masked):
        """Those of forwards of so many sequences, and of their losses."""
        self.settle()
        self.layer.zero_grad()
        state = self.state()
        total, wanted = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for i, n in enumerate(sequences):
            x, y, exact, expected = self.forward(seed + 7 * i, n, masked, state)
            toward = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            total, wanted = total + (y.double() * toward).sum(), wanted + (expected * toward).sum()
        aux = sum((loss.value for loss in self.covered()), torch.zeros(()))
        (total + self.settle()).backward()
        (wanted + aux).backward()
        if self.dtype == torch.bfloat16 and self.settings.experts in ("relu", "reglu"):
            return  # rounding may turn one of few: half of a gradient
        self.same(x.grad, exact.grad, "x.grad")
        for name, p in self.layer.named_parameters():
            if p.requires_grad:
                self.same(p.grad, state[name].grad, f"gradient of {name}")
            else:
                assert p.grad is None, name

    def state(self):
        """The layer's in float64, what is trained as leaves."""
        trained = {name for name, p in self.layer.named_parameters() if p.requires_grad}
        return {n: t.detach().double().clone().requires_grad_(n in trained) for n, t in self.layer.state_dict().items()}

    def forward(self, seed, sequences, masked, state):
        """One forward of both: (x, y, x of the oracle, its y); notes losses, compares outputs and statistics."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sequences, 3, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()
        mask = torch.rand(x.shape[:-1], generator=generator) > 0.3 if masked else None
        if mask is not None and mask.sum() == 1:  # Sinkhorn would choose by rounding
            mask[:] = True
        ids, training = torch.randint(-50, 50, x.shape[:-1], generator=generator), self.layer.training
        exact = x.detach().double().requires_grad_()
        torch.manual_seed(seed)
        y = self.layer(x, mask, ids)
        torch.manual_seed(seed)
        own = oracle.adapted(state, LORA["alpha"] / LORA["rank"], self.merged)
        flat = None if mask is None else mask.flatten()
        expected, routed = oracle.forward(
            self.settings, own, exact.flatten(0, 1), training, flat, ids.flatten(), self.dtype
        )
        expected = expected.reshape(x.shape)
        assert y.dtype == x.dtype
        self.same(y, expected, "y")
        stats = reference.load_stats(routed.expert, routed.kept, self.settings.choices)
        for name, value in stats.items():
            assert torch.allclose(getattr(self.layer.stats, name).double(), torch.tensor(value).double(), atol=1e-6), (
                name
            )
        loss = oracle.aux_loss(self.settings, [routed], [sequences], training=training)
        noted, adds_up = Loss(loss, torch.is_grad_enabled(), self.dtype), training and y.requires_grad
        self.pending = self.pending if self.under_way else []
        self.evaluation = None if training else noted
        if training:
            self.pending = [*self.pending, noted]
            self.under_way = self.under_way or y.requires_grad
        if adds_up:
            self.load += torch.tensor(stats["tokens_per_expert"])
            self.counted += torch.tensor(stats["tokens_per_expert"])
        return x, y, exact, expected

    def covered(self):
        """The losses that `aux_loss` gives now: of the step under way, or else of the last forward."""
        alone = self.evaluation is not None and not (self.layer.training and self.under_way)
        return [self.evaluation] if alone else self.pending

    def settle(self):
        """Ask for the losses."""
        gate, s = self.layer.gate, self.settings
        balanced = s.gate in BALANCED and s.gate != "noisy_topk" and not s.options.get("balance_loss")
        some = s.z_loss_weight or (s.aux_loss_weight and not balanced)
        wants = self.layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in gate.parameters())
        losses = self.covered()
        evaluated = losses == [self.evaluation]
        self.under_way = self.under_way and evaluated
        if some and wants and (evaluated or not all(loss.graph for loss in losses)):
            with pytest.raises(RuntimeError, match="has no graph: its last forward ran in eval mode"):
                aux_loss(self.layer)
            return torch.zeros(())
        aux = aux_loss(self.layer)
        off = aux.detach() - sum(loss.value.detach() for loss in losses)
        assert abs(float(off)) <= max((TOLERANCE[loss.dtype] for loss in losses), default=0), "aux loss"
        return aux

    def same(self, actual, wanted, what):
        if wanted is None:
            assert actual is None or not actual.any(), what
            return
        wanted = wanted.detach()
        actual = torch.zeros_like(wanted) if actual is None else actual.detach()
        off, size = (float(t.abs().max()) if t.numel() else 0.0 for t in (actual.double() - wanted, wanted))
        assert off <= TOLERANCE[self.dtype] * max(size, 0.5), f"{what} is off by {off}"
