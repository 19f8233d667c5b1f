"""Copies of tokens between padded and packed tensors, one launch each, zeros included.

torch's own ``index_copy_`` moves one element per thread, into zeros that another kernel has
written; indexing by two dimensions does too, with two more kernels for the places.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable

import torch

from .triton_launch import Launcher, hindrance

logger = logging.getLogger("smartattn")

#: Elements of a token that a program copies, the narrower where a token has no more in a row, and
#: how many tokens. So an H200 moves 3.4 to 3.7 TB/s, measured by ``benchmarks.moves``.
_NARROW, _WIDE, _TOKENS = 64, 256, 32
#: Strides from here on have an eighth of more than 31 bits.
_FURTHEST = 2**34
#: Places are counted in 32 bits.
_MOST_PLACES = 2**31

_launcher = Launcher("move_kernel", "TOKENS", "ELEMENTS")
#: Kinds of launches, with their device, that Triton could not build.
_unbuildable: set[Hashable] = set()


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why torch's own operations have to do on a device, None if these copies can be made.

    Triton comes with torch's CUDA builds, and needs a C compiler on the machine.
    """
    if device.type != "cuda":
        return "tokens are copied by a Triton kernel on GPUs alone"
    if torch.version.hip:
        return "tokens are copied by a kernel that was not tested on ROCm"
    reason = hindrance(lambda: _build(device))
    if reason is not None:
        logger.info("tokens are copied by torch's own operations, since %s", reason)
    return reason


def _build(device: torch.device) -> None:
    """Launches what a padding-free forward needs first."""
    index = torch.zeros(1, dtype=torch.int32, device=device)
    states = torch.zeros(1, 1, 1, _NARROW, dtype=torch.bfloat16, device=device)
    _move(states, index, torch.empty_like(states))


def sources(index: torch.Tensor, places: int) -> torch.Tensor:
    """(places,) which of the packed tokens belongs to each place, -1 where none does.

    Args:
        index: (total,) the place of each packed token.
    """
    found = torch.full((places,), -1, dtype=torch.int32, device=index.device)
    order = torch.arange(len(index), dtype=torch.int32, device=index.device)
    return found.index_copy_(0, index, order)


def moved(states: torch.Tensor, index: torch.Tensor, target: torch.Tensor) -> bool:
    """Copies tokens to ``target``, whatever it held: token ``i`` is number ``index[i]`` of states.

    Tokens count from row to row. Nothing is recorded for a gradient.

    Args:
        states: (rows, length, parts, width), of any strides.
        index: (tokens of target,) int32 or int64; zeros come from below 0.
        target: (rows, length, parts, width), other rows and length, no memory shared.

    Returns:
        Whether it was done; False has done nothing.
    """
    # What is traced, or has no memory of its own, is for torch's own operations.
    plain = type(states) is torch.Tensor and states.dtype.is_floating_point
    if not plain or torch.compiler.is_compiling() or unavailable(states.device) is not None:
        return False
    return _move(states, index, target)


def _move(states: torch.Tensor, index: torch.Tensor, target: torch.Tensor) -> bool:
    rows, length, parts, width = target.shape
    from_strides, to_strides = states.stride(), target.stride()
    count = rows * length
    launch = _launch_of(from_strides, to_strides, parts, width)
    at = (states.data_ptr(), index.data_ptr(), target.data_ptr())
    if launch is None or (at[0] | at[2]) % 16 or count >= _MOST_PLACES:
        return False
    if count == 0 or states.numel() == 0:
        target.zero_()
        return True
    strides, eighths, blocks, shares, elements = launch
    kind = (states.dtype, index.dtype, at[1] % 16 == 0, elements)
    if (kind, target.device) in _unbuildable:
        return False
    try:
        _launcher(
            target.device,
            kind,
            (-(-count // _TOKENS), shares, 1),
            (states, index, target),
            (*at, count, states.shape[1], length, eighths, blocks, *strides, _TOKENS, elements),
            enable_fp_fusion=True,
        )
    except NotImplementedError as error:
        logger.info("some tokens are copied by torch's own operations, since %s", error)
        _unbuildable.add((kind, target.device))
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _launch_of(
    from_strides: tuple[int, ...], to_strides: tuple[int, ...], parts: int, width: int
) -> tuple[tuple[int, ...], int, int, int, int] | None:
    """How a kernel is launched on tensors of such strides; None if it cannot move 16 bytes at once.

    Returns:
        Strides / 8 of row, token and part on both sides; elements of a part / 8; programs of a part
        and of a token; elements of a program.
    """
    if parts == 1 or from_strides[2] == to_strides[2] == width:
        # Parts that follow each other on both sides are one run of memory.
        parts, width = 1, parts * width
    strides = (*from_strides[:3], *to_strides[:3])
    every = width
    for stride in strides:
        every |= stride
    if every % 8 or every >= _FURTHEST or from_strides[3] != 1 or to_strides[3] != 1:
        return None
    elements = _NARROW if width <= _NARROW else _WIDE
    blocks = -(-width // elements)
    return tuple(stride // 8 for stride in strides), width // 8, blocks, parts * blocks, elements
