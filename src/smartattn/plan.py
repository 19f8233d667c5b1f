"""What one mask says about one batch, measured once per forward and used by every layer.

A :class:`Plan` is immutable as far as its facts go. It derives what kernels need (packing indices,
cumulative lengths, the dense mask) on first use and keeps it, so that the layers of a forward share
it. Values are read from the device when a plan is made, in one copy, and never afterwards.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from . import dense, moves
from .layouts import (
    IntArray,
    KeyBounds,
    SequenceBounds,
    Sequences,
    VarlenLayout,
    in_a_row,
    in_place_layout,
    key_bounds,
    packed_layout,
    sequence_bounds,
    used_layout,
)

T = TypeVar("T")
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


class Pattern(enum.Enum):
    """Which keys a query may see, padding aside."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    #: Anything else: known only as a dense mask.
    OTHER = "other"


class Padding(enum.Enum):
    """Where the padding of a batch lies, over all of its sequences."""

    NONE = "none"
    RIGHT = "right"
    LEFT = "left"
    BOTH = "both"
    #: Padding between real tokens.
    HOLES = "holes"
    #: Not measured: the plan holds a dense mask.
    UNKNOWN = "unknown"


class Plan:
    """Facts about one batch under one mask.

    Args:
        batch, q_len, kv_len: shape of the mask, in tokens.
        pattern: which keys a query sees.
        device: where the tensors of the forward are.
        shift: key index that query 0 stands at: query ``i`` sees key ``j`` only if
            ``j <= i + shift`` (causal), the number of tokens already in the cache.
        window: causal: a query sees its own and the ``window - 1`` keys before it; bidirectional:
            the keys at a distance of at most ``window``. None for no window.
        real: (batch, kv_len) True where a key is a real token, on the host; None if all are.
        real_on_device: the same on ``device``, which saves the upload where a mask is built; it is
            copied, since it may be the caller's own, who may fill it anew.
        packed: for batches that hold several sequences in a row, where these lie, or (batch, q_len)
            True where a new one starts, on the host.
        given: for the pattern ``OTHER``, the mask itself: boolean (True where a query sees a key)
            or additive, broadcasting to (batch, heads, q_len, kv_len); None if all is seen.
    """

    def __init__(
        self,
        batch: int,
        q_len: int,
        kv_len: int,
        pattern: Pattern,
        device: torch.device,
        *,
        shift: int = 0,
        window: int | None = None,
        real: BoolArray | None = None,
        real_on_device: torch.Tensor | None = None,
        packed: BoolArray | Sequences | None = None,
        given: torch.Tensor | None = None,
    ) -> None:
        self.batch = batch
        self.q_len = q_len
        self.kv_len = kv_len
        self.pattern = pattern
        self.device = device
        self.shift = shift
        self.window = window
        self.is_packed = packed is not None
        self._given = given
        self._real_on_device: torch.Tensor | None = None
        #: Keys that some query may see: a static cache is longer than what it holds.
        self.visible = min(kv_len, q_len + shift) if pattern is Pattern.CAUSAL else kv_len
        self._real_host: BoolArray | None = None
        self._sequences: Sequences | None = None
        self.padding = Padding.NONE
        #: Real queries and (visible) real keys of the batch; 0 for a dense mask.
        self.real_q = batch * q_len
        self.real_k = batch * self.visible
        if pattern is Pattern.OTHER:
            self.padding = Padding.UNKNOWN
            self.real_q = self.real_k = 0
        elif packed is not None:
            if not isinstance(packed, Sequences):
                packed = _packed_sequences(packed)
            self._sequences = packed
        elif real is not None:
            real = real[:, : self.visible]
            if not real.all():
                self.padding, self._sequences = self._padded_sequences(real)
                self.real_q = int(self._sequences.q_length.sum())
                self.real_k = int(self._sequences.k_length.sum())
                if real_on_device is None:
                    self._real_host = real
                else:
                    self._real_on_device = real_on_device.clone()
        self._derived: dict[Any, Any] = {}
        #: This plan on other devices, and the one whose twin this is. Neither waits for the garbage
        #: collector, which knows nothing of a device's memory.
        self._twins: dict[torch.device, Plan] = {}
        self._origin: weakref.ref[Plan] | None = None
        #: Choices already made for the layers of this forward, see ``integration``.
        self.decisions: dict[Any, Any] = {}
        #: What the caller had set when the forward began, see ``control``.
        self.settings: Any = None
        #: Other forwards may have this plan too, see ``shared_plans``; and whether one of them had
        #: to go on with a copy of its own.
        self.is_shared = False
        self.was_left = False
        #: What was chosen under an earlier plan of the same mask, without what it was bound to.
        self.chosen: dict[Any, Any] = {}
        #: Plans of packed batches by what shows the sequences, see ``arguments``.
        self.packings: dict[tuple[int, int], Any] = {}
        #: The plan of the same sequences with padding between them, which may have their bounds on
        #: the device already. It knows this one, and must not wait for the garbage collector.
        self.with_padding: weakref.ref[Plan] | None = None
        #: How a padding-free stack runs under this plan, see ``padding_free``.
        self.stack: Any = None

    # -- facts -----------------------------------------------------------------------------------

    @property
    def sequences(self) -> Sequences | None:
        """Where the real tokens of each sequence lie; None for a dense mask."""
        if self._sequences is None and self.pattern is not Pattern.OTHER:
            zeros = np.zeros(self.batch, dtype=np.int64)
            self._sequences = Sequences(
                np.arange(self.batch, dtype=np.int64),
                zeros,
                np.full(self.batch, self.q_len, dtype=np.int64),
                zeros,
                np.full(self.batch, self.visible, dtype=np.int64),
            )
        return self._sequences

    @property
    def is_padded(self) -> bool:
        """Some key is not a real token."""
        return self.padding not in (Padding.NONE, Padding.UNKNOWN)

    @property
    def is_uniform(self) -> bool:
        """The rows' real tokens lie all at the same places, in a row."""
        if not self.is_padded:
            return not self.is_packed and self.pattern is not Pattern.OTHER
        return self._derive(("uniform",), self._uniform)

    @property
    def is_causal(self) -> bool:
        """A query sees nothing that comes after it."""
        return self.pattern is Pattern.CAUSAL

    @property
    def is_aligned(self) -> bool:
        """Query ``i`` and key ``i`` are the same position."""
        return self.shift == 0 and self.q_len == self.visible

    @property
    def window_matters(self) -> bool:
        """The window hides a key that the pattern alone would show."""
        if self.window is None:
            return False
        if self.is_causal:
            return self.window < self.visible
        return self.window < max(self.shift + self.q_len - 1, self.kv_len - 1 - self.shift)

    @property
    def padding_share(self) -> float:
        """Share of the (visible) keys that are padding, 0 to 1."""
        total = self.batch * self.visible
        return 1.0 - self.real_k / total if self.is_padded and total else 0.0

    def attended_pairs(self, pack_queries: bool) -> int:
        """Number of (query, key) pairs among real tokens that the pattern lets through.

        ``pack_queries`` False counts every query, padding included. All pairs without
        :attr:`sequences`.
        """
        if self.sequences is None:
            return self.batch * self.q_len * self.kv_len
        return self.tiled_pairs(pack_queries, 1, 1)

    def tiled_pairs(self, pack_queries: bool, rows: int, columns: int) -> int:
        """Number of (query, key) pairs in the tiles of a kernel that hold an attended pair.

        Each sequence is cut into tiles of ``rows`` queries and ``columns`` keys, of which the last
        ones stick out. ``pack_queries`` False counts every query, padding included. Needs
        :attr:`sequences`.
        """
        key = ("tiles", pack_queries, rows, columns)
        return self._derive(key, lambda: self._tiled_pairs(pack_queries, rows, columns))

    def describe(self) -> dict[str, Any]:
        """The measured facts as plain values, for traces and logs."""
        facts: dict[str, Any] = {
            "batch": self.batch,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "pattern": "packed " + self.pattern.value if self.is_packed else self.pattern.value,
            "window": self.window,
            "padding": self.padding.value,
        }
        if self.sequences is not None:
            facts["sequences"] = len(self.sequences)
            facts["real_tokens"] = self.real_k
            facts["padding_share"] = round(self.padding_share, 4)
            facts["longest"] = int(self.sequences.k_length.max(initial=0))
        return facts

    # -- derived tensors -------------------------------------------------------------------------

    def real_keys(self) -> torch.Tensor | None:
        """(batch, visible) booleans on the device, True where a key is real; None if all are."""
        if not self.is_padded:
            return None
        if self._real_on_device is not None:
            return self._real_on_device[:, : self.visible]
        real = self._real_host
        assert real is not None
        return self._derive(("real",), lambda: torch.from_numpy(real).to(self.device))

    def dense_mask(self) -> torch.Tensor | None:
        """(batch, 1, q_len, kv_len) boolean, True where a query sees a key; None if all are seen.

        For a plan that was made from a caller's own mask, that mask (boolean or additive float).
        """
        seen = self._seen()
        if seen is None or self.pattern is Pattern.OTHER:
            return seen
        return seen.expand(self.batch, 1, self.q_len, self.kv_len)

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The dense mask as eager attention adds it: 0 where seen, else the dtype's minimum."""
        mask = self.dense_mask()
        if mask is None or mask.dtype != torch.bool:
            return mask
        return self._derive(
            ("additive", dtype),
            lambda: torch.where(
                mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min
            ),
        )

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask as SDPA takes it best: additive, with 1 for every dimension it is constant in.

        None if all keys are seen.
        """
        seen = self._seen()
        if seen is None or seen.dtype == dtype:
            return seen
        return self._derive(("bias", dtype), lambda: dense.bias(seen, dtype))

    def varlen(self, pack_queries: bool) -> VarlenLayout:
        """Where the real tokens lie once they are packed, see :func:`layouts.packed_layout`."""
        padded = self.with_padding() if self.with_padding is not None else None
        if padded is not None and padded.device == self.device:
            return self._derive(("varlen", pack_queries), lambda: in_a_row(padded.varlen(True)))
        return self._derive(("varlen", pack_queries), lambda: packed_layout(self, pack_queries))

    def sources(self, pack_queries: bool) -> torch.Tensor:
        """Which packed query belongs to each place, see :func:`moves.sources`.

        Of a batch whose queries :meth:`varlen` packs by index.
        """
        index = self.varlen(pack_queries).q_index
        assert index is not None
        return self._derive(
            ("sources", pack_queries), lambda: moves.sources(index, self.batch * self.q_len)
        )

    def in_place(self, pack_queries: bool, used_keys: bool, pitch: int) -> VarlenLayout:
        """Where they lie in the padded tensors, see :func:`layouts.in_place_layout`."""
        return self._derive(
            ("in place", pack_queries, used_keys, pitch),
            lambda: in_place_layout(self, pack_queries, used_keys, pitch),
        )

    def used(self, pack_queries: bool, pitch: int) -> VarlenLayout:
        """The same for kernels that are told what is used, see :func:`layouts.used_layout`."""
        return self._derive(
            ("used", pack_queries, pitch), lambda: used_layout(self, pack_queries, pitch)
        )

    def sequence_bounds(self, pack_queries: bool) -> SequenceBounds:
        """Where each sequence lies in them, see :func:`layouts.sequence_bounds`."""
        return self._derive(
            ("sequence bounds", pack_queries), lambda: sequence_bounds(self, pack_queries)
        )

    def key_bounds(self) -> KeyBounds:
        """Where the real keys of each row begin and end, see :func:`layouts.key_bounds`."""
        return self._derive(("bounds",), lambda: key_bounds(self))

    def _seen(self) -> torch.Tensor | None:
        if self.pattern is Pattern.OTHER:
            return self._given
        return self._derive(("seen",), lambda: dense.seen(self))

    def _derive(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What ``make`` returns, made once."""
        if key not in self._derived:
            # A mask that is made once may serve inference first and training later.
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False):
                    self._derived[key] = make()
            else:
                self._derived[key] = make()
        value: T = self._derived[key]
        return value

    def on(self, device: torch.device) -> Plan:
        """This plan with its tensors on ``device``; made once per device."""
        if device == self.device:
            return self
        origin = self._origin() if self._origin is not None else None
        if origin is not None:
            return origin.on(device)
        twin = self._twins.get(device)
        if twin is None:
            twin = object.__new__(Plan)
            twin.__dict__.update(self.__dict__)
            twin.device = device
            twin._derived = self._without_tensors()
            twin.decisions, twin.chosen, twin.packings = {}, {}, {}
            twin._given = _moved(self._given, device)
            twin._real_on_device = _moved(self._real_on_device, device)
            twin._twins = {}
            twin._origin = weakref.ref(self)
            self._twins[device] = twin
        return twin

    def own(self) -> Plan:
        """A copy that no other forward has. What was derived and chosen is given up by both."""
        self.was_left = True
        self._derived = self._without_tensors()
        self.decisions = {}
        return self.copy()

    def copy(self) -> Plan:
        """The same facts, with nothing derived that lies on a device, and nothing chosen."""
        copy = object.__new__(Plan)
        copy.__dict__.update(self.__dict__)
        copy._derived = self._without_tensors()
        copy.is_shared = copy.was_left = False
        copy._twins, copy._origin = {}, None
        copy.decisions, copy.chosen, copy.packings = {}, {}, {}
        copy.stack = None
        return copy

    def forget_choices(self) -> None:
        """Has the next layer choose anew."""
        self.decisions.clear()
        self.chosen.clear()

    def _without_tensors(self) -> dict[Any, Any]:
        """Of what was derived, numbers alone."""
        return {k: v for k, v in self._derived.items() if k[0] in ("tiles", "uniform")}

    # -- making ----------------------------------------------------------------------------------

    def _padded_sequences(self, real: BoolArray) -> tuple[Padding, Sequences]:
        rows = np.arange(self.batch, dtype=np.int64)
        width = real.shape[1]
        start, end, length = _bounds(real)
        empty = length == 0
        contiguous = bool((end - start == length).all())
        # A query is real where the key at its own position is.
        q_start = np.maximum(start, self.shift)
        q_length = np.maximum(end - q_start, 0)
        if not contiguous:
            q_length = np.count_nonzero(real[:, self.shift :], axis=1).astype(np.int64)
        if not self.is_causal and self.q_len != self.kv_len:
            # Keys of another length than the queries: the mask says nothing about the queries.
            q_start, q_length = np.full_like(start, self.shift), np.full_like(length, self.q_len)
        if not contiguous:
            padding = Padding.HOLES
        elif bool((start == 0).all()):
            padding = Padding.RIGHT
        elif bool((end[~empty] == width).all()):
            padding = Padding.LEFT
        else:
            padding = Padding.BOTH
        return padding, Sequences(rows, q_start - self.shift, q_length, start, length, contiguous)

    def _uniform(self) -> bool:
        sequences = self.sequences
        if sequences is None or not sequences.contiguous:
            return False
        spans = (sequences.q_start, sequences.q_length, sequences.k_start, sequences.k_length)
        return all(bool((span == span[0]).all()) for span in spans)

    def _tiled_pairs(self, pack_queries: bool, rows: int, columns: int) -> int:
        lengths = self._lengths(pack_queries)
        return count_tiled_pairs(*lengths, self.is_causal, self.window, rows, columns)

    def _lengths(self, pack_queries: bool) -> tuple[IntArray, IntArray]:
        """Queries and keys of each sequence."""
        assert self.sequences is not None
        lengths_k = self.sequences.k_length
        if pack_queries:
            return self.sequences.q_length, lengths_k
        return np.full_like(lengths_k, self.q_len), lengths_k


