"""Picks the backend of a call. Pure: plan, call, profile and backends are all arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .backends.base import Backend
from .call import Call
from .plan import Plan

if TYPE_CHECKING:
    from .profile import Profile


class UnsupportedCallError(RuntimeError):
    """No backend that may be used can run a call exactly; the message has every refusal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one backend said of a call."""

    backend: str
    #: Why it cannot run the call; empty if it can.
    refusals: tuple[str, ...]
    #: Predicted time in microseconds, None without a measurement.
    predicted_us: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen backend, and why."""

    backend: Backend
    reason: str
    verdicts: tuple[Verdict, ...]

    @property
    def predicted_us(self) -> float | None:
        """Predicted time of the chosen backend in microseconds."""
        for verdict in self.verdicts:
            if verdict.backend == self.backend.name:
                return verdict.predicted_us
        return None


def choose(
    plan: Plan,
    call: Call,
    profile: Profile,
    backends: Sequence[Backend],
    allowed: Sequence[str] | None = None,
) -> Decision:
    """Chooses the fastest backend that computes the call exactly.

    Args:
        backends: candidates in the order in which they are preferred without a measurement.
        allowed: names a caller restricts the choice to; one of them runs or an error is raised.

    Raises:
        UnsupportedCallError: every candidate refuses.
    """
    judged = [(backend, backend.refusals(plan, call)) for backend in backends]
    verdicts = {b.name: Verdict(b.name, tuple(refusals)) for b, refusals in judged}
    able = [b for b, refusals in judged if not refusals]
    if allowed is not None:
        able = [b for b in able if b.name in allowed]
    regular = [b for b in able if not b.last_resort]
    # A mask of (tokens, tokens) over packed sequences may not fit in memory at all.
    if plan.is_packed and (lean := [b for b in regular if not b.uses_dense_mask(plan, call)]):
        regular = lean
    candidates = regular or able
    if not candidates:
        raise UnsupportedCallError(_complaint(verdicts, allowed))

    def decide(backend: Backend, reason: str) -> Decision:
        return Decision(backend, reason, tuple(verdicts.values()))

    if len(candidates) == 1:
        restricted = " of those allowed" if allowed is not None else ""
        return decide(candidates[0], f"the only one{restricted} that can run this call")
    costs: list[tuple[float, Backend]] = []
    for backend in candidates:
        predicted = profile.predict(backend.name, plan, call)
        if predicted is not None:
            verdicts[backend.name] = Verdict(backend.name, (), predicted)
            costs.append((predicted, backend))
    if len(costs) > 1:
        predicted, backend = min(costs, key=lambda cost: cost[0])
        return decide(backend, f"fastest by profile {profile.name}: {predicted:.0f} us predicted")
    rule = profile.rule(plan, call)
    if rule is not None:
        for name in rule.prefer:
            for backend in candidates:
                if backend.name == name:
                    return decide(backend, f"rule of profile {profile.name}: {rule.because}")
    return decide(candidates[0], f"no measurement in profile {profile.name}; first in order")


def _complaint(verdicts: dict[str, Verdict], allowed: Sequence[str] | None) -> str:
    asked = [v for v in verdicts.values() if allowed is None or v.backend in allowed]
    lines = [f"{v.backend}: {'; '.join(v.refusals)}" for v in asked if v.refusals]
    if allowed is not None:
        lines += [f"{name}: no such backend" for name in allowed if name not in verdicts]
    scope = "none of the allowed backends" if allowed is not None else "no backend"
    return (
        f"{scope} can run this attention call exactly; "
        "load the model with attn_implementation='eager' instead. " + " | ".join(lines)
    )
