"""Clears what kernels that read padded batches in place would trip over, or leave undone.

Kernels that load whole tiles multiply what they load of the padding by zero, and zero times NaN is
NaN; and those that are told how many queries are used write no output for the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .layouts import LONGEST_TILE, VarlenLayout
from .triton_launch import Launcher, hindrance

#: What one program of the Triton kernel looks at, at most: elements in all, and tokens.
_TILE, _TOKENS = 8192, 64
#: Elements of the output that one program writes.
_RUN = 8192
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
    return hindrance(lambda: _build(device))


def _build(device: torch.device) -> None:
    """Launches each kernel once: a forward could not go on without one."""
    gaps = torch.zeros(1, 4, dtype=torch.int32, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        for width in _ELEMENTS:
            states = torch.zeros(2, 1, width, dtype=dtype, device=device)
            _clear(gaps, states, states, 1)


def handicap(device: torch.device) -> str | None:
    """What it means for a kernel that needs its tails cleared if they cannot be."""
    reason = unavailable(device) if device.type == "cuda" else None
    return None if reason is None else f"padded batches are gathered, since {reason}"


def clear(layout: VarlenLayout, values: torch.Tensor, output: torch.Tensor | None = None) -> None:
    """Clears padding on which a kernel depends.

    NaN and infinity among the values become zero where padding follows a sequence, within a tile of
    it. They are written in place, and only where some are not finite: nobody reads them there.
    All outputs that belong to padding become zero.

    Args:
        layout: one of :func:`~smartattn.layouts.in_place_layout` with ``used_k``, or of
            :func:`~smartattn.layouts.used_layout`.
        values: (total_k, kv_heads, value_head_dim), the last dimension dense.
        output: (total_q, heads, value_head_dim) of the same dtype, contiguous; None if the kernel
            writes all of it.
    """
    if layout.gaps is not None:
        _clear(layout.gaps, values, output, layout.longest_gap)


@dataclass(frozen=True, slots=True)
class _Launch:
    """How the kernel is launched on values of one kind.

    Args:
        tails: programs for the values of a gap.
        arguments: strides from token to token and from part to part of a token, the elements of a
            part, programs for the same tokens, and ``tails``.
        sizes: tokens and elements of a program.
    """

    tails: int
    arguments: tuple[int, int, int, int, int]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, token_stride: int, head_stride: int, heads: int, dim: int) -> _Launch:
        """That of (tokens, heads, dim) values with such strides."""
        # Heads that follow each other are one run of memory, which is read fastest.
        parts, width = (1, heads * dim) if heads == 1 or head_stride == dim else (heads, dim)
        elements = next((size for size in _ELEMENTS if size >= width), _ELEMENTS[-1])
        tokens = min(_TOKENS, _TILE // elements)
        shares = parts * -(-width // elements)
        tails = -(-LONGEST_TILE // tokens) * shares
        strides = (token_stride, head_stride, width)
        return cls(tails, (*strides, shares, tails), (tokens, elements))


_launch_of = functools.lru_cache(maxsize=1024)(_Launch.of)
_launcher = Launcher("clear_kernel", "TOKENS", "ELEMENTS", "RUN")


def _clear(
    gaps: torch.Tensor, values: torch.Tensor, output: torch.Tensor | None, longest_gap: int
) -> None:
    # All strides at once are cheaper than one after the other.
    (token_stride, head_stride, _), (_, heads, dim) = values.stride(), values.shape
    facts = (token_stride, head_stride, heads, dim)
    launch, address = _launch_of(*facts), values.data_ptr()
    if output is None:
        output, output_at, output_width, runs = values, address, dim, 0
    else:
        output_at, output_width = output.data_ptr(), output.shape[1] * output.shape[2]
        runs = -(-longest_gap * output_width // _RUN)
    pieces = launch.tails + runs
    _launcher(
        values.device,
        (values.dtype, address % 16 == 0, output_at % 16 == 0, facts, output_width),
        (gaps.shape[0] * pieces, 1, 1),
        (values, output, gaps),
        (
            *(address, output_at, gaps.data_ptr(), pieces),
            *(*launch.arguments, output_width, *launch.sizes, _RUN),
        ),
        enable_fp_fusion=True,
    )
