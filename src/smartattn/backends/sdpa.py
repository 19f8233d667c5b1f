"""torch's ``scaled_dot_product_attention`` with the semantics of Transformers' own ``sdpa``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..call import Call, Runner
from ..machine import processors
from ..plan import Padding, Pattern, Plan
from . import splitting
from .base import HALF_PRECISION, Backend, Support
from .splitting import Step


class SdpaBackend(Backend):
    """Takes every mask, dtype and device; what everything else falls back to.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """

    name = "sdpa"
    walks = "padded"
    indispensable = True
    support = Support(
        mixed_head_dims=True,
        features=frozenset({"dropout", "position_bias", "mixed dtypes", "broadcast batches"}),
    )

    def uses_dense_mask(self, plan: Plan, call: Call) -> bool:
        return not needs_no_mask(plan, call)

    def busiest(self, plan: Plan, call: Call, slots: int) -> float:
        share = splitting.cudnn if call.dtype in HALF_PRECISION else splitting.evenly
        return share(Step.of(plan, call), slots)

    def bind(self, plan: Plan, call: Call) -> Runner:
        unmasked = needs_no_mask(plan, call)
        causal = unmasked and plan.is_causal and call.q_len > 1
        # The rest of a static cache is empty.
        keys = slice(plan.visible) if plan.visible < call.kv_len else None
        biased = "position_bias" in call.features
        if unmasked and keys is None and not biased:
            return _bind_unmasked(call, causal)

        # The runner holds masks and not the plan, which holds the runner.
        if unmasked and not biased:
            shared = None
        elif biased or (call.keep_padding_output and plan.pattern is not Pattern.OTHER):
            # torch's own conversion decides what a query that sees nothing gets.
            shared = plan.dense_mask()
        else:
            shared = plan.bias(call.dtype)

        def run(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            arguments: Mapping[str, Any],
        ) -> torch.Tensor:
            mask = shared
            if biased:
                mask = _biased(arguments["position_bias"], shared, query.dtype)
            if keys is not None:
                key, value = key[:, :, keys], value[:, :, keys]
                mask = None if mask is None else mask[..., keys]
            is_causal = causal and mask is None
            return attend(query, key, value, mask, is_causal, call).transpose(1, 2).contiguous()

        return run


def _bind_unmasked(call: Call, causal: bool) -> Runner:
    """The commonest call, with nothing left to decide per layer."""
    attention = torch.nn.functional.scaled_dot_product_attention
    if call.group_size > 1 and (
        not _grouped_without_mask(call)
        or (not causal and _folding_pays(call, call.batch, call.q_len, call.kv_len))
    ):
        return lambda query, key, value, _: (
            attend(query, key, value, None, causal, call).transpose(1, 2).contiguous()
        )
    grouped, dropout, scale = call.group_size > 1, call.dropout, call.scaling

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        output = attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
        return output.transpose(1, 2).contiguous()

    return run


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    call: Call,
) -> torch.Tensor:
    """One call of ``scaled_dot_product_attention`` with grouped heads where a kernel takes them.

    Shapes are those of :class:`~smartattn.call.Call`, the mask is (1 or batch, 1 or heads, q_len,
    kv_len), or broadcasts to that; the result is (batch, heads, q_len, value_head_dim).
    """
    if mask is not None and mask.ndim < 4:
        mask = mask[(None,) * (4 - mask.ndim)]
    grouped = False
    if call.group_size > 1:
        foldable = not causal and (mask is None or mask.shape[1] == 1)
        if foldable and _folding_pays(call, query.shape[0], query.shape[2], key.shape[2]):
            return _folded(query, key, value, mask, call)
        grouped = _takes_grouped_heads(query, key, value, mask, call)
        if not grouped and foldable and query.shape[2] == 1:
            return _folded(query, key, value, mask, call)
        if not grouped:
            key, value = repeated(key, call.group_size), repeated(value, call.group_size)
    if key.is_cuda and (0 in key.stride() or 0 in value.stride()):
        # The memory-efficient kernel misreads broadcast keys at some lengths: pytorch #191937.
        key, value = key.contiguous(), value.contiguous()
    if mask is not None and mask.is_cuda and _is_huge(mask):
        # Offsets into the mask overflow in the memory-efficient kernel: pytorch #187227.
        rows = max(1, _MASK_LIMIT // mask.shape[-1])
        parts = zip(torch.split(query, rows, 2), torch.split(mask, rows, -2), strict=True)
        return torch.cat([_sdpa(q, key, value, m, False, grouped, call) for q, m in parts], dim=2)
    return _sdpa(query, key, value, mask, causal, grouped, call)


def _folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: Call,
) -> torch.Tensor:
    """:func:`attend` with the heads of a group as further queries of their key/value head."""
    batch, heads, q_len, head_dim = query.shape
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, call.group_size, 1)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, call.kv_heads, call.group_size * q_len, head_dim),
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        scale=call.scaling,
    )
    return attended.reshape(batch, heads, q_len, call.value_head_dim)


#: Queries up to which folding saves more than it costs.
_FEW_QUERIES = 8


def _folding_costs(dtype: torch.dtype, q_len: int) -> tuple[float, int]:
    """How many times as long a folded head takes as another, and from how many keys on.

    The kernel of one query is slow in half precision, and that of several in float16.
    """
    if dtype is torch.bfloat16 and q_len == 1:
        return 0.5, 0
    times = 1.67 if dtype is torch.float16 else 3.3
    if q_len > 1:
        return times, 256
    return times, 0 if dtype is torch.float16 else 128


def _folding_pays(call: Call, batch: int, q_len: int, kv_len: int) -> bool:
    """Whether a CPU is faster with the heads of a group as queries of one head.

    Its kernel takes heads one by one, reads the keys again for each, and multiplies by one query at
    a time; but heads are also what its threads share. Measured by ``benchmarks.sdpa_forms``.
    """
    if call.device.type != "cpu" or q_len > _FEW_QUERIES:
        return False
    times, fewest_keys = _folding_costs(call.dtype, q_len)
    if kv_len < fewest_keys:
        return False
    threads = torch.get_num_threads()
    folded, unfolded = -(-batch * call.kv_heads // threads), -(-batch * call.heads // threads)
    return folded * times <= unfolded


#: Elements of one (q_len, kv_len) mask that 32-bit offsets reach.
_MASK_LIMIT = 2**32


def _is_huge(mask: torch.Tensor) -> bool:
    return mask.shape[-2] > 1 and mask.shape[-2] * mask.shape[-1] > _MASK_LIMIT


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    grouped: bool,
    call: Call,
) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        scale=call.scaling,
        is_causal=causal,
        enable_gqa=grouped,
    )


def _takes_grouped_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: Call,
) -> bool:
    """Whether a fused kernel does; the math kernel holds all the scores in memory."""
    if mask is None:
        return _grouped_without_mask(call)
    if call.device.type not in _CHOOSING_DEVICES:
        return False
    try:
        kernel = _fused_sdp_choice(
            query, key, value, mask, call.dropout, False, scale=call.scaling, enable_gqa=True
        )
    except (NotImplementedError, TypeError):
        return False
    return bool(kernel != _MATH)


def _grouped_without_mask(call: Call) -> bool:
    """:func:`_takes_grouped_heads` without a mask.

    On GPUs none does in float32. There the math kernel is the faster one as long as the blocks of
    the memory-efficient one are fewer than the multiprocessors, since it alone cuts the keys of a
    query into parts. Measured by ``benchmarks.sdpa_forms``, without gradients.
    """
    if not call.head_dim == call.value_head_dim <= 256:
        return False
    if call.device.type != "cuda" or call.dtype != torch.float32:
        return True
    scores = call.batch * call.heads * call.q_len * call.kv_len
    if scores > _MOST_SCORES:
        return False
    blocks = call.batch * call.heads * -(-call.q_len // _BLOCK_QUERIES)
    return blocks < (processors(call.device) or 0)


#: Queries of one block of torch's memory-efficient kernel.
_BLOCK_QUERIES = 64
#: Scores that the math kernel may hold: 256 MiB of them.
_MOST_SCORES = 2**26


#: Where torch tells which kernel it would run.
_CHOOSING_DEVICES = frozenset({"cpu", "cuda", "xpu"})


#: Which kernel torch would run; costs the host one or two microseconds.
_fused_sdp_choice: Any = getattr(torch, "_fused_sdp_choice", lambda *_, **__: _MATH)
_MATH = 0


def repeated(states: torch.Tensor, times: int) -> torch.Tensor:
    """(batch, kv_heads, length, dim) with each head ``times`` times in a row."""
    batch, heads, length, dim = states.shape
    states = states[:, :, None].expand(batch, heads, times, length, dim)
    return states.reshape(batch, heads * times, length, dim)


def needs_no_mask(plan: Plan, call: Call) -> bool:
    """Whether attention without a mask is exact for all real tokens of the plan."""
    if plan.padding is Padding.UNKNOWN:
        return plan.dense_mask() is None
    if plan.is_packed or plan.window_matters or not _same_shape(plan, call):
        return False
    if not plan.is_padded:
        # torch aligns its causal mask at the upper left; one query is the last of its sequence.
        return not plan.is_causal or call.q_len == 1 or plan.is_aligned
    # Real tokens never see what comes after them.
    return (
        plan.is_causal
        and plan.padding is Padding.RIGHT
        and plan.is_aligned
        and call.q_len > 1
        and not call.keep_padding_output
    )


def _same_shape(plan: Plan, call: Call) -> bool:
    return plan.q_len == call.q_len and plan.kv_len == call.kv_len


def _biased(
    position_bias: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The mask with a learned bias of (1 or batch, heads, q_len, kv_len) in it."""
    if mask is None:
        biased = position_bias
    elif mask.dtype == torch.bool:
        biased = torch.where(mask, position_bias, torch.finfo(dtype).min)
    else:
        biased = position_bias + mask
    return biased.to(dtype).contiguous()
