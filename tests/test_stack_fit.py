"""When packing whole stacks pays: what is timed, what is made of it, and what is kept."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import smartattn
from smartattn import calibrate as module
from smartattn import cli, grid, profile, profiles, samples, stack_measure
from smartattn.calibrate import Outcome, Progress, Request, calibrate
from smartattn.machine import Device, Versions
from smartattn.samples import Header, StackSample
from smartattn.stack_fit import fit_stack_rules, pays
from smartattn.stack_measure import SHARES, Point, Stack, StackTimer, batch_of, build, search
from smartattn.stack_rule import MARGIN, StackRule, StackWhen, stack_rule
from smartattn.workload import Workload

CPU = torch.device("cpu")
ENCODER = Stack("encoder", 256, "forward")
HEADER = Header(
    device=Device(kind="cpu", name="Imaginary", threads=1),
    versions=Versions(torch="2.13"),
    date="2026-01-01",
    mode="quick",
    grid=grid.VERSION,
    seed=0,
)


def sample(share: float, power: int, speedup: float = 1.0, stack: Stack = ENCODER) -> StackSample:
    workload = batch_of(stack, share, power, "float32")
    assert workload is not None
    return StackSample(workload, 4, 1e3 * speedup, 1e3, speedup, 0.01, 5)


def packs(rules: tuple[StackRule, ...], share: float, work: float) -> bool:
    rule = stack_rule(rules, "cpu", share, share * work)
    return rule is not None and rule.pack


class Machine:
    """A forward takes what is longer, the host or the device; packing costs both something.

    Args:
        ops: units of work per microsecond.
    """

    host_us, host_more_us, once_us, per_token = 1500.0, 200.0, 250.0, 0.04

    def __init__(self, ops: float) -> None:
        self.ops = ops

    def speedup(self, share: float, work: float) -> float:
        device_us = work / self.ops
        packed_us = device_us * (1 - share + self.per_token) + self.once_us
        return max(self.host_us, device_us) / max(self.host_us + self.host_more_us, packed_us)


def asked(answer: Callable[[Point], bool | None], start: int, **bounds: int) -> list[Point]:
    """What a search asks for if a function answers."""
    found = []
    asking = search(start, **bounds)
    point = next(asking)
    while True:
        found.append(point)
        try:
            point = asking.send(answer(point))
        except StopIteration:
            return found


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", range(17, 38))
@pytest.mark.parametrize("start", [16, 22, 34])
def test_a_search_finds_where_it_begins_to_pay(begins: int, start: int) -> None:
    """To the power of two, for each share of padding, and with few questions."""

    def pays(point: Point) -> bool:
        return point[1] >= begins + 1.4 * np.log2(0.5 / point[0])

    points = asked(pays, start)
    assert len(points) == len(set(points)) <= 22
    for share in SHARES:
        border = begins + 1.4 * np.log2(0.5 / share)
        powers = {power for other, power in points if other == share}
        if border > 36:
            break
        assert int(np.ceil(border)) in powers, (share, powers)
        # Where the larger share was known to pay nothing, nothing is asked again.
        assert border <= 17 or share < 0.5 or int(np.ceil(border)) - 1 in powers


def test_a_search_ends_where_nothing_pays() -> None:
    assert asked(lambda point: False, 34) == [(0.5, 34), (0.5, 36), (0.5, 38)]
    assert asked(lambda point: point[0] > 0.2, 36, highest=38)[-1] == (0.1, 38)


def test_a_search_goes_down_from_what_is_too_much() -> None:
    def answer(point: Point) -> bool | None:
        return None if point[1] > 25 else point[1] >= 22

    points = asked(answer, 34)
    assert points[:6] == [(0.5, power) for power in (34, 32, 30, 28, 26, 24)]
    assert max(power for share, power in points if share < 0.5) <= 26
    assert asked(lambda point: None, 34)[-1] == (0.5, 16)


EVERY = [s for kind in ("cpu", "cuda") for stage in stack_measure.stages(kind) for s in stage]


@pytest.mark.parametrize("stack", EVERY, ids=str)
def test_batches_have_the_padding_and_the_work_that_was_asked_for(stack: Stack) -> None:
    for power in range(26, 34):
        for share in SHARES:
            workload = batch_of(stack, share, power, "float32")
            if workload is None:
                assert 2**power // stack.hidden**2 < 64
                continue
            made = StackSample(workload, 4, 1.0, 1.0, 1.0, 0.0, 1)
            assert made.work == 2.0**power
            assert made.hidden == stack.hidden
            assert made.padding_share == pytest.approx(share, abs=0.03)
            assert made.spared_work == pytest.approx(made.work * made.padding_share)
            assert workload.causal == (stack.kind == "decoder")


# -- the fit ---------------------------------------------------------------------------------------


def measured_on(machine: Machine, start: int, noise: float = 0.0) -> list[StackSample]:
    rng = np.random.default_rng(0)
    found: list[StackSample] = []

    def answer(point: Point) -> bool:
        made = sample(*point)
        speedup = machine.speedup(made.padding_share, made.work) * np.exp(noise * rng.normal())
        found.append(replace(made, speedup=speedup))
        return speedup >= 1 + MARGIN

    asked(answer, start, lowest=22, highest=32)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("ops", [3e3, 3e4, 3e5])
def test_crossovers_are_recovered(ops: float, noise: float) -> None:
    """Whatever the speed of the device: no loss anywhere, and little of what there is to gain."""
    machine = Machine(ops)
    rules = fit_stack_rules(measured_on(machine, 26, noise), HEADER)
    assert [rule.pack for rule in rules[-2:]] == [True, False]
    regrets = []
    for power in np.arange(20, 33, 0.25):
        for share in np.arange(0.02, 0.95, 0.02):
            speedup = machine.speedup(share, 2**power)
            chosen = packs(rules, share, 2**power)
            assert not chosen or speedup >= 1 - noise
            regrets.append(max(1.0, speedup) / (speedup if chosen else 1.0))
    assert np.mean(regrets) < 1.03
    best = [max(1.0, machine.speedup(s, 2.0**30)) for s in (0.3, 0.5, 0.8)]
    assert [packs(rules, s, 2.0**30) for s in (0.3, 0.5, 0.8)] == [b > 1.2 for b in best]


def test_a_forward_that_waits_for_the_host_is_not_packed() -> None:
    """However much of it is padding: the work of the whole batch decides there."""
    machine = Machine(3e4)
    rules = fit_stack_rules(measured_on(machine, 26), HEADER)
    border = machine.host_us * machine.ops
    for rule in rules[:-1]:
        assert rule.when.min_work is not None
        assert rule.when.min_work >= border
    # The same padding: in a batch that the device works on for longer, and in a smaller one.
    assert machine.speedup(0.95, 0.9 * border) < 1
    assert machine.speedup(0.25, 0.9 * border * 0.95 / 0.25) > 1.05
    assert not packs(rules, 0.95, 0.9 * border)
    assert packs(rules, 0.25, 0.9 * border * 0.95 / 0.25)


DEFAULT = (
    StackRule(when=StackWhen(device="cuda"), pack=True, because="of another device"),
    StackRule(
        when=StackWhen(device="cpu", min_padding_share=0.2, min_spared_work=1e7),
        pack=True,
        because="the default",
    ),
)
SAMPLES = st.lists(
    st.builds(
        sample,
        st.sampled_from((0.05, 0.1, 0.25, 0.5, 0.7)),
        st.integers(22, 30),
        st.floats(0.5, 3.0),
    ),
    min_size=4,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.tuples(*[st.floats(1.0, 10.0)] * 2), st.sampled_from(((), DEFAULT)))
def test_no_sample_is_packed_that_gained_too_little(
    taken: list[StackSample], more: tuple[float, float], default: tuple[StackRule, ...]
) -> None:
    """Whatever was measured; and with more padding or more work, what was packed still is."""
    rules = fit_stack_rules(taken, HEADER, default)
    for one in taken:
        packed = packs(rules, one.padding_share, one.work)
        assert not packed or one.speedup >= 1 + MARGIN
        if packed:
            share = min(1.0, one.padding_share * more[0])
            assert packs(rules, share, one.work * more[1])
        elif pays(one):
            assert any(
                other.speedup < 1 + MARGIN
                and other.padding_share >= 0.9 * one.padding_share
                and other.work >= 0.9 * one.work
                for other in taken
            ), "nothing speaks against it"


def test_each_share_of_padding_has_its_own_bound() -> None:
    """Where less padding pays is not where more does, and of several bounds none is idle."""
    taken = [
        *(sample(0.5, 24, 1.2), sample(0.5, 25, 1.5), sample(0.5, 23, 0.9)),
        *(sample(0.25, 26, 1.1), sample(0.25, 25, 1.02)),
        *(sample(0.1, 26, 1.0), sample(0.1, 28, 1.05), sample(0.1, 29, 1.08)),
    ]
    rules = fit_stack_rules(taken, HEADER)
    bounds = [(rule.when.min_padding_share, rule.when.min_work) for rule in rules[:-1]]
    expected = [(0.5, 2**24), (0.25, 2**26), (0.1, 2**28)]
    for (share, work), (right, power) in zip(bounds, expected, strict=True):
        assert share == pytest.approx(right, abs=0.01)
        assert share <= right
        assert 0.98 * power <= work <= power


def test_a_sample_speaks_for_others_almost_like_it() -> None:
    """Lengths are drawn: a little less padding, and twice the work, where packing lost."""
    gains = [sample(0.25, 24, 1.2, ENCODER)] * 4
    loses = sample(0.245, 25, 0.9, ENCODER)
    assert loses.padding_share < gains[0].padding_share
    assert fit_stack_rules(gains, HEADER)[0].pack
    assert not fit_stack_rules([*gains, loses], HEADER)[0].pack


def test_the_default_holds_beyond_what_was_measured() -> None:
    """A run without time for large batches says nothing of them; what contradicts it counts."""
    tiny = [sample(0.5, 22, 0.8), sample(0.5, 23, 0.9)]
    untouched, never = fit_stack_rules(tiny, HEADER, DEFAULT)
    assert untouched == DEFAULT[1]
    assert not never.pack
    loses = sample(0.5, 26, 1.0)
    raised, never = fit_stack_rules([*tiny, loses], HEADER, DEFAULT)
    assert raised.when.min_spared_work == 2 * loses.spared_work
    assert raised.when.min_padding_share == 0.2
    assert raised.because == "beyond the batches that contradict it, by the default: the default"
    # Rules that reckon with narrow layers are narrowed in their own measure.
    wide = tuple(
        rule.model_copy(update={"when": rule.when.model_copy(update={"width": 1000.0})})
        for rule in DEFAULT
    )
    raised, never = fit_stack_rules([*tiny, loses], HEADER, wide)
    assert not raised.when.holds("cpu", 0.5, loses.spared_work, loses.hidden)
    # What pays, but less surely than it should, neither makes a rule nor contradicts one.
    doubtful = replace(loses, speedup=1.1, spread=0.5, rounds=4)
    assert not pays(doubtful)
    assert fit_stack_rules([*tiny, doubtful], HEADER, DEFAULT)[0] == DEFAULT[1]


def test_the_sentences_say_what_was_measured() -> None:
    decoder = Stack("decoder", 512, "train")
    taken = [
        sample(0.5, 24, 0.8),
        sample(0.5, 26, 1.5),
        sample(0.5, 26, 1.2, decoder),
        sample(0.1, 24, 0.9),
    ]
    packed, padded = fit_stack_rules(taken, HEADER)
    assert packed.when.device == padded.when.device == "cpu"
    assert packed.because == (
        "measured on Imaginary, 1 thread on 2026-01-01: 2 batches with at least that padding and "
        "work ran 1.20 to 1.50 times as fast packed as padded (BERT-like of hidden size 256, "
        "Llama-like of hidden size 512, 4 layers, float32, forward and training)"
    )
    said = "2 batches below all bounds ran 0.80 to 0.90 times as fast packed as padded, none "
    assert said in padded.because


def test_what_the_default_packs_is_not_counted_as_padded() -> None:
    """A batch without a rule of its own, since with almost as much of both another one lost."""
    taken = [(0.5, 23, 0.8), (0.5, 26, 1.5), (0.25, 25, 1.2), (0.25, 24, 0.7), (0.24, 25, 1.02)]
    made = [sample(share, power, speedup) for share, power, speedup in taken]
    when = StackWhen(device="cpu", min_padding_share=0.248, min_spared_work=8e6)
    default = StackRule(when=when, pack=True, because="the default")
    rules = fit_stack_rules(made, HEADER, (default,))
    assert rules[1] == default, "nothing contradicts it"
    left = [one for one in made if not packs(rules, one.padding_share, one.work)]
    assert [one.speedup for one in left] == [0.8, 0.7, 1.02]
    assert "3 batches below all bounds ran 0.70 to 1.02 times" in rules[-1].because


def test_batches_of_one_share_of_padding_are_counted_together() -> None:
    """Lengths are drawn: 49.99% are the half that was meant."""
    first = sample(0.5, 26, 1.2)
    other = next(
        made
        for power in range(27, 36)
        for made in (sample(0.5, power, 1.5),)
        if made.padding_share < first.padding_share
    )
    rule, *_ = fit_stack_rules([first, replace(other, speedup=1.5)], HEADER)
    assert f"{rule.when.min_padding_share:.0%}" == "50%"
    assert "2 batches with at least that padding and work ran 1.20 to 1.50" in rule.because


def test_the_default_says_what_is_in_the_data() -> None:
    """Both conventions, "times as fast" and "takes longer", and the bound of each rule."""
    data = profiles.shipped_profiles().parents[1] / "docs" / "data"
    rules = {rule.when.device: rule for rule in profiles.default_stack_rules()}
    cpu = json.loads((data / "cpu_padding_free.json").read_text())["rows"]
    ratios = {"cpu": [(one["spared_work"], one["padding_share"], one["ratio"]) for one in cpu]}
    ratios["cuda"] = []
    for one in json.loads((data / "h200_model_forwards.json").read_text()):
        found = re.match(r"(\w+) fwd B(\d+) S(\d+) pad([\d.]+)", one["tag"])
        if found is None or float(found[4]) == 0:
            continue
        hidden = 1024 if found[1] == "bert" else 2048
        share = float(found[4])
        work = share * int(found[2]) * int(found[3]) * hidden**2
        best = min(one["r"]["sdpa"], one["r"]["flash_attention_2"])
        ratios["cuda"].append((work, share, best / one["r"]["pack_fa2"]))
    for device, rows in ratios.items():
        rule = rules[device]
        least, share = rule.when.min_spared_work or 0.0, rule.when.min_padding_share or 0.0
        inside = [ratio for work, padding, ratio in rows if work >= least and padding >= share]
        below = [ratio for work, padding, ratio in rows if work < least or padding < share]
        assert f"came to {least:.0e} or more" in rule.because
        assert f"ran {min(inside):.2f} to {max(inside):.2f} times as fast" in rule.because
        assert f"took up to {1 / min(below) - 1:.0%} longer" in rule.because


def test_nowhere_and_unknown_are_told_apart() -> None:
    slow = [sample(0.5, power, 0.9) for power in (24, 25, 26, 27)]
    (never,) = fit_stack_rules(slow, HEADER)
    assert not never.pack
    said = "4 batches ran 0.90 times as fast packed as padded, none of them 3% faster for certain ("
    assert said in never.because
    assert fit_stack_rules(slow[:1], HEADER, DEFAULT) == ()
    fast = [replace(one, speedup=1.5) for one in slow]
    assert "were not timed" in fit_stack_rules(fast, HEADER)[1].because


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_work_of_a_batch_is_asked_for(share: float) -> None:
    when = StackWhen(min_work=1e6)
    assert when.holds("cpu", share, share * 1e6)
    assert when.holds("cpu", share, share * 0.99e6) == (share == 0.0)


# -- the timing ------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks that a slow core runs in milliseconds."""
    stages = ((Stack("encoder", 64, "forward"), Stack("decoder", 64, "train")),)
    monkeypatch.setattr(stack_measure, "stages", lambda kind: stages)
    monkeypatch.setattr(stack_measure, "_START", {"cpu": 18})


