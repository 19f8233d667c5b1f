"""smartattn's own kernel, in Triton: sequences where they lie in the padded tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..call import Call, Runner
from ..packing import packs_queries, varlen_refusals
from ..plan import Padding, Pattern, Plan
from ..triton_launch import Launcher, hindrance
from .base import HALF_PRECISION, Backend, Support
from .flash import flash_window, on_rocm

#: Rows of a tile, which are queries times the heads of a group, and its keys where a query sees
#: many or few of them. Measured by ``benchmarks.triton_tiles``, as what follows.
_ROWS, _MANY_KEYS, _FEW_KEYS = 64, 64, 32
#: Keys that a query sees on average from which they are many, and the largest head_dim with which
#: so large a tile leaves registers.
_MANY, _SMALL_HEAD = 512, 64
#: Warps of a program, tiles of keys that are on their way, and how many of the largest heads.
_WARPS, _STAGES, _FEW_STAGES = 4, 3, 2
_LARGE_HEAD = 128
#: Blocks of a grid in its second and third dimension, at most.
_MOST_BLOCKS = 65_535
#: How many times as many blocks as have work a grid may have; no costs were measured beyond.
_MOST_EMPTY = 8.0
#: Strides from here on have an eighth of more than 31 bits.
_FURTHEST = 2**34
#: Further away than any key.
_NO_BOUND = 2**30

_launch = Launcher("attention_kernel", "ROWS", "KEYS", "DIM", "WIDTH", "WINDOWED", "STAGES")


@functools.cache
def _broken(device: torch.device) -> str | None:
    """Why Triton cannot build the kernel for a device, None if it can.

    Triton comes with torch's CUDA builds, and needs a C compiler on the machine.
    """
    states = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    plan = Plan(1, 1, 1, Pattern.BIDIRECTIONAL, device)
    call = Call(device, states.dtype, 1, 1, 1, 1, 1, 64, 64)
    return hindrance(lambda: _bind(plan, call)(states, states, states, {}))


class TritonVarlenBackend(Backend):
    """A FlashAttention-2 forward in Triton that looks up where each sequence lies.

    Padding on any side is neither computed nor read, and nothing is gathered. Its small tiles fit
    short sequences, whose heads of a group share them; for long ones the kernels of FlashAttention
    are faster.

    Source: the algorithm of https://arxiv.org/abs/2307.08691.
    """

    name = "triton_varlen"
    walks = "tokens"
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=HALF_PRECISION,
        max_head_dim=256,
        head_dim_multiple=8,
        backward=False,
        min_capability=(8, 0),
    )

    def unavailable(self) -> str | None:
        return on_rocm()

    def refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = super().refusals(plan, call)
        # Building takes a second: not for a call that it refuses anyway, or is not considered for.
        if reasons or call.device.type != "cuda" or call.q_len == 1:
            return reasons
        reason = _broken(call.device)
        return [reason] if reason else []

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if 0 in (call.batch, call.q_len, call.kv_len):
            reasons.append("takes no empty tensors")
        if plan.padding is Padding.HOLES:
            reasons.append("the real tokens of a row must follow each other")
        sequences = 0 if plan.sequences is None else len(plan.sequences)
        if max(sequences, call.kv_heads) > _MOST_BLOCKS:
            reasons.append(f"takes up to {_MOST_BLOCKS:,} sequences and heads")
        if call.heads * max(call.q_len, call.kv_len) * call.head_dim >= _FURTHEST:
            reasons.append("takes no rows of so many elements")
        if call.scaling is not None and not call.scaling > 0.0:
            reasons.append(f"takes a scaling above 0, given {call.scaling}")
        return reasons

    def tile(self, plan: Plan, call: Call) -> tuple[int, int]:
        return max(1, _ROWS // call.group_size), _keys(plan, call)

    def set_aside(self, plan: Plan, call: Call) -> str | None:
        if call.q_len == 1:
            return "does not split the keys of a single query"
        if plan.is_packed and _emptiness(plan) > _MOST_EMPTY:
            return "one sequence is so much longer than the others that most blocks would be empty"
        return super().set_aside(plan, call)

    def bind(self, plan: Plan, call: Call) -> Runner:
        return _bind(plan, call)


def _emptiness(plan: Plan) -> float:
    """Blocks of a grid that has room for the longest sequence, over those that have work."""
    assert plan.sequences is not None
    lengths = plan.sequences.q_length
    return float(len(lengths) * lengths.max(initial=0) / max(1, lengths.sum()))


def _keys(plan: Plan, call: Call) -> int:
    """Keys of a tile."""
    packs = packs_queries(plan, call)
    queries = plan.real_q if packs else call.batch * call.q_len
    many = plan.attended_pairs(packs) >= _MANY * queries
    return _MANY_KEYS if many and call.head_dim <= _SMALL_HEAD else _FEW_KEYS


def _bind(plan: Plan, call: Call) -> Runner:
    bounds = plan.sequence_bounds(packs_queries(plan, call))
    left, right = flash_window(plan) if plan.window_matters else (_NO_BOUND, _NO_BOUND)
    if plan.is_causal:
        right = 0
    device, dtype, dim = call.device, call.dtype, call.head_dim
    shape = (call.batch, call.q_len, call.heads, dim)
    scaling = dim**-0.5 if call.scaling is None else call.scaling
    scale = scaling * math.log2(math.e)
    sequences = bounds.table.shape[1]
    constants = (
        _ROWS,
        _keys(plan, call),
        dim,
        max(16, 1 << (dim - 1).bit_length()),
        plan.window_matters,
        _STAGES if dim <= _LARGE_HEAD else _FEW_STAGES,
    )
    rest = (sequences, call.q_len, call.heads, call.group_size, plan.shift, left, right, *constants)
    tiles = -(-bounds.longest * call.group_size // _ROWS)
    grid, kind = (tiles, call.kv_heads, sequences), (dtype, _WARPS, *constants)
    table, table_at = bounds.table, bounds.table.data_ptr()

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Mapping[str, Any]
    ) -> torch.Tensor:
        query, q_at, q_strides = _aligned(query)
        key, k_at, k_strides = _aligned(key)
        value, v_at, v_strides = _aligned(value)
        output = query.new_empty(shape)
        _launch(
            device,
            kind,
            grid,
            (query, key, value, output, table),
            (q_at, k_at, v_at, output.data_ptr(), table_at, scale)
            + (q_strides + k_strides + v_strides + rest),
            num_warps=_WARPS,
            num_stages=constants[-1],
            enable_fp_fusion=True,
        )
        return output

    return run


def _aligned(states: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, int, int]]:
    """The tensor, or a copy, of which 16 bytes may be loaded at once, its address, strides / 8.

    Args:
        states: (batch, heads, length, dim).
    """
    strides, address = _eighths(states.stride()), states.data_ptr()
    if strides is None or address % 16:
        states = states.clone(memory_format=torch.contiguous_format)
        strides, address = _eighths(states.stride()), states.data_ptr()
        assert strides is not None
    return states, address, strides


@functools.lru_cache(maxsize=4096)
def _eighths(strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Strides / 8 of all but the last dimension; None if the kernel cannot take them."""
    batch, head, token, element = strides
    bits = batch | head | token
    if element != 1 or bits % 8 or bits >= _FURTHEST:
        return None
    return batch // 8, head // 8, token // 8
