"""Runs a model under one implementation and compares it with another at real tokens."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils

import smartattn

#: Largest |difference| divided by the largest |expected|. Eager attention computes its softmax in
#: float32 whatever the dtype, which bounds what a comparison in float64 can show.
TOLERANCES = {
    torch.float64: 1e-5,
    torch.float32: 5e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

#: Backends that run on any machine and may be forced on a padded batch.
CPU_BACKENDS = ("sdpa", "sdpa_unpadded")

WIDTH = 12

#: What an argument and an output that hold a cache are called: "cache" since Transformers 5.24.
CACHE = next(
    name
    for name in inspect.signature(masking_utils.create_causal_mask).parameters
    if name in ("cache", "past_key_values")
)


def spans(*real: tuple[int, int], width: int = WIDTH) -> Tensor:
    """A 2D mask whose row i is real from ``real[i][0]`` up to ``real[i][1]``."""
    mask = torch.zeros(len(real), width, dtype=torch.long)
    for row, (start, stop) in zip(mask, real, strict=True):
        row[start:stop] = 1
    return mask


def holes() -> Tensor:
    """Padding between real tokens; the last row has some at the edges too."""
    mask = torch.ones(3, WIDTH, dtype=torch.long)
    mask[1, [3, 6, 7]] = 0
    mask[2, [0, 4, 9, 11]] = 0
    return mask


#: (3, WIDTH) masks of all kinds of padding whose real tokens are contiguous.
CONTIGUOUS_MASKS: dict[str, Tensor] = {
    "right": spans((0, 12), (0, 7), (0, 3)),
    "left": spans((0, 12), (5, 12), (9, 12)),
    "both": spans((0, 11), (2, 12), (4, 9)),
    "outer": spans((1, 11), (2, 10), (4, 9)),
    "equal": spans((0, 8), (0, 8), (0, 8)),
    "equal_left": spans((4, 12), (4, 12), (4, 12)),
    "one_token": spans((0, 1), (11, 12), (5, 6)),
    "empty_row": spans((0, 12), (0, 0), (5, 12)),
}
MASKS: dict[str, Tensor] = {
    "ones": torch.ones(3, WIDTH, dtype=torch.long),
    **CONTIGUOUS_MASKS,
    "holes": holes(),
}


def set_implementation(model: PreTrainedModel, implementation: str) -> None:
    """Switches a model and all of its parts; fails where Transformers would only warn."""
    model.set_attn_implementation(implementation)
    for module in model.modules():
        config = getattr(module, "config", None)
        # Older versions of Transformers leave out the copies that the stacks of T5 have.
        if isinstance(config, PreTrainedConfig) and config.model_type == model.config.model_type:
            config._attn_implementation = implementation
    assert model.config._attn_implementation == implementation


def output_of(result: Any) -> Tensor:
    """The per-token output of a model: logits if it has any."""
    return result.logits if "logits" in result else result.last_hidden_state


def run(
    model: PreTrainedModel,
    implementation: str,
    backends: Sequence[str] | str | None = None,
    **inputs: Any,
) -> Tensor:
    """The output of one forward without gradients; ``backends`` restricts smart's choice."""
    set_implementation(model, implementation)
    restricted = contextlib.nullcontext() if backends is None else smartattn.use(backends=backends)
    with torch.no_grad(), restricted:
        return output_of(model(**inputs))


def assert_agree(
    actual: Tensor,
    expected: Tensor,
    where: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Fails unless both are finite and equal within the noise of the dtype.

    Args:
        where: positions to compare, a mask of (batch, length); None for all of them.
        tolerance: instead of that of the dtype of ``actual``, see ``TOLERANCES``.
    """
    assert actual.shape == expected.shape
    if where is not None:
        actual, expected = actual[where.bool()], expected[where.bool()]
    assert actual.numel(), "nothing to compare"
    assert torch.isfinite(expected).all(), "the reference is not finite"
    assert torch.isfinite(actual).all(), "not finite"
    error = relative_error(actual, expected)
    limit = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    assert error <= limit, f"relative error {error:.2g} > {limit:g}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |difference| divided by the largest |expected|."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def assert_differ(actual: Tensor, other: Tensor) -> None:
    """Fails if two outputs that a test needs to be distinct could pass for equal."""
    limit = 100 * TOLERANCES[actual.dtype]
    assert relative_error(actual, other) > limit, "the test could not tell these apart"
