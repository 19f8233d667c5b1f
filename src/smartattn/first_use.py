"""Backends that build kernels on first use, and when that pays.

cuDNN, to which torch's SDPA goes on recent GPUs, needs tens of milliseconds for the first call of
each shape; a decoding step, whose keys are one more every time, never sees a shape again.
FlashAttention-4 needs seconds for the first call of each kind, whatever its lengths. Such a backend
is used for a shape, or a kind, once it has come back often enough: the rule of renting skis until
the rent comes to a fair share of their price.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .backends import Backend
from .call import Call, Runner
from .choose import TIE, Decision, Verdict
from .plan import Plan
from .units import format_us

#: What has come back is taken to come this many times as often as it has: building starts when the
#: time lost by waiting, so many times over, has come to what building costs.
_MORE_TO_COME = 4.0
#: Shapes and kinds that are remembered.
_MOST = 65_536


@dataclass(slots=True)
class _Shape:
    #: Microseconds lost so far by not building.
    lost_us: float = 0.0
    built: bool = False


class FirstUses:
    """Which backend has been built for which shapes or kinds, and what not building has cost.

    Args:
        backends: all that a decision may be about.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._shapes: dict[Hashable, _Shape] = {}

    def settle(
        self, decision: Decision, plan: Plan, call: Call
    ) -> tuple[Decision, Callable[[], Runner]]:
        """The decision with what it costs to build taken into account, and what binds it."""
        backend, verdict = decision.backend, decision.verdict
        waiting: list[tuple[_Shape, Verdict]] = []
        others = _others(decision)
        building = 0.0
        while verdict.build_us and not (shape := self._shape(backend, plan, call)).built:
            found = self._alternative(others, verdict.build_us, plan, call)
            if found is None:
                shape.built, building = True, verdict.build_us
                break
            waiting.append((shape, verdict))
            backend, verdict = found
        if not waiting:
            return decision, functools.partial(backend.bind, plan, call)
        # What is run instead, and what that has to build, is the price of waiting.
        rents = []
        for shape, better in waiting:
            shape.lost_us += building
            rents.append(_Rent(shape, _longer_us(verdict, better), better.build_us))
        waiting_for = decision.backend.name
        built = f"build kernels for such calls ({format_us(decision.verdict.build_us)})"
        best = decision.predicted_us
        if best is not None and all(rent.loss_us <= TIE * best for rent in rents) and not building:
            # Nothing is lost that could be measured: it is not worth counting either.
            reason = f"as fast as {waiting_for}, which would first have to {built}"
            chosen = replace(decision, backend=backend, reason=reason)
            return chosen, functools.partial(backend.bind, plan, call)
        reason = (
            f"{waiting_for} would first have to {built}, which pays once they have come often "
            "enough"
        )
        chosen = replace(decision, backend=backend, reason=reason, waiting_for=waiting_for)
        wait = functools.partial(_Waiting, rents, backend, plan, call)
        return chosen, lambda: wait().run

    def ready(self, decision: Decision, plan: Plan, call: Call) -> Decision:
        """The best of what needs nothing built for a call any more; the decision if nothing is so.

        Nothing is counted.
        """
        others = [(self._backends[v.backend], v) for v in _others(decision)]
        for backend, verdict in [(decision.backend, decision.verdict), *others]:
            if verdict.build_us and not self._shape(backend, plan, call).built:
                continue
            if backend is decision.backend:
                return decision
            if not backend.refusals(plan, call):
                reason = (
                    f"the fastest for which nothing has to be built, unlike {decision.backend.name}"
                )
                return replace(decision, backend=backend, reason=reason)
        return decision

    def has_built(self, decision: Decision, plan: Plan, call: Call) -> bool:
        """Whether what a decision needs has been built; False if nobody knows that it builds."""
        built: bool = self._shape(decision.backend, plan, call).built
        return bool(decision.verdict.build_us) and built

    def take(self, decision: Decision, plan: Plan, call: Call) -> None:
        """Takes note of a decision that is carried out whatever it costs to build."""
        if decision.verdict.build_us:
            self._shape(decision.backend, plan, call).built = True

    def _shape(self, backend: Backend, plan: Plan, call: Call) -> _Shape:
        key: Hashable = backend.built_for(plan, call)
        if key is None:
            # torch keeps cuDNN's plans per thread.
            key = (
                threading.get_ident(),
                replace(call, features=frozenset(), self_attention=False, has_eager=False),
                plan.pattern,
                backend.uses_dense_mask(plan, call),
            )
        shape = self._shapes.get((backend.name, key))
        if shape is None:
            if len(self._shapes) >= _MOST:
                self._shapes.clear()
            shape = self._shapes[backend.name, key] = _Shape()
        return shape

    def _alternative(
        self, others: list[Verdict], build_us: float, plan: Plan, call: Call
    ) -> tuple[Backend, Verdict] | None:
        """The fastest other backend that is ready or sooner built; it and faster ones are taken.

        One whose kernels cost as much as may be lost by waiting is no way to wait.
        """
        while others:
            verdict = others.pop(0)
            backend = self._backends[verdict.backend]
            if backend.refusals(plan, call):
                continue
            if (
                not verdict.build_us
                or verdict.build_us * _MORE_TO_COME < build_us
                or self._shape(backend, plan, call).built
            ):
                return backend, verdict
        return None


def _others(decision: Decision) -> list[Verdict]:
    """What was predicted for other backends, the fastest first; empty if nothing is known."""
    if decision.predicted_us is None:
        return []
    own = decision.backend.name
    known = [v for v in decision.verdicts if v.predicted_us is not None and v.backend != own]
    return sorted(known, key=lambda verdict: (verdict.predicted_us, verdict.backend))


def _longer_us(verdict: Verdict, better: Verdict) -> float:
    assert verdict.predicted_us is not None
    assert better.predicted_us is not None
    return max(0.0, verdict.predicted_us - better.predicted_us)


@dataclass(frozen=True, slots=True)
class _Rent:
    """What every call loses for as long as kernels are not built, and what building them costs."""

    shape: _Shape
    loss_us: float
    build_us: float

    def pay(self) -> bool:
        """Counts one call; returns whether to build from now on."""
        shape = self.shape
        shape.lost_us += self.loss_us
        if shape.lost_us * _MORE_TO_COME >= self.build_us:
            shape.built = True
        return shape.built


class _Waiting:
    """Runs one backend until another one is worth building; then the plan has to choose again."""

    def __init__(self, rents: Sequence[_Rent], now: Backend, plan: Plan, call: Call) -> None:
        self._rents = rents
        self._now = now.bind(plan, call)
        # A checkpointed layer must run again as it ran in the forward.
        self._plan = None if call.grad else weakref.ref(plan)

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        built = False
        for rent in self._rents:
            built = rent.pay() or built
        if built and self._plan is not None and (plan := self._plan()) is not None:
            plan.forget_choices()
        return self._now(query, key, value, arguments)