def _bounds(real: BoolArray) -> tuple[IntArray, IntArray, IntArray]:
    """The first real token of each row, the place behind its last one, and their number.

    Rows without one have 0 for all. The device has nothing to do while this runs: rows padded on
    one side, as nearly all are, take a tenth of the time of others.
    """
    width = real.shape[1]
    count = np.count_nonzero(real)
    zeros = np.zeros(len(real), dtype=np.int64)
    # The first padding token ends a row that begins with a real one.
    end = real.argmin(axis=1).astype(np.int64)
    end[(end == 0) & real[:, 0]] = width
    if end.sum() == count:
        return zeros, end, end
    start = real.argmax(axis=1).astype(np.int64)
    end = np.where(real[np.arange(len(real)), start], width, 0)
    length = end - start
    if length.sum() == count:
        return start, end, length
    length = np.count_nonzero(real, axis=1).astype(np.int64)
    end = width - real[:, ::-1].argmax(axis=1).astype(np.int64)
    end[length == 0] = 0
    return start, end, length


def _packed_sequences(starts: BoolArray) -> Sequences:
    """Sequences of a (batch, length) array that is True where a sequence begins."""
    starts = starts.copy()
    starts[:, 0] = True
    row, start = (axis.astype(np.int64) for axis in starts.nonzero())
    flat = row * starts.shape[1] + start
    length = np.diff(flat, append=starts.size)
    return Sequences(row, start, length, start, length)


