"""Keeps NaN that lies behind the last key of a sequence from kernels that load whole tiles.

Such a kernel multiplies what it loads of the padding by zero, and zero times NaN is NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .layouts import LONGEST_TILE, VarlenLayout
from .machine import one_line
from .triton_launch import Launcher

#: What one program of the Triton kernel looks at, at most: elements in all, and tokens.
_TILE, _TOKENS = 8192, 64
#: How many elements of a token it looks at, with a kernel of each. Where a token has more than the
#: last one, programs share it.
_ELEMENTS = (64, 128, 256, 1024)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why tails cannot be cleared on a device, None if they can.

    Triton comes with torch's CUDA builds, and needs a C compiler on the machine.
    """
    if device.type != "cuda":
        return "tails are cleared by a Triton kernel, on GPUs alone"
    try:
        # No result is read back: layers ask, and they never wait for the device. All kernels are
        # built here, since a forward could not go on without one.
        bounds = torch.zeros(2, dtype=torch.int32, device=device)
        for dtype in (torch.bfloat16, torch.float16):
            for width in _ELEMENTS:
                _clear(torch.zeros(2, 1, width, dtype=dtype, device=device), bounds)
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        return str(error)
    except RuntimeError as error:  # of the driver
        return f"no Triton kernel can be launched: {one_line(str(error))}"
    return None


def handicap(device: torch.device) -> str | None:
    """What it means for a kernel that needs its tails cleared if they cannot be."""
    reason = unavailable(device) if device.type == "cuda" else None
    return None if reason is None else f"padded batches are gathered, since {reason}"


def clear_tails(values: torch.Tensor, layout: VarlenLayout) -> None:
    """Replaces NaN and infinity by zero where padding follows a sequence, within a tile of it.

    They are written in place, and only where some are not finite: nobody reads them there.

    Args:
        values: (total_k, kv_heads, head_dim), the last dimension dense.
        layout: one of :func:`~smartattn.layouts.in_place_layout` with ``used_k``.
    """
    if layout.tails is not None:
        _clear(values, layout.tails)


@dataclass(frozen=True, slots=True)
class _Launch:
    """How the kernel is launched on values of one kind.

    Args:
        programs: for the tokens of a gap, and for what there is of a token.
        strides: elements from token to token, from part to part of a token, and in a part.
        sizes: tokens and elements of a program.
    """

    programs: tuple[int, int]
    strides: tuple[int, int, int]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, token_stride: int, head_stride: int, heads: int, dim: int) -> _Launch:
        """That of (tokens, heads, dim) values with such strides."""
        # Heads that follow each other are one run of memory, which is read fastest.
        parts, width = (1, heads * dim) if heads == 1 or head_stride == dim else (heads, dim)
        elements = next((size for size in _ELEMENTS if size >= width), _ELEMENTS[-1])
        tokens = min(_TOKENS, _TILE // elements)
        programs = (-(-LONGEST_TILE // tokens), parts * -(-width // elements))
        return cls(programs, (token_stride, head_stride, width), (tokens, elements))


_launch_of = functools.lru_cache(maxsize=1024)(_Launch.of)
_launcher = Launcher("clear_kernel", "TOKENS", "ELEMENTS")


def _clear(values: torch.Tensor, bounds: torch.Tensor) -> None:
    # All strides at once are cheaper than one after the other.
    (token_stride, head_stride, _), (_, heads, dim) = values.stride(), values.shape
    facts = (token_stride, head_stride, heads, dim)
    launch, address = _launch_of(*facts), values.data_ptr()
    _launcher(
        values.device,
        (values.dtype, address % 16 == 0, facts),
        (bounds.shape[0] // 2, *launch.programs),
        (values, bounds),
        (address, bounds.data_ptr(), *launch.strides, *launch.sizes),
        enable_fp_fusion=True,
    )
