"""The flash-attn package: dense, by key bounds, in place or packed, whichever is exact."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

import torch

from ..call import Call, Runner
from ..layouts import VarlenLayout
from ..machine import processors
from ..packing import Told, varlen_refusals
from ..plan import Plan
from . import splitting
from .base import HALF_PRECISION, Backend, Support
from .flash import (
    FLASH_2_BLOCKS,
    Facts,
    Route,
    bind_dense,
    bind_varlen,
    flash_2_tile,
    on_rocm,
    route,
    unit_stride,
)
from .splitting import Step

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
    packages = ("flash_attn",)
    walks = "sequences"
    blocks_per_processor = FLASH_2_BLOCKS
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

    def tile(self, plan: Plan, call: Call) -> tuple[int, int]:
        return flash_2_tile(call)

    def busiest(self, plan: Plan, call: Call, slots: int) -> float:
        return splitting.flash_2(Step.of(plan, call), slots)

    def bind(self, plan: Plan, call: Call) -> Runner:
        if not call.grad and not call.dropout and _extension() is not None:
            return _bind_thin(_extension(), plan, call)
        return _bind_public(_package()[0], plan, call)


def _parts(plan: Plan, call: Call) -> int:
    """``num_splits`` of a decoding step; 0 lets the kernel choose."""
    if call.q_len > 1 or plan.sequences is None or not (count := processors(call.device)):
        return 0
    return splitting.flash_2_parts(Step.of(plan, call), FLASH_2_BLOCKS * count)


def _bind_public(package: Any, plan: Plan, call: Call) -> Runner:
    """Through the package's own functions, which have a backward and dropout."""
    facts = Facts.of(plan, call)
    options = {
        "softmax_scale": facts.scale,
        "causal": facts.causal,
        "window_size": facts.window,
        "softcap": facts.softcap,
    }
    how = route(plan, call, key_bounds=True, in_place=True)
    if how is Route.KEY_BOUNDS:
        bounds = plan.key_bounds()
        options |= {"cache_seqlens": bounds.end, "cache_leftpad": bounds.start}
        options["num_splits"] = _parts(plan, call)
        return bind_dense(functools.partial(package.flash_attn_with_kvcache, **options), plan, call)
    options |= {"dropout_p": call.dropout, "deterministic": call.deterministic}
    if how is Route.DENSE:
        return bind_dense(functools.partial(package.flash_attn_func, **options), plan, call)
    function = package.flash_attn_varlen_func

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
            **options,
        )
        assert isinstance(output, torch.Tensor)
        return output

    return bind_varlen(kernel, how, plan, call)


def _bind_thin(extension: Any, plan: Plan, call: Call) -> Runner:
    """Through the compiled functions, for a forward alone."""
    facts = Facts.of(plan, call)
    scale, causal, (left, right), softcap = facts.scale, facts.causal, facts.window, facts.softcap
    how = route(plan, call, key_bounds=True, in_place=True, used_keys=True)
    direct = how is Route.KEY_BOUNDS or (how is Route.DENSE and not plan.is_padded)
    parts = _parts(plan, call) if direct else 0
    if how is Route.KEY_BOUNDS or parts:
        fwd_kvcache = extension.fwd_kvcache
        start = end = None
        if how is Route.KEY_BOUNDS:
            bounds = plan.key_bounds()
            start, end = bounds.start, bounds.end

        def bounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = fwd_kvcache(
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
                parts,
            )[0]
            return output

        return bind_dense(bounded, plan, call)
    if how is Route.DENSE:
        fwd = extension.fwd

        def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
            output: torch.Tensor = fwd(
                q, k, v, None, None, 0.0, scale, causal, left, right, softcap, False, None
            )[0]
            return output

        return bind_dense(dense, plan, call)
    varlen_fwd = extension.varlen_fwd

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
    ) -> torch.Tensor:
        output: torch.Tensor = varlen_fwd(
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

    return bind_varlen(varlen, how, plan, call, Told.KEYS)
