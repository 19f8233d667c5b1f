"""How the keys of a decoding step are shared among a GPU's thread blocks, by each kernel's rule.

One query per sequence gives a device few blocks to run. Kernels cut the keys of a sequence into
parts while processors are idle, which each does by a rule of its own, and a step takes as long as
the busiest of the places that blocks run in. The rules are those of the kernels; the shares of time
were measured on an H200 by ``benchmarks.decode``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from ..call import Call
from ..layouts import IntArray
from ..plan import Plan

#: Heads of a group that share a thread block.
_BLOCK_HEADS = 64

#: Share of the places from which blocks fill a device without parts, and of the best use of the
#: device that is enough: both are constants of the flash kernels' own rule.
_FULL, _ENOUGH = 0.8, 0.85
_MOST_PARTS = 128
#: A last wave of FlashAttention-2 that leaves half of the places empty is shorter by this: a
#: multiprocessor with one block has its memory accesses to itself.
_HALF_WAVE = 0.62
#: FlashAttention-2 reads whole sequences by another kernel, which is made for many queries: so much
#: more slowly, but for the largest heads.
_WHOLE, _LARGE_HEAD = 1.9, 128
#: What a part costs FlashAttention-2 beyond its keys, in keys: each of them, putting together each
#: of one sequence, and more than 16 of one. Caches of fewer keys were not measured.
_PART, _PUT_TOGETHER, _MANY, _MANY_PARTS, _FEWEST_KEYS = 256, 16, 400, 16, 512
_PARTS = np.array([*range(2, 17), 20, 24, 32, 48, 64, 96, 128])
#: Bytes of what parts leave to be put together, in float32, at most.
_WORKSPACE = 2**26
#: Time of cuDNN's waves: of one block per processor or less, of up to two, and of exactly two with
#: others to come.
_FIRST, _SECOND, _BOTH = 1.0, 1.5, 1.7


class Step(NamedTuple):
    """One query per sequence.

    ``blocks`` counts thread blocks before any keys are cut: sequences x key/value heads, more for
    groups of many heads. ``lengths`` are the real keys per sequence, ``visible`` the keys of the
    padded tensors, without the empty rest of a static cache.
    """

    blocks: int
    lengths: IntArray
    visible: int
    head_dim: int
    #: Of the query.
    heads: int = 1
    windowed: bool = False

    @staticmethod
    def of(plan: Plan, call: Call) -> Step:
        """The step of a call whose sequences are known."""
        assert plan.sequences is not None
        lengths = plan.sequences.k_length
        blocks = len(lengths) * call.kv_heads * -(-call.group_size // _BLOCK_HEADS)
        heads, windowed = call.heads, plan.window_matters
        return Step(blocks, lengths, plan.visible, call.head_dim, heads, windowed)

    @property
    def longest(self) -> int:
        """Real keys of the longest sequence."""
        return int(self.lengths.max(initial=0))

    @property
    def mean(self) -> float:
        """Real keys of a sequence."""
        return float(self.lengths.mean()) if len(self.lengths) else 0.0


def evenly(step: Step, slots: int) -> float:
    """Keys of the busiest of ``slots`` places if keys are cut just as far as places are empty."""
    if step.blocks < _FULL * slots:
        return step.blocks * step.mean / slots
    return _whole(step, slots, last=1.0)


def flash_2(step: Step, slots: int) -> float:
    """The same for FlashAttention-2, with the parts of :func:`flash_2_parts`.

    Source of its own rule: ``set_params_splitkv`` and ``num_splits_heuristic`` in
    csrc/flash_attn/flash_api.cpp of flash-attention.
    """
    if _is_cut(step):
        return _best_parts(step, slots)[1]
    tile, tiles = _flash_tile(step.head_dim), _tiles(step.visible, step.head_dim)
    parts = _flash_parts(step.blocks, slots, tiles, distinct=True)
    if parts == 1:
        times = _WHOLE if step.head_dim <= _LARGE_HEAD else 1.0
        return times * _whole(step, slots, last=_HALF_WAVE)
    part = min(-(-tiles // parts) * tile, step.longest)
    return max(part, step.blocks * step.mean / slots)


def flash_2_parts(step: Step, slots: int) -> int:
    """The best ``num_splits`` for FlashAttention-2; 0 where it is to choose itself.

    Its own rule takes all sequences for as long as the cache, and reads them whole where they are
    many. On an H200 a step took 0.72 of the time with these parts (geometric mean over 468 steps),
    0.19 at best and 1.03 at worst.
    """
    return _best_parts(step, slots)[0] if _is_cut(step) else 0


def _is_cut(step: Step) -> bool:
    room = _PARTS[0] <= _most_parts(step)
    return step.visible >= _FEWEST_KEYS and not step.windowed and step.blocks > 0 and bool(room)


def _most_parts(step: Step) -> int:
    rows = max(1, len(step.lengths) * step.heads)
    return min(_WORKSPACE // (4 * rows * (step.head_dim + 1)), _tiles(step.visible, step.head_dim))


def _best_parts(step: Step, slots: int) -> tuple[int, float]:
    # Who predicts a step and who runs it ask the same.
    lengths = step.lengths.astype(np.int64).tobytes()
    return _fewest_keys(lengths, step.blocks, step.visible, step.head_dim, _most_parts(step), slots)


@functools.lru_cache(maxsize=64)
def _fewest_keys(
    int64_lengths: bytes, blocks: int, visible: int, head_dim: int, most: int, slots: int
) -> tuple[int, float]:
    """The best number of parts, and the keys of the busiest place with what parts cost beyond."""
    lengths = np.frombuffer(int64_lengths, dtype=np.int64)
    numbers = _PARTS[: np.searchsorted(_PARTS, most, side="right")]
    part = -(-_tiles(visible, head_dim) // numbers) * _flash_tile(head_dim)
    busy = (-(-lengths[:, None] // part)).sum(0) * (blocks // len(lengths))
    keys = (np.minimum(part, lengths.max()) + _PART) * -(-busy // slots)
    keys += _PUT_TOGETHER * numbers + _MANY * (numbers > _MANY_PARTS)
    best = int(keys.argmin())
    return int(numbers[best]), float(keys[best])


def _flash_tile(head_dim: int) -> int:
    """Keys per tile of FlashAttention-2's kernel for caches."""
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


