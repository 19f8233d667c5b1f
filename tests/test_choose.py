"""The choice of a backend: pure, explained, and never one that refuses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smartattn.backends import BACKENDS, Backend, Support
from smartattn.call import Call, Runner
from smartattn.choose import LATENCY, Chooser, Objective, UnsupportedCallError, _kind, choose
from smartattn.control import MEMORY_SLOWDOWN, SETTINGS, use
from smartattn.cost import Estimate
from smartattn.plan import Pattern, Plan
from smartattn.profile import Profile, Rule, When
from smartattn.record import Trace

CPU = torch.device("cpu")
thorough = settings(max_examples=120, deadline=None, derandomize=True)


class Fake(Backend):
    support = Support()

    def __init__(
        self, name: str, refusals: tuple[str, ...], dense: bool, last_resort: bool
    ) -> None:
        self.name = name  # type: ignore[misc]
        self.given = refusals
        self.dense = dense
        self.last_resort = last_resort  # type: ignore[misc]
        self.asked = 0

    def refusals(self, plan: Plan, call: Call) -> list[str]:
        self.asked += 1
        return list(self.given)

    def uses_dense_mask(self, plan: Plan, call: Call) -> bool:
        return self.dense

    def bind(self, plan: Plan, call: Call) -> Runner:
        raise AssertionError("choosing runs nothing")


@dataclass
class FakeProfile:
    predictions: dict[str, float]
    prefer: tuple[str, ...] | None = None
    name: str = "fake"
    asked: list[str] = field(default_factory=list)

    #: Peak memory and error per backend.
    memory: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def estimate(self, backend: str, plan: Plan, call: Call) -> Estimate | None:
        self.asked.append(backend)
        us = self.predictions.get(backend)
        if us is None:
            return None
        return Estimate(us, self.memory.get(backend), self.errors.get(backend))

    def reach(self, backends: list[str], plan: Plan, call: Call) -> int | None:
        return None

    def rule(self, plan: Plan, call: Call) -> Rule | None:
        return None if self.prefer is None else Rule(prefer=self.prefer, because="a test says so")


def _plan(packed: bool = False, **facts: Any) -> Plan:
    starts = None
    if packed:
        starts = np.zeros((1, 8), dtype=bool)
        starts[0, [0, 3]] = True
    return Plan(1, 8, 8, Pattern.CAUSAL, CPU, packed=starts, **facts)


def _call(**facts: Any) -> Call:
    facts = {"heads": 2, "kv_heads": 2, "head_dim": 8, "value_head_dim": 8, **facts}
    facts = {"device": CPU, "dtype": torch.float32, "batch": 1, "q_len": 8, "kv_len": 8, **facts}
    return Call(**facts)


NAMES = ("a", "b", "c", "d", "e")


@st.composite
def worlds(draw: Any) -> tuple[list[Fake], FakeProfile, bool, tuple[str, ...] | None]:
    backends = [
        Fake(
            name,
            tuple(draw(st.lists(st.sampled_from(["no", "never", "not so"]), max_size=2))),
            draw(st.booleans()),
            draw(st.integers(0, 4)) == 0,
        )
        for name in draw(st.permutations(NAMES))[: draw(st.integers(1, 5))]
    ]
    times = st.floats(0.1, 1e6, allow_nan=False)
    predictions = draw(st.dictionaries(st.sampled_from(NAMES), times))
    prefer = draw(st.none() | st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple))
    allowed = st.lists(st.sampled_from((*NAMES, "unknown")), min_size=1, max_size=3).map(tuple)
    profile = FakeProfile(predictions, prefer)
    return backends, profile, draw(st.booleans()), draw(st.none() | allowed)


def _candidates(backends: list[Fake], packed: bool, allowed: Any) -> list[Fake]:
    able = [b for b in backends if not b.given and (allowed is None or b.name in allowed)]
    regular = [b for b in able if not b.last_resort]
    if packed and any(not b.dense for b in regular):
        regular = [b for b in regular if not b.dense]
    return regular or able


@thorough
@given(worlds())
def test_the_choice_is_the_best_of_those_that_can(world: Any) -> None:
    backends, profile, packed, allowed = world
    candidates = _candidates(backends, packed, allowed)
    assume(candidates)
    decision = choose(_plan(packed), _call(), profile, backends, allowed)
    chosen = decision.backend
    assert chosen in candidates
    names = {b.name for b in candidates}
    known = {name: time for name, time in profile.predictions.items() if name in names}
    if len(candidates) == 1:
        assert "the only one" in decision.reason
        assert ("of those allowed" in decision.reason) == (allowed is not None)
        able = [b for b in backends if not b.given and (allowed is None or b.name in allowed)]
        aside = sum(not b.last_resort for b in able) > 1
        assert ("and is not set aside" in decision.reason) == aside
    elif len(known) > 1:
        fast = [b.name for b in backends if known.get(b.name, 1e9) <= min(known.values()) * 1.03]
        assert chosen.name == fast[0]
        assert decision.reason.startswith("fastest by profile fake")
        assert decision.predicted_us == known[chosen.name]
    else:
        preferred = [b for name in profile.prefer or () for b in candidates if b.name == name]
        assert chosen is (preferred or candidates)[0]
        reason = "a test says so" if preferred else "no measurement in profile fake"
        assert reason in decision.reason


@thorough
@given(worlds())
def test_the_trace_has_every_backend_with_all_its_refusals(world: Any) -> None:
    backends, profile, packed, allowed = world
    candidates = _candidates(backends, packed, allowed)
    assume(candidates)
    decision = choose(_plan(packed), _call(), profile, backends, allowed)
    assert [v.backend for v in decision.verdicts] == [b.name for b in backends]
    for verdict, backend in zip(decision.verdicts, backends, strict=True):
        assert verdict.refusals == backend.given
        if verdict.predicted_us is not None:
            assert backend in candidates
            assert verdict.predicted_us == profile.predictions[backend.name]
    # Nobody is asked how long a refused call would take.
    assert set(profile.asked) <= {b.name for b in candidates}


@thorough
@given(worlds())
def test_the_choice_is_pure(world: Any) -> None:
    backends, profile, packed, allowed = world
    assume(_candidates(backends, packed, allowed))
    plan, call = _plan(packed), _call()
    facts, profile_before = plan.describe(), copy.deepcopy(profile)
    decisions = [choose(plan, call, profile, tuple(backends), allowed) for _ in range(2)]
    decisions.append(choose(_plan(packed), _call(), profile_before, list(backends), allowed))
    for decision in decisions[1:]:
        assert decision.backend is decisions[0].backend
        assert decision.reason == decisions[0].reason
        assert decision.verdicts == decisions[0].verdicts
    assert plan.describe() == facts
    assert plan.decisions == {}


@thorough
@given(worlds())
def test_no_backend_left_is_an_error_with_every_reason(world: Any) -> None:
    backends, profile, packed, allowed = world
    assume(not _candidates(backends, packed, allowed))
    with pytest.raises(UnsupportedCallError) as caught:
        choose(_plan(packed), _call(), profile, backends, allowed)
    message = str(caught.value)
    advice = "attn_implementation='eager'" if allowed is None else "allow further backends"
    assert advice in message
    assert message.startswith("no backend" if allowed is None else "none of the allowed")
    for backend in backends:
        if allowed is None or backend.name in allowed:
            assert f"{backend.name}: {'; '.join(backend.given)}" in message
    for name in set(allowed or ()) - {b.name for b in backends}:
        assert f"{name}: no such backend" in message


def test_a_packed_batch_never_goes_through_a_dense_mask_if_another_way_is_open() -> None:
    dense, lean = Fake("dense", (), True, False), Fake("lean", (), False, False)
    profile = FakeProfile({"dense": 1.0, "lean": 1000.0}, prefer=("dense",))
    assert choose(_plan(True), _call(), profile, [dense, lean]).backend is lean
    assert choose(_plan(False), _call(), profile, [dense, lean]).backend is dense
    assert choose(_plan(True), _call(), profile, [dense, lean], ["dense"]).backend is dense
    refusing = Fake("lean", ("no",), False, False)
    assert choose(_plan(True), _call(), profile, [dense, refusing]).backend is dense
    # A last resort is not a way that is open.
    last = Fake("last", (), False, True)
    assert choose(_plan(True), _call(), profile, [dense, last]).backend is dense


def test_on_a_gpu_rows_do_not_run_one_after_the_other_if_another_way_is_open() -> None:
    """However fast that is predicted to be: what it costs there does not follow from the work."""
    able = [b for b in BACKENDS if b.name in ("sdpa", "sdpa_unpadded")]
    profile = FakeProfile({"sdpa": 1000.0, "sdpa_unpadded": 1.0}, prefer=("sdpa_unpadded",))

    def chosen(lengths: list[int], device: str, **facts: Any) -> str:
        plan = _padded(lengths, 12, facts.pop("packed", False), device=torch.device(device))
        sizes = {"batch": plan.batch, "q_len": plan.q_len, "kv_len": plan.kv_len}
        call = _call(device=torch.device(device), **sizes)
        return choose(plan, call, profile, able, **facts).backend.name  # type: ignore[arg-type]

    assert chosen([5, 5, 5], "cuda") == "sdpa_unpadded"
    assert chosen([5, 6, 5], "cuda") == "sdpa"
    assert chosen([5, 6, 5], "cpu") == "sdpa_unpadded"
    assert chosen([5, 6, 5], "cuda", allowed=["sdpa_unpadded"]) == "sdpa_unpadded"
    # The other way would be a mask of all tokens by all tokens.
    assert chosen([5, 6, 5], "cuda", packed=True) == "sdpa_unpadded"


def test_rows_that_lie_alike_are_a_choice_of_their_own() -> None:
    """Those that do not have as many tokens, and yet another backend is the one for them."""
    able = [b for b in BACKENDS if b.name in ("sdpa", "sdpa_unpadded")]
    chooser, cuda = Chooser(able), torch.device("cuda")
    profile = FakeProfile({"sdpa": 1000.0, "sdpa_unpadded": 1.0})
    call = _call(device=cuda, batch=3, q_len=1000, kv_len=1000)
    for lengths, expected in (
        ([500, 500, 500], "sdpa_unpadded"),
        ([500, 501, 499], "sdpa"),
        ([500, 500, 500], "sdpa_unpadded"),
    ):
        plan = _padded(lengths, 1000, device=cuda)
        assert chooser(plan, call, profile).backend.name == expected  # type: ignore[arg-type]


def test_the_last_resort_comes_last_and_only_if_allowed() -> None:
    last, other = Fake("last", (), False, True), Fake("other", (), False, False)
    profile = FakeProfile({"last": 0.1, "other": 1.0})
    assert choose(_plan(), _call(), profile, [last, other]).backend is other
    assert choose(_plan(), _call(), profile, [last, other], ["last"]).backend is last
    other.given = ("no",)
    assert choose(_plan(), _call(), profile, [last, other]).backend is last
    with pytest.raises(UnsupportedCallError):
        choose(_plan(), _call(), profile, [last, other], ["other"])


def test_equal_predictions_go_to_the_first_in_order() -> None:
    backends = [Fake(name, (), False, False) for name in "abc"]
    profile = FakeProfile({"a": 2.0, "b": 1.0, "c": 1.0})
    assert choose(_plan(), _call(), profile, backends).backend.name == "b"
    # What is closer than predictions are exact is equal too.
    profile = FakeProfile({"a": 1.005, "b": 1.0, "c": 0.998})
    assert choose(_plan(), _call(), profile, backends).backend.name == "a"
    profile = FakeProfile({"a": 1.02, "b": 1.0, "c": 0.998})
    assert choose(_plan(), _call(), profile, backends).backend.name == "b"


#: "a" is the fastest, "b" needs least memory, "c" is the most exact, "d" is neither.
KINDS = FakeProfile(
    {"a": 10.0, "b": 14.0, "c": 30.0, "d": 40.0},
    memory={"a": 8e6, "b": 1e6, "c": 5e5, "d": 5e5},
    errors={"a": 3e-3, "b": 2e-3, "c": 1e-3, "d": 1.01e-3},
)


@pytest.mark.parametrize(
    ("objective", "chosen", "why"),
    [
        (LATENCY, "a", "fastest by profile fake: 10.0 us predicted"),
        (Objective("memory", 1.5), "b", "least memory by profile fake: 1.0 MiB"),
        (Objective("memory", 1.0), "a", "least memory by profile fake: 7.6 MiB"),
        # Equal ones: the faster.
        (Objective("memory"), "c", "3.00 times the shortest time"),
        (Objective("accuracy"), "c", "smallest error by profile fake: 0.001"),
        (Objective("accuracy", 2.0), "b", "smallest error by profile fake: 0.002"),
    ],
    ids=str,
)
def test_objectives(objective: Objective, chosen: str, why: str) -> None:
    backends = [Fake(name, (), False, False) for name in "abcd"]
    decision = choose(_plan(), _call(), KINDS, backends, None, objective)
    assert decision.backend.name == chosen
    assert why in decision.reason
    assert decision.objective == objective
    verdict = decision.verdicts[1]
    assert (verdict.predicted_bytes, verdict.expected_error) == (1e6, 2e-3)


def test_an_objective_without_measurements_takes_the_fastest_and_says_so() -> None:
    backends = [Fake(name, (), False, False) for name in "ab"]
    profile = FakeProfile({"a": 10.0, "b": 12.0}, memory={"b": 1.0})
    decision = choose(_plan(), _call(), profile, backends, None, Objective("memory", 2.0))
    assert decision.backend.name == "a"
    assert decision.reason.startswith("memory was not measured; fastest by profile fake")


def test_an_objective_and_a_memory_layout_are_choices_of_their_own() -> None:
    backends = [Fake(name, (), False, False) for name in "abcd"]
    chooser, plan = Chooser(backends), _plan()
    assert chooser(plan, _call(), KINDS).backend.name == "a"
    memory = chooser(plan, _call(), KINDS, None, Objective("memory", 1.5))
    assert memory.backend.name == "b"
    before = len(KINDS.asked)
    chooser(plan, _call(token_major_keys=False), KINDS)
    assert len(KINDS.asked) == before + 4


def test_what_use_may_be_given() -> None:
    assert SETTINGS.get().objective is None, "latency is the default"
    with use(objective="memory"):
        assert SETTINGS.get().objective == Objective("memory", MEMORY_SLOWDOWN)
        with use(objective="accuracy", max_slowdown=3):
            assert SETTINGS.get().objective == Objective("accuracy", 3)
        with use(backends="sdpa"):
            assert SETTINGS.get().objective.goal == "memory"
    assert SETTINGS.get().objective is None
    for wrong, says in (
        ({"objective": "beauty"}, "one of"),
        ({"max_slowdown": 2.0}, "needs objective .*, none is given"),
        ({"objective": "latency", "max_slowdown": 2.0}, "needs objective .*, given 'latency'"),
        ({"objective": "memory", "max_slowdown": 0.5}, "at least 1"),
        ({"objective": "memory", "max_slowdown": "2"}, "at least 1, given '2'"),
        ({"objective": "memory", "max_slowdown": float("nan")}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=says), use(**wrong):  # type: ignore[arg-type]
            pass


def test_the_trace_has_the_objective() -> None:
    backends = [Fake(name, (), False, False) for name in "abcd"]
    recorder, plan, call = Trace(), _plan(), _call()
    for objective in (LATENCY, Objective("memory", 1.5)):
        recorder.record(plan, call, choose(plan, call, KINDS, backends, None, objective))
    found = [(row.backend, row.objective) for row in recorder.rows]
    assert found == [("a", "latency"), ("b", "memory within 1.5 times the fastest")]


def test_one_prediction_alone_proves_nothing() -> None:
    backends = [Fake(name, (), False, False) for name in "ab"]
    profile = FakeProfile({"b": 1.0})
    decision = choose(_plan(), _call(), profile, backends)
    assert decision.backend.name == "a"
    assert decision.predicted_us is None


def test_the_real_backends_on_a_cpu() -> None:
    profile = Profile(name="empty")
    plan = _plan(real=np.array([[False] * 2 + [True] * 6]))
    decision = choose(plan, _call(), profile, BACKENDS)
    assert decision.backend.name == "sdpa"
    refused = {v.backend: v.refusals for v in decision.verdicts}
    assert refused["sdpa"] == refused["sdpa_unpadded"] == ()
    assert "runs on cuda, given cpu" in refused["torch_varlen"]
    prefer = ("flash_attention_2", "sdpa_unpadded")
    rules = (Rule(when=When(padded=True), prefer=prefer, because="Padding costs."),)
    ruled = Profile(name="ruled", rules=rules)
    assert choose(plan, _call(), ruled, BACKENDS).backend.name == "sdpa_unpadded"
    assert choose(_plan(), _call(), ruled, BACKENDS).backend.name == "sdpa"
    packed = choose(_plan(packed=True), _call(), profile, BACKENDS)
    assert packed.backend.name == "sdpa_unpadded"
    sinks = _call(features=frozenset({"s_aux"}), has_eager=True)
    assert choose(plan, sinks, profile, BACKENDS).backend.name == "eager"
    with pytest.raises(UnsupportedCallError, match="sdpa: does not implement s_aux"):
        choose(plan, _call(features=frozenset({"s_aux"})), profile, BACKENDS)


# -- choices that are remembered -------------------------------------------------------------------


def _padded(
    lengths: list[int], width: int, packed: bool = False, device: torch.device = CPU, **facts: Any
) -> Plan:
    if packed:
        starts = np.zeros((1, sum(lengths)), dtype=bool)
        starts[0, np.cumsum([0, *lengths[:-1]])] = True
        return Plan(1, sum(lengths), sum(lengths), Pattern.CAUSAL, device, packed=starts, **facts)
    real = np.arange(width)[::-1][None] < np.array(lengths)[:, None]
    return Plan(len(lengths), width, width, Pattern.CAUSAL, device, real=real, **facts)


@thorough
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 12), min_size=1, max_size=3),
            st.booleans(),
            st.none() | st.integers(1, 14),
            st.sampled_from([frozenset(), frozenset({"dropout"}), frozenset({"s_aux"})]),
            st.none() | st.just(("sdpa",)) | st.just(("sdpa_unpadded", "sdpa")),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_remembered_choice_is_one_that_can_run(requests: Any) -> None:
    chooser = Chooser(BACKENDS)
    profile = Profile(
        name="ruled", rules=(Rule(prefer=("sdpa_unpadded",), because="Padding costs."),)
    )
    for lengths, packed, window, features, allowed in requests:
        if packed:
            lengths = [length or 1 for length in lengths]
        plan = _padded(lengths, 12, packed, window=window)
        call = _call(
            batch=plan.batch, q_len=plan.q_len, kv_len=plan.kv_len, features=features,
            has_eager=True,
        )  # fmt: skip
        try:
            direct = choose(plan, call, profile, BACKENDS, allowed)
        except UnsupportedCallError:
            with pytest.raises(UnsupportedCallError):
                chooser(plan, call, profile, allowed)
            continue
        remembered = chooser(plan, call, profile, allowed)
        # Rules and refusals know no sizes here, so that nothing may differ.
        assert remembered.backend is direct.backend


def test_batches_of_about_one_size_are_judged_once() -> None:
    lean = Fake("lean", (), False, False)
    other = Fake("other", (), False, False)
    profile = FakeProfile({"lean": 1.0, "other": 2.0})
    chooser = Chooser([lean, other])
    first = chooser(_padded([900, 1000], 1000), _call(batch=2, q_len=1000, kv_len=1000), profile)
    near = chooser(_padded([905, 1001], 1001), _call(batch=2, q_len=1001, kv_len=1001), profile)
    assert near is first
    assert other.asked == 1
    far = chooser(_padded([100, 1000], 1000), _call(batch=2, q_len=1000, kv_len=1000), profile)
    assert far is not first
    # What can be run is asked anew for every plan.
    lean.given = ("not this one",)
    plan = _padded([900, 1000], 1000)
    assert chooser(plan, _call(batch=2, q_len=1000, kv_len=1000), profile).backend is other


def test_another_profile_or_restriction_is_another_choice() -> None:
    backends = [Fake(name, (), False, False) for name in "ab"]
    chooser = Chooser(backends)
    plan, call = _plan(), _call()
    assert chooser(plan, call, FakeProfile({"a": 1.0, "b": 2.0})).backend.name == "a"
    assert chooser(plan, call, FakeProfile({"a": 2.0, "b": 1.0})).backend.name == "b"
    profile = FakeProfile({"a": 1.0, "b": 2.0})
    assert chooser(plan, call, profile, ("b",)).backend.name == "b"
    assert chooser(plan, call, profile).backend.name == "a"


def test_the_memory_is_bounded() -> None:
    chooser = Chooser([Fake("a", (), False, False)], size=4)
    profile = FakeProfile({})
    for heads in range(1, 40):
        chooser(_plan(), _call(heads=heads, kv_heads=heads), profile)
        assert len(chooser._known) <= 4


def test_steps_of_one_sequence_more_are_another_kind() -> None:
    """66 sequences may keep a device busy where 67 come in two waves."""
    steps, forwards = set(), set()
    for batch in (66, 67):
        step = Plan(batch, 1, 500, Pattern.CAUSAL, CPU, shift=499)
        steps.add(_kind(step, _call(batch=batch, q_len=1, kv_len=500)))
        whole = Plan(batch, 500, 500, Pattern.CAUSAL, CPU)
        forwards.add(_kind(whole, _call(batch=batch, q_len=500, kv_len=500)))
    assert len(steps) == 2
    assert len(forwards) == 1


def test_how_full_a_static_cache_is_makes_another_kind() -> None:
    kinds = set()
    for visible in (100, 32_000):
        plan = Plan(8, 1, 32_768, Pattern.CAUSAL, CPU, shift=visible - 1)
        kinds.add(_kind(plan, _call(batch=8, q_len=1, kv_len=32_768)))
    assert len(kinds) == 2
