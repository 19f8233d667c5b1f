"""From raw timings to cost models, and from those to a profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from .backends import NAMED, Backend
from .backends.base import Walk
from .cost import BEND_LIMIT, Cost
from .features import (
    BEND_TERMS,
    FEATURES,
    FIXED,
    Kernel,
    Mode,
    Regime,
    Seen,
)
from .grid import FEWEST
from .least_squares import FloatArray, outlier_weights, relative_fit
from .plan import Plan
from .profile import Profile, Rule, Run
from .profiles import default_stack_rules
from .samples import Header, Sample, StackSample
from .stack_fit import fit_layer_times, fit_stack_rules
from .thresholds import thresholds
from .workload import Workload

#: How many samples the coefficients of all regimes of a group together count as, for those of one.
_PRIOR_SAMPLES = 10.0
#: First calls that take less than this longer allocate and look up; they do not build kernels.
_BUILDING_US = 5_000.0
#: What a host time counts that is longer than predicted: other work on the cores only ever adds.
_LATE_HOST = 0.1
#: Fewest samples of a group that its models are bent by; one of fewer learns from its siblings.
#: Those differ most in decoding: what a kernel does about padding may take many times as long as
#: reading the keys, and then nothing is to be learned from rows without.
_BENDING_SAMPLES: dict[Mode, int] = {"forward": 24, "train": 24, "decode": 8}
#: How many samples of one half width each term of a bend is held back by. Features of their own
#: tell how the blocks of a decoding step share its work, and leave less to a bend.
_STIFFNESS: dict[Mode, float] = {"forward": 4.0, "train": 4.0, "decode": 60.0}
#: Rounds in which outliers lose weight.
_BENDING_ROUNDS = 5


def _columns(*names: str) -> FloatArray:
    return np.array([1.0 if name in names else 0.0 for name in FEATURES])


#: The features of each walk: few samples would not tell them apart.
_WALKS: dict[Walk, FloatArray] = {
    "padded": _columns(
        "call",
        "blocks",
        "busiest_keys",
        "sequences",
        "padded_tiles",
        "mask_pairs",
        "bias_pairs",
        "dense_queries",
        "dense_keys",
        "repeated_keys",
        "width",
    ),
    "sequences": _columns(
        "call",
        "blocks",
        "busiest_keys",
        "groups",
        "sequenced",
        "sequences",
        "sequence_tiles",
        "dense_queries",
        "real_queries",
        "real_keys",
        "concatenated_keys",
        "longest",
    ),
    "tokens": _columns(
        "call",
        "blocks",
        "busiest_keys",
        "sequences",
        "real_tiles",
        "dense_queries",
        "real_queries",
        "real_keys",
        "longest",
    ),
    "groups": _columns(
        "call",
        "blocks",
        "busiest_keys",
        "groups",
        "real_tiles",
        "dense_queries",
        "real_queries",
        "real_keys",
        "repeated_real_keys",
        "walked",
        "group_tokens",
    ),
}
#: The work that nobody can avoid, per mode: attended pairs, or for one query the keys to read.
_NEEDED: dict[Mode, str] = {"forward": "real_tiles", "train": "real_tiles", "decode": "real_keys"}
#: What it is called by what is walked.
_NEEDED_AS = {
    "real_tiles": ("real_tiles", "sequence_tiles", "padded_tiles"),
    "real_keys": ("real_keys", "dense_keys"),
}
#: Share of the lowest time per unit of it that the coefficient is at least. All of it would leave
#: nothing for the other features of the very sample that reached it.
_CREDIBLE_RATE = 0.5
_PLACES = {name: place for place, name in enumerate(FEATURES)}
#: Features that are unknown without the number of slots.
_SLOTTED = [_PLACES["blocks"], _PLACES["busiest_keys"]]
#: The host does not see how much work a launch is, only how many launches there are.
_LAUNCHES = _columns("call", "groups", "gathers", "sequenced")
#: What is made once per forward: indices, masks, and what a kernel builds for lengths new to it.
_PREPARED = _columns("call", "groups", "sequences", "mask_pairs", "real_queries", "real_keys")
#: Tensors that a call allocates: copies, masks, outputs and, for a backward, what it kept.
_ALLOCATED = _columns(
    "sequences",
    "dense_tiles",
    "mask_pairs",
    "dense_queries",
    "real_queries",
    "dense_keys",
    "real_keys",
    "concatenated_keys",
    "repeated_keys",
    "repeated_real_keys",
)
#: Backends that run the same kernels in training, forward and backward: the samples of each say
#: something of the other.
_KIN = frozenset({"flash_attention_2", "torch_varlen"})
#: Coefficients that grow with head_dim.
_SCALES = 1.0 - _columns(*FIXED)


_Row: TypeAlias = tuple[tuple[float, ...], tuple[float, ...], Sample]


def fit_costs(
    samples: Iterable[Sample], device: torch.device, processors: int | None = None
) -> list[Cost]:
    """Fits a model per backend and regime.

    Args:
        device: of the kind that was measured; it need not exist here.
        processors: its multiprocessors; None if unknown.
    """
    rows: dict[tuple[str, Regime], list[_Row]] = defaultdict(list)
    known: dict[Workload, tuple[Plan, Seen]] = {}
    builds: dict[tuple[str, Mode], dict[Hashable, float]] = defaultdict(dict)
    for sample in samples:
        if sample.status != "ok" or sample.device_us <= 0 or sample.backend not in NAMED:
            continue
        if sample.workload not in known:
            plan = sample.workload.plan(device)
            known[sample.workload] = plan, Seen.of(plan, sample.workload.call(device))
        plan, seen = known[sample.workload]
        if seen.regime is not None:
            runner = NAMED[sample.backend]
            kernel = Kernel.of(runner, plan, seen.call, _slots(runner, processors))
            amounts = seen.amounts(plan, kernel)
            rows[sample.backend, seen.regime].append((amounts, seen.terms, sample))
            kind = runner.built_for(plan, seen.call)
            if kind is not None:
                of = builds[sample.backend, seen.regime.mode]
                of[kind] = max(of.get(kind, 0.0), _longer_us(sample))
    # Regimes that differ in head_dim, and in whether they are causal, have most in common: the
    # amounts of work speak of both. Right padding that a kernel need not know of is none to it.
    alike: dict[tuple[str, Regime], list[_Table]] = defaultdict(list)
    for (backend, regime), found in sorted(rows.items()):
        layout = "plain" if regime.layout == "right" else regime.layout
        shared = regime._replace(head_dim=0, causal=False, layout=layout)
        alike[backend, shared].append(_Table.of(regime, found))
    groups = [_Group(backend, regime, tables) for (backend, regime), tables in alike.items()]
    # Few samples may make the work that nobody can avoid seem free, and then a backend unbeatable
    # at lengths beyond those. It costs at least half of what it cost whoever was best at it.
    rates: dict[tuple[Mode, str], float] = {}
    for group in groups:
        key = (group.regime.mode, group.regime.dtype)
        rates[key] = min(rates.get(key, np.inf), group.rate())
    for group in groups:
        kinds = builds.get((group.backend, group.regime.mode))
        group.build_us = _build_us(group.samples) if kinds is None else _kinds_us(kinds.values())
        group.best_rate = rates[group.regime.mode, group.regime.dtype]
        group.kin = [other for other in groups if other is not group and group.is_kin_of(other)]
        if len(group.samples) < _BENDING_SAMPLES[group.regime.mode]:
            group.siblings = [other for other in groups if group.is_sibling_of(other)]
    costs: list[Cost] = []
    for group in groups:
        slots = _slots(NAMED[group.backend], processors)
        costs += group.costs(slots, host=device.type != "cpu")
    return costs


def _slots(backend: Backend, processors: int | None) -> int:
    return backend.blocks_per_processor * (processors or 0)


@dataclass(frozen=True)
class _Table:
    """The samples of a backend in a regime; the features are scaled as in ``_per_dim``."""

    regime: Regime
    samples: tuple[Sample, ...]
    amounts: FloatArray
    #: (samples, terms), see :func:`~smartattn.features.bend_terms`.
    terms: FloatArray

    @staticmethod
    def of(regime: Regime, rows: list[_Row]) -> _Table:
        amounts = np.array([amounts for amounts, _, _ in rows]) * _per_dim(regime)
        terms = np.array([terms for _, terms, _ in rows])
        return _Table(regime, tuple(sample for _, _, sample in rows), amounts, terms)

    @property
    def device_us(self) -> FloatArray:
        return np.array([sample.device_us for sample in self.samples])


def _per_dim(regime: Regime) -> FloatArray:
    """What each feature's coefficient is taken to be proportional to."""
    return np.where(_SCALES > 0, float(regime.head_dim), 1.0)


