"""What a call costs depends on: its regime, and how much work it is and how that is shared.

A regime is what a kernel branches on; the features are amounts of work. Both are functions of the
plan and the call alone, so that fitting and predicting share them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from .backends import Backend
from .backends.flash import bounds_suffice, skipping_pays
from .backends.sdpa import needs_no_mask
from .backends.splitting import Step
from .call import Call
from .packing import packs_queries
from .plan import Padding, Plan, count_tiled_pairs

Mode = Literal["forward", "train", "decode"]
Layout = Literal["plain", "right", "padded", "masked", "packed"]

#: The features in their order, each with its unit. "Dense" counts what the padded tensors hold,
#: "real" what the mask leaves of it, "tiles" the pairs of all tiles that hold one; a "group" is the
#: sequences of a batch that lie alike, which can be cut out of the padded tensors together.
FEATURES: dict[str, str] = {
    "call": "1 per call",
    "groups": "kernel launches if each group of sequences gets its own",
    "gathers": "1 if keys lie as a cache concatenates them and are not all real: rows to collect",
    "sequenced": "1 if rows are told apart as sequences, since padding is not first and last keys",
    "sequences": "10^3 sequences x heads",
    "dense_tiles": "10^6 (query, key) pairs x heads, masked ones included",
    "padded_tiles": "the same without those that a causal kernel spares, if there is no mask",
    "real_tiles": "10^6 (query, key) pairs x heads, those with real tokens in them only",
    "mask_pairs": "10^6 elements of the mask that SDPA is handed, 0 if it needs none",
    "bias_pairs": "10^6 (query, key) pairs x heads that each read an element of the mask, if its "
    "rows differ from query to query",
    "dense_queries": "10^3 query tokens x heads, padding included",
    "real_queries": "10^3 query tokens x heads, real ones only",
    "dense_keys": "10^3 key tokens x kv_heads, padding included",
    "real_keys": "10^3 key tokens x kv_heads, real ones only",
    "concatenated_keys": "real_keys if keys lie as a cache concatenates them, else 0",
    "repeated_keys": "10^3 key tokens x heads that grouped heads add if repeated",
    "repeated_real_keys": "the same for real keys only",
    "longest": "10^3 keys of the longest sequence: what one thread block walks",
    "width": "10^3 keys of the padded tensor: what one thread block walks under a mask",
    "walked": "10^3 keys of the groups one after the other: what the blocks of each group walk",
    "group_tokens": "groups x 10^3 tokens x heads in a backward: gradients of a slice are as large "
    "as the tensor",
    "busiest_keys": "one query per sequence: 10^3 keys that the busiest thread block walks",
    # Starting one and fetching what it needs takes time however few keys there are, which is most
    # of what many short sequences cost; "sequences" counts the heads that share a block, too.
    "blocks": "one query per sequence: 10^3 thread blocks, whose heads share their keys",
    "sequence_tiles": "real_tiles, or padded_tiles of right padding that is not worth skipping",
}

#: Features that the head_dim has no part in.
FIXED = frozenset(
    {*("call", "groups", "gathers", "sequenced", "sequences"), "mask_pairs", "bias_pairs", "blocks"}
)

#: The sizes whose logarithms bend a model, each with the middle of its usual range and half of its
#: width in octaves. Work is not all that counts: how many blocks share it, and how evenly, decides
#: how much of a device is busy.
SIZES: dict[str, tuple[float, float]] = {
    "blocks": (7.0, 3.0),
    "longest": (10.0, 3.0),
    "real_keys": (22.0, 4.0),
    "group": (1.0, 1.5),
    "head_dim": (6.5, 0.5),
    "balance": (-0.5, 0.5),
}
#: Terms of a bend: 1, the sizes, and the products of any two of them.
BEND_TERMS = 1 + len(SIZES) + len(SIZES) * (len(SIZES) + 1) // 2
#: Sizes beyond this many half widths count as that many.
_SIZE_LIMIT = 2.0


class Regime(NamedTuple):
    """What a kernel branches on."""

    #: "train" is forward and backward, "decode" a forward of one query per sequence.
    mode: Mode
    #: "plain": no padding; "right": padding that a causal kernel need not know of; "padded": other
    #: padding; "masked": no padding, but SDPA needs a mask (windows, chunks); "packed": several
    #: sequences in a row.
    layout: Layout
    causal: bool
    #: Name of the dtype, e.g. "bfloat16".
    dtype: str
    #: Larger one of the head dims of query and value.
    head_dim: int


def regime_of(plan: Plan, call: Call) -> Regime | None:
    """The regime of a call; None if the plan knows the mask only as a dense tensor."""
    if plan.sequences is None:
        return None
    mode: Mode = "train" if call.grad else "decode" if call.q_len == 1 else "forward"
    return Regime(
        mode,
        _layout(plan, call),
        plan.is_causal and call.q_len > 1,
        _dtype_name(call.dtype),
        max(call.head_dim, call.value_head_dim),
    )


def _layout(plan: Plan, call: Call) -> Layout:
    if plan.is_packed:
        return "packed"
    if needs_no_mask(plan, call):
        return "right" if plan.is_padded else "plain"
    return "padded" if plan.is_padded else "masked"


_DTYPE_NAMES: dict[torch.dtype, str] = {}


def _dtype_name(dtype: torch.dtype) -> str:
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        name = _DTYPE_NAMES[dtype] = str(dtype).removeprefix("torch.")
    return name


class Kernel(NamedTuple):
    """How a backend's kernel cuts up a call."""

    #: See :meth:`~smartattn.backends.base.Backend.tile`.
    tile: tuple[int, int] = (1, 1)
    #: Thread blocks of a decoding step that the device runs at once; 0 if unknown.
    slots: int = 0
    #: Keys that the busiest of so many blocks walks, see
    #: :meth:`~smartattn.backends.base.Backend.busiest`; only for decoding steps on known devices.
    busiest: Callable[[Plan, Call, int], float] | None = None

    @staticmethod
    def of(backend: Backend, plan: Plan, call: Call, slots: int) -> Kernel:
        """The kernel that a backend runs a call with."""
        tiled = call.q_len > 1 and call.device.type != "cpu"
        tile = backend.tile(plan, call) if tiled else (1, 1)
        return Kernel(tile, slots, backend.busiest if slots and call.q_len == 1 else None)


