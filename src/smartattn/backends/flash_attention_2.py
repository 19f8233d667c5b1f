"""The flash-attn package: dense, by key bounds, in place or packed, whichever is exact."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

import torch

from ..call import Call, Runner
from ..layouts import VarlenLayout
from ..packing import VarlenKernel, varlen_refusals
from ..plan import Plan
from .base import HALF_PRECISION, Backend, Support
from .flash import (
    DenseKernel,
    Route,
    bind_dense,
    bind_varlen,
    flash_window,
    on_rocm,
    route,
    unit_stride,
)

#: The extension's functions and how many arguments they are known to take.
_KNOWN_SIGNATURES = {"fwd": 13, "varlen_fwd": 21, "fwd_kvcache": 20}


#: What is used of the package.
_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


@functools.cache
def _package() -> tuple[Any, str | None]:
    """(flash_attn, None), or (None, why it cannot be used)."""
    try:
        package = importlib.import_module("flash_attn")
    except Exception as error:  # a broken build may raise anything
        return None, f"flash-attn cannot be imported: {type(error).__name__}: {error}"
    # FlashAttention-4 installs itself into the same package, which has no version then.
    version = getattr(package, "__version__", "another package of its name")
    if not str(version).startswith("2."):
        return None, f"flash-attn 2 is needed, {version} is installed"
    missing = [name for name in _FUNCTIONS if not hasattr(package, name)]
    if missing:
        return None, f"flash-attn {version} has no {missing[0]}"
    return package, None


@functools.cache
def _extension() -> Any | None:
    """The compiled functions under the package's Python, if they have the known signatures.

    Calling them costs the host a quarter of what the package's own functions do, and they take the
    number of keys in use, which those do not pass on.
    """
    try:
        extension = importlib.import_module("flash_attn_2_cuda")
    except Exception:
        return None
    for name, count in _KNOWN_SIGNATURES.items():
        described = str(getattr(extension, name, None).__doc__ or "")
        if len(re.findall(r"\barg\d+:", described)) != count:
            return None
    return extension


@functools.cache
def _has_dropout(device: torch.device) -> bool:
    """Whether the installed build has dropout, which it can be compiled without."""
    package, _ = _package()
    tensor = torch.zeros(1, 16, 1, 64, dtype=torch.float16, device=device)
    # A layer that is checkpointed asks once, and must draw the same dropout when it runs again.
    with torch.random.fork_rng(devices=[device]):
        try:
            package.flash_attn_func(tensor, tensor, tensor, dropout_p=0.5)
        except torch.OutOfMemoryError:
            raise
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
        return on_rocm() or _package()[1]

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
        extension = None if call.grad or call.dropout else _extension()
        how = route(plan, call, key_bounds=True, in_place=extension is not None)
        if how is Route.KEY_BOUNDS:
            return _bind_key_bounds(plan, call)
        if how is Route.DENSE:
            return bind_dense(_dense(extension, plan, call), plan, call)
        return bind_varlen(_varlen(extension, plan, call), how, plan, call)


def _scale(call: Call) -> float:
    return float(call.head_dim**-0.5 if call.scaling is None else call.scaling)


def _options(plan: Plan, call: Call) -> dict[str, Any]:
    """The arguments that all public functions of the package take."""
    return {
        "softmax_scale": call.scaling,
        "causal": plan.is_causal and call.q_len > 1,
        "window_size": flash_window(plan),
        "softcap": call.softcap or 0.0,
    }


def _dense(extension: Any | None, plan: Plan, call: Call) -> DenseKernel:
    if extension is None:
        function = _package()[0].flash_attn_func
        options = _options(plan, call)
        options |= {"dropout_p": call.dropout, "deterministic": call.deterministic}

        def public(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            output = function(q, k, v, **options)
            assert isinstance(output, torch.Tensor)
            return output

        return public
    forward, scale, softcap = extension.fwd, _scale(call), float(call.softcap or 0.0)
    causal, (left, right) = plan.is_causal and call.q_len > 1, flash_window(plan)

    def thin(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        output: torch.Tensor = forward(
            q, k, v, None, None, 0.0, scale, causal, left, right, softcap, False, None
        )[0]
        return output

    return thin


def _varlen(extension: Any | None, plan: Plan, call: Call) -> VarlenKernel:
    if extension is None:
        function = _package()[0].flash_attn_varlen_func
        options = _options(plan, call)
        options |= {"dropout_p": call.dropout, "deterministic": call.deterministic}

        def public(
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
                **options,
            )
            assert isinstance(output, torch.Tensor)
            return output

        return public
    forward, scale, softcap = extension.varlen_fwd, _scale(call), float(call.softcap or 0.0)
    causal, (left, right) = plan.is_causal and call.q_len > 1, flash_window(plan)

    def thin(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
    ) -> torch.Tensor:
        output: torch.Tensor = forward(
            unit_stride(q),
            unit_stride(k),
            unit_stride(v),
            None,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.used_k,
            None,
            None,
            None,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            0.0,
            scale,
            False,
            causal,
            left,
            right,
            softcap,
            False,
            None,
        )[0]
        return output

    return thin


def _bind_key_bounds(plan: Plan, call: Call) -> Runner:
    """Through the kernel for caches, which reads keys from an offset to an end, of any strides."""
    extension, bounds = _extension(), plan.key_bounds()
    kernel: DenseKernel
    if extension is None:
        function = _package()[0].flash_attn_with_kvcache
        options = _options(plan, call)
        options |= {"cache_seqlens": bounds.end, "cache_leftpad": bounds.start}

        def public(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            output = function(q, k, v, **options)
            assert isinstance(output, torch.Tensor)
            return output

        kernel = public
    else:
        forward, scale, softcap = extension.fwd_kvcache, _scale(call), float(call.softcap or 0.0)
        causal, (left, right) = plan.is_causal and call.q_len > 1, flash_window(plan)
        start, end = bounds.start, bounds.end

        def thin(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = forward(
                unit_stride(q),
                unit_stride(k),
                unit_stride(v),
                None,
                None,
                end,
                None,
                None,
                None,
                start,
                None,
                None,
                None,
                scale,
                causal,
                left,
                right,
                softcap,
                True,
                0,
            )[0]
            return output

        kernel = thin
    return lambda query, key, value, _: kernel(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
