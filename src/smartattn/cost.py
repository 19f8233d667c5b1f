"""The cost model: from the amounts of work in a call to microseconds.

Each regime of each backend has a model of its own, linear in the amounts with coefficients that are
not negative, and bent by how the work is shared; see :mod:`smartattn.features`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from pydantic import Field, StringConstraints, model_validator

from .backends import NAMED
from .call import Call
from .features import (
    BEND_TERMS,
    FEATURES,
    FIXED,
    Kernel,
    Layout,
    Mode,
    Regime,
    Seen,
)
from .machine import Record
from .plan import Plan
from .surroundings import Surroundings, waited_us

BackendName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]

#: No bend is by more than this factor.
BEND_LIMIT = 2.0
#: Layers that one forward's preparation is divided among: those of BERT-large, between the 16 of
#: small language models and the 32 of usual ones. A call does not know its model.
LAYERS = 24
#: A model is used up to this multiple of the longest key length it was fitted on.
MAX_EXTRAPOLATION = 64
#: A head_dim above the largest one measured costs in proportion, up to this multiple.
MAX_HEAD_DIM_SCALE = 2

Coefficient = Annotated[float, Field(ge=0.0, le=1e12)]
Term = Annotated[float, Field(ge=-100.0, le=100.0)]


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
    #: What the first call of each new shape takes longer, or of each new kind, for kernels that are
    #: built for those: see :meth:`~smartattn.backends.Backend.built_for`.
    build_us: Coefficient = 0.0
    #: Logarithm of what ``device_us`` is multiplied by, in the terms of :func:`bend_terms`; empty
    #: if too little was measured to tell.
    bend: tuple[Term, ...] = ()
    #: Thread blocks of the backend that the device runs at once, for the features ``blocks`` and
    #: ``busiest_keys``; 0 if unknown.
    slots: Annotated[int, Field(ge=0, le=10**6)] = 0
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
    #: Microseconds until the call returns, and that the device works on it; None on a CPU, where
    #: both are the same.
    host_us: float | None = None
    device_us: float | None = None
    #: Microseconds of the device less those of the host in the rest of the layer, see
    #: :func:`~smartattn.surroundings.waited_us`.
    slack_us: float = 0.0
    #: The longest key length, in tokens, that this comes from; 0 if it is unknown.
    longest_kv_len: int = 0
    #: What of ``us`` is this layer's share of what is prepared once per forward.
    shared_us: float = 0.0


class _Model(NamedTuple):
    """A cost with its features as (place, coefficient) pairs."""

    head_dim: int
    longest: int
    host: _Terms
    #: Apart from the others those that the head_dim has no part in.
    fixed: _Terms
    device: _Terms
    prepare: _Terms
    memory: _Terms
    error: float | None
    build_us: float
    bend: tuple[float, ...]
    slots: int


class Predictor:
    """Cost models, indexed for prediction.

    Args:
        surroundings: the rest of a layer; None for calls on their own.
    """

    def __init__(self, costs: Sequence[Cost], surroundings: Surroundings | None = None) -> None:
        self._surroundings = surroundings
        self._models: dict[Any, list[_Model]] = {}
        for cost in costs:
            if cost.backend not in NAMED:
                # Of a version that has more of them: this one cannot tell what their kernels do.
                continue
            model = _Model(
                head_dim=cost.head_dim,
                longest=cost.longest_kv_len * MAX_EXTRAPOLATION,
                host=_terms(cost.host_us),
                fixed=_terms(cost.device_us, FIXED),
                device=_terms(cost.device_us, FEATURES.keys() - FIXED),
                prepare=_terms(cost.prepare_us),
                memory=_terms(cost.peak_bytes),
                error=cost.error,
                build_us=cost.build_us,
                bend=cost.bend,
                slots=cost.slots,
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
        regime = seen.regime
        if regime is None:
            return None
        mode, wanted_dim = regime.mode, regime.head_dim
        model = self._model_of(backend, regime, call.device.type)
        if model is None:
            return None
        scale = fixed_scale = max(1.0, wanted_dim / model.head_dim)
        if call.kv_len > model.longest or scale > MAX_HEAD_DIM_SCALE:
            return None
        kernel = Kernel.of(NAMED[backend], plan, call, model.slots)
        amounts = seen.amounts(plan, kernel)
        host_us = _weighted(model.host, amounts)
        device_scale = scale
        if mode == "decode":
            # The keys are read and not computed with: there are as many bytes as there are.
            device_scale, fixed_scale = wanted_dim / model.head_dim, 1.0
        device_us = device_scale * _weighted(model.device, amounts)
        device_us += fixed_scale * _weighted(model.fixed, amounts)
        if model.bend:
            device_us *= bend_factor(model.bend, seen.terms)
        slack_us = 0.0
        apart = call.device.type != "cpu"
        bottleneck: Literal["host", "device"] | None = None
        if self._surroundings is not None:
            slack_us = self._surroundings.slack_us(plan, call)
            bottleneck = "host" if slack_us < 0 else "device"
        shared_us = _weighted(model.prepare, amounts) / LAYERS
        return Estimate(
            us=waited_us(host_us, device_us, slack_us) + shared_us,
            peak_bytes=scale * _weighted(model.memory, amounts) if model.memory else None,
            error=model.error,
            build_us=model.build_us,
            bottleneck=bottleneck,
            host_us=host_us if apart else None,
            device_us=device_us if apart else None,
            slack_us=slack_us,
            longest_kv_len=model.longest // MAX_EXTRAPOLATION,
            shared_us=shared_us,
        )

    def rest_us(self, plan: Plan, call: Call) -> float:
        """Microseconds of the layer that makes a call, without the call; 0 if nothing is known."""
        if self._surroundings is None:
            return 0.0
        return max(self._surroundings.rest_us(plan, call))

    @property
    def of_layers(self) -> bool:
        """Whether predictions are what calls add to their layers, of which something is known."""
        return self._surroundings is not None

    def reach(self, backends: Collection[str], plan: Plan, call: Call) -> int | None:
        """The longest key length, in tokens, at which two of some backends are predicted.

        None where no two of them have a model of such calls.
        """
        regime = _seen(plan, call).regime
        if regime is None:
            return None
        models = (self._model_of(name, regime, call.device.type) for name in backends)
        reaches = sorted(model.longest for model in models if model is not None)
        return reaches[-2] if len(reaches) > 1 else None

    def _model_of(self, backend: str, regime: Regime, kind: str) -> _Model | None:
        models = self._models_of(backend, regime, kind)
        if models is None:
            return None
        # The smallest measured head_dim that holds this one: kernels pad to the next size.
        return next((one for one in models if one.head_dim >= regime.head_dim), models[-1])

    def _models_of(self, backend: str, regime: Regime, kind: str) -> list[_Model] | None:
        """The models of a regime on a kind of device, or of one that stands for it."""
        dtypes = [regime.dtype]
        if kind == "cuda" and regime.dtype in _TWIN_DTYPES:
            dtypes.append(_TWIN_DTYPES[regime.dtype])
        layouts = [regime.layout]
        if regime.layout in _STAND_INS:
            layouts.append(_STAND_INS[regime.layout])
        for layout in layouts:
            for dtype in dtypes:
                models = self._models.get((backend, regime.mode, layout, regime.causal, dtype))
                if models is not None:
                    return models
        return None


#: Whoever needs a mask where there is no padding needs one where there is, and the work says how
#: much of it is attended.
_STAND_INS: dict[Layout, Layout] = {"masked": "padded"}
#: GPUs run both at the same speed.
_TWIN_DTYPES = {"float16": "bfloat16", "bfloat16": "float16"}


_Terms: TypeAlias = tuple[tuple[int, float], ...]
_PLACES = {name: place for place, name in enumerate(FEATURES)}


def _terms(coefficients: dict[str, float], names: Collection[str] = FEATURES) -> _Terms:
    return tuple(
        (_PLACES[name], value) for name, value in coefficients.items() if value and name in names
    )


def _weighted(terms: _Terms, amounts: tuple[float, ...]) -> float:
    total = 0.0
    for place, coefficient in terms:
        total += coefficient * amounts[place]
    return total


def bend_factor(bend: Sequence[float], terms: Sequence[float]) -> float:
    """What a model's device time is multiplied by."""
    exponent = sum(map(operator.mul, bend, terms))
    return min(BEND_LIMIT, max(1.0 / BEND_LIMIT, math.exp(min(10.0, exponent))))


#: The last call that was asked about, per plan: every backend is asked about the same one in turn.
_LAST: WeakKeyDictionary[Plan, Seen] = WeakKeyDictionary()


def _seen(plan: Plan, call: Call) -> Seen:
    seen = _LAST.get(plan)
    if seen is None or seen.call is not call:
        seen = _LAST[plan] = Seen.of(plan, call)
    return seen