#: One that counts every pair and knows of no blocks.
_UNCUT = Kernel()


def features(plan: Plan, call: Call, kernel: Kernel = _UNCUT) -> tuple[float, ...]:
    """The amounts of work in a call, in the order and units of :data:`FEATURES`."""
    return _cut_up(_work(plan, call), plan, call, kernel)


class _Work(NamedTuple):
    """What the kernels of all backends have in common."""

    facts: _Facts
    pack_queries: bool
    #: Padding is computed: a causal kernel need not know of it, and skipping does not pay.
    whole: bool
    #: SDPA is handed a mask.
    masked: bool
    #: Amounts in the order of :data:`FEATURES`, without those that depend on the kernel.
    amounts: tuple[float, ...]


def _work(plan: Plan, call: Call) -> _Work:
    pack_queries = packs_queries(plan, call)
    facts = _facts(plan)
    heads, kv_heads, visible = call.heads, call.kv_heads, plan.visible
    queries = call.batch * call.q_len * 1e-3
    keys = call.batch * visible * 1e-3
    real_keys = plan.real_k * 1e-3
    masked = not needs_no_mask(plan, call)
    sequences, rows = _mask_shape(plan, call) if masked else (0, 0)
    whole = plan.is_padded and not masked and not skipping_pays(plan, call)
    padded = plan.is_padded and not whole
    sequenced = padded and (call.grad or not bounds_suffice(plan, call))
    concatenated = not call.token_major_keys
    amounts = {
        "call": 1.0,
        "groups": facts.groups,
        "gathers": 1.0 if concatenated and (plan.is_padded or plan.is_packed) else 0.0,
        "sequenced": 1.0 if sequenced else 0.0,
        "sequences": facts.sequences * heads * 1e-3,
        "mask_pairs": sequences * rows * visible * 1e-6,
        "bias_pairs": queries * heads * visible * 1e-3 if rows > 1 else 0.0,
        "dense_queries": queries * heads,
        "real_queries": plan.real_q * heads * 1e-3 if pack_queries else queries * heads,
        "dense_keys": keys * kv_heads,
        "real_keys": real_keys * kv_heads,
        "concatenated_keys": real_keys * kv_heads if concatenated else 0.0,
        "repeated_keys": keys * (heads - kv_heads),
        "repeated_real_keys": real_keys * (heads - kv_heads),
        "longest": facts.longest * 1e-3,
        "width": visible * 1e-3,
        "walked": facts.walked * 1e-3,
        "group_tokens": facts.groups * (queries * heads + 2 * keys * kv_heads)
        if call.grad
        else 0.0,
    }
    known = tuple(amounts.get(name, 0.0) for name in FEATURES)
    return _Work(facts, pack_queries, whole, masked, known)


