"""When kernels that are built per shape are worth building."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from smartattn.backends import Backend, Support
from smartattn.call import Call, Runner
from smartattn.choose import Decision, Verdict
from smartattn.first_use import FirstUses
from smartattn.plan import Pattern, Plan
from smartattn.profile import Profile
from smartattn.profiles import profile_for

CPU = torch.device("cpu")
CALL = Call(CPU, torch.float32, 2, 8, 8, 4, 4, 16, 16)
STATES = tuple(torch.zeros(2, 4, 8, 16) for _ in range(3))


class Named(Backend):
    """Returns its own name, and refuses on request."""

    support = Support()

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self.refuses = False
        #: What its kernels are built for, None for every shape.
        self.kind: str | None = None

    def built_for(self, plan: Plan, call: Call) -> str | None:
        return self.kind

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        return ["not today"] if self.refuses else []

    def bind(self, plan: Plan, call: Call) -> Runner:
        def run(q: Any, k: Any, v: Any, arguments: Mapping[str, Any]) -> Any:
            return self.name

        return run


@pytest.fixture
def profile() -> Profile:
    return profile_for(CPU)


BUILT, READY, SLOW = Named("built"), Named("ready"), Named("slow")


def decide(profile: Profile, build_us: float = 4000.0, known: bool = True) -> Decision:
    verdicts = (
        Verdict("built", (), 10.0 if known else None, build_us=build_us),
        Verdict("ready", (), 110.0),
        Verdict("slow", (), 500.0),
    )
    return Decision(BUILT, "fastest", verdicts, profile)


def plan(width: int = 8) -> Plan:
    return Plan(2, width, width, Pattern.CAUSAL, CPU)


def bound(first: FirstUses, *arguments: Any) -> tuple[Decision, Runner]:
    decision, bind = first.settle(*arguments)
    return decision, bind()


def uses(runner: Runner, times: int) -> list[Any]:
    return [runner(*STATES, {}) for _ in range(times)]


def test_built_once_waiting_has_cost_as_much(profile: Profile) -> None:
    first = FirstUses((BUILT, READY, SLOW))
    # 100 us are lost per call, and building takes 4000: 1000 have to be lost.
    chosen, run = bound(first, decide(profile), plan(), CALL)
    assert chosen.backend is READY
    assert "build kernels" in chosen.reason
    assert chosen.waiting_for == "built"
    assert uses(run, 4) == ["ready"] * 4
    # Later forwards go on counting.
    again = plan()
    again.decisions["layer"] = "kept"
    chosen, run = bound(first, decide(profile), again, CALL)
    assert chosen.backend is READY
    assert uses(run, 5) == ["ready"] * 5
    assert again.decisions
    # The layers that come now have to choose again, in this forward too.
    assert uses(run, 1) == ["ready"]
    assert not again.decisions
    chosen, run = bound(first, decide(profile), again, CALL)
    assert chosen.backend is BUILT
    assert chosen.waiting_for is None
    assert uses(run, 2) == ["built"] * 2


@pytest.mark.parametrize(("ready_us", "waits"), [(10.05, False), (10.2, True)])
def test_nothing_is_counted_where_another_is_as_fast(
    ready_us: float, waits: bool, profile: Profile
) -> None:
    verdicts = (Verdict("built", (), 10.0, build_us=4000.0), Verdict("ready", (), ready_us))
    decision = Decision(BUILT, "fastest", verdicts, profile)
    first = FirstUses((BUILT, READY, SLOW))
    now = plan()
    now.decisions["layer"] = "kept"
    chosen, run = bound(first, decision, now, CALL)
    assert chosen.backend is READY
    assert (chosen.waiting_for is not None) == waits
    assert chosen.reason.startswith("as fast as built") != waits
    assert uses(run, 10_000) == ["ready"] * 10_000
    assert bool(now.decisions) != waits


def test_every_shape_counts_for_itself(profile: Profile) -> None:
    first = FirstUses((BUILT, READY, SLOW))
    _, run = bound(first, decide(profile), plan(), CALL)
    uses(run, 10)
    assert bound(first, decide(profile), plan(), CALL)[0].backend is BUILT
    longer = replace(CALL, q_len=9, kv_len=9)
    for other in (longer, replace(CALL, dtype=torch.float64), replace(CALL, grad=True)):
        assert bound(first, decide(profile), plan(other.q_len), other)[0].backend is READY
    # What does not change the kernel does not make a new shape.
    same = replace(CALL, self_attention=True, has_eager=True)
    assert bound(first, decide(profile), plan(), same)[0].backend is BUILT


def test_every_thread_builds_its_own(profile: Profile) -> None:
    first = FirstUses((BUILT, READY, SLOW))
    uses(bound(first, decide(profile), plan(), CALL)[1], 10)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(bound(first, decide(profile), plan(), CALL)[0].backend)
    )
    thread.start()
    thread.join()
    assert found == [READY]


def test_a_layer_with_gradients_runs_again_as_it_ran(profile: Profile) -> None:
    """A checkpointed layer runs twice; only the next forward may change."""
    first = FirstUses((BUILT, READY, SLOW))
    training = replace(CALL, grad=True)
    forward = plan()
    forward.decisions["layer"] = "kept"
    _, run = bound(first, decide(profile), forward, training)
    assert uses(run, 20) == ["ready"] * 20
    assert forward.decisions
    assert bound(first, decide(profile), plan(), training)[0].backend is BUILT


def test_nothing_to_wait_for(profile: Profile) -> None:
    first = FirstUses((BUILT, READY, SLOW))
    assert bound(first, decide(profile, build_us=0.0), plan(), CALL)[0].backend is BUILT
    unknown = bound(FirstUses((BUILT, READY, SLOW)), decide(profile, known=False), plan(), CALL)
    assert unknown[0].backend is BUILT


def test_the_next_best_may_refuse(profile: Profile) -> None:
    ready, slow = Named("ready"), Named("slow")
    first = FirstUses((BUILT, ready, slow))
    ready.refuses = True
    chosen, run = bound(first, decide(profile), plan(), CALL)
    assert chosen.backend is slow
    # 490 us are lost per call.
    assert uses(run, 3) == ["slow"] * 3
    assert bound(first, decide(profile), plan(), CALL)[0].backend is BUILT
    slow.refuses = True
    assert bound(first, decide(profile), plan(9), replace(CALL, q_len=9))[0].backend is BUILT


# -- kernels of a kind of calls --------------------------------------------------------------------


def test_a_kind_is_built_once_for_all_lengths_and_threads(profile: Profile) -> None:
    kinds, ready = Named("built"), Named("ready")
    kinds.kind = "causal"
    first = FirstUses((kinds, ready, SLOW))
    made = replace(decide(profile), backend=kinds)
    # Losses of all lengths count together.
    for width in range(8, 18):
        shape = replace(CALL, q_len=width, kv_len=width)
        chosen, run = bound(first, made, plan(width), shape)
        assert chosen.backend is ready
        assert "such calls (4.00 ms)" in chosen.reason
        uses(run, 1)
    other = replace(CALL, q_len=99, kv_len=99)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(bound(first, made, plan(99), other)[0].backend.name)
    )
    thread.start()
    thread.join()
    assert found == ["built"]
    kinds.kind = "windowed"
    assert bound(first, made, plan(), CALL)[0].backend is ready


def chain(profile: Profile, *verdicts: Verdict) -> Decision:
    return Decision(Named(verdicts[0].backend), "fastest", verdicts, profile)


def test_what_is_run_meanwhile_may_have_to_be_built_first(profile: Profile) -> None:
    """Seconds for a kind, milliseconds for a shape, and one that is ready."""
    kinds, shapes, ready = Named("kinds"), Named("shapes"), Named("ready")
    kinds.kind = "causal"
    first = FirstUses((kinds, shapes, ready))
    decision = chain(
        profile,
        Verdict("kinds", (), 10.0, build_us=40_000.0),
        Verdict("shapes", (), 30.0, build_us=4_000.0),
        Verdict("ready", (), 130.0),
    )
    decision = replace(decision, backend=kinds)
    # 100 us a call are lost to the shape's kernels, 120 us to those of the kind.
    chosen, run = bound(first, decision, plan(), CALL)
    assert chosen.backend is ready
    assert chosen.waiting_for == "kinds"
    uses(run, 9)
    assert bound(first, decision, plan(), CALL)[0].backend is ready
    again = plan()
    again.decisions["layer"] = "kept"
    uses(bound(first, decision, again, CALL)[1], 1)
    assert not again.decisions
    # Now those of the shape are built: 20 us a call are lost, of 10,000 in all.
    chosen, run = bound(first, decision, plan(), CALL)
    assert chosen.backend is shapes
    uses(run, 439)
    assert bound(first, decision, plan(), CALL)[0].backend is shapes
    uses(run, 1)
    assert bound(first, decision, plan(), CALL)[0].backend is kinds


def test_waiting_with_one_that_has_to_be_built_costs_what_that_costs(profile: Profile) -> None:
    kinds, shapes = Named("kinds"), Named("shapes")
    kinds.kind = "causal"
    first = FirstUses((kinds, shapes))

    def decision(build_us: float) -> Decision:
        made = chain(
            profile,
            Verdict("kinds", (), 10.0, build_us=40_000.0),
            Verdict("shapes", (), 30.0, build_us=build_us),
        )
        return replace(made, backend=kinds)

    # Every new shape costs 4,000 us, and 10,000 may be lost.
    for width in (8, 9):
        shape = replace(CALL, q_len=width, kv_len=width)
        assert bound(first, decision(4_000.0), plan(width), shape)[0].backend is shapes
        # What is built is there.
        assert bound(first, decision(4_000.0), plan(width), shape)[0].backend is shapes
    third = replace(CALL, q_len=10, kv_len=10)
    _, run = bound(first, decision(4_000.0), plan(10), third)
    assert uses(run, 1) == ["shapes"]
    assert bound(first, decision(4_000.0), plan(11), replace(CALL, q_len=11))[0].backend is kinds
    # One that costs as much as may be lost is no way to wait.
    other = FirstUses((kinds, shapes))
    assert bound(other, decision(10_000.0), plan(), CALL)[0].backend is kinds


def test_what_is_carried_out_anyway_is_built(profile: Profile) -> None:
    first = FirstUses((BUILT, READY, SLOW))
    first.take(decide(profile), plan(), CALL)
    assert bound(first, decide(profile), plan(), CALL)[0].backend is BUILT
    other = replace(CALL, q_len=9)
    first.take(decide(profile, build_us=0.0), plan(9), other)
    assert bound(first, decide(profile), plan(9), other)[0].backend is READY


def test_what_is_ready_is_asked_without_counting(profile: Profile) -> None:
    first = FirstUses((BUILT, READY, SLOW))
    for _ in range(100):
        assert first.ready(decide(profile), plan(), CALL).backend is READY
    READY.refuses = True
    try:
        assert first.ready(decide(profile), plan(), CALL).backend is SLOW
    finally:
        READY.refuses = False
    # Nothing was lost by it, and nothing is taken for built.
    chosen, run = bound(first, decide(profile), plan(), CALL)
    assert chosen.backend is READY
    assert uses(run, 9) == ["ready"] * 9
    first.take(decide(profile), plan(), CALL)
    assert first.ready(decide(profile), plan(), CALL).backend is BUILT
    # Where nothing else is known, the decision stands.
    assert first.ready(decide(profile, known=False), plan(16), CALL).backend is BUILT