class _Group:
    """The samples of one backend in regimes that share their coefficients, more or less."""

    def __init__(self, backend: str, regime: Regime, tables: list[_Table]) -> None:
        self.backend = backend
        self.regime = regime
        self.tables = tables
        self.amounts = np.concatenate([table.amounts for table in tables])
        self.samples = [sample for table in tables for sample in table.samples]
        self.device_us = np.array([sample.device_us for sample in self.samples])
        #: The lowest time per unit of ``_NEEDED`` of any backend in this mode and dtype.
        self.best_rate = 0.0
        self.build_us = 0.0
        #: Groups of the same kernels, and of the same backend in another layout.
        self.kin: list[_Group] = []
        self.siblings: list[_Group] = []

    def is_kin_of(self, other: _Group) -> bool:
        """Whether both run the same kernels."""
        same = self.regime == other.regime and self.regime.mode == "train"
        return same and {self.backend, other.backend} <= _KIN

    def is_sibling_of(self, other: _Group) -> bool:
        """Whether both differ in having padding alone, which the amounts of work tell of."""
        layouts = {self.regime.layout, other.regime.layout}
        same = self.regime == other.regime._replace(layout=self.regime.layout)
        return self.backend == other.backend and same and layouts == {"plain", "padded"}

    def rate(self) -> float:
        """The lowest time per unit of the work that nobody can avoid."""
        work = self.amounts[:, _PLACES[_NEEDED[self.regime.mode]]]
        return float((self.device_us / np.maximum(work, 1e-12)).min())

    def _least(self, columns: FloatArray) -> FloatArray:
        """What the coefficients are at least."""
        names = _NEEDED_AS[_NEEDED[self.regime.mode]]
        place = next(_PLACES[name] for name in names if columns[_PLACES[name]])
        own = float((self.device_us / np.maximum(self.amounts[:, place], 1e-12)).min())
        least = np.zeros(len(FEATURES))
        least[place] = _CREDIBLE_RATE * min(self.best_rate, own)
        return least

    def costs(self, slots: int, host: bool) -> list[Cost]:
        """The models, one per regime."""
        columns = _WALKS[NAMED[self.backend].walks]
        alike = [self, *self.siblings]
        if sum(len(group.samples) for group in alike) < FEWEST:
            return []
        least = self._least(columns)
        amounts = np.concatenate([group.amounts for group in alike + self.kin])
        device_us = np.concatenate([group.device_us for group in alike + self.kin])
        pooled = relative_fit(amounts * columns, device_us, least=least)
        shares = amounts * columns / device_us[:, None]
        # The host runs the same code whatever the head_dim.
        launches = np.zeros(len(FEATURES))
        if host:
            # A mask costs launches of its own: other layouts only stand in for what is unknown.
            known = [self] if len(self.samples) >= FEWEST else alike
            launches = _fitted(known, _LAUNCHES, lambda s: s.host_us, above=_LATE_HOST)
        prepare = _fitted([self], _PREPARED, lambda s: s.prepare_us)
        memory = _fitted([self], _ALLOCATED, lambda s: float(s.peak_bytes))
        device = [
            relative_fit(
                table.amounts * columns,
                table.device_us,
                pooled * columns,
                least=least,
                strength=_PRIOR_SAMPLES,
                prior_shares=np.sqrt(np.square(shares).mean(axis=0)),
            )
            for table in self.tables
        ]
        bend = self._bend(device)
        return [
            self._cost(table, coefficients, bend, launches, prepare, memory, slots)
            for table, coefficients in zip(self.tables, device, strict=True)
        ]

    def _bend(self, device: list[FloatArray]) -> FloatArray | None:
        """What the linear models of the group leave over, in the terms of a bend."""
        mode = self.regime.mode
        if len(self.samples) < _BENDING_SAMPLES[mode]:
            return None
        straight = np.concatenate(
            [table.amounts @ one for table, one in zip(self.tables, device, strict=True)]
        )
        left = np.log(np.maximum(self.device_us, 1e-3) / np.maximum(straight, 1e-3))
        left = np.clip(left, -np.log(BEND_LIMIT), np.log(BEND_LIMIT))
        terms = np.concatenate([table.terms for table in self.tables])
        held = np.diag([0.0, *[_STIFFNESS[mode]] * (BEND_TERMS - 1)])
        bend: FloatArray = np.zeros(BEND_TERMS)
        for _ in range(_BENDING_ROUNDS):
            weighted = terms * outlier_weights(np.abs(left - terms @ bend))[:, None]
            bend = np.linalg.solve(weighted.T @ terms + held, weighted.T @ left)
        return bend

    def _cost(
        self,
        table: _Table,
        device: FloatArray,
        bend: FloatArray | None,
        launches: FloatArray,
        prepare: FloatArray,
        memory: FloatArray,
        slots: int,
    ) -> Cost:
        amounts, per_dim = table.amounts, _per_dim(table.regime)
        busy = amounts @ device
        if bend is not None:
            factors = np.exp(table.terms @ bend)
            busy = busy * np.clip(factors, 1.0 / BEND_LIMIT, BEND_LIMIT)
        predicted = np.maximum(busy, amounts @ launches)
        measured = table.device_us
        if launches.any():
            measured = np.array([max(s.host_us, s.device_us) for s in table.samples])
        errors = [sample.error for sample in table.samples]
        return Cost(
            backend=self.backend,
            **table.regime._asdict(),
            host_us=_named(launches * per_dim),
            device_us=_named(device * per_dim) or {"call": 0.0},
            prepare_us=_named(prepare * per_dim),
            peak_bytes=_named(memory * per_dim),
            error=float(f"{np.median(errors):.3g}"),
            build_us=self.build_us,
            bend=() if bend is None else tuple(float(f"{term:.4g}") for term in bend),
            slots=slots if device[_SLOTTED].any() else 0,
            # The coefficients come from all of the group's samples, and so does their reach.
            longest_kv_len=max(sample.workload.kv_len for sample in self.samples),
            samples=len(table.samples),
            median_error=round(float(np.median(np.abs(predicted - measured) / measured)), 4),
        )