@pytest.mark.usefixtures("small")
def test_stacks_are_timed_within_their_seconds() -> None:
    doing: list[str] = []
    state = torch.get_rng_state()
    start = time.monotonic()
    timer = StackTimer(CPU, 1.5, doing.append)
    found = timer.run()
    assert time.monotonic() - start < 3.0
    assert timer.refusal is None
    assert torch.get_rng_state().equal(state), "models with random weights moved the caller's"
    assert found
    assert "padding-free encoder of hidden size 64, forward, 4 x 16, 50% padding" in doing
    assert {one.workload.causal for one in found} == {False, True}
    for one in found:
        assert one.hidden == 64
        assert one.rounds >= 3
        assert one.speedup == pytest.approx(one.padded_us / one.packed_us, rel=0.5)


def test_both_ways_run_what_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded one sees (batch, length), the packed one the real tokens alone; in turns."""
    workload = batch_of(Stack("encoder", 64, "forward"), 0.5, 18, "float32")
    assert workload is not None
    model = build("encoder", 64, CPU, torch.float32)
    shapes: list[tuple[int, ...]] = []
    model.encoder.layer[0].output.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape[:2]))
    )
    timer = StackTimer(CPU, 60.0)
    timer._end = time.monotonic() + 60.0
    monkeypatch.setattr(stack_measure, "_is_clear", lambda ratios: len(ratios) >= 4)
    made = timer._timed(model, workload)
    assert made is not None
    assert made.rounds == 4
    padded, packed = (4, 16), (1, int(workload.lengths.sum()))
    assert shapes[3:] == [padded, packed, packed, padded, padded, packed, packed, padded]


@pytest.mark.usefixtures("small")
def test_what_cannot_be_packed_is_said() -> None:
    timer = StackTimer(CPU, 5.0)
    with smartattn.use(backends="sdpa"):
        assert timer.run() == []
    assert "all tokens by all tokens" in (timer.refusal or "")


@pytest.mark.usefixtures("small")
def test_lack_of_memory_ends_a_search_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackTimer, "_timed", fails)
    timer = StackTimer(CPU, 5.0)
    assert timer.run() == []
    assert timer.refusal is None


def test_batches_beyond_time_or_memory_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = StackTimer(CPU, 5.0)
    timer._end = time.monotonic() + 5.0
    workload = batch_of(ENCODER, 0.5, 26, "float32")
    assert workload is not None
    assert timer._fits(workload, ENCODER)
    timer._rates["forward"] = 1e7 / 2**26
    assert not timer._fits(workload, ENCODER)
    timer._rates.clear()
    monkeypatch.setattr(stack_measure, "free_memory", lambda device: 10**7)
    assert not timer._fits(workload, ENCODER)


# -- the calibration -------------------------------------------------------------------------------


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few kinds of small calls, more than there is time for, and no profile of before."""
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "data" / "profiles")
    monkeypatch.delenv(profiles.ENVIRONMENT, raising=False)
    families = [
        grid.Family("forward", causal, ("left", "right"), "float32", head_dim)
        for causal in (False, True)
        for head_dim in (32, 64, 80, 128)
    ]
    monkeypatch.setattr(grid, "families", lambda kind, mode, varlen: families)
    limits = grid.Limits(256, 2048, 1e8, 1e8, max_batch=16)
    monkeypatch.setattr(grid, "limits", lambda kind, mode, memory: limits)
    profiles.set_profile(None)
    yield
    profiles.set_profile(None)


