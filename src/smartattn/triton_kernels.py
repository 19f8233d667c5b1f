"""Kernels in Triton; importing this module needs it."""

from __future__ import annotations

import triton
import triton.language as tl


# The bounds of a layout lie behind others, anywhere: one kernel for all.
@triton.jit(do_not_specialize_on_alignment=["bounds"])  # type: ignore[untyped-decorator]
def clear_kernel(  # type: ignore[no-untyped-def]
    values,
    bounds,
    token_stride,
    part_stride,
    width,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """See :func:`smartattn.tails.clear_tails`; programs are (gap, tokens, part and elements)."""
    place = tl.program_id(0) * 2
    first = tl.load(bounds + place) + tl.program_id(1) * TOKENS
    last = tl.load(bounds + place + 1)
    if first < last:
        blocks = tl.cdiv(width, ELEMENTS)
        part = tl.program_id(2) // blocks
        token = first + tl.arange(0, TOKENS)
        element = tl.program_id(2) % blocks * ELEMENTS + tl.arange(0, ELEMENTS)
        offset = token.to(tl.int64)[:, None] * token_stride + element[None, :]
        pointer = values + part.to(tl.int64) * part_stride + offset
        inside = (token < last)[:, None] & (element < width)[None, :]
        found = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
        # Infinity less itself is not a number, and that is unequal to everything.
        bad = (found - found) != 0.0
        if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
            tl.store(pointer, 0.0, mask=inside & bad)