def _mask_shape(plan: Plan, call: Call) -> tuple[int, int]:
    """Sequences and rows of a mask, 1 where it is constant in them: see ``dense.seen``."""
    differs = plan.is_packed or plan.window_matters or plan.is_causal
    return call.batch if plan.is_padded or plan.is_packed else 1, call.q_len if differs else 1


_PLACES = {name: place for place, name in enumerate(FEATURES)}


def _cut_up(work: _Work, plan: Plan, call: Call, kernel: Kernel) -> tuple[float, ...]:
    """The amounts with those that depend on the kernel."""
    amounts = list(work.amounts)
    heads, tile = call.heads * 1e-6, kernel.tile
    visible = _rectangle(call.q_len, plan.visible, plan.is_causal, tile) * call.batch * heads
    real = plan.tiled_pairs(work.pack_queries, *tile) * heads
    dense = _rectangle(call.q_len, plan.visible, False, tile) * call.batch * heads
    amounts[_PLACES["dense_tiles"]] = dense
    amounts[_PLACES["padded_tiles"]] = dense if work.masked else visible
    amounts[_PLACES["real_tiles"]] = real
    amounts[_PLACES["sequence_tiles"]] = visible if work.whole else real
    if kernel.busiest is not None:
        amounts[_PLACES["busiest_keys"]] = kernel.busiest(plan, call, kernel.slots) * 1e-3
        amounts[_PLACES["blocks"]] = Step.of(plan, call).blocks * 1e-3
    return tuple(amounts)


@functools.lru_cache(maxsize=4096)
def _rectangle(queries: int, keys: int, causal: bool, tile: tuple[int, int]) -> int:
    return count_tiled_pairs(np.array([queries]), np.array([keys]), causal, None, *tile)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the costs of a call depend on, for all backends that are asked about it in turn."""

    call: Call
    #: None if nothing is known of the call's costs.
    regime: Regime | None
    #: See :func:`bend_terms`.
    terms: tuple[float, ...] = ()
    _work: _Work | None = None
    _amounts: dict[Kernel, tuple[float, ...]] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, call: Call) -> Seen:
        """Looks at a call."""
        regime = regime_of(plan, call)
        if regime is None:
            return Seen(call, None)
        return Seen(call, regime, bend_terms(plan, call), _work(plan, call))

    def amounts(self, plan: Plan, kernel: Kernel) -> tuple[float, ...]:
        """The :func:`features` of the call, which this does not hold together with its plan."""
        found = self._amounts.get(kernel)
        if found is None:
            assert self._work is not None
            found = self._amounts[kernel] = _cut_up(self._work, plan, self.call, kernel)
        return found


class _Facts(NamedTuple):
    sequences: int
    #: Groups of sequences that lie alike, and the sum of their keys per sequence.
    groups: int
    walked: int
    #: Keys of the longest sequence.
    longest: int


def _facts(plan: Plan) -> _Facts:
    sequences = plan.sequences
    assert sequences is not None
    if not plan.is_padded and not plan.is_packed:
        return _Facts(len(sequences), 1, plan.visible, plan.visible)
    lengths = sequences.k_length.tolist()
    distinct = set(lengths)
    distinct.discard(0)
    longest = max(distinct, default=0)
    # Rows that are padded on one side lie alike if they are equally long.
    if plan.padding in (Padding.LEFT, Padding.RIGHT):
        return _Facts(len(lengths), len(distinct), sum(distinct), longest)
    return _Facts(len(lengths), len(lengths), sum(lengths), longest)


def bend_terms(plan: Plan, call: Call) -> tuple[float, ...]:
    """The terms of a bend: 1, the normalised logarithms of :data:`SIZES`, and their products.

    ``blocks`` are sequences x kv_heads, ``longest`` the keys of the longest sequence, ``real_keys``
    those of all, times kv_heads and head_dim, ``group`` the heads per kv_head, and ``balance`` the
    mean length as a share of the longest.
    """
    facts = _facts(plan)
    sequences, longest = max(1, facts.sequences), max(1, facts.longest)
    real = max(1, plan.real_k)
    amounts = (
        sequences * call.kv_heads,
        longest,
        real * call.kv_heads * call.head_dim,
        call.group_size,
        call.head_dim,
        real / (longest * sequences),
    )
    sizes = []
    for amount, (middle, half) in zip(amounts, SIZES.values(), strict=True):
        size = (math.log2(amount) - middle) / half
        sizes.append(max(-_SIZE_LIMIT, min(_SIZE_LIMIT, size)))
    products = [x * y for place, x in enumerate(sizes) for y in sizes[place:]]
    return (1.0, *sizes, *products)
