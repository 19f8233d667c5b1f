"""Backends that build kernels for every new shape, and when that pays.

cuDNN, to which torch's SDPA goes on recent GPUs, needs tens of milliseconds for the first call of
each shape; a decoding step, whose keys are one more every time, never sees a shape again. Such a
backend is used for a shape once it has come back often enough: the rule of renting skis until the
rent comes to a fair share of their price.
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
from .choose import Decision
from .plan import Plan
from .units import format_us

#: A shape that has come back is taken to come this many times as often as it has: building starts
#: when the time lost by waiting, so many times over, has come to what building costs.
_MORE_TO_COME = 4.0
#: Shapes that are remembered.
_MOST = 65_536


@dataclass(slots=True)
class _Shape:
    #: Microseconds lost so far by not building.
    lost_us: float = 0.0
    built: bool = False


class FirstUses:
    """Which backend has been built for which shapes, and what not building has cost.

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
        bind = functools.partial(decision.backend.bind, plan, call)
        build_us = decision.verdict.build_us
        if not build_us:
            return decision, bind
        shape = self._shape(decision.backend, plan, call)
        other = None if shape.built else self._alternative(decision, plan, call)
        if other is None:
            shape.built = True
            return decision, bind
        backend, loss_us = other
        reason = (
            f"{decision.backend.name} would first have to build kernels for this shape "
            f"({format_us(build_us)}), which pays once it has come often enough"
        )
        waiting_for = decision.backend.name
        chosen = replace(decision, backend=backend, reason=reason, waiting_for=waiting_for)
        wait = functools.partial(_Waiting, shape, loss_us, build_us, backend, plan, call)
        return chosen, lambda: wait().run

    def _shape(self, backend: Backend, plan: Plan, call: Call) -> _Shape:
        # torch keeps cuDNN's plans per thread.
        key = (
            threading.get_ident(),
            backend.name,
            replace(call, features=frozenset(), self_attention=False, has_eager=False),
            plan.pattern,
            backend.uses_dense_mask(plan, call),
        )
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= _MOST:
                self._shapes.clear()
            shape = self._shapes[key] = _Shape()
        return shape

    def _alternative(
        self, decision: Decision, plan: Plan, call: Call
    ) -> tuple[Backend, float] | None:
        """The fastest backend that has nothing to build, and what it takes longer in us."""
        known_us = decision.predicted_us
        if known_us is None:
            return None
        others = sorted(
            (verdict.predicted_us, verdict.backend)
            for verdict in decision.verdicts
            if verdict.predicted_us is not None and not verdict.build_us
        )
        for predicted_us, name in others:
            backend = self._backends[name]
            if not backend.refusals(plan, call):
                return backend, max(0.0, predicted_us - known_us)
        return None


class _Waiting:
    """Runs one backend until another one is worth building; then the plan has to choose again."""

    def __init__(
        self,
        shape: _Shape,
        loss_us: float,
        build_us: float,
        now: Backend,
        plan: Plan,
        call: Call,
    ) -> None:
        self._shape, self._loss_us, self._build_us = shape, loss_us, build_us
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
        shape = self._shape
        shape.lost_us += self._loss_us
        if shape.lost_us * _MORE_TO_COME >= self._build_us:
            shape.built = True
        if shape.built and self._plan is not None and (plan := self._plan()) is not None:
            plan.decisions.clear()
        return self._now(query, key, value, arguments)
