"""One batch on its way through a stack without its padding: tokens, positions, masks and cache."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from . import moves
from .layouts import Sequences
from .mask import PlanMask
from .packing import recorded, scatter
from .plan import Padding, Plan

#: Arguments of a layer with a value per token, that are packed as the tokens are.
_PER_TOKEN = frozenset({"position_ids", "position_embeddings"})
#: Tensors that models hand through their layers to nobody, or that say nothing of single tokens.
_LEFT_ALONE = frozenset({"cache_position", "labels", "num_items_in_batch", "shift_labels"})
_CACHES = (DynamicCache, StaticCache)
_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class Packing:
    """Takes the real tokens of a padded batch out and puts them back.

    All layers of a forward share one. Nothing is read from the device: the indices are made from
    the numbers that the plan holds on the host.

    Args:
        plan: the facts about the padded batch, queries and keys aligned.
    """

    def __init__(self, plan: Plan) -> None:
        # The plan knows how its stack runs, and this one with it: it must not wait for the garbage
        # collector, which its tensors on the device would wait for too.
        self._plan = weakref.ref(plan)
        self._sequences = plan.sequences
        self.batch = plan.batch
        self.length = plan.q_len
        self.total = plan.real_q
        self._indices: dict[tuple[torch.device, bool], torch.Tensor] = {}
        self._inverse: dict[torch.device, torch.Tensor] = {}
        self._packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[Plan, torch.dtype], PlanMask] = {}
        self._last: weakref.ref[torch.Tensor] | None = None

    def is_padded(self, states: torch.Tensor) -> bool:
        """Whether a tensor has the (batch, length, ...) of the padded tokens."""
        return states.shape[:2] == (self.batch, self.length)

    def is_packed(self, states: torch.Tensor) -> bool:
        """Whether a tensor has the (1, total, ...) of the packed tokens, fewer than the padded."""
        return states.ndim > 2 and states.shape[:2] == (1, self.total)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) tokens to (1, total, ...) real ones."""
        index = self._index(states.device)
        return states.flatten(0, 1).index_select(0, index).unsqueeze(0)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """(1, total, ...) real tokens to (batch, length, ...), zeros at padding."""
        index, device = self._index(states.device), states.device
        tokens = states.reshape(self.total, 1, -1)
        padded = scatter(tokens, index, self.batch, self.length, self._sources(device))
        padded = padded.view(self.batch, self.length, *states.shape[2:])
        self._last = weakref.ref(padded)
        return padded

    def unpack_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(1, heads, total, dim) real tokens to (batch, heads, length, dim), zeros at padding."""
        heads, _, dim = states.shape[1:]
        shape = (self.batch, heads, self.length, dim)
        tokens, device = states.transpose(1, 2), states.device
        sources = self._sources(device)
        if sources is not None and not recorded(states):
            padded = states.new_empty(shape)
            if moves.moved(tokens, sources, padded.transpose(1, 2)):
                return padded
        padded = states.new_zeros(shape)
        index = self._index(device)
        rows, places = index // self.length, self._index(device, within_row=True)
        padded.transpose(1, 2)[rows, places] = tokens[0]
        return padded

    def has_unpacked(self, states: torch.Tensor) -> bool:
        """Whether a tensor is the one that was unpacked last: it holds zeros at padding."""
        return self._last is not None and self._last() is states

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of (1 or batch, length, ...) that all layers get, packed once for all."""
        known = self._packed.get(id(values))
        # The entry holds its tensor, so the id cannot be another tensor's by now.
        if known is None:
            if values.shape[0] == self.batch:
                packed = self.pack(values)
            else:
                packed = values.index_select(1, self._index(values.device, within_row=True))
            known = self._packed[id(values)] = (values, packed)
        return known[1]

    def mask(self, packed: Plan, dtype: torch.dtype) -> PlanMask:
        """The mask of the packed tokens, one for all layers."""
        known = self._masks.get((packed, dtype))
        if known is None:
            known = self._masks[packed, dtype] = PlanMask(packed, dtype)
        return known

    def _sources(self, device: torch.device) -> torch.Tensor | None:
        """(batch * length,) which real token belongs to each place; None if nobody can use it."""
        if torch.compiler.is_compiling() or moves.unavailable(device) is not None:
            return None
        sources = self._inverse.get(device)
        if sources is None:
            plan = self._plan()
            if plan is not None and plan.device == device:
                sources = plan.sources(True)
            else:
                sources = moves.sources(self._index(device), self.batch * self.length)
            self._inverse[device] = sources
        return sources

    def _index(self, device: torch.device, within_row: bool = False) -> torch.Tensor:
        """(total,) places of the real tokens among the padded ones, or in their rows."""
        index = self._indices.get((device, within_row))
        if index is None:
            if within_row:
                index = self._index(device) % self.length
            elif self._indices:
                # The first one is of places, and outlives the plan.
                index = next(iter(self._indices.values())).to(device)
            else:
                plan = self._plan()
                assert plan is not None
                index = plan.varlen(True).q_index
                assert index is not None
                index = index.to(device)
            self._indices[device, within_row] = index
        return index

    def covers(self, plan: Plan) -> bool:
        """Whether another plan of this forward has its padding in the same places."""
        mine, others = self._sequences, plan.sequences
        if (plan.batch, plan.q_len, plan.real_q) != (self.batch, self.length, self.total):
            return False
        if mine is None or others is None:
            return False
        # Where the real tokens between the first and the last one lie, sequences do not say.
        if not (mine.contiguous and others.contiguous):
            return False
        return bool(
            np.array_equal(mine.q_start, others.q_start)
            and np.array_equal(mine.q_length, others.q_length)
        )


