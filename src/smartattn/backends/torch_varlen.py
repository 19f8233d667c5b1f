"""FlashAttention-2's kernels that ship in torch, reached without SDPA."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..call import Call, Runner
from ..layouts import VarlenLayout
from ..packing import Told, VarlenKernel, varlen_refusals
from ..plan import Plan
from .base import HALF_PRECISION, Backend, Support
from .flash import (
    FLASH_2_BLOCKS,
    DenseKernel,
    Facts,
    Route,
    bind_dense,
    bind_varlen,
    flash_2_tile,
    on_rocm,
    route,
    unit_stride,
)


@functools.cache
def _varlen_attn() -> tuple[Any, frozenset[str], str | None]:
    """(function, its parameters, None), or (None, nothing, why it cannot be used)."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        return None, frozenset(), f"this torch has no varlen_attn: {error}"
    parameters = frozenset(inspect.signature(function).parameters)
    if not {"scale", "window_size"} <= parameters:
        return None, frozenset(), f"varlen_attn of torch {torch.__version__} has another signature"
    return function, parameters, None


#: The arguments of the operator under varlen_attn that are used here, in their order.
_POSITIONAL = (
    "query",
    "key",
    "value",
    "cum_seq_q",
    "cum_seq_k",
    "max_q",
    "max_k",
    "dropout_p",
    "is_causal",
    "return_debug_mask",
)
_KEYWORDS = frozenset({"scale", "window_size_left", "window_size_right", "seqused_k"})


@functools.cache
def _operator() -> Any | None:
    """torch's operator for these kernels, if it has the known arguments.

    varlen_attn costs the host several times as much, and has no dense call.
    """
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None:
        return None
    arguments = operator.default._schema.arguments
    positional = tuple(a.name for a in arguments if not a.kwarg_only)
    keywords = {a.name for a in arguments if a.kwarg_only}
    known = positional == _POSITIONAL and keywords >= _KEYWORDS
    return operator.default if known else None


#: The arguments of SDPA's own entry to the dense kernel that are used here.
_DENSE_ARGUMENTS = (
    *("query", "key", "value", "dropout_p", "is_causal", "return_debug_mask"),
    "scale",
)


@functools.cache
def _dense_operator() -> Any | None:
    """SDPA's own entry to the dense kernel, if it has the known arguments.

    It takes the tensors as Transformers hands them over, which saves the host three views. It knows
    no window.
    """
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
    if operator is None:
        return None
    names = tuple(a.name for a in operator.default._schema.arguments)
    return operator.default if names == _DENSE_ARGUMENTS else None


def _replaced() -> str | None:
    """The kernels that a user has put in the place of these.

    What they read of padding, or refuse, is theirs.
    """
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


class TorchVarlenBackend(Backend):
    """The kernels of ``torch.nn.attention.varlen``: no package beside torch is needed.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """

    name = "torch_varlen"
    walks = "sequences"
    blocks_per_processor = FLASH_2_BLOCKS
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=HALF_PRECISION,
        max_head_dim=256,
        head_dim_multiple=8,
        min_capability=(8, 0),
    )

    def unavailable(self) -> str | None:
        return on_rocm() or _varlen_attn()[2]

    def remedy(self) -> str | None:
        return None if self.unavailable() is None else "pip install --upgrade 'torch>=2.11'"

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if call.device.type == "cuda" and (other := _replaced()) is not None:
            reasons.append(f"its kernels are replaced by {other} in this process")
        if 0 in (call.batch, call.q_len, call.kv_len):
            reasons.append("takes no empty tensors")
        if (call.grad or _operator() is None) and not plan.is_padded and not plan.is_packed:
            reasons.append("no padding to remove")
        if call.grad and call.deterministic:
            reasons.append("its backward is not deterministic")
        return reasons

    def tile(self, plan: Plan, call: Call) -> tuple[int, int]:
        return flash_2_tile(call)

    def bind(self, plan: Plan, call: Call) -> Runner:
        operator = None if call.grad else _operator()
        thin = operator is not None
        how = route(plan, call, key_bounds=False, in_place=True, used_keys=thin, dense=thin)
        facts = Facts.of(plan, call)
        if how is Route.DENSE:
            whole = facts.window == (-1, -1) and plan.visible == call.kv_len
            if whole and (dense := _dense_operator()) is not None:
                return _bind_whole(dense, facts)
            return bind_dense(_dense(operator, facts), plan, call)
        kernel = _varlen(operator, facts) if thin else _public(facts, call)
        return bind_varlen(kernel, how, plan, call, Told.KEYS if thin else Told.BOUNDS)


def _options(facts: Facts) -> dict[str, Any]:
    left, right = facts.window
    return {"scale": facts.scale, "window_size_left": left, "window_size_right": right}


def _dense(operator: Any, facts: Facts) -> DenseKernel:
    causal, options = facts.causal, _options(facts)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = operator(
            unit_stride(q),
            unit_stride(k),
            unit_stride(v),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            False,
            **options,
        )[0]
        return output

    return kernel


def _bind_whole(operator: Any, facts: Facts) -> Runner:
    scale, causal = facts.scale, facts.causal

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        output: torch.Tensor = operator(
            unit_stride(query),
            unit_stride(key),
            unit_stride(value),
            0.0,
            causal,
            False,
            scale=scale,
        )[0]
        return output.transpose(1, 2)

    return run


def _varlen(operator: Any, facts: Facts) -> VarlenKernel:
    causal, options = facts.causal, _options(facts)

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
    ) -> torch.Tensor:
        output: torch.Tensor = operator(
            unit_stride(q),
            unit_stride(k),
            unit_stride(v),
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            0.0,
            causal,
            False,
            seqused_k=layout.used_k,
            **options,
        )[0]
        return output

    return kernel


def _public(facts: Facts, call: Call) -> VarlenKernel:
    function, parameters, _ = _varlen_attn()
    # torch 2.11 takes grouped heads as they come; later versions want to be told.
    grouped = call.group_size > 1 and "enable_gqa" in parameters
    options = {"enable_gqa": True} if grouped else {}
    window = (facts.window[0], 0) if facts.causal else facts.window

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
    ) -> torch.Tensor:
        output = function(
            q,
            k,
            v,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            scale=facts.scale,
            window_size=window,
            **options,
        )
        assert isinstance(output, torch.Tensor)
        return output

    return kernel
