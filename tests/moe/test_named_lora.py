"""Several adapters by name in one model, and a model without its adapters for a while."""

import pytest
import torch
from reference import close
from torch import nn
from turnout.moe import MoE, aux_loss
from turnout.moe.adapters import add_lora, disable_lora, lora_parameters, merge_lora, unmerge_lora, use_lora

D, RANK = 16, 4


def layer() -> MoE:
    torch.manual_seed(1)
    return MoE(D, 24, 4, 2).double()


def tokens() -> torch.Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def drawn(model: nn.Module, name: str) -> nn.Module:
    """With an adapter that is not zero."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for p in lora_parameters(model, name).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def two() -> tuple[nn.Module, dict[str | None, torch.Tensor]]:
    """A model with two adapters, the second in use, and what it computes without any and with each."""
    model = nn.Sequential(layer(), layer())
    y: dict[str | None, torch.Tensor] = {None: model(tokens())}
    y["default"] = drawn(add_lora(model, RANK), "default")(tokens())
    y["second"] = drawn(add_lora(model, 2 * RANK, alpha=5.0, name="second"), "second")(tokens())
    assert all(not close(y[a], y[b], 1e-2) for a in y for b in y if a != b)
    return model, y


def test_one_is_used_and_trained_at_a_time():
    model, y = two()
    for name in ("default", "second", "default"):
        assert torch.equal(use_lora(model, name)(tokens()), y[name])
        assert {own for own, p in model.named_parameters() if p.requires_grad} == lora_parameters(model, name).keys()
        (model(tokens()).square().mean() + aux_loss(model)).backward()
        assert {own for own, p in model.named_parameters() if p.grad is not None} == lora_parameters(model, name).keys()
        model.zero_grad()
    assert lora_parameters(model).keys() == lora_parameters(model, "default").keys() | lora_parameters(model, "second")
    assert all(".second." in own for own in lora_parameters(model, "second"))
    first, second = (model[0].experts.lora[name]["up"].a for name in ("default", "second"))
    assert first.shape != second.shape


def test_two_of_one_rank_are_drawn_apart():
    moe = add_lora(add_lora(layer(), RANK), RANK, name="second")
    assert not close(*(moe.experts.lora[name]["up"].a for name in ("default", "second")), 0.5)


def test_switched_off_for_a_reference():
    model, y = two()
    with disable_lora(model) as plain:
        assert torch.equal(plain(tokens()), y[None])
        assert not any(moe.experts.adapts for moe in model)
        with disable_lora(model):
            assert torch.equal(model(tokens()), y[None])
        assert torch.equal(model(tokens()), y[None]), "the inner one has not switched them on again"
    assert torch.equal(model(tokens()), y["second"])
    with pytest.raises(ZeroDivisionError), disable_lora(model):
        raise ZeroDivisionError
    assert torch.equal(model(tokens()), y["second"])


def test_the_one_in_use_is_merged():
    model, y = two()
    assert close(merge_lora(model)(tokens()), y["second"], 1e-12)
    for change in (lambda: use_lora(model, "default"), lambda: add_lora(model, RANK, name="third")):
        with pytest.raises(ValueError, match="an adapter is merged"):
            change()
    with pytest.raises(ValueError, match="an adapter is merged"), disable_lora(model):
        pass
    assert close(use_lora(unmerge_lora(model), "default")(tokens()), y["default"], 1e-12)
    merge_lora(model, keep=False)
    assert lora_parameters(model).keys() == lora_parameters(model, "second").keys()
    assert close(model(tokens()), y["default"], 1e-12)
    assert not close(use_lora(model, "second")(tokens()), y["default"], 1e-2)
    merge_lora(model, keep=False)
    assert model.state_dict().keys() == nn.Sequential(layer(), layer()).state_dict().keys()


def test_what_does_not_go():
    model, _ = two()
    with pytest.raises(ValueError, match="has no adapter 'third'; it has default, second"):
        use_lora(model, "third")
    with pytest.raises(ValueError, match="'second' already"):
        add_lora(model, RANK, name="second")
    for name in ("", "a.b", "items"):
        with pytest.raises(ValueError, match="must be a word"):
            add_lora(model, RANK, name=name)
    with pytest.raises(ValueError, match="call add_lora first"), disable_lora(layer()):
        pass
