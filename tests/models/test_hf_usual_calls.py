"""The usual calls on a model of Hugging Face do the right thing with a bridge in it, or name what to call."""

import copy
import pickle

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from turnout.models.hf import BridgedMoE, FusedExperts, replace_moe, restore_moe, restored
from turnout.models.hf.compare_blocks import experts_differ
from turnout.moe import aux_loss, parallelize

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from hf_families import batch, tiny
from transformers import AutoModelForCausalLM


def layers(model: nn.Module) -> list[BridgedMoE]:
    return [module for module in model.modules() if isinstance(module, BridgedMoE)]


def minimax_m2(**options) -> nn.Module:
    """A family whose experts alone are replaced."""
    import hf_walk

    return hf_walk.tiny("minimax_m2")


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", [lambda: tiny("mixtral"), minimax_m2], ids=["mixtral", "minimax_m2"])
def test_save_pretrained_writes_the_familys_names(make, tmp_path):
    make().save_pretrained(tmp_path / "before")
    ours = replace_moe(make())
    names = list(ours.state_dict())
    ours.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "before") == files(tmp_path / "after")
    assert list(ours.state_dict()) == names  # bridged still
    with restored(ours):
        pass
    for number, model in enumerate((ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), restore_moe(ours))):
        model.save_pretrained(tmp_path / f"{number}")
        assert files(tmp_path / "before") == files(tmp_path / f"{number}"), number
    assert "save_pretrained" not in vars(ours)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    ids = torch.randint(3, 64, (2, 9))
    torch.testing.assert_close(again.eval()(ids).logits, make()(ids).logits)


def test_a_model_inside_saves_itself_as_well(tmp_path):
    tiny("mixtral").model.save_pretrained(tmp_path / "before")
    replace_moe(tiny("mixtral")).model.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "before") == files(tmp_path / "after")


def test_a_state_dict_of_the_bridge_is_not_written(tmp_path):
    ours = replace_moe(tiny("mixtral"))
    with pytest.raises(ValueError, match="leave state_dict out"):
        ours.save_pretrained(tmp_path, state_dict=ours.state_dict())


def test_trainer_in_one_process(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    texts = [{"input_ids": ids, "labels": ids} for ids in batch("mixtral")["input_ids"]]
    trained = []
    for name, model in (("before", tiny("mixtral")), ("after", replace_moe(tiny("mixtral")))):
        args = TrainingArguments(str(tmp_path / name), max_steps=2, use_cpu=True, report_to=[], learning_rate=0.01)
        trainer = Trainer(model=model, args=args, train_dataset=texts)
        trainer.train()
        trainer.save_model()
        trained.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    start = tiny("mixtral").state_dict()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert not torch.equal(value, start[name])


def spread_calls(folder):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    with pytest.raises(
        ValueError, match=r"MixtralForCausalLM has no MoE layer, but 2 modules called experts, .*replace_moe"
    ):
        parallelize(tiny("mixtral"), mesh)
    model = parallelize(replace_moe(tiny("mixtral")), mesh)
    if dist.get_rank() == 0:  # alone, as Trainer calls it
        with pytest.raises(
            ValueError, match=r"hf\.save_pretrained\(model, folder\) on every rank, or train with MoETrainer"
        ):
            model.save_pretrained(folder)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):  # what Trainer does on several ranks
        nn.parallel.DistributedDataParallel(model)
    # transformers' generation, prompts of one length and answers of two: a rank that is done goes on until all are
    ids = batch("mixtral")["input_ids"][:1]
    number = 3 + 4 * dist.get_rank()
    answer = model.generate(ids, max_new_tokens=number, do_sample=False, synced_gpus=True)
    alone = tiny("mixtral").generate(ids, max_new_tokens=number, do_sample=False)
    assert torch.equal(answer[:, : alone.shape[1]], alone)

    half = tiny("mixtral")
    for block in (layer.mlp for layer in half.model.layers):
        for name, p in list(block.experts.named_parameters()):
            setattr(block.experts, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp .*: experts\.gate_up_proj is spread .* without tp_plan, ep_plan"
    ):
        replace_moe(half)


def test_spread_models(tmp_path):
    ranks.run(2, spread_calls, tmp_path)


def test_twice():
    ours = replace_moe(tiny("mixtral"))
    for model in (ours, replace_moe(minimax_m2())):
        before = layers(model)
        with pytest.raises(ValueError, match=r"went through replace_moe before, .*restore_moe\(model\) undoes it"):
            replace_moe(model)
        assert layers(model) == before
    assert layers(replace_moe(restore_moe(ours)))


def test_a_balance_loss_of_ours():
    ours = replace_moe(tiny("mixtral")).train()
    for layer in layers(ours):
        layer.balance = 0.1
    given = {**batch("mixtral"), "output_router_logits": False}
    ours(**given).loss.backward()
    with pytest.warns(UserWarning, match="the balance loss of .* was left out of the last step"):
        out = ours(**given)
    (out.loss + aux_loss(ours)).backward()
    alone = layers(replace_moe(minimax_m2()))[0]
    alone.balance = 0.0
    for name, value in {"balance": 0.1, "capacity": 1.0, "top_k": 1}.items():
        with pytest.raises(ValueError, match=f"a layer whose router is the model's own has no {name}"):
            setattr(alone, name, value)


