"""What the flash kernels have in common: how they read a batch, and their windows."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..call import Call, Runner
from ..packing import Told, VarlenKernel, bind_in_place, bind_packed, packs_queries
from ..plan import Padding, Plan

#: Dense attention over (batch, length, heads, head_dim) tensors.
DenseKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


#: Thread blocks of FlashAttention-2 that a multiprocessor runs at once. Source: the number that
#: ``set_params_splitkv`` in csrc/flash_attn/flash_api.cpp reckons with.
FLASH_2_BLOCKS = 2


def flash_2_tile(call: Call) -> tuple[int, int]:
    """(queries, keys) of a tile of FlashAttention-2 in a forward on an H100 or H200.

    The tiles of its backward are others, which tells no more of its time. Source:
    csrc/flash_attn/src/flash_fwd_launch_template.h of flash-attention.
    """
    if call.grad:
        return (128, 64)
    return (128, 128) if call.head_dim <= 64 else (128, 64) if call.head_dim <= 192 else (64, 64)


class Route(enum.Enum):
    """How the kernel gets at the real tokens."""

    #: The padded tensors as they are: there is no padding, or none that a real token sees.
    DENSE = "dense"
    #: The padded tensors, with the first and the last real key of each row.
    KEY_BOUNDS = "key bounds"
    #: The padded tensors as one row of sequences, with the padding between them skipped.
    IN_PLACE = "in place"
    #: Gathered, and scattered back.
    PACKED = "packed"


#: Right padding under a causal mask is skipped where rows have this many tokens of it on average:
#: about what the last tile of a sequence, which is partly empty, costs a kernel for sequences.
_SPARED_TOKENS = 192
#: Queries per row from which padding is left in place by kernels with a backward: its workspace has
#: room for another 128 tokens per sequence, and padding makes up to two more of each.
BACKWARD_QUERIES = 256
#: At this many keys, copying one key/value head, or one query head, takes as long as the attention
#: of one query head by the fastest of these kernels.
_COPIED_KEYS = 1024


def route(
    plan: Plan,
    call: Call,
    *,
    key_bounds: bool,
    in_place: bool,
    used_keys: bool = False,
    dense: bool = True,
) -> Route:
    """The cheapest exact way to read a batch that :func:`packing.varlen_refusals` lets through.

    Args:
        key_bounds, in_place, dense: whether the kernel has these ways, the first of which has no
            backward.
        used_keys: whether it takes the number of keys in use, which none with a backward does.
    """
    fallback = Route.PACKED
    if dense and runs_dense(plan, call):
        fallback = Route.DENSE
        if not (in_place and skipping_pays(plan, call)):
            return fallback
    sequences = plan.sequences
    if plan.is_packed or sequences is None or not sequences.contiguous:
        return fallback
    if key_bounds and not call.grad and not call.dropout and bounds_suffice(plan, call):
        return Route.KEY_BOUNDS
    # Otherwise keys as a cache concatenates them are copied, padding included, and gradients too.
    long = call.token_major_keys and plan.q_len >= BACKWARD_QUERIES
    return Route.IN_PLACE if in_place and (used_keys or long) else fallback


def skipping_pays(plan: Plan, call: Call) -> bool:
    """Whether a kernel for sequences beats the dense one, which computes the padding as well."""
    if not plan.is_padded or (call.grad and plan.q_len < BACKWARD_QUERIES):
        return False
    needed: float = _SPARED_TOKENS
    if call.copies_keys:
        # The empty part of a static cache would be copied too.
        if call.grad or plan.visible < plan.kv_len:
            return False
        needed += _COPIED_KEYS * call.kv_heads / call.heads
    if not call.token_major_queries:
        needed += _COPIED_KEYS
    return plan.batch * plan.q_len - plan.real_q >= needed * plan.batch


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


def bounds_suffice(plan: Plan, call: Call) -> bool:
    """Whether a first and a last key per row say all, and no more queries run than have to.

    Kernels align a causal mask (and a window) at the last key of a row, so that the real keys of
    every row must end where the queries end. Queries before the first key then see nothing and
    cost nothing; without a causal mask every query of a row is computed.
    """
    if plan.is_causal and (call.q_len > 1 or plan.window_matters):
        return plan.padding is Padding.LEFT
    return not packs_queries(plan, call)


def flash_window(plan: Plan) -> tuple[int, int]:
    """(left, right) as flash kernels take it; -1 is no bound."""
    if not plan.window_matters:
        return (-1, -1)
    assert plan.window is not None
    return (plan.window - 1, 0) if plan.is_causal else (plan.window, plan.window)


@dataclass(frozen=True, slots=True)
class Facts:
    """What all flash kernels are told, in the form of their compiled functions."""

    scale: float
    causal: bool
    #: (left, right), -1 is no bound.
    window: tuple[int, int]
    softcap: float

    @classmethod
    def of(cls, plan: Plan, call: Call) -> Facts:
        """The facts of one call."""
        return cls(
            scale=float(call.head_dim**-0.5 if call.scaling is None else call.scaling),
            causal=plan.is_causal and call.q_len > 1,
            window=flash_window(plan),
            softcap=float(call.softcap or 0.0),
        )


def bind_dense(kernel: DenseKernel, plan: Plan, call: Call) -> Runner:
    """A runner that hands the padded tensors to a kernel of (batch, length, heads, dim) tensors."""
    if plan.visible < call.kv_len:
        # The rest of a static cache is empty.
        visible = slice(plan.visible)
        return lambda query, key, value, _: kernel(
            query.transpose(1, 2),
            key[:, :, visible].transpose(1, 2),
            value[:, :, visible].transpose(1, 2),
        )
    return bind_whole(kernel)


def bind_whole(kernel: DenseKernel) -> Runner:
    """A runner that hands all of the tensors to such a kernel."""
    return lambda query, key, value, _: kernel(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )


def bind_varlen(
    kernel: VarlenKernel,
    how: Route,
    plan: Plan,
    call: Call,
    told: Told = Told.BOUNDS,
) -> Runner:
    """A runner that hands sequences of (tokens, heads, dim) to a kernel, in place or packed.

    ``told`` says what the kernel is told in place.
    """
    if how is Route.IN_PLACE:
        return bind_in_place(kernel, plan, call, told)
    return bind_packed(kernel, plan, call)


def on_rocm() -> str | None:
    """Why no flash kernel is used on AMD's GPUs, None elsewhere.

    Their builds have the same signatures, and ignore offsets, used lengths and softcap without a
    word.
    """
    return "untested on ROCm, where its kernels ignore arguments" if torch.version.hip else None


def unit_stride(states: torch.Tensor) -> torch.Tensor:
    """The same tensor with its last dimension dense, which every flash kernel needs."""
    # The tuple of all strides is cheaper than asking for one.
    return states if states.stride()[-1] == 1 else states.contiguous()
