"""What one mask says about one batch, measured once per forward and used by every layer.

A :class:`Plan` is immutable as far as its facts go. It derives what kernels need (packing indices,
cumulative lengths, the dense mask) on first use and keeps it, so that the layers of a forward share
it. Values are read from the device when a plan is made, in one copy, and never afterwards.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IntArray = np.ndarray[Any, np.dtype[np.int64]]
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
    None means that all tokens are taken in order and nothing has to be gathered.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    total_q: int
    total_k: int
    q_index: torch.Tensor | None
    k_index: torch.Tensor | None


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
        real_on_device: the same on ``device``; needed only if ``real`` has holes.
        packed: (batch, q_len) True where a new sequence starts, on the host, for batches that hold
            several sequences in a row.
        dense: makes the (batch, 1, q_len, kv_len) boolean mask, True where a query sees a key.
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
        packed: BoolArray | None = None,
        dense: Callable[[], torch.Tensor | None] | None = None,
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
        self._dense = dense
        self._given = given
        self._real_on_device = real_on_device
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
            self._sequences = _packed_sequences(packed)
        elif real is not None:
            real = real[:, : self.visible]
            if not real.all():
                self.padding, self._sequences = self._padded_sequences(real)
                self.real_q = int(self._sequences.q_length.sum())
                self.real_k = int(self._sequences.k_length.sum())
                if self.padding is Padding.HOLES:
                    self._real_host = real
        self._derived: dict[Any, Any] = {}
        self._twins: dict[torch.device, Plan] = {device: self}
        #: Choices already made for the layers of this forward, see ``integration``.
        self.decisions: dict[Any, Any] = {}
        #: What the caller had set when the forward began, see ``control``.
        self.settings: Any = None
        #: Plans of packed batches by the tensor that shows the sequences, see ``integration``.
        self.packings: dict[int, tuple[torch.Tensor, Plan]] = {}
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
        return self.window < self.visible if self.is_causal else self.window < self.kv_len - 1

    @property
    def padding_share(self) -> float:
        """Share of the (visible) keys that are padding, 0 to 1."""
        total = self.batch * self.visible
        return 1.0 - self.real_k / total if self.is_padded and total else 0.0

    def attended_pairs(self, pack_queries: bool) -> int:
        """Number of (query, key) pairs among real tokens that the pattern lets through.

        ``pack_queries`` False counts every query, padding included.
        """
        key = ("pairs", pack_queries)
        if key not in self._derived:
            if self.sequences is None:
                pairs = self.batch * self.q_len * self.kv_len
            else:
                lengths_k = self.sequences.k_length
                lengths_q = (
                    self.sequences.q_length if pack_queries else np.full_like(lengths_k, self.q_len)
                )
                pairs = int(_pairs(lengths_q, lengths_k, self.is_causal, self.window))
            self._derived[key] = pairs
        return int(self._derived[key])

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

    def dense_mask(self) -> torch.Tensor | None:
        """(batch, 1, q_len, kv_len) boolean, True where a query sees a key; None if all are seen.

        For a plan that was made from a caller's own mask, that mask (boolean or additive float).
        """
        if self._given is not None:
            return self._given
        if "dense" not in self._derived:
            self._derived["dense"] = self._dense() if self._dense is not None else self._build()
        mask = self._derived["dense"]
        assert mask is None or isinstance(mask, torch.Tensor)
        return mask

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The dense mask as eager attention adds it: 0 where seen, else the dtype's minimum."""
        mask = self.dense_mask()
        if mask is None or mask.dtype != torch.bool:
            return mask
        key = ("additive", dtype)
        if key not in self._derived:
            zero = torch.zeros((), dtype=dtype, device=mask.device)
            self._derived[key] = torch.where(mask, zero, torch.finfo(dtype).min)
        additive = self._derived[key]
        assert isinstance(additive, torch.Tensor)
        return additive

    def varlen(self, pack_queries: bool) -> VarlenLayout:
        """The layout of the real tokens for a variable-length kernel.

        ``pack_queries`` False keeps every query of a row, padding included, as one sequence of
        ``q_len``: what cross-attention needs, whose mask speaks of the keys alone.
        """
        key = ("varlen", pack_queries)
        if key not in self._derived:
            self._derived[key] = self._varlen(pack_queries)
        layout = self._derived[key]
        assert isinstance(layout, VarlenLayout)
        return layout

    def on(self, device: torch.device) -> Plan:
        """This plan with its tensors on ``device``; made once per device."""
        twin = self._twins.get(device)
        if twin is None:
            twin = object.__new__(Plan)
            twin.__dict__.update(self.__dict__)
            twin.device = device
            twin._derived = {k: v for k, v in self._derived.items() if k[0] == "pairs"}
            twin.decisions = {}
            twin.packings = {}
            source = self
            twin._dense = lambda: _moved(source.dense_mask(), device)
            twin._given = _moved(self._given, device)
            twin._real_on_device = _moved(self._real_on_device, device)
            self._twins[device] = twin
        return twin

    # -- making ----------------------------------------------------------------------------------

    def _padded_sequences(self, real: BoolArray) -> tuple[Padding, Sequences]:
        rows = np.arange(self.batch, dtype=np.int64)
        width = real.shape[1]
        length = np.count_nonzero(real, axis=1).astype(np.int64)
        start = real.argmax(axis=1).astype(np.int64)
        end = width - real[:, ::-1].argmax(axis=1).astype(np.int64)
        empty = length == 0
        end[empty] = start[empty] = 0
        contiguous = bool((end - start == length).all())
        # A query is real where the key at its own position is.
        q_start = np.maximum(start, self.shift)
        q_length = np.maximum(end - q_start, 0)
        if not contiguous:
            q_length = np.count_nonzero(real[:, self.shift :], axis=1).astype(np.int64)
        if not self.is_causal and self.q_len != self.kv_len:
            # Keys of another length than the queries: the mask says nothing about the queries.
            q_start, q_length = np.zeros_like(start), np.full_like(length, self.q_len)
        if not contiguous:
            padding = Padding.HOLES
        elif bool((start == 0).all()):
            padding = Padding.RIGHT
        elif bool((end[~empty] == width).all()):
            padding = Padding.LEFT
        else:
            padding = Padding.BOTH
        return padding, Sequences(rows, q_start - self.shift, q_length, start, length, contiguous)

    def _varlen(self, pack_queries: bool) -> VarlenLayout:
        sequences = self.sequences
        if sequences is None:
            raise ValueError("a plan made from a dense mask has no variable-length layout")
        q_length = sequences.q_length
        if not pack_queries:
            q_length = np.full_like(sequences.k_length, self.q_len)
        cu_q, cu_k = _cumulative(q_length), _cumulative(sequences.k_length)
        # A sequence's first place among the padded tokens, less that among the packed ones.
        offset_q = sequences.row * self.q_len + sequences.q_start - cu_q[:-1]
        offset_k = sequences.row * self.kv_len + sequences.k_start - cu_k[:-1]
        total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
        uploaded = upload(
            np.concatenate([cu_q, cu_k, offset_q, offset_k, q_length, sequences.k_length]),
            self.device,
        )
        n = len(sequences)
        parts = torch.split(uploaded, [n + 1, n + 1, n, n, n, n])
        q_index = k_index = None
        if pack_queries and total_q != self.batch * self.q_len:
            q_index = self._token_index(parts[2], parts[4], total_q, queries=True)
        if total_k != self.batch * self.kv_len:
            k_index = (
                q_index
                if q_index is not None and self.is_aligned and self.q_len == self.kv_len
                else self._token_index(parts[3], parts[5], total_k, queries=False)
            )
        longest_q = int(q_length.max(initial=0))
        if longest_q == 1 and total_q != n:
            # FlashAttention-2 takes a longest query of 1 for exactly one query per sequence.
            longest_q = 2
        return VarlenLayout(
            cu_seqlens_q=parts[0],
            cu_seqlens_k=parts[1],
            max_seqlen_q=longest_q,
            max_seqlen_k=int(sequences.k_length.max(initial=0)),
            total_q=total_q,
            total_k=total_k,
            q_index=q_index,
            k_index=k_index,
        )

    def _token_index(
        self, offset: torch.Tensor, length: torch.Tensor, total: int, *, queries: bool
    ) -> torch.Tensor:
        assert self.sequences is not None
        if self.sequences.contiguous:
            # output_size keeps repeat_interleave from asking the device how long it gets.
            index = offset.repeat_interleave(length, output_size=total)
            return (index + torch.arange(total, dtype=torch.int32, device=self.device)).long()
        real = self._real_on_device
        if real is None:
            assert self._real_host is not None
            real = torch.from_numpy(self._real_host).to(self.device)
        real = real[:, : self.visible]
        if queries:
            real = real[:, self.shift : self.shift + self.q_len]
        elif self.visible < self.kv_len:
            real = torch.nn.functional.pad(real, (0, self.kv_len - self.visible))
        return torch.nonzero_static(real.reshape(-1), size=total).squeeze(1)

    def _build(self) -> torch.Tensor | None:
        """The dense mask from the facts alone, for plans that no mask function made."""
        assert self.sequences is not None
        sequences = self.sequences
        if self.is_packed:
            ids = torch.from_numpy(np.repeat(np.arange(len(sequences)), sequences.q_length))
            ids = ids.view(self.batch, self.q_len).to(self.device)
            mask = ids[:, None, :, None] == ids[:, None, None, :]
        elif self.pattern is Pattern.BIDIRECTIONAL and not self.is_padded and self.window is None:
            return None
        else:
            keys = torch.arange(self.kv_len, device=self.device)
            start = upload(sequences.k_start, self.device)[:, None]
            end = start + upload(sequences.k_length, self.device)[:, None]
            mask = ((keys >= start) & (keys < end))[:, None, None, :]
        return mask & local_mask(
            self.q_len, self.kv_len, self.shift, self.is_causal, self.window, self.device
        )


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


def _packed_sequences(starts: BoolArray) -> Sequences:
    """Sequences of a (batch, length) array that is True where a sequence begins."""
    starts = starts.copy()
    starts[:, 0] = True
    row, start = (axis.astype(np.int64) for axis in starts.nonzero())
    flat = row * starts.shape[1] + start
    length = np.diff(flat, append=starts.size)
    return Sequences(row, start, length, start, length)


def _pairs(q: IntArray, k: IntArray, causal: bool, window: int | None) -> int:
    """Attended pairs of sequences whose last query stands at the last key."""
    full = q * k
    if causal:
        full = full - q * (q - 1) // 2
        if window is not None:
            # Query j (from the end) has k - j keys before the window cuts them to `window`.
            over = np.maximum(k - window, 0)
            first = np.maximum(over - q, 0)
            full = full - (over * (over + 1) // 2 - first * (first + 1) // 2)
    elif window is not None:
        full = np.minimum(full, q * (2 * window + 1))
    return int(full.sum())


def _cumulative(lengths: IntArray) -> IntArray:
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def upload(values: IntArray, device: torch.device) -> torch.Tensor:
    """Host integers as an int32 tensor on ``device``, without waiting for the device."""
    tensor = torch.from_numpy(values.astype(np.int32))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
