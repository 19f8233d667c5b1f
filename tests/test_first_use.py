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
from smartattn.profile import Profile, profile_for

CPU = torch.device("cpu")
CALL = Call(CPU, torch.float32, 2, 8, 8, 4, 4, 16, 16)
STATES = tuple(torch.zeros(2, 4, 8, 16) for _ in range(3))


class Named(Backend):
    """Returns its own name, and refuses on request."""

    support = Support()

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self.refuses = False

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
