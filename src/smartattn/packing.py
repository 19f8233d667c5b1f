"""Padded to packed and back: gathers and scatters real tokens by index."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from . import moves
from .call import Call, Runner
from .layouts import VarlenLayout
from .plan import Padding, Plan

#: A variable-length kernel: packed (total_q, heads, head_dim) queries, (total_k, kv_heads, ...)
#: keys and values to packed outputs (total_q, heads, value_head_dim).
VarlenKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenLayout], torch.Tensor]


def gather(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Packs the tokens of a (batch, heads, length, dim) tensor as (total, heads, dim).

    Args:
        index: (total,) places in the flattened (batch * length) tokens; None takes all in order.
    """
    batch, heads, length, dim = states.shape
    tokens = states.transpose(1, 2)
    if index is None:
        return tokens.reshape(batch * length, heads, dim)
    if states.requires_grad:
        gathered = _Gather.apply(tokens, index)  # type: ignore[no-untyped-call]
        assert isinstance(gathered, torch.Tensor)
        return gathered
    return _gathered(tokens, index)


def _gathered(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    batch, length, heads, dim = tokens.shape
    if tokens.is_contiguous():
        return tokens.view(batch * length, heads, dim).index_select(0, index)
    # Layouts that do not flatten, such as a concatenated cache: no copy of the padding.
    if not recorded(tokens):
        packed = tokens.new_empty(len(index), heads, dim)
        if moves.moved(tokens, index, packed.unsqueeze(0)):
            return packed
    return tokens[index // length, index % length]


class _Gather(torch.autograd.Function):
    """Tokens are taken once each, so that their gradients are put back instead of added up."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.shape = tokens.shape
        return _gathered(tokens, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        batch, length = ctx.shape[:2]
        return scatter(grad, index, batch, length), None


def scatter(
    packed: torch.Tensor,
    index: torch.Tensor | None,
    batch: int,
    length: int,
    sources: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts (total, heads, dim) tokens back as (batch, length, heads, dim), zeros elsewhere.

    Args:
        sources: those of ``index``, see :func:`moves.sources`, where they are known.
    """
    heads, dim = packed.shape[1:]
    if index is None:
        return packed.view(batch, length, heads, dim)
    if sources is not None and not recorded(packed):
        padded = packed.new_empty(batch, length, heads, dim)
        if moves.moved(packed.unsqueeze(0), sources, padded):
            return padded
    padded = packed.new_zeros(batch * length, heads, dim)
    return padded.index_copy_(0, index, packed).view(batch, length, heads, dim)


def recorded(states: torch.Tensor) -> bool:
    """Whether what is done to a tensor is recorded for a gradient, or may carry one forward."""
    return (states.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def packs_queries(plan: Plan, call: Call) -> bool:
    """Whether padding may be dropped from the queries too, not from the keys alone."""
    if plan.q_len == 1 and not plan.is_packed:
        return False
    return plan.is_causal or plan.is_packed or call.self_attention


def bind_packed(kernel: VarlenKernel, plan: Plan, call: Call) -> Runner:
    """A runner that sends the real tokens of a padded or packed batch through a kernel.

    It returns (batch, q_len, heads, value_head_dim) with zeros at padding positions.
    """
    layout = plan.varlen(packs_queries(plan, call))
    index, sources = layout.q_index, None
    if index is not None and not call.grad and moves.unavailable(call.device) is None:
        sources = plan.sources(packs_queries(plan, call))

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        packed = kernel(
            gather(query, index),
            gather(key, layout.k_index),
            gather(value, layout.k_index),
            layout,
        )
        return scatter(packed, index, call.batch, call.q_len, sources)

    return run


class Told(enum.Enum):
    """What a kernel for sequences is told beside where each of them begins."""

    #: Nothing: a sequence ends where the next one begins.
    BOUNDS = "bounds"
    #: How many keys of each are in use. Keys and values may overlap then: tokens of one head lie
    #: where those of another are counted.
    KEYS = "keys"
    #: And how many queries; it clears the outputs of the others.
    KEYS_AND_QUERIES = "keys and queries"


def bind_in_place(kernel: VarlenKernel, plan: Plan, call: Call, told: Told = Told.BOUNDS) -> Runner:
    """A runner that sends the padded tensors through a kernel which skips what lies between.

    Tensors whose rows lie otherwise than ``call.key_pitch`` says are copied, padding included. It
    returns (batch, q_len, heads, value_head_dim) with zeros at padding positions.
    """
    pitch = call.kv_len if told is Told.BOUNDS else _bound_pitch(call)
    packs = packs_queries(plan, call)
    if told is Told.KEYS_AND_QUERIES:
        layout = plan.used(packs, pitch)
    else:
        layout = plan.in_place(packs, told is Told.KEYS, pitch)
    q_len = call.q_len
    shape = (call.batch, q_len, call.heads, call.value_head_dim)
    if call.grad:
        return lambda query, key, value, _: kernel(
            _flattened(query), _flattened(key), _flattened(value), layout
        ).view(shape)
    return lambda query, key, value, _: kernel(
        _in_a_row(query, q_len), _in_a_row(key, pitch), _in_a_row(value, pitch), layout
    ).view(shape)


def _bound_pitch(call: Call) -> int:
    if call.key_pitch is not None:
        return call.key_pitch or call.kv_len
    return call.kv_len * (1 if call.token_major_keys else call.kv_heads)


#: Places of tokens are counted in 32 bits.
_MOST_TOKENS = 2**31


def where_keys_lie(key: torch.Tensor, value: torch.Tensor) -> tuple[bool, int]:
    """(``token_major_keys``, ``key_pitch``) of a :class:`~smartattn.call.Call` with these tensors.

    Args:
        key, value: (batch, kv_heads, kv_len, dim).
    """
    batch = key.shape[0]
    token_major = lies_by_token(key)
    pitches = {_pitch(key), _pitch(value)}
    pitch = pitches.pop()
    return token_major, 0 if pitches or batch * pitch >= _MOST_TOKENS else pitch


def lies_by_token(states: torch.Tensor) -> bool:
    """Whether the heads of a token of (batch, heads, length, dim) tensors lie together."""
    # One head lies either way.
    return states.shape[1] == 1 or states.stride(1) < states.stride(2)


def _pitch(states: torch.Tensor) -> int:
    """Tokens from row to row, 0 if memory of others lies in between: a tile may reach into it."""
    batch, heads, length, _ = states.shape
    batch_stride, head_stride, token_stride, _ = states.stride()
    if batch == 1 or length == 1 or batch_stride == length * token_stride > 0:
        return length
    if batch_stride == heads * head_stride and head_stride == length * token_stride > 0:
        return heads * length
    return 0


def _flattened(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, dim) as (batch * length, heads, dim)."""
    return states.transpose(1, 2).flatten(0, 1)


def _in_a_row(states: torch.Tensor, pitch: int) -> torch.Tensor:
    """(batch, heads, length, dim) as tokens in a row, of which each row's begin ``pitch`` apart.

    For what needs no gradient: a view by one operation, which the host feels, or else a copy. The
    pitch is one of those that a call can have.

    Returns:
        ((batch - 1) * pitch + length, heads, dim), the last dimension dense.
    """
    batch, heads, length, dim = states.shape
    batch_stride, head_stride, token_stride, stride = states.stride()
    fits = stride == 1
    if batch > 1:
        if length == 1:
            token_stride, rest = divmod(batch_stride, pitch)
            fits = fits and rest == 0
        # Rows that share their memory are no rows to a kernel that writes, or clears, some.
        fits = fits and token_stride > 0 and batch_stride == pitch * token_stride
    if not fits:
        by_token = pitch == length
        token_stride, head_stride = (heads * dim, dim) if by_token else (dim, length * dim)
        strides = (pitch * token_stride, head_stride, token_stride, 1)
        states = states.new_empty_strided(states.shape, strides).copy_(states)
    return states.as_strided(
        ((batch - 1) * pitch + length, heads, dim), (token_stride, head_stride, 1)
    )


def varlen_refusals(plan: Plan, call: Call) -> list[str]:
    """Why the real tokens of a batch cannot be packed exactly."""
    reasons = []
    if plan.padding is Padding.UNKNOWN:
        return ["the mask is known only as a dense tensor"]
    if call.batch != plan.batch or call.q_len != plan.q_len or call.kv_len != plan.kv_len:
        return [
            f"the mask describes {plan.batch} x {plan.q_len} queries and {plan.kv_len} keys, "
            f"given {call.batch} x {call.q_len} and {call.kv_len}"
        ]
    pack_queries = packs_queries(plan, call)
    if call.keep_padding_output and plan.is_padded and pack_queries:
        reasons.append("padding positions of the output are to be kept")
    if plan.real_k == 0 or (plan.real_q == 0 and pack_queries):
        reasons.append("no real token in the batch")
    if plan.is_causal and not 0 <= plan.shift <= plan.kv_len - plan.q_len:
        reasons.append("the last query does not stand at the last visible key")
    if plan.window_matters:
        if not plan.is_causal and plan.q_len != plan.kv_len:
            reasons.append("a symmetric window needs as many queries as keys")
        if plan.padding is Padding.HOLES:
            reasons.append("a window cannot be packed across holes in the mask")
        elif plan.is_padded and not pack_queries and not _ends_at_the_query(plan):
            reasons.append("a window over padded keys needs self-attention")
    return reasons


def _ends_at_the_query(plan: Plan) -> bool:
    """One query per row, which stands at the row's last real key."""
    return plan.is_causal and plan.q_len == 1 and plan.padding is Padding.LEFT
