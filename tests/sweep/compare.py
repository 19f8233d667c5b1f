"""Compares what two attention implementations computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """`figure` is the largest error of any tensor, relative to its scale; None if undefined."""

    agrees: bool
    figure: float | None
    reason: str = ""


def compare(
    reference: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
    *,
    tolerance: float,
    common_scale: float = 0.0,
) -> Comparison:
    """Whether every tensor of `candidate` equals its namesake of `reference` within `tolerance`.

    The error of a tensor is max|candidate - reference| / scale, where scale is max|reference|, plus
    `common_scale` times the largest magnitude in any reference tensor. Gradients need the latter:
    some are zero in exact arithmetic (a key bias under softmax) and consist of noise alone.
    A shape or name that differs, and anything that is not finite, is a disagreement.
    """
    if reference.keys() != candidate.keys():
        difference = ", ".join(sorted(reference.keys() ^ candidate.keys()))
        return Comparison(False, None, f"names differ: {difference}")
    if not any(tensor.numel() for tensor in reference.values()):
        return Comparison(False, None, "nothing to compare")
    for name, expected in reference.items():
        actual = candidate[name]
        if expected.shape != actual.shape:
            shapes = f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
            return Comparison(False, None, f"{name}: shape {shapes}")
        for whose, tensor in (("reference", expected), ("candidate", actual)):
            if not torch.isfinite(tensor).all():
                return Comparison(False, None, f"{name}: not finite in the {whose}")

    floor = common_scale * max(_magnitude(tensor) for tensor in reference.values())
    worst_name, worst = "", -1.0
    for name, expected in reference.items():
        error = _magnitude(candidate[name].double() - expected.double())
        scale = _magnitude(expected) + floor
        relative = error / scale if scale else (0.0 if error == 0.0 else math.inf)
        if relative > worst:
            worst_name, worst = name, relative
    agrees = worst <= tolerance
    figure = worst if math.isfinite(worst) else None
    return Comparison(
        agrees, figure, "" if agrees else f"{worst_name}: {worst:.2g} > {tolerance:g}"
    )


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a reference is fit to be compared with."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _magnitude(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0
