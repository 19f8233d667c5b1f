"""Picks the backend of a call. Pure: plan, call, profile and backends are all arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .backends.base import Backend, changes
from .call import Call
from .plan import Plan
from .units import format_us

if TYPE_CHECKING:
    from .cost import Estimate
    from .profile import Profile

Goal = Literal["latency", "memory", "accuracy"]

#: Predictions closer than this share count as equal: then the order of the backends decides, which
#: is the same on every machine and after every calibration.
TIE = 0.01


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be small: time, peak memory, or the error against float64.

    ``max_slowdown`` bounds the predicted time of what is chosen for memory or accuracy, as a
    multiple of the fastest one's; None is no bound.
    """

    goal: Goal = "latency"
    max_slowdown: float | None = None

    def __str__(self) -> str:
        if self.max_slowdown is None:
            return self.goal
        return f"{self.goal} within {self.max_slowdown:g} times the fastest"


LATENCY = Objective()


class UnsupportedCallError(RuntimeError):
    """No backend that may be used can run a call exactly; the message has every refusal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one backend said of a call."""

    backend: str
    #: Why it cannot run the call; empty if it can.
    refusals: tuple[str, ...]
    #: What the call is predicted to add to its layer, in microseconds; None without a measurement.
    predicted_us: float | None = None
    #: Predicted peak memory in bytes, and error relative to the largest value; None likewise.
    predicted_bytes: float | None = None
    expected_error: float | None = None
    #: Microseconds that building kernels for a new shape takes.
    build_us: float = 0.0
    #: What the rest of the layer waits for, if that is known.
    bottleneck: Literal["host", "device"] | None = None
    #: Microseconds that the call itself keeps host and device busy; None on a CPU.
    host_us: float | None = None
    device_us: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen backend, and why."""

    backend: Backend
    reason: str
    verdicts: tuple[Verdict, ...]
    profile: Profile
    objective: Objective = LATENCY
    #: The better one, which has to come back more often before its kernels are built.
    waiting_for: str | None = None

    @property
    def predicted_us(self) -> float | None:
        """What the chosen backend's call is predicted to add to its layer, in microseconds."""
        return self.verdict.predicted_us

    @property
    def verdict(self) -> Verdict:
        """What the chosen backend said."""
        return next(v for v in self.verdicts if v.backend == self.backend.name)


def choose(
    plan: Plan,
    call: Call,
    profile: Profile,
    backends: Sequence[Backend],
    allowed: Sequence[str] | None = None,
    objective: Objective = LATENCY,
    ask: Callable[[Backend, Plan, Call], list[str]] | None = None,
) -> Decision:
    """Chooses the best backend of those that compute the call exactly.

    Args:
        backends: candidates in the order in which they are preferred without a measurement.
        allowed: names a caller restricts the choice to; one of them runs or an error is raised.
        objective: what "best" means; where its measurements are missing, the fastest.
        ask: what a backend refuses, for machines other than this one; None asks the backend.

    Raises:
        UnsupportedCallError: every candidate refuses.
    """
    judged = [(b, ask(b, plan, call) if ask else b.refusals(plan, call)) for b in backends]
    verdicts = {b.name: Verdict(b.name, tuple(refusals)) for b, refusals in judged}
    able = [b for b, refusals in judged if not refusals]
    if allowed is not None:
        able = [b for b in able if b.name in allowed]
    regular = [b for b in able if not b.last_resort]
    candidates = [b for b in regular if b.set_aside(plan, call) is None] or regular or able
    if not candidates:
        raise UnsupportedCallError(_complaint(verdicts, allowed))

    def decide(backend: Backend, reason: str) -> Decision:
        return Decision(backend, reason, tuple(verdicts.values()), profile, objective)

    if len(candidates) == 1:
        restricted = " of those allowed" if allowed is not None else ""
        kept = " and is not set aside" if len(regular) > 1 else ""
        return decide(candidates[0], f"the only one{restricted} that can run this call{kept}")
    estimates: list[tuple[Backend, Estimate]] = []
    for backend in candidates:
        estimate = profile.estimate(backend.name, plan, call)
        if estimate is not None:
            verdicts[backend.name] = Verdict(backend.name, (), *estimate[:7])
            estimates.append((backend, estimate))
    if len(estimates) > 1:
        return decide(*_best(estimates, objective, profile.name))
    reach = profile.reach([backend.name for backend in candidates], plan, call)
    beyond = ""
    if reach is not None and call.kv_len > reach:
        beyond = f" beyond {reach:,} tokens, the longest that it predicts"
    rule = profile.rule(plan, call)
    if rule is not None:
        for name in rule.prefer:
            for backend in candidates:
                if backend.name == name:
                    source = f"rule of profile {profile.name}{beyond}: {rule.because}"
                    return decide(backend, source)
    nothing = f"no measurement in profile {profile.name}{beyond}; first in order"
    return decide(candidates[0], nothing)


