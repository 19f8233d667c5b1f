"""Attention from first principles in float64, a comparison that can fail, and a varlen stand-in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from smartattn.backends import Backend, Support
from smartattn.backends.flash import Route, bind_dense, bind_varlen, flash_window, route
from smartattn.call import Call, Runner
from smartattn.layouts import VarlenLayout
from smartattn.packing import Told, varlen_refusals
from smartattn.plan import Plan


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scaling * q k + bias) v in float64, one matrix product at a time.

    Args:
        query: (batch, heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim or value_head_dim); the heads of a group
            share one, in order.
        mask: (batch, 1, q_len, kv_len) boolean, True where a query sees a key.
        bias: added to the scores, broadcastable to (batch, heads, q_len, kv_len).

    Returns:
        (batch, q_len, heads, value_head_dim) in float64; zeros for queries that see no key.
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    some = mask.any(-1, keepdim=True)
    # Rows without any key get scores of zero and lose their result below: no NaN, no gradient.
    scores = scores.masked_fill(~mask & some, -math.inf).masked_fill(~some, 0.0)
    weights = torch.softmax(scores, dim=-1) * some
    # Zero times the NaN of a key that nobody sees would be NaN.
    seen = mask.any(2).any(1)[:, None, :, None]
    return (weights @ value.masked_fill(~seen, 0.0)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Error:
    """How far a result is from its reference, relative to the reference."""

    #: Largest absolute difference divided by the largest absolute value of the reference.
    largest: float
    #: Norm of the difference divided by the norm of the reference.
    norm: float


def relative_error(
    result: torch.Tensor, reference: torch.Tensor, where: torch.Tensor | None = None
) -> Error:
    """The error of a result at the selected positions.

    Args:
        where: boolean, broadcastable from the left: (batch, length) selects tokens of
            (batch, length, heads, dim).

    Raises:
        AssertionError: the shapes differ, something is NaN or infinite, or nothing is selected.
    """
    assert result.shape == reference.shape, f"shape {result.shape}, reference {reference.shape}"
    if where is not None:
        result, reference = result[where], reference[where]
    assert reference.numel() > 0, "nothing is compared"
    result, reference = result.detach().double(), reference.detach().double()
    assert bool(reference.isfinite().all()), "the reference is not finite"
    broken = int((~result.isfinite()).sum())
    assert broken == 0, f"{broken} of {result.numel()} values are not finite"
    difference = result - reference
    return Error(
        _ratio(difference.abs().max().item(), reference.abs().max().item()),
        _ratio(difference.norm().item(), reference.norm().item()),
    )


def _ratio(difference: float, scale: float) -> float:
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def assert_close(
    result: torch.Tensor,
    reference: torch.Tensor,
    tolerance: float,
    where: torch.Tensor | None = None,
    what: str = "result",
) -> Error:
    """Asserts that both measures of :func:`relative_error` are within a tolerance."""
    error = relative_error(result, reference, where)
    assert max(error.largest, error.norm) <= tolerance, (
        f"{what}: relative error {error.largest:.2e} (norm {error.norm:.2e}), "
        f"tolerance {tolerance:.0e}"
    )
    return error


# -- exact kernels with the contract of the flash ones ---------------------------------------------


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    used_k: torch.Tensor | None = None,
    *,
    scale: float | None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    used_q: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a variable-length flash kernel computes, and what it demands of its arguments.

    Query ``i`` of a sequence of ``q`` queries and ``k`` keys stands at key ``i + k - q``. It sees
    the keys from ``window[0]`` before to ``window[1]`` after that one; -1 is no bound.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim or value_head_dim).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32.
        used_k: (sequences,) int32, how many of a sequence's keys count, the first ones.
        used_q: the same of its queries; those that do not count are not written.
        output: (total_q, heads, value_head_dim), what is written; a new tensor if not given.
    """
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    sparing = used_q is not None
    assert sparing == (output is not None)
    used_q = lengths_q if used_q is None else used_q
    used_k = lengths_k if used_k is None else used_k
    for used, lengths in ((used_q, lengths_q), (used_k, lengths_k)):
        assert used.dtype == torch.int32
        assert used.shape == lengths.shape
        assert bool(((used >= 0) & (used <= lengths)).all())
    for name, states, bounds, used, longest in (
        ("query", q, cu_seqlens_q, used_q, max_seqlen_q),
        ("key", k, cu_seqlens_k, used_k, max_seqlen_k),
        ("value", v, cu_seqlens_k, used_k, max_seqlen_k),
    ):
        assert states.ndim == 3, name
        assert bounds.dtype == torch.int32, name
        lengths = bounds.diff()
        assert int(bounds[0]) == 0 or (sparing and int(bounds[0]) > 0), name
        assert bool((lengths >= 0).all()), name
        # A kernel reads out of bounds without this one, and leaves out tokens without the next.
        assert int(bounds[-1]) == states.shape[0], name
        assert int(used.max()) <= longest, name
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    # FlashAttention-2 takes a longest query of 1 for exactly one query in every sequence.
    assert max_seqlen_q > 1 or bool((cu_seqlens_q.diff() == 1).all())
    pieces = []
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    counts = zip(used_q.tolist(), used_k.tolist(), strict=True)
    for (first_q, first_k), (some_q, some_k) in zip(starts, counts, strict=False):
        queries, keys = slice(first_q, first_q + some_q), slice(first_k, first_k + some_k)
        pieces.append(
            dense_attention(
                q[None, queries],
                k[None, keys],
                v[None, keys],
                scale=scale,
                window=window,
                softcap=softcap,
            )[0]
        )
        if output is not None:
            output[queries] = pieces[-1]
    return torch.cat(pieces) if output is None else output


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """What the dense flash kernel computes, for (batch, length, heads, dim) tensors."""
    q_len, k_len = q.shape[1], k.shape[1]
    keys = torch.arange(k_len, device=q.device)
    position = torch.arange(q_len, device=q.device)[:, None] + k_len - q_len
    mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device)
    left, right = window
    if left >= 0:
        mask &= keys >= position - left
    if right >= 0:
        mask &= keys <= position + right
    output = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask.expand(q.shape[0], 1, q_len, k_len),
        scaling=scale,
        softcap=softcap or None,
    )
    return output.to(q.dtype)