class Timer:
    """Stands for StackTimer: no models, and a failure if one is wanted."""

    failure: BaseException | None = None
    made: list[Timer] = []  # noqa: RUF012

    def __init__(
        self, device: torch.device, seconds: float, report: Any, taken: list[StackSample]
    ) -> None:
        self.seconds, self.report, self.samples, self.refusal = seconds, report, taken, None
        self.profile = None
        self.made.append(self)

    def run(self) -> None:
        self.profile = profiles.profile_for(CPU)
        self.report("stacks")
        self.samples.append(sample(0.5, 26, 1.5))
        if self.failure is not None:
            raise self.failure
        self.samples += [sample(0.5, 24, 0.9), sample(0.25, 26, 1.2), sample(0.25, 24, 0.8)]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, own_folders: None) -> type[Timer]:
    monkeypatch.setattr(Timer, "made", [])
    monkeypatch.setattr(Timer, "failure", None)
    monkeypatch.setattr(module, "StackTimer", Timer)
    # The sweep may end late by a workload.
    monkeypatch.setattr(module, "_STACK_LEAST", 0.01)
    return Timer


def quick(budget: float, **changes: Any) -> Outcome:
    return calibrate(Request(CPU, mode="quick", budget=budget, **changes))


@pytest.mark.parametrize(
    ("budget", "seconds"), [(1.0, 0.0), (4.9, 0.0), (5.0, 0.5), (30.0, 3.0), (1e4, 10.0)]
)
def test_stacks_get_a_tenth_of_the_budget_and_at_most_ten_seconds(
    budget: float, seconds: float
) -> None:
    assert module.stack_seconds(budget) == pytest.approx(seconds)


