"""How good choices are: the time of what was chosen, divided by the time of the best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .backends import BACKENDS, Backend, Support
from .call import Call, Runner
from .choose import choose
from .features import Mode
from .fit import fit_costs
from .plan import Plan
from .profile import Profile
from .samples import Sample
from .surroundings import Surroundings
from .workload import Workload

#: Picks one of the names for a workload on a device; None if it takes none of them.
Policy = Callable[[Workload, torch.device, Sequence[str]], str | None]


@dataclass(frozen=True)
class Judged:
    """One workload under one policy. Times in microseconds, see :meth:`Sample.us`."""

    workload: Workload
    chosen: str
    us: Mapping[str, float]

    @property
    def best(self) -> str:
        """The fastest backend."""
        return min(self.us, key=self.us.__getitem__)

    @property
    def regret(self) -> float:
        """Time of the chosen backend / time of the best, at least 1."""
        return self.us[self.chosen] / self.us[self.best]


@dataclass(frozen=True, slots=True)
class Regret:
    """Regrets of some workloads; ``calls`` that a policy could not decide are not among them."""

    calls: int
    mean: float
    p95: float
    worst: float

    @staticmethod
    def of(judged: Sequence[Judged]) -> Regret | None:
        """The figures; None for no workloads."""
        if not judged:
            return None
        regrets = np.array([one.regret for one in judged])
        p95 = float(np.quantile(regrets, 0.95))
        return Regret(len(judged), float(regrets.mean()), p95, float(regrets.max()))


class _Measured(Backend):
    """Stands for a backend that ran a workload, wherever that was."""

    support = Support()

    def __init__(self, name: str, backend: Backend | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self._backend = backend

    def set_aside(self, plan: Plan, call: Call) -> str | None:
        return None if self._backend is None else self._backend.set_aside(plan, call)

    def bind(self, plan: Plan, call: Call) -> Runner:
        raise NotImplementedError("only measured timings are looked at")


_STANDINS: dict[str, _Measured] = {one.name: _Measured(one.name, one) for one in BACKENDS}


def by_profile(profile: Profile, surroundings: Surroundings | None = None) -> Policy:
    """What :func:`~smartattn.choose.choose` does with a profile, for calls in such layers."""
    profile = profile.model_copy(update={"surroundings": surroundings})
    # A copy of a model takes its cached properties along.
    profile.__dict__.pop("predictor", None)

    def pick(workload: Workload, device: torch.device, names: Sequence[str]) -> str:
        known = [one for name, one in _STANDINS.items() if name in names]
        known += [_Measured(name) for name in names if name not in _STANDINS]
        return choose(workload.plan(device), workload.call(device), profile, known).backend.name

    return pick


def always(*preferred: str) -> Policy:
    """The first of these that can run."""

    def pick(workload: Workload, device: torch.device, names: Sequence[str]) -> str | None:
        return next((name for name in preferred if name in names), None)

    return pick


def timings(
    samples: Iterable[Sample], device: torch.device, surroundings: Surroundings | None = None
) -> dict[Workload, dict[str, float]]:
    """Microseconds by workload and backend, of workloads that leave a choice.

    Args:
        surroundings: the rest of the layers that the calls are taken to be in; None for none.
    """
    found: dict[Workload, dict[str, float]] = defaultdict(dict)
    for sample in samples:
        if sample.status == "ok" and sample.device_us > 0:
            slack_us = 0.0
            if surroundings is not None:
                workload = sample.workload
                slack_us = surroundings.slack_us(workload.plan(device), workload.call(device))
            found[sample.workload][sample.backend] = sample.us(slack_us)
    return {workload: us for workload, us in found.items() if len(us) > 1}


def judge(
    samples: Iterable[Sample],
    policy: Policy,
    device: torch.device,
    surroundings: Surroundings | None = None,
) -> list[Judged]:
    """Every workload that a policy decides.

    Args:
        device: of the kind that was measured; it need not exist here.
        surroundings: see :func:`timings`.
    """
    judged = []
    for workload, us in timings(samples, device, surroundings).items():
        chosen = policy(workload, device, list(us))
        if chosen is not None:
            judged.append(Judged(workload, chosen, us))
    return judged


def by_mode(judged: Iterable[Judged]) -> dict[Mode, list[Judged]]:
    """The workloads of each mode."""
    found: dict[Mode, list[Judged]] = defaultdict(list)
    for one in judged:
        found[one.workload.mode].append(one)
    return dict(found)


def cross_validated(
    samples: Sequence[Sample],
    profile: Profile,
    device: torch.device,
    folds: int,
    seed: int = 0,
    surroundings: Surroundings | None = None,
    processors: int | None = None,
) -> list[Judged]:
    """Every workload, under costs that are fitted to the others.

    Args:
        profile: whose rules hold where nothing is left to fit.
        folds: parts that the workloads are cut into; as many as workloads leaves one out each.
        surroundings: see :func:`timings`.
        processors: see :func:`~smartattn.fit.fit_costs`.
    """
    workloads = list(dict.fromkeys(sample.workload for sample in samples))
    order = np.random.default_rng(seed).permutation(len(workloads))
    part = {workloads[place]: number % folds for number, place in enumerate(order)}
    judged = []
    for fold in range(min(folds, len(workloads))):
        rest = [sample for sample in samples if part[sample.workload] != fold]
        out = [sample for sample in samples if part[sample.workload] == fold]
        costs = fit_costs(rest, device, processors)
        fitted = profile.model_copy(update={"costs": tuple(costs)})
        judged += judge(out, by_profile(fitted, surroundings), device, surroundings)
    return judged
