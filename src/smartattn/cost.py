"""The cost model: from (plan, call) to a regime and features, and from those to microseconds.

A regime is what a kernel branches on, and each regime of each backend has a model of its own; the
features are amounts of work, and a model is linear in them with coefficients that are not negative.
Both are functions of the plan and the call alone, so fitting and predicting share this file.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, StringConstraints, model_validator

from .backends.flash import skipping_pays
from .backends.sdpa import needs_no_mask
from .call import Call
from .machine import Record
from .packing import packs_queries
from .plan import Padding, Plan
from .surroundings import Surroundings, waited_us

Mode = Literal["forward", "train", "decode"]
Layout = Literal["plain", "right", "padded", "masked", "packed"]
BackendName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]

#: The features in their order, each with its unit. "Dense" counts what the padded tensors hold,
#: "real" what the mask leaves of it; a "group" is the sequences of a batch that lie alike, which
#: can be cut out of the padded tensors together.
FEATURES: dict[str, str] = {
    "call": "1 per call",
    "groups": "kernel launches if each group of sequences gets its own",
    "gathers": "1 if keys lie as a cache concatenates them and are not all real: rows to collect",
    "sequences": "10^3 sequences x heads",
    "dense_pairs": "10^6 (query, key) pairs x heads, masked ones included",
    "visible_pairs": "10^6 (query, key) pairs x heads that the causal pattern leaves of those",
    "real_pairs": "10^6 (query, key) pairs x heads, attended ones only",
    "mask_pairs": "10^6 elements of a (batch, 1, q_len, kv_len) mask",
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
    "group_tokens": "groups x 10^3 tokens x heads: gradients of a slice are as large as the tensor",
    "sequence_pairs": "real_pairs, or visible_pairs of right padding that is not worth skipping",
}

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
#: Sizes beyond this many half widths count as that many; and no bend is by more than this factor.
_SIZE_LIMIT, BEND_LIMIT = 2.0, 2.0

#: Layers that one forward's preparation is divided among: those of BERT-large, between the 16 of
#: small language models and the 32 of usual ones. A call does not know its model.
LAYERS = 24
#: A model is used up to this multiple of the longest key length it was fitted on.
MAX_EXTRAPOLATION = 64
#: A head_dim above the largest one measured costs in proportion, up to this multiple.
MAX_HEAD_DIM_SCALE = 2

Coefficient = Annotated[float, Field(ge=0.0, le=1e12)]
Term = Annotated[float, Field(ge=-100.0, le=100.0)]


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


class Cost(Record):
    """The model of one backend in one regime: features times coefficients is time.

    Coefficients of the times are microseconds per unit of :data:`FEATURES`. ``host_us`` is the time
    until the call returns, ``device_us`` the time until the device is done; on a CPU both are the
    same thing and ``host_us`` is empty. ``prepare_us`` comes once per forward, see :data:`LAYERS`.
    ``head_dim`` is the one that was measured.
    """

    backend: BackendName
    mode: Mode
    layout: Layout
    causal: bool
    dtype: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")]
    head_dim: Annotated[int, Field(ge=1, le=65536)]
    host_us: dict[str, Coefficient] = Field(max_length=len(FEATURES))
    device_us: dict[str, Coefficient] = Field(max_length=len(FEATURES))
    prepare_us: dict[str, Coefficient] = Field(default={}, max_length=len(FEATURES))
    #: Peak memory of a call above its inputs, in bytes per unit; empty if it was not measured.
    peak_bytes: dict[str, Coefficient] = Field(default={}, max_length=len(FEATURES))
    #: Median over the samples of the largest error against float64, relative to the largest
    #: reference value; None if it was not measured.
    error: Annotated[float, Field(ge=0.0, le=1e6)] | None = None
    #: What the first call of each new shape takes longer, for kernels that are built for a shape.
    build_us: Coefficient = 0.0
    #: Logarithm of what ``device_us`` is multiplied by, in the terms of :func:`bend_terms`; empty
    #: if too little was measured to tell.
    bend: tuple[Term, ...] = ()
    #: Longest key length in tokens, and number of samples, that the model was fitted on.
    longest_kv_len: Annotated[int, Field(ge=1, le=10**9)]
    samples: Annotated[int, Field(ge=1, le=10**9)]
    #: Median of |predicted - measured| / measured over those samples.
    median_error: Annotated[float, Field(ge=0.0, le=1e6)]

    @model_validator(mode="after")
    def _known_features(self) -> Cost:
        parts = (self.host_us, self.device_us, self.prepare_us, self.peak_bytes)
        unknown = sorted(set().union(*parts) - FEATURES.keys())
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r}")
        if not self.device_us:
            raise ValueError("no coefficient in device_us")
        if len(self.bend) not in (0, BEND_TERMS):
            raise ValueError(f"a bend has {BEND_TERMS} terms")
        return self

    @property
    def regime(self) -> Regime:
        """The regime that the model was fitted on."""
        return Regime(self.mode, self.layout, self.causal, self.dtype, self.head_dim)


class Estimate(NamedTuple):
    """What a profile expects of one backend on one call."""

    #: Microseconds that the call adds to its layer, and this layer's share of what is prepared once
    #: per forward. A layer of which nothing is known has to wait for both host and device.
    us: float
    #: Peak memory above the inputs in bytes, and relative error; None where it was not measured.
    peak_bytes: float | None
    error: float | None
    #: Microseconds that the first call of a shape takes longer; 0 if none is known.
    build_us: float = 0.0
    #: What the rest of the layer waits for; None if nothing is known of it.
    bottleneck: Literal["host", "device"] | None = None


class _Model(NamedTuple):
    """A cost with its features as (place, coefficient) pairs."""

    head_dim: int
    longest: int
    host: _Terms
    device: _Terms
    prepare: _Terms
    memory: _Terms
    error: float | None
    build_us: float
    bend: tuple[float, ...]


class Predictor:
    """Cost models, indexed for prediction.

    Args:
        surroundings: the rest of a layer; None for calls on their own.
    """

    def __init__(self, costs: Sequence[Cost], surroundings: Surroundings | None = None) -> None:
        self._surroundings = surroundings
        self._models: dict[Any, list[_Model]] = {}
        for cost in costs:
            model = _Model(
                head_dim=cost.head_dim,
                longest=cost.longest_kv_len * MAX_EXTRAPOLATION,
                host=_terms(cost.host_us),
                device=_terms(cost.device_us),
                prepare=_terms(cost.prepare_us),
                memory=_terms(cost.peak_bytes),
                error=cost.error,
                build_us=cost.build_us,
                bend=cost.bend,
            )
            self._models.setdefault((cost.backend, *cost.regime[:4]), []).append(model)
        for models in self._models.values():
            models.sort(key=lambda model: model.head_dim)

    def __len__(self) -> int:
        return len(self._models)

    def predict(self, backend: str, plan: Plan, call: Call) -> float | None:
        """Microseconds of a call, None where no model covers it; see :meth:`Profile.predict`."""
        estimate = self.estimate(backend, plan, call)
        return None if estimate is None else estimate.us

    def estimate(self, backend: str, plan: Plan, call: Call) -> Estimate | None:
        """Time, memory and error of a call, None where no model covers it."""
        seen = _seen(plan, call)
        regime, amounts = seen.regime, seen.amounts
        if regime is None:
            return None
        mode, layout, causal, dtype, wanted_dim = regime
        models = self._models.get((backend, mode, layout, causal, dtype))
        if models is None and dtype in _TWIN_DTYPES and call.device.type == "cuda":
            models = self._models.get((backend, mode, layout, causal, _TWIN_DTYPES[dtype]))
        if models is None:
            return None
        # The smallest measured head_dim that holds this one: kernels pad to the next size.
        for model in models:
            if model.head_dim >= wanted_dim:
                break
        scale = max(1.0, wanted_dim / model.head_dim)
        if call.kv_len > model.longest or scale > MAX_HEAD_DIM_SCALE:
            return None
        host_us = _weighted(model.host, amounts)
        device_us = scale * _weighted(model.device, amounts)
        if model.bend:
            device_us *= bend_factor(model.bend, seen.terms)
        slack_us = 0.0
        bottleneck: Literal["host", "device"] | None = None
        if self._surroundings is not None:
            slack_us = self._surroundings.slack_us(call)
            bottleneck = "host" if slack_us < 0 else "device"
        return Estimate(
            us=waited_us(host_us, device_us, slack_us) + _weighted(model.prepare, amounts) / LAYERS,
            peak_bytes=scale * _weighted(model.memory, amounts) if model.memory else None,
            error=model.error,
            build_us=model.build_us,
            bottleneck=bottleneck,
        )


#: GPUs run both at the same speed.
_TWIN_DTYPES = {"float16": "bfloat16", "bfloat16": "float16"}


_Terms: TypeAlias = tuple[tuple[int, float], ...]
_PLACES = {name: place for place, name in enumerate(FEATURES)}


def _terms(coefficients: dict[str, float]) -> _Terms:
    return tuple((_PLACES[name], value) for name, value in coefficients.items() if value)


def _weighted(terms: _Terms, amounts: tuple[float, ...]) -> float:
    total = 0.0
    for place, coefficient in terms:
        total += coefficient * amounts[place]
    return total


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


def features(plan: Plan, call: Call) -> tuple[float, ...]:
    """The amounts of work in a call, in the order and units of :data:`FEATURES`."""
    pack_queries = packs_queries(plan, call)
    facts = _facts(plan)
    heads, kv_heads, visible = call.heads, call.kv_heads, plan.visible
    queries = call.batch * call.q_len * 1e-3
    keys = call.batch * visible * 1e-3
    real_keys = plan.real_k * 1e-3
    dense = queries * visible * 1e-3
    real_pairs = plan.attended_pairs(pack_queries) * heads * 1e-6
    # Query i of a causal call does not see the q_len - 1 - i keys that come after its own.
    hidden = call.q_len - 1 if plan.is_causal else 0
    visible_pairs = max(0.0, dense - queries * hidden * 0.5e-3) * heads
    whole = plan.is_padded and needs_no_mask(plan, call) and not skipping_pays(plan, call)
    concatenated = not call.token_major_keys
    return (
        1.0,
        facts.groups,
        1.0 if concatenated and (plan.is_padded or plan.is_packed) else 0.0,
        facts.sequences * heads * 1e-3,
        dense * heads,
        visible_pairs,
        real_pairs,
        dense,
        queries * heads,
        plan.real_q * heads * 1e-3 if pack_queries else queries * heads,
        keys * kv_heads,
        real_keys * kv_heads,
        real_keys * kv_heads if concatenated else 0.0,
        keys * (heads - kv_heads),
        real_keys * (heads - kv_heads),
        facts.longest * 1e-3,
        visible * 1e-3,
        facts.walked * 1e-3,
        facts.groups * (queries * heads + 2 * keys * kv_heads),
        visible_pairs if whole else real_pairs,
    )


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


def bend_factor(bend: Sequence[float], terms: Sequence[float]) -> float:
    """What a model's device time is multiplied by."""
    exponent = sum(map(operator.mul, bend, terms))
    return min(BEND_LIMIT, max(1.0 / BEND_LIMIT, math.exp(min(10.0, exponent))))


class _Seen:
    """What one call is about; every backend is asked about the same one in turn."""

    __slots__ = ("_plan", "_terms", "amounts", "call", "regime")

    def __init__(self, plan: Plan, call: Call) -> None:
        self._plan = weakref.ref(plan)
        self._terms: tuple[float, ...] | None = None
        self.call = call
        self.regime = regime_of(plan, call)
        self.amounts = () if self.regime is None else features(plan, call)

    @property
    def terms(self) -> tuple[float, ...]:
        if self._terms is None:
            plan = self._plan()
            assert plan is not None
            self._terms = bend_terms(plan, self.call)
        return self._terms


#: The last call that was asked about, per plan.
_LAST: weakref.WeakKeyDictionary[Plan, _Seen] = weakref.WeakKeyDictionary()


def _seen(plan: Plan, call: Call) -> _Seen:
    seen = _LAST.get(plan)
    if seen is None or seen.call is not call:
        seen = _LAST[plan] = _Seen(plan, call)
    return seen