@pytest.mark.parametrize("make", [lambda: tiny("mixtral"), minimax_m2], ids=["mixtral", "minimax_m2"])
def test_hooks_of_a_block_go_on_running(make):
    model = make()
    block, seen = model.model.layers[0].mlp, []
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    block.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    replace_moe(model)
    ids = torch.randint(3, 64, (2, 9))
    model(ids).logits.sum().backward()
    assert len(seen) == 2
    assert set(seen) == {seen[0]}
    handle.remove()
    model(ids)
    assert len(seen) == 2


def test_hooks_that_would_never_run_are_refused():
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp .*experts\.act_fn has hooks, which would never run"):
        replace_moe(model)
    assert not layers(model)


def test_expert_parallelism_of_transformers_is_refused():
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="spread by transformers' expert parallelism: load the model without it"):
        replace_moe(model)


def test_device_map_and_offload():
    accelerate = pytest.importorskip("accelerate")
    expected = tiny("mixtral")(**batch("mixtral")).logits
    mapped = accelerate.dispatch_model(tiny("mixtral"), {"": "cpu"}, force_hooks=True)
    torch.testing.assert_close(replace_moe(mapped)(**batch("mixtral")).logits, expected)
    offloaded = accelerate.cpu_offload(tiny("mixtral"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp .*is offloaded by accelerate.* without offload"):
        replace_moe(offloaded)
    torch.testing.assert_close(offloaded(**batch("mixtral")).logits, expected)


def test_quantised_experts_are_refused():
    for dtype in (torch.float8_e4m3fn, torch.int8):
        model = tiny("qwen3_moe")
        experts = model.model.layers[1].mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(dtype), requires_grad=False)
        experts.gate_up_proj_scale_inv = nn.Parameter(torch.ones(6, 1, 1))
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp .*gate_up_proj is torch\..*quantised.*load the model dequant"
        ):
            replace_moe(model)
        assert not layers(model)


def test_a_tensor_that_nothing_would_use_is_refused():
    model = tiny("qwen3_moe")
    model.model.layers[1].mlp.experts.extra = nn.Parameter(torch.ones(6))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp .*at most a bias for each; it has .*extra"):
        replace_moe(model)
    assert not layers(model)


def test_a_block_that_computes_something_else_keeps_its_own_code():
    model = tiny("qwen3_moe")
    own = type(model.model.layers[0].mlp)
    kind = type("Doubled", (own,), {"forward": lambda self, hidden_states: 2 * own.forward(self, hidden_states)})
    kind.__module__ = own.__module__
    model.model.layers[0].mlp.__class__ = kind
    expected = model(**batch("qwen3_moe")).logits
    torch.testing.assert_close(replace_moe(model)(**batch("qwen3_moe")).logits, expected)
    assert isinstance(model.model.layers[0].mlp, kind)  # with our experts in it
    assert isinstance(model.model.layers[1].mlp, BridgedMoE)


def test_a_model_without_weights():
    with torch.device("meta"):
        config = tiny("mixtral").config
        model = replace_moe(type(tiny("mixtral"))(config))
    assert all(p.is_meta for p in model.parameters())
    assert len(layers(model)) == 2


@pytest.mark.parametrize(
    ("flaw", "differs"),
    [
        ({"act_fn": nn.GELU()}, "the output in eval mode"),
        ({"_apply_gate": lambda gate_up: gate_up.chunk(2, -1)[0]}, "the output in eval mode"),
    ],
)
def test_the_comparison_sees(flaw, differs):
    """Experts of ours that compute with another function than the family's."""
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts

    def flawed(module):
        for name, value in flaw.items():
            object.__setattr__(module, name, value) if name == "_apply_gate" else setattr(module, name, value)
        return FusedExperts(module)

    assert experts_differ(experts, FusedExperts) is None
    assert experts_differ(experts, flawed).startswith(differs)


def test_the_comparison_sees_a_gradient_that_is_cut():
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts

    class Cut(FusedExperts):
        def down(self, hidden, ends):
            return super().down(hidden.detach(), ends)

    assert "the gradient of" in experts_differ(experts, Cut)


def test_without_the_comparison():
    expected = tiny("qwen3_moe")(**batch("qwen3_moe")).logits
    ours = replace_moe(tiny("qwen3_moe"), verify=False)
    torch.testing.assert_close(ours(**batch("qwen3_moe")).logits, expected)
    assert replace_moe(minimax_m2(), verify=False)


def test_layers_that_differ_are_compared_one_by_one():
    model = tiny("qwen3_moe")
    model.model.layers[1].mlp.experts._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]  # unlike its own forward
    with pytest.raises(ValueError, match=r"layers\.1\.mlp .*the output in eval mode differs"):
        replace_moe(model)
    assert not layers(model)
