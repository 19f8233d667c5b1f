"""The flash-attn package: dense where nothing is padded, variable-length where something is."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch

from ..call import Call, Runner
from ..packing import bind_packed, varlen_refusals
from ..plan import Padding, Plan, VarlenLayout
from .base import HALF_PRECISION, Backend, Support


@functools.cache
def _package() -> tuple[Any, str | None]:
    """(flash_attn, None), or (None, why it cannot be used)."""
    try:
        package = importlib.import_module("flash_attn")
    except Exception as error:  # a broken build may raise anything
        return None, f"flash-attn cannot be imported: {type(error).__name__}: {error}"
    if not str(package.__version__).startswith("2."):
        return None, f"flash-attn 2 is needed, {package.__version__} is installed"
    return package, None


@functools.cache
def _has_dropout(device: torch.device) -> bool:
    """Whether the installed build has dropout, which it can be compiled without."""
    package, _ = _package()
    tensor = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device=device)
    try:
        package.flash_attn_func(tensor, tensor, tensor, dropout_p=0.5)
    except RuntimeError:
        return False
    return True


class FlashAttention2Backend(Backend):
    """FlashAttention-2 of the package flash-attn, optional.

    Source: https://github.com/Dao-AILab/flash-attention
    """

    name = "flash_attention_2"
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=HALF_PRECISION,
        max_head_dim=256,
        head_dim_multiple=8,
        features=frozenset({"softcap", "dropout"}),
        min_capability=(8, 0),
    )

    def unavailable(self) -> str | None:
        return _package()[1]

    def remedy(self) -> str | None:
        reason = self.unavailable()
        if reason is None:
            return None
        install = "pip install --no-build-isolation 'flash-attn>=2.8,<3'"
        if "cannot be imported" in reason and "No module named 'flash_attn'" not in reason:
            # Built for another torch or CUDA; pip would take the same build from its cache.
            install += " --force-reinstall --no-deps --no-cache-dir"
        return install

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if 0 in (call.batch, call.q_len, call.kv_len):
            reasons.append("takes no empty tensors")
        usable = call.device.type == "cuda" and self.unavailable() is None
        if call.dropout and usable and not _has_dropout(call.device):
            reasons.append("this build of flash-attn has no dropout")
        return reasons

    def bind(self, plan: Plan, call: Call) -> Runner:
        package, _ = _package()
        options = {
            "dropout_p": call.dropout,
            "softmax_scale": call.scaling,
            "causal": plan.is_causal and call.q_len > 1,
            "window_size": flash_window(plan),
            "softcap": call.softcap or 0.0,
            "deterministic": call.deterministic,
        }
        if runs_dense(plan, call):
            dense = package.flash_attn_func
            # The rest of a static cache is empty.
            keys = slice(plan.visible) if plan.visible < call.kv_len else None

            def run(
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                arguments: Mapping[str, Any],
            ) -> torch.Tensor:
                if keys is not None:
                    key, value = key[:, :, keys], value[:, :, keys]
                output = dense(
                    query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options
                )
                assert isinstance(output, torch.Tensor)
                return output

            return run

        def kernel(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
        ) -> torch.Tensor:
            packed = package.flash_attn_varlen_func(
                q,
                k,
                v,
                layout.cu_seqlens_q,
                layout.cu_seqlens_k,
                layout.max_seqlen_q,
                layout.max_seqlen_k,
                **options,
            )
            assert isinstance(packed, torch.Tensor)
            return packed

        return bind_packed(kernel, plan, call)


def runs_dense(plan: Plan, call: Call) -> bool:
    """Whether the dense kernel, which aligns its masks at the lower right, is exact."""
    if plan.is_packed:
        return False
    if not plan.is_padded:
        return True
    # Right padding under a causal mask: real tokens never see what comes after them.
    return (
        plan.is_causal
        and plan.padding is Padding.RIGHT
        and plan.is_aligned
        and not call.keep_padding_output
    )


def flash_window(plan: Plan) -> tuple[int, int]:
    """(left, right) as flash kernels take it; -1 is no bound."""
    if not plan.window_matters:
        return (-1, -1)
    assert plan.window is not None
    return (plan.window - 1, 0) if plan.is_causal else (plan.window, plan.window)