def _tiles(keys: int, head_dim: int) -> int:
    return -(-keys // _flash_tile(head_dim))


def flash_3(step: Step, slots: int) -> float:
    """The same for FlashAttention-3, roughly: with padding it looks at each sequence on the device.

    Source: ``num_splits_heuristic`` in hopper/heuristics.h, ``tile_size_fwd_sm90`` in
    hopper/tile_size.h of flash-attention.
    """
    dims = (64, 96, 128)
    tile = (192, 144, 176, 80)[sum(step.head_dim > dim for dim in dims)]
    tiles = -(-step.visible // tile)
    parts = _flash_parts(step.blocks, slots, tiles, distinct=False) if tiles > 4 else 1
    if parts == 1:
        return _whole(step, slots, last=1.0)
    part = -(-tiles // parts) * tile
    busy = int((-(-step.lengths // part)).sum()) * step.blocks / max(1, len(step.lengths))
    return float(min(part, step.longest) * math.ceil(busy / slots))


def cudnn(step: Step, processors: int) -> float:
    """The same for cuDNN, which torch's SDPA runs on recent GPUs, of a place per processor.

    It cuts sequences into a power of two of parts, and reads padding, too. Source: the grids that
    its kernels are launched with on an H200.
    """
    parts = cudnn_parts(step, processors)
    waves, rest = divmod(step.blocks * parts, 2 * processors)
    last = 0.0 if not rest else _FIRST if rest <= processors else _SECOND
    return step.visible / parts * (waves * _BOTH + last)


def cudnn_parts(step: Step, processors: int) -> int:
    """Into how many parts cuDNN cuts each sequence."""
    large = step.head_dim > _LARGE_HEAD
    room, least = (4 * processors, 64) if large else (2 * processors, 128)
    parts = 1
    if step.blocks and 2 * step.blocks <= processors:
        while 2 * parts * step.blocks < room and 2 * parts * least <= step.visible:
            parts *= 2
    return parts


def _whole(step: Step, slots: int, last: float) -> float:
    """Keys of the busiest place if none are cut: blocks come in waves.

    ``last`` is what a last wave counts that fills no more than half of the places. No wave is
    shorter than its longest sequence.
    """
    waves, rest = divmod(step.blocks, slots)
    share = 0.0 if not rest else last if 2 * rest <= slots else 1.0
    return max(step.longest, (waves + share) * step.mean)


@functools.lru_cache(maxsize=4096)
def _flash_parts(blocks: int, slots: int, tiles: int, distinct: bool) -> int:
    """Parts that a flash kernel cuts each sequence into.

    The fewest that use the device nearly as well as the best number does. ``distinct`` leaves
    numbers out that make parts of as many tiles as a smaller number.
    """
    if blocks >= _FULL * slots:
        return 1
    numbers = np.arange(1, min(_MOST_PARTS, slots, tiles) + 1)
    waves = numbers * blocks / slots
    used = waves / np.ceil(waves)
    if distinct:
        sizes = -(-tiles // numbers)
        used[1:][sizes[1:] == sizes[:-1]] = 0.0
    return int(numbers[np.argmax(used >= _ENOUGH * used.max(initial=0.0))]) if len(used) else 1
