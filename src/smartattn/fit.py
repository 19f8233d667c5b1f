"""From raw timings to cost models, and from those to thresholds that people can read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .cost import FEATURES, Cost, Layout, Predictor, Regime, features, regime_of
from .grid import FEWEST
from .profile import Profile, Rule, Run, Threshold, Winner
from .samples import Header, Sample
from .workload import Side, Workload

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

#: Samples whose relative error is more than this many times the median one count less.
_OUTLIER = 4.0
#: Keeps coefficients that nothing decides at 0 instead of at chance.
_RIDGE = 1e-6
#: Parts that the samples are cut into for predicting each from the others.
_FOLDS = 5
#: How many samples the coefficients of all head dims together count as, for those of one of them.
_PRIOR_SAMPLES = 2.0


def _columns(*names: str) -> FloatArray:
    return np.array([1.0 if name in names else 0.0 for name in FEATURES])


#: What a kernel may walk: the padded tensors, or the real tokens (and then the padded output).
_WALKS = (
    _columns(
        "call",
        "sequences",
        "dense_pairs",
        "mask_pairs",
        "dense_queries",
        "dense_keys",
        "repeated_keys",
        "width",
    ),
    _columns(
        "call",
        "groups",
        "sequences",
        "real_pairs",
        "dense_queries",
        "real_queries",
        "real_keys",
        "longest",
    ),
)
_LAUNCHES = _columns("call", "groups")
#: Coefficients that grow with head_dim.
_SCALES = 1.0 - _columns("call", "groups", "sequences", "mask_pairs")

#: The key lengths and padding shares at which thresholds are looked for.
THRESHOLD_LENGTHS = tuple(
    round(2**exponent * step) for exponent in range(5, 17) for step in (1.0, 1.5)
)
THRESHOLD_SHARES = (0.1, 0.3, 0.5, 0.75)


def nonnegative_least_squares(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """x >= 0 with the smallest ``|matrix @ x - target|``, by Lawson and Hanson's active sets.

    Source: C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    a = matrix / scale
    x = np.zeros(columns)
    free = np.zeros(columns, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(a.T @ target).max(initial=0.0)))
    for _ in range(10 * columns):
        gradient = a.T @ (target - a @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            solution = np.zeros(columns)
            solution[free] = np.linalg.lstsq(a[:, free], target, rcond=None)[0]
            negative = free & (solution <= 0)
            if not negative.any():
                x = solution
                break
            step = float((x[negative] / (x[negative] - solution[negative])).min())
            x = x + step * (solution - x)
            free &= x > 1e-14
            x[~free] = 0.0
            if not free.any():
                break
    result: FloatArray = x / scale
    return result


def relative_fit(
    amounts: FloatArray, times: FloatArray, prior: FloatArray | None = None, rounds: int = 4
) -> FloatArray:
    """Coefficients >= 0 with the smallest squared relative errors; outliers count less.

    Args:
        amounts: (samples, features).
        times: (samples,) in microseconds, positive.
        prior: (features,) coefficients that each count as much as ``_PRIOR_SAMPLES`` samples.
    """
    goal = np.zeros(amounts.shape[1]) if prior is None else prior
    strength = (_RIDGE if prior is None else _PRIOR_SAMPLES / len(times)) ** 0.5
    weights = 1.0 / times
    coefficients = np.zeros(amounts.shape[1])
    for _ in range(rounds):
        matrix = amounts * weights[:, None]
        pull = strength * np.linalg.norm(matrix, axis=0)
        coefficients = nonnegative_least_squares(
            np.concatenate([matrix, np.diag(pull)]),
            np.concatenate([times * weights, pull * goal]),
        )
        errors = np.abs(amounts @ coefficients - times) / times
        limit = max(_OUTLIER * float(np.median(errors)), 0.01)
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(errors, 1e-12))) / times
    return coefficients


