"""Backends that build kernels for every new shape, and when that pays.

cuDNN, to which torch's SDPA goes on recent GPUs, needs tens of milliseconds for the first call of
each shape; a decoding step, whose keys are one more every time, never sees a shape again. Such a
backend is used for a shape once the time lost to the next best one adds up to what building costs:
the rule that is never worse than twice the best (renting skis until the rent would have bought
them).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .backends import Backend
from .call import Call, Runner
from .choose import Decision
from .plan import Plan

#: Shapes that are remembered.
_MOST = 65_536


@dataclass(slots=True)
class _Shape:
    #: Microseconds lost so far by not building.
    lost_us: float = 0.0
    built: bool = False


class FirstUses:
    """Which backend has been built for which shapes, and what not building has cost."""

    def __init__(self) -> None:
        self._shapes: dict[Hashable, _Shape] = {}

    def bind(self, decision: Decision, plan: Plan, call: Call) -> tuple[Decision, Runner]:
        """The decision with what it costs to build taken into account, and its runner."""
        build_us = decision.profile.build_us(decision.backend.name, plan, call)
        if not build_us:
            return decision, decision.backend.bind(plan, call)
        shape = self._shape(decision.backend, plan, call)
        other = None if shape.built else self._alternative(decision, plan, call)
        if other is None:
            shape.built = True
            return decision, decision.backend.bind(plan, call)
        backend, loss_us = other
        reason = (
            f"{decision.backend.name} would first have to build kernels for this shape "
            f"({build_us / 1e3:.0f} ms), and be {loss_us:.0f} us faster from then on"
        )
        chosen = replace(decision, backend=backend, reason=reason)
        wait = _Waiting(shape, loss_us, build_us, backend, decision.backend, plan, call)
        return chosen, wait.run

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

    @staticmethod
    def _alternative(decision: Decision, plan: Plan, call: Call) -> tuple[Backend, float] | None:
        """The fastest backend that has nothing to build, and what it takes longer in us."""
        known = decision.predicted_us
        if known is None:
            return None
        best: tuple[Backend, float] | None = None
        for backend, predicted_us in decision.predictions():
            loss_us = max(0.0, predicted_us - known)
            if (
                (best is None or loss_us < best[1])
                and not decision.profile.build_us(backend.name, plan, call)
                and not backend.refusals(plan, call)
            ):
                best = backend, loss_us
        return best


class _Waiting:
    """Runs one backend until another one is worth building."""

    def __init__(
        self,
        shape: _Shape,
        loss_us: float,
        build_us: float,
        now: Backend,
        later: Backend,
        plan: Plan,
        call: Call,
    ) -> None:
        self._shape, self._loss_us, self._build_us = shape, loss_us, build_us
        self._now = now.bind(plan, call)
        self._later: Runner | None = None
        self._bind_later = lambda: later.bind(plan, call)
        # A checkpointed layer must run again as it ran in the forward.
        self._may_change = not call.grad

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        shape = self._shape
        if shape.built and self._may_change:
            if self._later is None:
                self._later = self._bind_later()
            return self._later(query, key, value, arguments)
        shape.lost_us += self._loss_us
        if shape.lost_us >= self._build_us:
            shape.built = True
        return self._now(query, key, value, arguments)