def _best(
    estimates: list[tuple[Backend, Estimate]], objective: Objective, profile: str
) -> tuple[Backend, str]:
    """The best of several backends, and why."""
    shortest = min(estimate.us for _, estimate in estimates)
    fastest = next(
        (
            backend,
            f"fastest by profile {profile}: {_predicted(estimate)}",
        )
        for backend, estimate in estimates
        if estimate.us <= shortest * (1 + TIE)
    )
    if objective.goal == "latency":
        return fastest
    bound = math.inf if objective.max_slowdown is None else objective.max_slowdown * shortest
    figures = [
        (
            estimate.peak_bytes if objective.goal == "memory" else estimate.error,
            estimate.us,
            backend,
        )
        for backend, estimate in estimates
        if estimate.us <= bound
    ]
    known = [(figure, us, backend) for figure, us, backend in figures if figure is not None]
    if len(known) < len(figures):
        return fastest[0], f"{objective.goal} was not measured; {fastest[1]}"
    lowest = min(figure for figure, _, _ in known)
    figure, us, backend = min(
        (entry for entry in known if entry[0] <= lowest * (1 + TIE)), key=lambda entry: entry[1]
    )
    value = f"{figure / 2**20:.1f} MiB" if objective.goal == "memory" else f"{figure:.2g}"
    what = "least memory" if objective.goal == "memory" else "smallest error"
    slower = us / shortest
    ratio = f"{slower:.2f} times the shortest time" if slower > 1 + TIE else "also the fastest"
    return backend, f"{what} by profile {profile}: {value} predicted, {ratio}"


def _predicted(estimate: Estimate) -> str:
    """What is expected of a call: in a layer that waits for host or device no kernel's time."""
    if estimate.bottleneck is None:
        return f"{format_us(estimate.us)} predicted"
    return (
        f"predicted to add {format_us(estimate.us)} to a layer that waits for the "
        f"{estimate.bottleneck}"
    )


class Chooser:
    """:func:`choose` with a memory for batches that differ little in size.

    Costs are smooth but for the number of thread blocks of a decoding step, so that batches within
    a few per cent of each other share their choice. What can be run is never remembered: the
    chosen backend is asked about every plan anew.

    Args:
        backends: as for :func:`choose`.
        size: number of choices that are remembered.
    """

    def __init__(self, backends: Sequence[Backend], size: int = 4096) -> None:
        self._backends = tuple(backends)
        self._size = size
        self._known: dict[Hashable, Decision] = {}

    def __call__(
        self,
        plan: Plan,
        call: Call,
        profile: Profile,
        allowed: tuple[str, ...] | None = None,
        objective: Objective = LATENCY,
    ) -> Decision:
        """The decision for a call; see :func:`choose`."""
        key = (id(profile), allowed, objective, changes(), _kind(plan, call))
        known = self._known.get(key)
        # The entry of a profile that is gone may have come back under the id of another.
        if (
            known is not None
            and known.profile is profile
            and not known.backend.last_resort
            and not known.backend.refusals(plan, call)
        ):
            return known
        if len(self._known) >= self._size:
            self._known.clear()
        decision = self._known[key] = choose(
            plan, call, profile, self._backends, allowed, objective
        )
        return decision


def _kind(plan: Plan, call: Call) -> Hashable:
    """What a choice depends on, with sizes rounded to an eighth of an octave."""
    sizes = [call.batch, call.q_len, call.kv_len, plan.visible]
    if plan.is_padded or plan.is_packed:
        sizes += (plan.real_q, plan.real_k, plan.attended_pairs(True))
    return (
        plan.pattern,
        plan.padding,
        plan.is_packed,
        plan.is_uniform,
        plan.window if plan.window_matters else None,
        plan.is_aligned,
        call.device,
        call.dtype,
        call.heads,
        call.kv_heads,
        call.head_dim,
        call.value_head_dim,
        call.grad,
        call.self_attention,
        call.keep_padding_output,
        call.token_major_keys,
        call.copies_keys,
        call.features,
        call.batch if call.q_len == 1 else None,
        len(plan.sequences) if plan.is_packed and plan.sequences is not None else None,
        *[int(8 * math.log2(size + 1)) for size in sizes],
    )


def _complaint(verdicts: dict[str, Verdict], allowed: Sequence[str] | None) -> str:
    asked = [v for v in verdicts.values() if allowed is None or v.backend in allowed]
    lines = [f"{v.backend}: {'; '.join(v.refusals)}" for v in asked if v.refusals]
    if allowed is not None:
        lines += [f"{name}: no such backend" for name in allowed if name not in verdicts]
    scope = "none of the allowed backends" if allowed is not None else "no backend"
    advice = (
        "load the model with attn_implementation='eager' instead"
        if allowed is None
        else "allow further backends"
    )
    return f"{scope} can run this attention call exactly; {advice}. " + " | ".join(lines)