def count_tiled_pairs(
    q: IntArray, k: IntArray, causal: bool, window: int | None, rows: int, columns: int
) -> int:
    """:meth:`Plan.tiled_pairs` of sequences whose last query stands at the last key.

    Where there are more queries than keys, the further ones see all keys.
    """
    if rows == columns == 1 and window is None:
        # Every padded forward asks for these.
        fewer = np.minimum(q, k)
        return int((q * k - (fewer * (fewer - 1) // 2 if causal else 0)).sum())
    width, blocks = _tiles(k, columns), _tiles(q, rows)
    tiles = blocks * width
    if causal:
        # Row i of tiles ends at its last query's key, and the last row at the last key.
        shift = np.maximum(k - q, 0)
        last = np.maximum(_tiles(np.minimum(q, k), rows) - 1, 0)
        tiles = _floor_sum(last, rows, shift + rows + columns - 1, columns)
        tiles = tiles + (blocks - last) * width
        if window is not None:
            seen = np.minimum(last + 1, blocks)
            tiles = tiles - _stairs(shift - window + 1, rows, columns, width, seen)
    elif window is not None:
        # Queries that far behind the last key see none.
        q = np.minimum(q, k + window)
        blocks = _tiles(q, rows)
        last = np.maximum(blocks - 1, 0)
        tiles = _stairs(np.full_like(k, window + rows + columns - 1), rows, columns, width, last)
        tiles = tiles + (blocks - last) * np.minimum(width, _tiles(q + window, columns))
        tiles = tiles - _stairs(np.full_like(k, -window), rows, columns, width, blocks)
    return rows * columns * int(tiles.sum())


def _tiles(lengths: IntArray, size: int) -> IntArray:
    return -(-lengths // size)


def _stairs(first: IntArray, step: int, size: int, highest: IntArray, terms: IntArray) -> IntArray:
    """The sum of first // size, (first + step) // size, ..., each between 0 and ``highest``."""
    # numpy's clip takes the host several times as long.
    start = np.minimum(np.maximum(_tiles(-first, step), 0), terms)
    high = np.minimum(np.maximum(_tiles(highest * size - first, step), start), terms)
    rising = _floor_sum(high - start, step, first + step * start, size)
    total: IntArray = rising + (terms - high) * highest
    return total


def _floor_sum(terms: IntArray, step: int, first: IntArray, size: int) -> IntArray:
    """The sum of first // size, (first + step) // size, ... in as many rounds as Euclid needs.

    ``first`` is not negative where there are terms. What is left of a whole number of steps are
    the points under a line, which are counted by columns or, with the axes exchanged, by rows.
    """
    total: IntArray = np.zeros_like(terms)
    while True:
        total = total + terms * (terms - 1) // 2 * (step // size) + terms * (first // size)
        step = step % size
        if step == 0:
            return total
        first = first % size
        last = step * terms + first
        terms = last // size
        if not terms.any():
            return total
        step, size, first = size, step, last % size


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
