"""Models in transforms of ``torch.func``, in which no value can be read: the static choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

import smartattn

from .agreement import MASKS, WIDTH, set_implementation
from .tiny_models import tiny_model, token_ids

IDS = token_ids(3, WIDTH)


def loss(model: Any, weights: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A sum of the outputs at real tokens, each with a weight of its own."""
    output = functional_call(model, weights, (), {"input_ids": ids, "attention_mask": mask})[0]
    shares = torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)
    return (output * shares * real(mask)).sum()


def gradient(model: Any, mask: Any) -> Any:
    return grad(lambda weights: loss(model, weights, IDS, mask))(weights_of(model))


def gradient_with_mask_given(model: Any, mask: Any) -> Any:
    return grad(lambda weights, mask: loss(model, weights, IDS, mask))(weights_of(model), mask)


def product(model: Any, mask: Any) -> Any:
    states = model.get_input_embeddings()(IDS).detach()
    output, back = vjp(
        lambda states: model(inputs_embeds=states, attention_mask=mask)[0] * real(mask), states
    )
    return {"output": output.detach(), "back": back(torch.ones_like(output))[0]}


def jacobian(model: Any, mask: Any) -> Any:
    weights = weights_of(model)
    name = next(name for name in weights if name.endswith("norm.weight") or "LayerNorm" in name)
    part = weights.pop(name)
    return {name: jacrev(lambda one: loss(model, {**weights, name: one}, IDS, mask)[None])(part)}


def ensemble(model: Any, mask: Any) -> Any:
    stacked = {name: torch.stack([one, 1.1 * one]) for name, one in weights_of(model).items()}
    inputs = {"input_ids": IDS, "attention_mask": mask}
    output = vmap(lambda weights: functional_call(model, weights, (), inputs)[0])(stacked)
    return {"output": output * real(mask)}


def per_sample(model: Any, mask: Any) -> Any:
    def one(weights: Any, ids: torch.Tensor) -> Any:
        return loss(model, weights, ids[None], None)

    return vmap(grad(one), in_dims=(None, 0))(weights_of(model), IDS)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def real(mask: torch.Tensor | None) -> torch.Tensor | float:
    return 1.0 if mask is None else mask[..., None].float()


TRANSFORMS = {
    one.__name__: one
    for one in (gradient, gradient_with_mask_given, product, jacobian, ensemble, per_sample)
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_equal_eager(
    transform: Callable[[Any, Any], Any], name: str, padding: str | None
) -> None:
    if name == "gpt_oss" and transform in (ensemble, per_sample):
        pytest.skip("its experts are not for vmap")
    mask = None if padding is None else MASKS[padding]
    model = tiny_model(name)
    model.config.use_cache = False
    results = {}
    for implementation in ("eager", "smart"):
        set_implementation(model, implementation)
        results[implementation] = transform(model, mask)
    assert results["eager"].keys() == results["smart"].keys()
    largest = max(float(one.abs().max()) for one in results["eager"].values())
    assert largest > 1e-3
    for key, expected in results["eager"].items():
        difference = float((results["smart"][key] - expected).abs().max())
        assert difference <= 1e-5 * largest, key


def test_the_next_forward_is_measured_again() -> None:
    model = tiny_model("llama", "smart")
    mask = MASKS["left"]
    gradient(model, mask)
    with torch.no_grad(), smartattn.trace() as trace:
        model(input_ids=IDS, attention_mask=mask)
    assert [row.facts["padding"] for row in trace.rows] == ["left"]
