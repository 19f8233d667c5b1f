"""Masks that have to be built after all: from the facts of a plan, with few kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .plan import Plan

#: Elements to which memory-efficient kernels want the rows of a mask aligned.
_ALIGNMENT = 8


def seen(plan: Plan) -> torch.Tensor | None:
    """Booleans that broadcast to (batch, 1, q_len, kv_len), True where a query sees a key.

    Dimensions along which all is the same have the length 1. None if every key is seen.
    """
    local = None
    if plan.is_causal or plan.window_matters:
        local = local_mask(
            plan.q_len, plan.kv_len, plan.shift, plan.is_causal, plan.window, plan.device
        )[None, None]
    if plan.is_packed:
        sequences = plan.sequences
        assert sequences is not None
        ids = torch.from_numpy(np.repeat(np.arange(len(sequences)), sequences.q_length))
        ids = ids.view(plan.batch, plan.q_len).to(plan.device)
        own = (ids[:, :, None] == ids[:, None, :])[:, None]
        return own if local is None else own & local
    real = plan.real_keys() if plan.is_padded else None
    if real is None:
        return local
    if real.shape[1] < plan.kv_len:
        # The rest of a static cache is empty.
        real = torch.nn.functional.pad(real, (0, plan.kv_len - real.shape[1]))
    real = real[:, None, None, :]
    return real if local is None else real & local


def bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as the additive one that kernels want, of the same shape.

    Rows of a boolean mask become aligned, so that no kernel has to copy them; hidden keys get a
    finite value, so that queries that see nothing stay finite.
    """
    if mask.dtype != torch.bool:
        # The lowest values of a caller's own mask must not become infinite in a smaller dtype.
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    *shape, width = mask.shape
    aligned = -(-width // _ALIGNMENT) * _ALIGNMENT
    additive = torch.full((*shape, aligned), HIDDEN, dtype=dtype, device=mask.device)
    return additive[..., :width].masked_fill_(mask, 0.0)


#: What is added to the scores of hidden keys, the lowest number of float16. It is far below every
#: score. Kernels subtract it again, in float32 and in different orders, from which a much lower
#: number comes out as infinity.
HIDDEN = -65504.0


def local_mask(
    q_len: int, kv_len: int, shift: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor:
    """(q_len, kv_len) boolean mask of a pattern without padding, True where a query sees a key."""
    distance = (torch.arange(q_len, device=device)[:, None] + shift) - torch.arange(
        kv_len, device=device
    )[None, :]
    if causal:
        mask = distance >= 0
        return mask if window is None else mask & (distance < window)
    if window is None:
        return torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    return distance.abs() <= window