def bounded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
    *,
    scale: float | None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """What a kernel for caches computes: each row sees its keys ``start[i] : end[i]`` alone.

    All of them without bounds.

    Args:
        q: (batch, q_len, heads, head_dim).
        k, v: (batch, kv_len, kv_heads, head_dim or value_head_dim).
        start, end: (batch,) int32; the last query stands at the key before ``end``.
    """
    if start is None or end is None:
        assert start is end
        return dense_attention(q, k, v, scale=scale, window=window, softcap=softcap)
    assert start.dtype == end.dtype == torch.int32
    assert bool(((start >= 0) & (start <= end) & (end <= k.shape[1])).all())
    bounds = zip(start.tolist(), end.tolist(), strict=True)
    rows = [
        dense_attention(
            q[i : i + 1],
            k[i : i + 1, first:last],
            v[i : i + 1, first:last],
            scale=scale,
            window=window,
            softcap=softcap,
        )
        for i, (first, last) in enumerate(bounds)
    ]
    return torch.cat(rows)


class VarlenReference(Backend):
    """Reads batches like the real flash backends and computes exactly, on every device.

    Args:
        how: the way it reads where that is exact and there is a choice; packed otherwise.
    """

    name = "varlen_reference"
    support = Support(mixed_head_dims=True)

    def __init__(self, how: Route = Route.PACKED) -> None:
        self.how = how
        self.label = f"varlen_reference-{how.name.lower()}"

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        return varlen_refusals(plan, call)

    def bind(self, plan: Plan, call: Call) -> Runner:
        window = flash_window(plan)
        if plan.is_causal:
            window = (window[0], 0)
        how = route(
            plan,
            call,
            key_bounds=self.how is Route.KEY_BOUNDS,
            in_place=self.how is Route.IN_PLACE,
            used_keys=not call.grad,
        )
        if how is Route.DENSE:
            return bind_dense(
                lambda q, k, v: dense_attention(q, k, v, scale=call.scaling, window=window),
                plan,
                call,
            )
        if how is Route.KEY_BOUNDS:
            bounds = plan.key_bounds()
            return lambda query, key, value, _: bounded_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                bounds.start,
                bounds.end,
                scale=call.scaling,
                window=window,
            )

        def kernel(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
        ) -> torch.Tensor:
            return varlen_attention(
                q,
                k,
                v,
                layout.cu_seqlens_q,
                layout.cu_seqlens_k,
                layout.max_seqlen_q,
                layout.max_seqlen_k,
                layout.used_k,
                scale=call.scaling,
                window=window,
            )

        told = Told.BOUNDS if call.grad else Told.KEYS
        return bind_varlen(kernel, how, plan, call, told)
