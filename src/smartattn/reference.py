"""Whether a backend's output is right: softmax attention in float64, written from its definition.

It shares no code with the backends or the plan. Checking all of a large call would take longer than
timing it, so heads, rows and (of long ones) queries are sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .layouts import IntArray
from .workload import Tensors, Workload

#: (query, key) pairs x grouped heads up to which all queries of a head are checked.
MAX_PAIRS = 1 << 21
#: Queries that are checked otherwise.
SAMPLED_QUERIES = 64
#: A gradient passes through more rounded products than an output.
GRADIENT_SLACK = 4.0


class Expected(NamedTuple):
    """The right output, and gradients, of the query heads of one key/value head of one row."""

    row: int
    kv_head: int
    #: The queries that were computed, and whether these are all real ones.
    queries: IntArray
    complete: bool
    #: (group, queries, head_dim) in float64.
    output: torch.Tensor
    #: Gradients of query (as output), key and value (kv_len, head_dim); empty without a backward.
    gradients: tuple[torch.Tensor, ...]


def expected(workload: Workload, tensors: Tensors, rows: int = 2) -> list[Expected]:
    """Reference outputs of a sample of rows: the one with most and the one with fewest keys."""
    order = np.argsort(workload.real_keys().sum(axis=1), kind="stable")
    chosen = list(dict.fromkeys(int(row) for row in (order[-1], order[0])))[:rows]
    rng = np.random.default_rng(workload.seed)
    return [
        _one(workload, tensors, row, int(rng.integers(workload.kv_heads)), rng) for row in chosen
    ]


def error_of(
    workload: Workload,
    output: torch.Tensor,
    gradients: tuple[torch.Tensor, ...],
    references: list[Expected],
) -> float:
    """Largest error at real tokens, relative to the largest reference value; inf for NaN and inf.

    Args:
        output: (batch, q_len, heads, head_dim).
        gradients: those of the leaves of :class:`~smartattn.workload.Tensors`, or empty. Their
            errors are divided by ``GRADIENT_SLACK``.
    """
    worst = 0.0 if bool(torch.isfinite(output).all()) else float("inf")
    group = workload.heads // workload.kv_heads
    cached = workload.memory == "concatenated"
    for reference in references:
        row, kv_head = reference.row, reference.kv_head
        index = torch.from_numpy(reference.queries).to(output.device)
        heads = slice(kv_head * group, (kv_head + 1) * group)
        worst = max(worst, _difference(output[row, index, heads].transpose(0, 1), reference.output))
        if not gradients:
            continue
        query, *others = gradients
        # One key makes the softmax a constant: gradients of query and key are then exactly zero.
        floor = 0.1 * max(float(g.abs().max()) for g in reference.gradients if g.numel())
        pairs = [(query[row, index, heads].transpose(0, 1), reference.gradients[0])]
        if reference.complete:
            pairs += [
                (given[row, kv_head] if cached else given[row, :, kv_head], right)
                for given, right in zip(others, reference.gradients[1:], strict=True)
            ]
        for given, right in pairs:
            worst = max(worst, _difference(given, right, floor) / GRADIENT_SLACK)
    return worst


def _one(
    workload: Workload, tensors: Tensors, row: int, kv_head: int, rng: np.random.Generator
) -> Expected:
    group = workload.heads // workload.kv_heads
    real = np.flatnonzero(workload.real_queries()[row])
    complete = len(real) * workload.kv_len * group <= MAX_PAIRS
    queries = real if complete else np.sort(rng.permutation(real)[:SAMPLED_QUERIES])
    device = tensors.query.device
    index = torch.from_numpy(queries).to(device)
    heads = slice(kv_head * group, (kv_head + 1) * group)
    inputs = [
        tensors.query[row, heads][:, index],
        tensors.key[row, kv_head],
        tensors.value[row, kv_head],
    ]
    q, k, v = (x.detach().double().requires_grad_(tensors.grad_output is not None) for x in inputs)
    seen = torch.tensor(workload.visible(row, queries), device=device)
    scores = (q @ k.T) * workload.head_dim**-0.5
    output = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v
    gradients: tuple[torch.Tensor, ...] = ()
    if tensors.grad_output is not None:
        given = tensors.grad_output[row, index, heads].transpose(0, 1).double()
        gradients = torch.autograd.grad(output, (q, k, v), given)
    return Expected(row, kv_head, queries, complete, output.detach(), gradients)


def _difference(given: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> float:
    if not right.numel():
        return 0.0
    scale = max(float(right.abs().max()), floor, torch.finfo(torch.float32).tiny)
    difference = float((given.double() - right).abs().max()) / scale
    return difference if difference == difference else float("inf")
