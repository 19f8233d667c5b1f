"""Keeps NaN that lies behind the last key of a sequence from kernels that load whole tiles.

Such a kernel multiplies what it loads of the padding by zero, and zero times NaN is NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .layouts import LONGEST_TILE, VarlenLayout
from .machine import one_line

#: What one program of the Triton kernel looks at: tokens, and elements of each.
_TOKENS, _ELEMENTS = 8, 1024
#: Built kernels by what they were built for; None where they are not to be launched directly.
_built: dict[tuple[Any, ...], Any] = {}
_MAX_BUILT = 1024


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
    _, heads, dim = values.shape
    grid = (bounds.shape[0] // 2, LONGEST_TILE // _TOKENS, -(-heads * dim // _ELEMENTS))
    if torch.cuda.current_device() == values.device.index:
        return _launch(grid, values, bounds)
    with torch.cuda.device(values.device):
        return _launch(grid, values, bounds)


def _launch(grid: tuple[int, int, int], values: torch.Tensor, bounds: torch.Tensor) -> None:
    """Launches the kernel, by what Triton built the last time if it can be used again.

    Triton's own way to a built kernel looks at every argument, and takes the host longer than all
    of FlashAttention's call.
    """
    _, heads, dim = values.shape
    arguments = (values, bounds, values.stride(0), values.stride(1), heads * dim, dim)
    # Triton builds for dtypes, for addresses that are multiples of 16 or not, and for kinds of
    # integers: of one multiplicity, size, or equal to 1.
    aligned = (values.data_ptr() % 16 == 0, bounds.data_ptr() % 16 == 0)
    facts = (values.device.index, values.dtype, aligned, arguments[2:])
    built = _built.get(facts)
    if built is not None:
        try:
            # Source: python/tutorials/02-fused-softmax.py of Triton.
            built[grid](*arguments, _TOKENS, _ELEMENTS)
        except TypeError:
            # The launcher of another version takes other arguments.
            _built[facts] = None
        else:
            return
    # Not every machine has Triton, and its import takes a while.
    from .triton_kernels import clear_kernel

    kernel = clear_kernel[grid](*arguments, TOKENS=_TOKENS, ELEMENTS=_ELEMENTS)
    if facts not in _built:
        if len(_built) >= _MAX_BUILT:
            _built.clear()
        # An interpreter returns nothing.
        _built[facts] = kernel
