"""What kernels without a mask need to know of a plan: where each sequence begins and ends.

Everything is computed from the host's numbers and uploaded in one copy; nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from .plan import Plan

#: Keys that one tile of a 16-bit kernel of FlashAttention-3 holds at most. Source:
#: tile_size_fwd_sm90 in hopper/tile_size.h, kBlockN.
LONGEST_TILE = 192

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Runs of real tokens on the host; one entry per sequence, all arrays of shape (sequences,).

    Sequence ``i`` owns the queries ``q_start[i] : q_start[i] + q_length[i]`` and the keys
    ``k_start[i] : k_start[i] + k_length[i]`` of batch row ``row[i]``. Where the tokens of a row
    have holes between them the starts say nothing and ``contiguous`` is False.
    """

    row: IntArray
    q_start: IntArray
    q_length: IntArray
    k_start: IntArray
    k_length: IntArray
    contiguous: bool = True

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """The arguments of a variable-length kernel, on the device of the plan.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are int32 of shape (sequences + 1,). ``q_index`` and
    ``k_index`` hold, for every packed token, its place in the flattened (batch * length) tokens;
    None means that all tokens are taken in order and nothing has to be gathered. ``used_q`` and
    ``used_k``, int32 of shape (sequences,), say how many queries and keys of each sequence are
    real, the first ones; None means all. ``gaps``, int32 of shape (gaps, 4), is what
    :func:`smartattn.tails.clear` clears: first and last place (exclusive) of the keys' padding
    that follows on sequences within a tile, and of the outputs that the kernel leaves out, of which
    the longest gap has ``longest_gap``. None where there is nothing, or nobody asks.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    total_q: int
    total_k: int
    q_index: torch.Tensor | None = None
    k_index: torch.Tensor | None = None
    used_q: torch.Tensor | None = None
    used_k: torch.Tensor | None = None
    gaps: torch.Tensor | None = None
    longest_gap: int = 0


@dataclass(frozen=True, slots=True)
class KeyBounds:
    """The real keys of each row: ``start[i] : end[i]``, int32 of shape (batch,) on the device."""

    start: torch.Tensor
    end: torch.Tensor


@dataclass(frozen=True, slots=True)
class SequenceBounds:
    """Where each sequence lies in the padded tensors, and what of the output it has to write.

    ``table``, int32 of shape (6, sequences) on the device, holds the batch row of each sequence,
    its first query and their number, its first key and their number, and the number of places of
    the output that it writes, counted from the first query on and beginning again at the row's
    first place: all of a padded row, its own queries of a packed one. ``longest`` is the largest of
    those numbers.
    """

    table: torch.Tensor
    longest: int


def packed_layout(plan: Plan, pack_queries: bool) -> VarlenLayout:
    """The layout of the real tokens alone, gathered from the padded tensors.

    ``pack_queries`` False keeps every query of a row, padding included, as one sequence of
    ``q_len``: what cross-attention needs, whose mask speaks of the keys alone.
    """
    sequences = _of(plan)
    k_length = sequences.k_length
    q_length = sequences.q_length if pack_queries else np.full_like(k_length, plan.q_len)
    cu_q, cu_k = _cumulative(q_length), _cumulative(k_length)
    # A sequence's first place among the padded tokens, less that among the packed ones.
    offset_q = sequences.row * plan.q_len + sequences.q_start - cu_q[:-1]
    offset_k = sequences.row * plan.kv_len + sequences.k_start - cu_k[:-1]
    total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
    arrays = [cu_q, offset_q, q_length]
    alike = pack_queries and plan.is_aligned and plan.q_len == plan.kv_len
    if not alike:
        arrays += [cu_k, offset_k, k_length]
    parts = _uploaded(arrays, plan.device)
    cu_seqlens_q, first_q, count_q = parts[:3]
    cu_seqlens_k, first_k, count_k = parts[-3:]
    q_index = k_index = None
    if pack_queries and total_q != plan.batch * plan.q_len:
        q_index = _token_index(plan, first_q, count_q, total_q, queries=True)
    if alike:
        k_index = q_index
    elif total_k != plan.batch * plan.kv_len:
        k_index = _token_index(plan, first_k, count_k, total_k, queries=False)
    longest_q = int(q_length.max(initial=0))
    if longest_q == 1 and total_q != len(sequences):
        # FlashAttention-2 takes a longest query of 1 for exactly one query per sequence.
        longest_q = 2
    return VarlenLayout(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=int(k_length.max(initial=0)),
        total_q=total_q,
        total_k=total_k,
        q_index=q_index,
        k_index=k_index,
    )


def in_a_row(layout: VarlenLayout) -> VarlenLayout:
    """A layout of tokens that were gathered already."""
    return replace(layout, q_index=None, k_index=None)


def in_place_layout(plan: Plan, pack_queries: bool, used_keys: bool, pitch: int) -> VarlenLayout:
    """The layout of the padded tensors as they lie in memory, for contiguous real tokens.

    The padding between the sequences becomes sequences of its own, which cost next to nothing. With
    ``used_keys`` they own queries and keys of which none is used: 2 * sequences + 1 in all. Kernels
    that do not take the number of keys in use, as none with a backward does, get the padding's
    queries without a key, for which they write zeros, and then its keys without a query, whose
    gradients are zeros: 3 * sequences + 2 in all, less the empty ones.

    Args:
        pitch: tokens from a row of keys to the next. Where that is more than ``kv_len``, as in a
            (batch, kv_heads, kv_len, head_dim) tensor, what lies between two rows of one head are
            the other heads, and counts as padding.
    """
    sequences = _of(plan)
    q_start, q_length = _queries_in_place(plan, pack_queries)
    cu_q = _alternating(sequences.row * plan.q_len + q_start, q_length, plan.batch * plan.q_len)
    k_start = sequences.row * pitch + sequences.k_start
    total_k = (plan.batch - 1) * pitch + plan.kv_len
    cu_k = _alternating(k_start, sequences.k_length, total_k)
    used_k = gaps = None
    if used_keys:
        used = np.zeros(2 * len(sequences) + 1, dtype=np.int64)
        used[1::2] = sequences.k_length
        tails = _tails(plan, pitch)
        cleared = np.concatenate([tails, np.zeros_like(tails)], axis=1)
        parts = _uploaded([cu_q, cu_k, used, cleared.reshape(-1)], plan.device)
        used_k = parts[2]
        gaps = _table(parts[3])
    else:
        # Each gap ends twice: first for the queries, then for the keys.
        cu_q = np.insert(cu_q, np.arange(2, len(cu_q) + 1, 2), cu_q[1::2])
        cu_k = np.insert(cu_k, np.arange(1, len(cu_k), 2), cu_k[:-1:2])
        filled = np.append(True, (np.diff(cu_q) > 0) | (np.diff(cu_k) > 0))
        cu_q, cu_k = cu_q[filled], cu_k[filled]
        parts = _uploaded([cu_q, cu_k], plan.device)
    return VarlenLayout(
        cu_seqlens_q=parts[0],
        cu_seqlens_k=parts[1],
        # Padding too has to be written; and 1 would mean exactly one query per sequence.
        max_seqlen_q=max(2, int(np.diff(cu_q).max())),
        # The gradients of the padding's keys have to be written too.
        max_seqlen_k=max(1, int((sequences.k_length if used_keys else np.diff(cu_k)).max())),
        total_q=plan.batch * plan.q_len,
        total_k=total_k,
        used_k=used_k,
        gaps=gaps,
    )


def used_layout(plan: Plan, pack_queries: bool, pitch: int) -> VarlenLayout:
    """The layout of the padded tensors for kernels that are told the queries and keys in use.

    A sequence reaches from its first token to that of the next one, and its first tokens are used.
    Kernels write the outputs of those alone.

    Args:
        pitch: as in :func:`in_place_layout`.
    """
    sequences = _of(plan)
    first, q_length = _queries_in_place(plan, pack_queries)
    q_start = sequences.row * plan.q_len + first
    k_start = sequences.k_start + sequences.row * pitch
    total_q, total_k = plan.batch * plan.q_len, (plan.batch - 1) * pitch + plan.kv_len
    tails = _tails(plan, pitch)
    unwritten = _gaps(q_start, q_length, np.arange(plan.batch) * plan.q_len, plan.q_len)
    cleared = np.zeros((max(len(tails), len(unwritten)), 4), dtype=np.int64)
    cleared[: len(tails), :2] = tails
    cleared[: len(unwritten), 2:] = unwritten
    cu_q, cu_k = np.append(q_start, total_q), np.append(k_start, total_k)
    arrays = [cu_q, cu_k, q_length, sequences.k_length, cleared.reshape(-1)]
    parts = _uploaded(arrays, plan.device)
    return VarlenLayout(
        cu_seqlens_q=parts[0],
        cu_seqlens_k=parts[1],
        # 1 would mean exactly one query per sequence.
        max_seqlen_q=max(2, int(q_length.max(initial=0))),
        max_seqlen_k=max(1, int(sequences.k_length.max(initial=0))),
        total_q=total_q,
        total_k=total_k,
        used_q=parts[2],
        used_k=parts[3],
        gaps=_table(parts[4]),
        longest_gap=int((unwritten[:, 1] - unwritten[:, 0]).max(initial=0)),
    )


def key_bounds(plan: Plan) -> KeyBounds:
    """Where the keys of each row begin and end, for kernels that take offsets into a cache."""
    sequences = _of(plan)
    if not sequences.contiguous or len(sequences) != plan.batch:
        raise ValueError("only rows of one sequence without holes have two bounds")
    start, end = _uploaded([sequences.k_start, sequences.k_start + sequences.k_length], plan.device)
    return KeyBounds(start, end)


def sequence_bounds(plan: Plan, pack_queries: bool) -> SequenceBounds:
    """Where sequences without holes lie, for kernels that look it up themselves.

    ``pack_queries`` False computes every query of a row, padding included.
    """
    sequences = _of(plan)
    q_start, q_length = _queries_in_place(plan, pack_queries)
    written = q_length if plan.is_packed else np.full_like(q_length, plan.q_len)
    facts = (sequences.row, q_start, q_length, sequences.k_start, sequences.k_length, written)
    return SequenceBounds(upload(np.stack(facts), plan.device), int(written.max(initial=0)))


def _queries_in_place(plan: Plan, pack_queries: bool) -> tuple[IntArray, IntArray]:
    """The first query of each sequence and their number, all of a row unless they are packed."""
    sequences = _of(plan)
    if not sequences.contiguous:
        raise ValueError("tokens with holes between them cannot be read in place")
    if pack_queries:
        return sequences.q_start, sequences.q_length
    return np.zeros_like(sequences.q_start), np.full_like(sequences.q_length, plan.q_len)


def upload(values: IntArray, device: torch.device) -> torch.Tensor:
    """Host integers as an int32 tensor on ``device``, without waiting for the device."""
    tensor = torch.from_numpy(values.astype(np.int32))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _of(plan: Plan) -> Sequences:
    if plan.sequences is None:
        raise ValueError("a plan made from a dense mask has no variable-length layout")
    return plan.sequences


def _alternating(start: IntArray, length: IntArray, total: int) -> IntArray:
    """Bounds of gap, sequence, gap, ..., gap over ``total`` tokens."""
    bounds = np.empty(2 * len(start) + 2, dtype=np.int64)
    bounds[0], bounds[-1] = 0, total
    bounds[1:-1:2] = start
    bounds[2:-1:2] = start + length
    return bounds


def _gaps(start: IntArray, length: IntArray, rows: IntArray, width: int) -> IntArray:
    """(gaps, 2), first and last place of what lies before, between and behind sequences of rows."""
    first = np.sort(np.concatenate([rows, start + length]))
    last = np.sort(np.concatenate([start, rows + width]))
    gaps: IntArray = np.stack([first, last], axis=1)[last > first]
    return gaps


def _tails(plan: Plan, pitch: int) -> IntArray:
    """(gaps, 2), first and last place of the padding of keys that tiles may reach into.

    A tile that reaches beyond its sequence enters a gap at its first place, and goes no further
    into it than a tile.
    """
    sequences = _of(plan)
    start = sequences.row * pitch + sequences.k_start
    gaps = _gaps(start, sequences.k_length, np.arange(plan.batch) * pitch, plan.kv_len)
    gaps[:, 1] = np.minimum(gaps[:, 1], gaps[:, 0] + LONGEST_TILE)
    return gaps


def _table(places: torch.Tensor) -> torch.Tensor | None:
    return places.view(-1, 4) if len(places) else None


def _uploaded(arrays: Items[IntArray], device: torch.device) -> tuple[torch.Tensor, ...]:
    together = upload(np.concatenate(arrays), device)
    return torch.split(together, [len(array) for array in arrays])


def _token_index(
    plan: Plan, offset: torch.Tensor, length: torch.Tensor, total: int, *, queries: bool
) -> torch.Tensor:
    if _of(plan).contiguous:
        # output_size keeps repeat_interleave from asking the device how long it gets.
        index = offset.repeat_interleave(length, output_size=total)
        return (index + torch.arange(total, dtype=torch.int32, device=plan.device)).long()
    real = plan.real_keys()
    assert real is not None
    if queries:
        real = real[:, plan.shift : plan.shift + plan.q_len]
    elif plan.visible < plan.kv_len:
        real = torch.nn.functional.pad(real, (0, plan.kv_len - plan.visible))
    return torch.nonzero_static(real.reshape(-1), size=total).squeeze(1)


def _cumulative(lengths: IntArray) -> IntArray:
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result