def _fitted(
    groups: Sequence[_Group],
    columns: FloatArray,
    value: Callable[[Sample], float],
    above: float = 1.0,
) -> FloatArray:
    """Coefficients of what is modelled for groups as a whole; zeros if nothing is known.

    Args:
        above: see :func:`~smartattn.least_squares.relative_fit`.
    """
    amounts = np.concatenate([group.amounts for group in groups])
    measured = np.array([value(sample) for group in groups for sample in group.samples])
    known = measured > 0
    if known.sum() < FEWEST:
        return np.zeros(len(FEATURES))
    return relative_fit(amounts[known] * columns, measured[known], above=above)


def _build_us(samples: Sequence[Sample]) -> float:
    """What the first call of a shape takes longer, 0 where no kernels are built for it.

    The lower quartile: first calls of a process load code, too, but not three in four of them.
    """
    longer = [_longer_us(sample) for sample in samples if sample.first_us > 0]
    if len(longer) < FEWEST:
        return 0.0
    quartile = float(np.quantile(longer, 0.25))
    return float(f"{quartile:.3g}") if quartile >= _BUILDING_US else 0.0


def _kinds_us(longest: Iterable[float]) -> float:
    """The same where kernels are built for kinds of calls, from the longest first call of each.

    The median: kinds have kernels in common, and one whose kernels were all there says nothing.
    """
    built = [us for us in longest if us >= _BUILDING_US]
    return float(f"{np.median(built):.3g}") if built else 0.0


