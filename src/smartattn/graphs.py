"""The static choice: Transformers' sdpa, or the model's own eager code, whatever the batch.

It is made where no value of a batch may be looked at: a graph outlives the batch that it was made
with, and in a transform of ``torch.func`` tensors have no values. And with ``output_attentions``,
under which Transformers says itself what it does.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .arguments import features_of, narrow
from .choose import UnsupportedCallError
from .layer_call import eager_function
from .mask import PlanMask
from .masking import additive
from .modeling import made_for_sdpa

#: What models hand over beside tensors and masks, and sdpa takes without a word.
_NOT_OF_SDPA = ("s_aux", "softcap", "indices", "block_indices")


def none_is_causal(module: torch.nn.Module) -> bool:
    """What a layer without a mask means while a graph is made.

    To code that was written for sdpa, what it says of itself: a mask that is causal is left
    out. Other code gets every mask, and means by None that nothing is hidden.
    """
    return bool(getattr(module, "is_causal", True)) and made_for_sdpa(type(module))


def as_sdpa_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask that Transformers' sdpa would have got."""
    if not isinstance(mask, PlanMask):
        return mask
    plan = mask.own_plan()
    return mask.dense() if plan is None else plan.dense_mask()


def static_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformers' sdpa, or the model's eager code if sdpa does not know all of the arguments."""
    indices, block_indices = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if indices is not None or block_indices is not None:
        mask = additive(mask, query.dtype)
        positions = kwargs.get("position_ids")
        mask = narrow(module, query, key, mask, positions, indices, block_indices)
    if mask is None and is_causal is None:
        is_causal = none_is_causal(module)
    beyond_sdpa = False
    for name in features_of(kwargs):
        beyond_sdpa = beyond_sdpa or name != "position_bias"
    if not beyond_sdpa:
        output, weights = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return output, weights
    eager = eager_function(module)
    if eager is None:
        raise NotImplementedError(
            f"{sorted(kwargs)}: sdpa does not implement one of these arguments; "
            "load the model with attn_implementation='eager' instead."
        )
    if mask is None and query.shape[2] > 1 and is_causal:
        q_len, kv_len = query.shape[2], key.shape[2]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    mask = additive(mask, query.dtype)
    output, weights = eager(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output, weights


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformers' sdpa on a paged cache, which up to 5.23 it fills itself.

    Raises:
        UnsupportedCallError: for an argument that it would leave out.
    """
    left_out = [name for name in _NOT_OF_SDPA if kwargs.get(name) is not None]
    if left_out:
        raise UnsupportedCallError(
            f"sdpa on a paged cache does not implement {', '.join(left_out)}; "
            "load the model with attn_implementation='paged|eager' instead"
        )
    output, weights = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        as_sdpa_mask(mask),
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return output, weights