def fit_costs(samples: Iterable[Sample], device: torch.device) -> list[Cost]:
    """Fits a model per backend and regime.

    Args:
        device: of the kind that was measured; it need not exist here.
    """
    rows: dict[tuple[str, Regime], list[tuple[tuple[float, ...], Sample]]] = defaultdict(list)
    known: dict[Workload, tuple[Regime | None, tuple[float, ...]]] = {}
    for sample in samples:
        if sample.status != "ok" or sample.device_us <= 0:
            continue
        if sample.workload not in known:
            plan, call = sample.workload.plan(device), sample.workload.call(device)
            regime = regime_of(plan, call)
            known[sample.workload] = (regime, () if regime is None else features(plan, call))
        regime, amounts = known[sample.workload]
        if regime is not None:
            rows[sample.backend, regime].append((amounts, sample))
    # Regimes that differ in nothing but head_dim have much in common.
    alike: dict[tuple[str, Regime], list[_Table]] = defaultdict(list)
    for (backend, regime), found in sorted(rows.items()):
        alike[backend, regime._replace(head_dim=0)].append(_Table.of(backend, regime, found))
    groups = [_Group(tables) for tables in alike.values()]
    # What a backend walks in a layout it walks in every mode, and few samples of one decide little.
    misses: dict[tuple[str, Layout], FloatArray] = defaultdict(lambda: np.zeros(len(_WALKS)))
    for group in groups:
        misses[group.backend, group.regime.layout] += group.misses()
    return [
        cost
        for group in groups
        for cost in group.costs(
            _WALKS[int(misses[group.backend, group.regime.layout].argmin())],
            host=device.type != "cpu",
        )
    ]


@dataclass(frozen=True)
class _Table:
    """The samples of a backend in a regime."""

    backend: str
    regime: Regime
    amounts: FloatArray
    device_us: FloatArray
    host_us: FloatArray
    longest_kv_len: int

    @staticmethod
    def of(backend: str, regime: Regime, rows: list[tuple[tuple[float, ...], Sample]]) -> _Table:
        return _Table(
            backend,
            regime,
            amounts=np.array([amounts for amounts, _ in rows]),
            device_us=np.array([sample.device_us for _, sample in rows]),
            host_us=np.array([max(sample.host_us, 1e-3) for _, sample in rows]),
            longest_kv_len=max(sample.workload.kv_len for _, sample in rows),
        )

    @property
    def per_dim(self) -> FloatArray:
        """What each feature's coefficient is taken to be proportional to."""
        return np.where(_SCALES, float(self.regime.head_dim), 1.0)


class _Group:
    """The samples of one backend in regimes that differ in head_dim alone."""

    def __init__(self, tables: list[_Table]) -> None:
        self.tables = tables
        self.backend = tables[0].backend
        self.regime = tables[0].regime
        self.amounts = np.concatenate([table.amounts * table.per_dim for table in tables])
        self.device_us = np.concatenate([table.device_us for table in tables])

    def misses(self) -> FloatArray:
        """Per entry of ``_WALKS``, the sum of the relative errors at left-out samples."""
        folds = np.arange(len(self.device_us)) % _FOLDS
        missed = np.zeros(len(_WALKS))
        if len(self.device_us) < FEWEST:
            return missed
        for place, columns in enumerate(_WALKS):
            amounts = self.amounts * columns
            for fold in range(_FOLDS):
                rest, out = folds != fold, folds == fold
                fitted = relative_fit(amounts[rest], self.device_us[rest], rounds=1)
                errors = np.abs(amounts[out] @ fitted / self.device_us[out] - 1.0)
                missed[place] += float(np.minimum(errors, 1.0).sum())
        return missed

    def costs(self, columns: FloatArray, host: bool) -> list[Cost]:
        """The models, of the features that ``columns`` has ones for."""
        if len(self.device_us) < FEWEST:
            return []
        pooled = relative_fit(self.amounts * columns, self.device_us)
        return [
            _cost(table, columns, pooled * table.per_dim, host)
            for table in self.tables
            if len(table.device_us) >= FEWEST
        ]


def _cost(table: _Table, columns: FloatArray, prior: FloatArray, host: bool) -> Cost:
    device = relative_fit(table.amounts * columns, table.device_us, prior * columns)
    predicted = table.amounts @ device
    measured = table.device_us
    launches = np.zeros(len(FEATURES))
    if host:
        # The host does not see how much work a launch is, only how many launches there are.
        launches = relative_fit(table.amounts * _LAUNCHES, table.host_us)
        predicted = np.maximum(predicted, table.amounts @ launches)
        measured = np.maximum(measured, table.host_us)
    return Cost(
        backend=table.backend,
        **table.regime._asdict(),
        host_us=_named(launches),
        device_us=_named(device) or {"call": 0.0},
        longest_kv_len=table.longest_kv_len,
        samples=len(measured),
        median_error=round(float(np.median(np.abs(predicted - measured) / measured)), 4),
    )


