"""Keeps NaN that lies behind the last key of a sequence from kernels that load whole tiles.

Such a kernel multiplies what it loads of the padding by zero, and zero times NaN is NaN.
"""

from __future__ import annotations

import functools

import torch

from .layouts import LONGEST_TILE, VarlenLayout
from .machine import one_line

#: What one program of the Triton kernel looks at: tokens, and elements of each.
_TOKENS, _ELEMENTS = 8, 1024


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why tails cannot be cleared on a device, None if they can.

    Triton comes with torch's CUDA builds, and needs a C compiler on the machine.
    """
    if device.type != "cuda":
        return "tails are cleared by a Triton kernel, on GPUs alone"
    try:
        # No result is read back: layers ask, and they never wait for the device. Triton builds a
        # kernel for each dtype, and another one for addresses that are not multiples of 16.
        bounds = torch.zeros(4, dtype=torch.int32, device=device)
        for dtype in (torch.bfloat16, torch.float16):
            values = torch.zeros(2, 1, 64, dtype=dtype, device=device)
            _clear(values, bounds[:2])
            _clear(values, bounds[2:])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton missing, no compiler, a read-only home: anything may come
        return f"no Triton kernel can be built: {one_line(f'{type(error).__name__}: {error}')}"
    return None


def clear_tails(values: torch.Tensor, layout: VarlenLayout) -> None:
    """Replaces NaN and infinity by zero where padding follows a sequence, within a tile of it.

    They are written in place, and only where some are not finite: nobody reads them there.

    Args:
        values: (total_k, kv_heads, head_dim), the last dimension dense.
        layout: one of :func:`~smartattn.layouts.in_place_layout` with ``used_k``.
    """
    if layout.tails is not None:
        _clear(values, layout.tails)


def _clear(values: torch.Tensor, bounds: torch.Tensor) -> None:
    # Not every machine has Triton, and its import takes a while.
    from .triton_kernels import clear_kernel

    _, heads, dim = values.shape
    grid = (bounds.shape[0] // 2, LONGEST_TILE // _TOKENS, -(-heads * dim // _ELEMENTS))
    with torch.cuda.device(values.device):
        clear_kernel[grid](
            values,
            bounds,
            values.stride(0),
            values.stride(1),
            heads * dim,
            dim,
            TOKENS=_TOKENS,
            ELEMENTS=_ELEMENTS,
        )