def packed_plan(plan: Plan) -> Plan:
    """The plan of the real tokens of a padded batch in one row, (1, total)."""
    sequences = plan.sequences
    assert sequences is not None
    lengths = sequences.q_length[sequences.q_length > 0]
    total = int(lengths.sum())
    row = None
    if len(lengths) > 1:
        starts = np.cumsum(lengths) - lengths
        row = Sequences(np.zeros_like(starts), starts, lengths, starts, lengths)
    packed = Plan(1, total, total, plan.pattern, plan.device, window=plan.window, packed=row)
    packed.settings = plan.settings
    if len(lengths) == plan.batch:
        packed.with_padding = weakref.ref(plan)
    return packed


def plan_refusal(plan: Plan) -> str | None:
    """Why the tokens of a batch cannot, or need not, be packed around the layers."""
    if plan.padding is Padding.UNKNOWN:
        return "the mask is known only as a dense tensor"
    if plan.is_packed:
        return "the batch is packed already"
    if plan.q_len == 1:
        return "a single token per sequence"
    if not plan.is_aligned:
        return "there are earlier tokens in the cache"
    if not plan.is_padded:
        return "no padding"
    if plan.real_q == 0:
        return "no real token in the batch"
    if plan.padding is Padding.HOLES and plan.window_matters:
        return "a window cannot be packed across holes in the mask"
    return None


def argument_refusal(packing: Packing, values: dict[str, Any]) -> str | None:
    """Why a layer's arguments cannot be packed; what is not positively known is refused."""
    for name, value in values.items():
        if value is None or isinstance(value, bool | int | float | str | PlanMask):
            continue
        if isinstance(value, Cache):
            if type(value) not in _CACHES or any(
                type(layer) not in _CACHE_LAYERS for layer in value.layers
            ):
                return f"a cache of class {type(value).__name__} is not known"
            continue
        if name in _LEFT_ALONE:
            continue
        parts: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
        if name in _PER_TOKEN and all(_is_per_token(packing, part) for part in parts):
            continue
        return f"the layers get {name}, which cannot be packed"
    return None


class UnpackableError(Exception):
    """A layer got an argument that the first layer did not get, and that cannot be packed."""


def pack_argument(packing: Packing, name: str, value: Any) -> Any:
    """An argument of a layer for the packed tokens, other than hidden states and mask.

    Raises:
        UnpackableError: a tensor that nothing is known about.
    """
    if name in _PER_TOKEN:
        if isinstance(value, torch.Tensor):
            return packing.shared(value)
        return tuple(packing.shared(part) for part in value)
    if isinstance(value, Cache):
        return _padded_view(value, packing)
    if isinstance(value, torch.Tensor) and name not in _LEFT_ALONE:
        raise UnpackableError(name)
    return value


def _is_per_token(packing: Packing, value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim in (2, 3)
        and value.shape[0] in (1, packing.batch)
        and value.shape[1] == packing.length
    )


# -- the cache -------------------------------------------------------------------------------------


def _padded_view(cache: Cache, packing: Packing) -> Any:
    """The same cache for layers that see packed tokens: it keeps them in the padded layout."""
    view: Any = object.__new__(_view_class(type(cache)))  # type: ignore[arg-type]
    view.__dict__ = cache.__dict__
    view._packing = packing
    return view


@functools.cache
def _view_class(cache_class: Any) -> Any:
    def update(
        self: Any,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (1, kv_heads, total, dim) states as (batch, kv_heads, length, dim)."""
        padded = [self._packing.unpack_heads(states) for states in (key_states, value_states)]
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if type(layer) is DynamicLayer and not self.offloading and not layer.get_seq_length():
            # What the layer would do, less the copy of tensors that nobody else has.
            if not layer.is_initialized:
                layer.lazy_initialization(*padded)
            layer.keys, layer.values = padded
        else:
            cache_class.update(self, *padded, layer_idx, *args, **kwargs)
        return key_states, value_states

    # What the view adds lies in a slot: its __dict__ is that of the cache.
    members = {"__slots__": ("_packing",), "update": update}
    return type(f"Padded{cache_class.__name__}", (cache_class,), members)
