"""FlashAttention-2's variable-length kernel that ships in torch (``torch.nn.attention.varlen``)."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch

from ..call import Call, Runner
from ..packing import bind_packed, varlen_refusals
from ..plan import Plan, VarlenLayout
from .base import HALF_PRECISION, Backend, Support
from .flash_attention_2 import flash_window


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


class TorchVarlenBackend(Backend):
    """``torch.nn.attention.varlen.varlen_attn``: no package beside torch is needed.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """

    name = "torch_varlen"
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=HALF_PRECISION,
        max_head_dim=256,
        head_dim_multiple=8,
        min_capability=(8, 0),
    )

    def unavailable(self) -> str | None:
        return _varlen_attn()[2]

    def remedy(self) -> str | None:
        return None if self.unavailable() is None else "pip install --upgrade 'torch>=2.11'"

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if not plan.is_padded and not plan.is_packed:
            reasons.append("no padding to remove")
        if call.grad and call.deterministic:
            reasons.append("its backward is not deterministic")
        return reasons

    def bind(self, plan: Plan, call: Call) -> Runner:
        function, parameters, _ = _varlen_attn()
        # torch 2.11 takes grouped heads as they come; later versions want to be told.
        grouped = call.group_size > 1 and "enable_gqa" in parameters
        options = {"enable_gqa": True} if grouped else {}
        window = flash_window(plan)
        if plan.is_causal and call.q_len > 1:
            window = (window[0], 0)

        def kernel(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
        ) -> torch.Tensor:
            packed = function(
                q,
                k,
                v,
                layout.cu_seqlens_q,
                layout.cu_seqlens_k,
                layout.max_seqlen_q,
                layout.max_seqlen_k,
                scale=call.scaling,
                window_size=window,
                **options,
            )
            assert isinstance(packed, torch.Tensor)
            return packed

        return bind_packed(kernel, plan, call)
