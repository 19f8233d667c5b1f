"""FlashAttention-3, forward only, for Hopper GPUs."""

from __future__ import annotations

import functools
import importlib
from dataclasses import asdict
from typing import Any

import torch

from .. import tails
from ..call import Call, Runner
from ..layouts import VarlenLayout
from ..machine import Versions
from ..packing import Told, VarlenKernel, packs_queries, varlen_refusals
from ..plan import Padding, Plan
from . import splitting
from .base import Backend, Support
from .flash import (
    DenseKernel,
    Facts,
    Route,
    bind_dense,
    bind_varlen,
    on_rocm,
    route,
    unit_stride,
)
from .splitting import Step

#: Modules that hold the kernels: (Python module, namespace of its operators).
_BUILDS = (("fa3_fwd_interface", "fa3_fwd"), ("flash_attn_interface", "flash_attn_3"))
#: The arguments of the forward operator in their order.
_ARGUMENTS = (
    *("q", "k", "v", "k_new", "v_new", "q_v", "out"),
    *("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k"),
    *("max_seqlen_q", "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
    *("softmax_scale", "is_causal", "window_size_left", "window_size_right", "attention_chunk"),
    *("softcap", "is_rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa"),
    "sm_margin",
)


#: The heads of a group share the tiles of calls with sequences, which short ones need, but which
#: loads queries more slowly: up to this head_dim, and from as many keys per query on, heads are
#: faster apart. Measured by ``benchmarks.flash_3``, as what follows.
_APART_HEAD, _APART_KEYS = 64, 2048
#: Keys per query, and share of the queries, from which left padding is faster left out than told by
#: the first key of each row, since blocks for padding cost more than writing zeros.
_LEFT_OUT_KEYS, _LEFT_OUT_SHARE = 1024, 0.125


#: What the package fa3-fwd is built without. Source: its own description.
_LACKED = frozenset({"float16", "window"})


def _asked_of_a_build(plan: Plan, call: Call) -> list[tuple[str, str]]:
    """What a call needs of those features that not every build has, and their names in words."""
    needed = {"float16": call.dtype is torch.float16, "window": plan.window_matters}
    words = {"float16": "float16", "window": "windows"}
    return [(feature, words[feature]) for feature, asked in needed.items() if asked]


@functools.cache
def _operator() -> tuple[Any, str | None]:
    """(the forward operator, None), or (None, why it cannot be used)."""
    why = "FlashAttention-3 is not installed (fa3_fwd_interface, flash_attn_interface)"
    for module, namespace in _BUILDS:
        try:
            importlib.import_module(module)
            operator = getattr(torch.ops, namespace).fwd.default
        except ModuleNotFoundError as error:
            if error.name != module:
                why = f"{module} cannot be imported: {error}"
            continue
        except Exception as error:  # a broken build may raise anything
            why = f"{module} cannot be imported: {type(error).__name__}: {error}"
            continue
        names = tuple(a.name for a in operator._schema.arguments)
        if names == _ARGUMENTS:
            return operator, None
        why = f"the forward of {module} has another signature"
    return None, why


@functools.cache
def has(feature: str, device: torch.device) -> bool:
    """Whether the installed build was compiled with a feature, "float16" or "window"."""
    operator, _ = _operator()
    dtype = torch.float16 if feature == "float16" else torch.bfloat16
    tensor = torch.zeros(1, 16, 1, 64, dtype=dtype, device=device)
    window = (4, 0) if feature == "window" else (-1, -1)
    try:
        _call(operator, (tensor, tensor, tensor), scale=0.125, causal=False, window=window)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


class FlashAttention3Backend(Backend):
    """FlashAttention-3 of the packages fa3-fwd or flash-attn-3, optional.

    Source: https://github.com/Dao-AILab/flash-attention/tree/main/hopper
    """

    name = "flash_attention_3"
    packages = ("fa3_fwd", "flash_attn_3")
    walks = "sequences"
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        head_dim_multiple=8,
        features=frozenset({"softcap"}),
        backward=False,
        # Compiled for Hopper GPUs alone.
        min_capability=(9, 0),
        max_capability=(9, 9),
    )

    def unavailable(self) -> str | None:
        return on_rocm() or _operator()[1]

    def remedy(self) -> str | None:
        return None if self.unavailable() is None else "pip install fa3-fwd"

    def handicap(self, device: torch.device) -> str | None:
        return None if self.unavailable() is not None else tails.handicap(device)

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if 0 in (call.batch, call.q_len, call.kv_len):
            reasons.append("takes no empty tensors")
        if call.device.type == "cuda" and self.unavailable() is None:
            asked = _asked_of_a_build(plan, call)
            reasons += [
                f"this build has no {words}" for f, words in asked if not has(f, call.device)
            ]
        return reasons

    def refusals_elsewhere(
        self,
        plan: Plan,
        call: Call,
        capability: tuple[int, int] | None,
        packages: Versions | None = None,
    ) -> list[str]:
        reasons = super().refusals_elsewhere(plan, call, capability, packages)
        if packages is not None and packages.fa3_fwd and not packages.flash_attn_3:
            asked = _asked_of_a_build(plan, call)
            reasons += [
                f"the build of fa3-fwd has no {words}" for f, words in asked if f in _LACKED
            ]
        return reasons

    def tile(self, plan: Plan, call: Call) -> tuple[int, int]:
        # Source: tile_size_fwd_sm90 in hopper/tile_size.h, should_pack_gqa in hopper/heuristics.h.
        windowed = plan.window_matters
        masked = plan.is_causal or windowed
        if call.head_dim <= 64:
            rows, columns = 192, 128 if masked else 192
        elif call.head_dim <= 96:
            rows, columns = 192, 128 if windowed else 144
        elif call.head_dim <= 128:
            rows, columns = 128, 128 if masked else 176
        else:
            rows, columns = 128, 64 if windowed else 80
        # The heads of a group share a tile where sequences may be of any length, or it is emptier
        # without.
        group = call.group_size
        sequences = _route(plan, call, in_place=True) in (Route.IN_PLACE, Route.PACKED)
        shared = sequences and not _heads_apart(plan, call)
        if shared or _filled(call.q_len, rows) < 0.9 * _filled(call.q_len * group, rows):
            rows = max(1, rows // group)
        return rows, columns

    def busiest(self, plan: Plan, call: Call, slots: int) -> float:
        return splitting.flash_3(Step.of(plan, call), slots)

    def bind(self, plan: Plan, call: Call) -> Runner:
        how = _route(plan, call, in_place=True)
        if how is Route.IN_PLACE and tails.unavailable(call.device) is not None:
            how = _route(plan, call, in_place=False)
        if how in (Route.DENSE, Route.KEY_BOUNDS):
            bounded = how is Route.KEY_BOUNDS
            return bind_dense(_dense(plan, call, bounded), plan, call)
        kernel = _varlen(plan, call, in_place=how is Route.IN_PLACE)
        return bind_varlen(kernel, how, plan, call, Told.KEYS_AND_QUERIES)


def _route(plan: Plan, call: Call, in_place: bool) -> Route:
    # It loads whole tiles, and multiplies what lies behind the last key by zero, which NaN
    # survives: nothing but the end of the tensor may lie there, or it is cleared first.
    key_bounds = plan.padding is Padding.LEFT and not (in_place and _left_out(plan, call))
    return route(plan, call, key_bounds=key_bounds, in_place=in_place, used_keys=in_place)


def _left_out(plan: Plan, call: Call) -> bool:
    """Whether left padding is faster left out than told by the first key of each row."""
    if call.q_len == 1 or not packs_queries(plan, call):
        return False
    if call.copies_keys or not call.token_major_queries:
        return False
    queries = plan.batch * plan.q_len
    padded = queries - plan.real_q >= _LEFT_OUT_SHARE * queries
    return padded and _keys_per_query(plan) >= _LEFT_OUT_KEYS


def _heads_apart(plan: Plan, call: Call) -> bool:
    """Whether sequences are faster if the heads of a group do not share tiles."""
    if call.head_dim > _APART_HEAD or call.group_size == 1 or call.q_len == 1:
        return False
    return _keys_per_query(plan) >= _APART_KEYS


def _keys_per_query(plan: Plan) -> float:
    return plan.attended_pairs(True) / max(1, plan.real_q)


def _filled(queries: int, rows: int) -> float:
    """The share of their tiles that queries fill."""
    return queries / (-(-queries // rows) * rows)


def _options(plan: Plan, call: Call) -> dict[str, Any]:
    # One query: only by splitting the keys do few rows fill the device.
    return asdict(Facts.of(plan, call)) | {"num_splits": 0 if call.q_len == 1 else 1}


def _dense(plan: Plan, call: Call, bounded: bool) -> DenseKernel:
    operator, options = _operator()[0], _options(plan, call)
    start = end = None
    if bounded:
        bounds = plan.key_bounds()
        start, end = bounds.start, bounds.end

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _call(operator, (q, k, v), used_k=end, leftpad_k=start, **options)

    return kernel


def _varlen(plan: Plan, call: Call, in_place: bool) -> VarlenKernel:
    operator, options = _operator()[0], _options(plan, call)
    pack_gqa = False if _heads_apart(plan, call) else None
    heads, dim = call.heads, call.value_head_dim

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
    ) -> torch.Tensor:
        v, output = unit_stride(v), None
        if in_place:
            # It writes what is used alone. Zeros by blocks of its own, for padding as sequences
            # without keys, took up to a tenth longer: ``benchmarks.flash_3``.
            output = torch.empty((layout.total_q, heads, dim), dtype=q.dtype, device=q.device)
            tails.clear(layout, v, output)
        return _call(
            operator,
            (q, k, v),
            output=output,
            cu_seqlens=(layout.cu_seqlens_q, layout.cu_seqlens_k),
            longest=(layout.max_seqlen_q, layout.max_seqlen_k),
            used_q=layout.used_q,
            used_k=layout.used_k,
            pack_gqa=pack_gqa,
            **options,
        )

    return kernel


def _call(
    operator: Any,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float = 0.0,
    num_splits: int = 1,
    output: torch.Tensor | None = None,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    longest: tuple[int | None, int | None] = (None, None),
    used_q: torch.Tensor | None = None,
    used_k: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    pack_gqa: bool | None = None,
) -> torch.Tensor:
    q, k, v = map(unit_stride, states)
    returned: torch.Tensor = operator(
        q,
        k,
        v,
        None,
        None,
        None,
        output,
        *cu_seqlens,
        None,
        used_q,
        used_k,
        *longest,
        None,
        None,
        leftpad_k,
        None,
        None,
        None,
        None,
        None,
        None,
        scale,
        causal,
        *window,
        0,
        softcap,
        False,
        None,
        num_splits,
        pack_gqa,
        0,
    )[0]
    return returned
