"""FlashAttention-4, forward and backward on Hopper GPUs, whose kernels are built on first use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Hashable
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

import torch

from .. import tails
from ..call import Call, Runner
from ..layouts import VarlenLayout
from ..machine import one_line, versions
from ..packing import Told, VarlenKernel, varlen_refusals
from ..plan import Plan
from .base import HALF_PRECISION, Backend, Support
from .flash import DenseKernel, Facts, Route, bind_dense, bind_varlen, on_rocm, route, unit_stride

_MODULE = "flash_attn.cute"
#: The package that compiles its kernels, with errors of its own.
_COMPILER = "cutlass"
#: What is handed to both of its functions, and to the one for sequences beyond that.
_OPTIONS = frozenset(
    {"softmax_scale", "causal", "window_size", "softcap", "num_splits", "deterministic"}
)
_SEQUENCES = frozenset({"cu_seqlens_q", "cu_seqlens_k", "seqused_k"})
#: More sequences than these are looked up by kernels of their own. Source: BIN_BATCH_SEARCH_THRESH
#: in flash_attn/cute/interface.py, as of all that follows.
_MANY_SEQUENCES = 256


class Functions(NamedTuple):
    """The functions of the package."""

    dense: Callable[..., Any]
    varlen: Callable[..., Any]


@functools.cache
def _missing() -> str | None:
    """Why the package cannot be there, without importing it, which takes seconds."""
    there = sys.modules.get(_MODULE) is not None
    if _MODULE not in sys.modules:
        try:
            # It shares a folder with flash-attn 2, which need not be imported for this either.
            around = importlib.util.find_spec("flash_attn")
            folders = None if around is None else around.submodule_search_locations
            there = folders is not None and PathFinder.find_spec(_MODULE, folders) is not None
        except Exception:  # whatever stands in the place of flash_attn may have no spec
            there = False
    return None if there else f"flash-attn-4 is not installed ({_MODULE})"


@functools.cache
def _functions() -> tuple[Functions | None, str | None]:
    """(the functions, None), or (None, why they cannot be used)."""
    if (reason := _missing()) is not None:
        return None, reason
    try:
        module = importlib.import_module(_MODULE)
        found = Functions(module.flash_attn_func, module.flash_attn_varlen_func)
        known = _takes(found.dense, _OPTIONS) and _takes(found.varlen, _OPTIONS | _SEQUENCES)
    except Exception as error:  # a broken build may raise anything
        if versions("cuda").flash_attn_4 is None:
            # flash-attn 2 brings an early version of the same module along.
            return None, f"flash-attn-4 is not installed: the {_MODULE} here came with flash-attn 2"
        return None, f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    return (found, None) if known else (None, f"{_MODULE} has other signatures than are known")


def _takes(function: Callable[..., Any], names: frozenset[str]) -> bool:
    """Whether a function takes query, key, value and these by name, and needs nothing else."""
    parameters = inspect.signature(function).parameters
    needed = [name for name, one in parameters.items() if one.default is inspect.Parameter.empty]
    return list(parameters)[:3] == needed == ["q", "k", "v"] and names <= parameters.keys()


class FlashAttention4Backend(Backend):
    """FlashAttention-4 of the package flash-attn-4, optional.

    Source: https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute
    """

    name = "flash_attention_4"
    packages = ("flash_attn_4",)
    walks = "sequences"
    support = Support(
        devices=frozenset({"cuda"}),
        dtypes=HALF_PRECISION,
        max_head_dim=256,
        # Its backward for these GPUs sums gradients in tiles of a multiple of 16 dimensions, and
        # reads the sums in tiles of a multiple of 32.
        head_dim_multiple=32,
        features=frozenset({"softcap"}),
        # Those it was tried on; it has other kernels for newer ones.
        min_capability=(9, 0),
        max_capability=(9, 9),
    )

    def unavailable(self) -> str | None:
        return on_rocm() or _functions()[1]

    def remedy(self) -> str | None:
        reason = self.unavailable()
        if reason is None:
            return None
        install = "pip install --pre flash-attn-4"
        if versions("cuda").flash_attn_4 is not None and "ModuleNotFoundError" not in reason:
            # flash-attn 2 may have written over its files, which pip would not look at.
            install += " --force-reinstall --no-deps"
        return install

    def handicap(self, device: torch.device) -> str | None:
        return None if self.unavailable() is not None else tails.handicap(device)

    def refusals(self, plan: Plan, call: Call) -> list[str]:
        if (reason := on_rocm() or _missing()) is None:
            elsewhere = self.refusals_elsewhere(plan, call, None)
            # Who cannot run a call need not be imported.
            return elsewhere or super().refusals(plan, call)
        return [reason, *self.refusals_elsewhere(plan, call, None)]

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        reasons = varlen_refusals(plan, call)
        if 0 in (call.batch, call.q_len, call.kv_len):
            reasons.append("takes no empty tensors")
        if call.grad and call.deterministic:
            reasons.append("its deterministic backward is untested")
        return reasons

    def set_aside(self, plan: Plan, call: Call) -> str | None:
        if call.q_len == 1 and not plan.is_packed:
            # On these GPUs, whose kernel has no split keys.
            return "reads all keys of a single query in one thread block"
        return super().set_aside(plan, call)

    def tile(self, plan: Plan, call: Call) -> tuple[int, int]:
        rows, columns = _tile(plan, call)
        # The heads of a group share a tile.
        return max(1, rows // call.group_size), columns

    def built_for(self, plan: Plan, call: Call) -> Hashable:
        # The compile keys of its forward and backward, as far as a call decides them. Bounds of
        # the lengths are part of them, and are therefore not handed over.
        how = _route(plan, call)
        sequences = 0 if plan.sequences is None else len(plan.sequences)
        if how is Route.DENSE:
            sequences, queries, keys = 0, call.q_len, plan.visible
        else:
            queries, keys = plan.real_q, plan.real_k
            sequences = 2 * sequences + 1 if how is Route.IN_PLACE else sequences
        masked = plan.is_causal and call.q_len > 1, plan.window_matters
        rows, _ = _tile(plan, call)
        # What fits in one tile, of the forward and of the backward.
        one = how is Route.DENSE and any(masked) and queries * call.group_size <= rows
        small = call.grad and (
            queries <= _backward_rows(call, masked),
            keys <= _backward_keys(call),
        )
        return (
            *(call.dtype, call.head_dim, call.group_size, call.softcap, call.grad),
            *(how, *masked, one, small, sequences > _MANY_SEQUENCES),
        )

    def bind(self, plan: Plan, call: Call) -> Runner:
        how = _route(plan, call)
        if how is Route.IN_PLACE and tails.unavailable(call.device) is not None:
            how = _route(plan, call, in_place=False)
        if how is Route.DENSE:
            return bind_dense(_dense(plan, call), plan, call)
        kernel = _varlen(plan, call, clear=how is Route.IN_PLACE)
        return bind_varlen(kernel, how, plan, call, Told.KEYS)


def _route(plan: Plan, call: Call, in_place: bool = True) -> Route:
    # Like FlashAttention-3 it loads whole tiles and multiplies what is masked by zero, so that
    # padding which is read in place has to be cleared. Its backward does so with the queries, too,
    # and their gradients: there the padding is left out.
    in_place = in_place and not call.grad
    return route(plan, call, key_bounds=False, in_place=in_place, used_keys=in_place)


def _tile(plan: Plan, call: Call) -> tuple[int, int]:
    """(rows, keys) of a tile of the forward; rows are queries times heads of a group.

    Source: ``_tile_size_fwd_sm90``.
    """
    windowed = plan.window_matters
    masked = plan.is_causal or windowed
    if call.head_dim <= 64:
        return 192, 128
    if call.head_dim <= 96:
        return 192, 128 if masked else 144
    if call.head_dim <= 128:
        return 128, 128
    if call.head_dim <= 192:
        return 128, 96 if windowed else 112
    return 128, 64 if windowed else 80


def _backward_rows(call: Call, masked: tuple[bool, bool]) -> int:
    """Queries of a tile of the backward. Source: ``_tile_size_bwd_sm90``."""
    if call.head_dim <= 64:
        return 128
    return 80 if 96 < call.head_dim <= 128 and not any(masked) else 64


def _backward_keys(call: Call) -> int:
    """Keys of a tile of the backward."""
    return 128 if call.head_dim <= 128 else 96 if call.head_dim <= 192 else 48


def _options(plan: Plan, call: Call) -> dict[str, Any]:
    facts = Facts.of(plan, call)
    return {
        "softmax_scale": facts.scale,
        "causal": facts.causal,
        "window_size": facts.window if plan.window_matters else (None, None),
        "softcap": facts.softcap,
        "num_splits": 1,
        "deterministic": False,
    }


def _dense(plan: Plan, call: Call) -> DenseKernel:
    functions, _ = _functions()
    assert functions is not None
    function, options = functions.dense, _options(plan, call)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _output(function, q, k, v, options)

    return kernel


def _varlen(plan: Plan, call: Call, clear: bool) -> VarlenKernel:
    functions, _ = _functions()
    assert functions is not None
    function, options = functions.varlen, _options(plan, call)

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout
    ) -> torch.Tensor:
        v = unit_stride(v)
        if clear:
            tails.clear(layout, v)
        sequences = {
            "cu_seqlens_q": layout.cu_seqlens_q,
            "cu_seqlens_k": layout.cu_seqlens_k,
            "seqused_k": layout.used_k,
        }
        return _output(function, q, k, v, options | sequences)

    return kernel


def _output(
    function: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """The output alone; the functions return (output, log of the sums) or the former."""
    states = [unit_stride(one) for one in (q, k, v)]
    if not torch.is_grad_enabled():
        # It would keep what a backward needs, and build other kernels for that.
        states = [one.detach() if one.requires_grad else one for one in states]
    other = q.device.type == "cuda" and torch.cuda.current_device() != q.device.index
    # It asks the current device what to build for.
    with torch.cuda.device(q.device) if other else contextlib.nullcontext():
        try:
            returned = function(*states, **options)
        except Exception as error:
            if isinstance(error, AssertionError) or type(error).__module__.startswith(_COMPILER):
                # The host's own, before anything is launched: another backend may take the call.
                said = one_line(f"{type(error).__name__}: {error}")
                raise NotImplementedError(f"flash-attn-4 has no kernel for it: {said}") from error
            raise
    output: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
    return output