def _longer_us(sample: Sample) -> float:
    return sample.first_us - max(sample.host_us, sample.device_us)


def _named(coefficients: FloatArray) -> dict[str, float]:
    return {
        name: float(f"{value:.6g}")
        for name, value in zip(FEATURES, coefficients, strict=True)
        if value > 0
    }


def fit_profile(
    header: Header,
    samples: Sequence[Sample],
    rules: Sequence[Rule],
    raw_samples: str | None,
    stacks: Sequence[StackSample] = (),
) -> Profile:
    """The profile of a device from its raw samples. Needs no device.

    Args:
        stacks: what was timed of padding-free stacks.
        rules: what to go by where nothing was measured; excluded backends are taken out of them.
        raw_samples: file name to refer to.
    """
    device = torch.device(header.device.kind)
    usable = [sample for sample in samples if sample.backend not in header.excluded]
    costs = fit_costs(usable, device, header.processors)
    kept = []
    for rule in rules:
        prefer = tuple(name for name in rule.prefer if name not in header.excluded)
        if prefer:
            kept.append(rule.model_copy(update={"prefer": prefer}))
    return Profile(
        name=header.device.slug,
        notes="Made by `smartattn calibrate`; times in microseconds, caches "
        + ("flushed before each call." if header.cold else "warm."),
        device=header.device,
        versions=header.versions,
        date=header.date,
        run=Run(
            mode=header.mode,
            seconds=round(header.seconds, 1),
            samples=len(samples),
            seed=header.seed,
            raw_samples=raw_samples,
            excluded=header.excluded,
            cold=header.cold,
            complaints=header.complaints,
        ),
        surroundings=header.surroundings,
        rules=tuple(kept),
        padding_free=fit_stack_rules(stacks, header, default_stack_rules()),
        layers=fit_layer_times(stacks, header),
        thresholds=tuple(thresholds(costs, device, header.surroundings)),
        costs=tuple(costs),
    )