def test_stacks_come_last_under_the_profile_that_was_just_made(timer: type[Timer]) -> None:
    """And the choice of plain smart is that of this profile, of which nothing is left behind."""
    before = profiles.profile_for(CPU)
    steps: list[Progress] = []
    start = time.monotonic()
    outcome = calibrate(Request(CPU, mode="quick", budget=6.0), steps.append)
    assert time.monotonic() - start < 10.0
    (made,) = timer.made
    assert 0.0 < made.seconds < 0.61
    assert made.profile is not None
    assert made.profile.costs == outcome.profile.costs
    assert made.profile.padding_free == ()
    assert profiles.profile_for(CPU) is before
    doing = [step.doing for step in steps]
    assert doing[-3:] == ["fitting", "stacks", "saving"]
    assert [step.elapsed for step in steps] == sorted(step.elapsed for step in steps)
    assert 5.4 <= steps[-3].elapsed < 6.0
    assert outcome.profile.padding_free[-1].when == StackWhen(device="cpu")
    assert "measured on" in outcome.profile.padding_free[0].because
    assert outcome.unmeasured is None
    assert profile.load(outcome.path) == outcome.profile


def test_fit_makes_the_same_rules_from_the_raw_samples(
    timer: type[Timer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = quick(6.0)
    assert outcome.samples is not None
    assert cli.run(["fit", str(outcome.samples), "--output", str(tmp_path / "again.json")]) == 0
    assert profile.load(tmp_path / "again.json").padding_free == outcome.profile.padding_free
    assert "padding_free" in capsys.readouterr().out


def test_without_time_the_default_rules_hold(
    timer: type[Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STACK_LEAST", 0.5)
    outcome = quick(2.0)
    assert timer.made == []
    assert "no time of 2 s was left" in (outcome.unmeasured or "")
    assert outcome.profile.padding_free == ()
    assert {rule.when.device for rule in profiles.stack_rules(outcome.profile)} == {"cpu", "cuda"}


def test_a_stack_that_fails_does_not_end_the_calibration(timer: type[Timer]) -> None:
    timer.failure = RuntimeError("no such\nkernel")
    outcome = quick(6.0)
    assert (
        outcome.unmeasured == "not measured (RuntimeError: no such kernel); the default rules hold"
    )
    assert outcome.profile.padding_free == ()
    assert outcome.profile.costs


def test_ctrl_c_keeps_the_stacks_for_the_next_run(timer: type[Timer]) -> None:
    timer.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        quick(6.0)
    (raw,) = (profiles.user_profiles().parent / "samples").glob("*.safetensors")
    assert len(samples.load_stacks(raw)) == 1
    assert not samples.load(raw)[0].complete
    timer.failure = None
    outcome = quick(12.0)
    assert len(samples.load_stacks(raw)) == 5
    assert outcome.resumed > 0
    assert samples.load(raw)[0].complete


@pytest.mark.usefixtures("own_folders", "small")
def test_a_real_calibration_ends_with_rules_for_stacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of a short run, for a slow core, a larger share than a tenth.
    monkeypatch.setattr(module, "_STACK_SHARE", 0.5)
    start = time.monotonic()
    assert cli.run(["calibrate", "--device", "cpu", "--quick", "--budget", "6"]) == 0
    assert time.monotonic() - start < 15.0
    out = " ".join(capsys.readouterr().out.split())
    assert "measured on" in out
    assert "padding_free" in out
    rules = profiles.stack_rules(profile.load(next(profiles.user_profiles().glob("*.json"))))
    assert not rules[-1].pack


# -- what is kept ----------------------------------------------------------------------------------


def saved(path: Path, stacks: list[StackSample]) -> dict[str, np.ndarray]:
    """The columns of a file with these stacks."""
    from safetensors.numpy import load

    workload = Workload("forward", True, "left", "float32", 2, 8, 8, 1, 1, 16, padding_share=0.3)
    rows = [samples.Sample(0, workload, "sdpa", "ok", 1.0, 0.0, 1.0, 0.0, 3)]
    samples.save(path, HEADER, rows, stacks)
    return load(path.read_bytes())


def test_stacks_read_back_equal(tmp_path: Path) -> None:
    taken = [sample(0.5, 24, 1.25), sample(0.1, 26, 0.9, Stack("decoder", 512, "train"))]
    saved(tmp_path / "raw", taken)
    assert samples.load_stacks(tmp_path / "raw") == taken
    assert len(samples.load(tmp_path / "raw")[1]) == 1


def test_files_of_before_have_no_stacks(tmp_path: Path) -> None:
    columns = saved(tmp_path / "raw", [])
    assert not [name for name in columns if name.startswith("stack.")]
    assert samples.load_stacks(tmp_path / "raw") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"speedup": [0.0]}, "cannot be"),
        ({"speedup": [float("inf")]}, "non-finite"),
        ({"padded_us": [-1.0]}, "negative"),
        ({"layers": [0]}, "cannot be"),
        ({"layers": [2.0]}, "cannot be"),
        ({"layers": [1, 2]}, "one length"),
        ({"workload.kv_len": [0]}, "cannot be"),
        ({name: [1 << 24] for name in ("workload.heads", "workload.kv_heads")}, "cannot be"),
        ({"depth": [3]}, "stack.depth is missing or not known"),
        ({"rounds": None}, "stack.rounds is missing or not known"),
    ],
)
def test_impossible_stacks_are_refused(
    change: dict[str, list[float] | None], says: str, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save

    path = tmp_path / "raw"
    columns = saved(path, [sample(0.5, 24)])
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    for name, values in change.items():
        if values is None:
            del columns[f"stack.{name}"]
        else:
            columns[f"stack.{name}"] = np.array(values)
    with pytest.raises(samples.SamplesError, match=says) as caught:
        samples.parse_stacks(save(columns, metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("gain", "packed"), [(0.5 * MARGIN, False), (3 * MARGIN, True)])
def test_a_larger_batch_that_gains_next_to_nothing_speaks_against_a_smaller_one(
    gain: float, packed: bool
) -> None:
    small, large = sample(0.4, 24, 1.3), sample(0.6, 26, 1 + gain)
    rules = fit_stack_rules([small, large], HEADER)
    assert packs(rules, small.padding_share, small.work) is packed


def of_width(hidden: int, power: int, us: float, speedup: float) -> StackSample:
    workload = batch_of(Stack("encoder", hidden, "forward"), 0.5, power, "float32")
    assert workload is not None
    return StackSample(workload, 4, us, us / speedup, speedup, 0.01, 5)


def test_narrow_layers_are_more_work_than_their_products() -> None:
    """Reads and writes take as long as the products at a hidden size of 512."""

    def us(hidden: int, power: int) -> float:
        return 1e-6 * 2**power / hidden**2 * hidden * (hidden + 512)

    wide = [of_width(1024, power, us(1024, power), 1.5) for power in (26, 28, 30)]
    narrow = [of_width(256, power, us(256, power), 1.5) for power in (28, 30)]
    (rule, *_) = fit_stack_rules([*wide, *narrow], HEADER)
    assert rule.when.width == pytest.approx(512, rel=0.05)
    least = wide[0].spared_work
    assert rule.when.holds("cpu", 0.5, least, 1024)
    assert not rule.when.holds("cpu", 0.5, least / 1.9, 1024)
    assert rule.when.holds("cpu", 0.5, least / 1.9, 256)
    assert "hidden x (hidden + 51" in str(rule.when)
    # The narrow ones wait for the host, or nothing is known of another size.
    waiting = [of_width(256, 24, us(1024, 26), 1.5)]
    for timed in ([*wide, *waiting], wide):
        assert fit_stack_rules(timed, HEADER)[0].when.width is None