def _named(coefficients: FloatArray) -> dict[str, float]:
    return {
        name: float(f"{value:.6g}")
        for name, value in zip(FEATURES, coefficients, strict=True)
        if value > 0
    }


# -- thresholds ----------------------------------------------------------------------------------


def thresholds(costs: Sequence[Cost], device: torch.device) -> list[Threshold]:
    """Who wins from which key length on, for a usual shape of each regime with several backends."""
    predictor = Predictor(costs)
    backends: dict[Regime, list[Cost]] = defaultdict(list)
    for cost in costs:
        backends[cost.regime].append(cost)
    found = []
    for regime, rivals in sorted(backends.items()):
        if len(rivals) < 2:
            continue
        longest = max(cost.longest_kv_len for cost in rivals)
        for share in THRESHOLD_SHARES if regime.layout in ("padded", "right") else (0.0,):
            usual = _usual(regime, share)
            names = [cost.backend for cost in rivals]
            winners = _winners(usual, regime.layout, predictor, names, longest, device)
            if winners:
                found.append(
                    Threshold(
                        mode=regime.mode,
                        layout=regime.layout,
                        causal=regime.causal,
                        dtype=regime.dtype,
                        head_dim=regime.head_dim,
                        batch=usual.batch if regime.layout != "packed" else usual.sequences,
                        heads=usual.heads,
                        kv_heads=usual.kv_heads,
                        padding_share=share,
                        winners=tuple(winners),
                    )
                )
    return found


def _usual(regime: Regime, share: float) -> Workload:
    sides: dict[str, Side] = {"right": "right", "padded": "left", "packed": "packed"}
    packed = regime.layout == "packed"
    return Workload(
        mode=regime.mode,
        causal=regime.causal,
        side=sides.get(regime.layout, "none"),
        dtype=regime.dtype,
        batch=1 if packed else 8,
        q_len=1,
        kv_len=1,
        heads=16,
        kv_heads=16,
        head_dim=regime.head_dim,
        sequences=8 if packed else 0,
        padding_share=share,
    )


def _winners(
    usual: Workload,
    layout: Layout,
    predictor: Predictor,
    names: list[str],
    longest: int,
    device: torch.device,
) -> list[Winner]:
    """The winners by key length; of a packed batch, by the mean length of its sequences."""
    winners: list[Winner] = []
    for length in THRESHOLD_LENGTHS:
        if length > longest:
            break
        total = length * max(1, usual.sequences)
        workload = replace(usual, q_len=1 if usual.mode == "decode" else total, kv_len=total)
        if layout == "masked":
            workload = replace(workload, window=max(1, length // 4))
        plan, call = workload.plan(device), workload.call(device)
        predicted = [(predictor.predict(name, plan, call), name) for name in names]
        times = sorted((us, name) for us, name in predicted if us is not None)
        if len(times) < 2 or times[0][0] <= 0:
            continue
        if not winners or winners[-1].backend != times[0][1]:
            speedup = round(max(1.0, times[1][0] / times[0][0]), 3)
            winners.append(Winner(from_kv_len=length, backend=times[0][1], speedup=speedup))
    return winners


# -- the profile ---------------------------------------------------------------------------------


def fit_profile(
    header: Header, samples: Sequence[Sample], rules: Sequence[Rule], raw_samples: str | None
) -> Profile:
    """The profile of a device from its raw samples. Needs no device.

    Args:
        rules: what to go by where nothing was measured; excluded backends are taken out of them.
        raw_samples: file name to refer to.
    """
    device = torch.device(header.device.kind)
    usable = [sample for sample in samples if sample.backend not in header.excluded]
    costs = fit_costs(usable, device)
    kept = []
    for rule in rules:
        prefer = tuple(name for name in rule.prefer if name not in header.excluded)
        if prefer:
            kept.append(rule.model_copy(update={"prefer": prefer}))
    return Profile(
        name=header.device.slug,
        notes="Made by `smartattn calibrate`; times in microseconds, caches warm.",
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
        ),
        rules=tuple(kept),
        thresholds=tuple(thresholds(costs, device)),
        costs=tuple(costs),
    )
