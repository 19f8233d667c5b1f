"""The sweep: what is timed and checked, what is kept, what it costs and what it changes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from smartattn import calibrate as module
from smartattn import grid, profile, profiles, samples, timing
from smartattn import measure as measuring
from smartattn.backends import BACKENDS, Backend, Support
from smartattn.calibrate import CalibrationError, Outcome, Progress, Request, calibrate
from smartattn.call import Call, Runner
from smartattn.choose import choose
from smartattn.features import features, regime_of
from smartattn.machine import identify
from smartattn.measure import Patience, candidates, measure, takes_sequences
from smartattn.parallel import at_once, calibrate_all
from smartattn.plan import Plan
from smartattn.reference import error_of, expected
from smartattn.surroundings import Surroundings
from smartattn.timing import cache_flush, interleaved, relative_spread
from smartattn.workload import Workload

CPU = torch.device("cpu")
SDPA, UNPADDED = (next(b for b in BACKENDS if b.name == n) for n in ("sdpa", "sdpa_unpadded"))
ONE_FAMILY = grid.Family("forward", False, ("left", "right"), "float32", 64)
SMALL = Workload("forward", True, "left", "float32", 3, 20, 20, 4, 2, 16, 0, 0, 0.4)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "data" / "profiles")
    monkeypatch.delenv(profiles.ENVIRONMENT, raising=False)
    profiles.set_profile(None)
    yield
    profiles.set_profile(None)


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to measure: one regime, small calls."""
    monkeypatch.setattr(grid, "families", lambda kind, mode, varlen: [ONE_FAMILY])
    limits = grid.Limits(1024, 8192, 3e8, 2e8, max_batch=32)
    monkeypatch.setattr(grid, "limits", lambda kind, mode, memory: limits)


def quick(budget: float, **changes: Any) -> Request:
    return Request(CPU, mode="quick", budget=budget, **changes)


class Altered(Backend):
    """sdpa_unpadded under another name, with an error in what it computes."""

    name = "altered"
    walks = "padded"
    support = Support()

    def __init__(self, alter: Any) -> None:
        self.alter = alter

    def bind(self, plan: Plan, call: Call) -> Runner:
        right = SDPA.bind(plan, call)

        def run(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, given: Mapping[str, Any]
        ) -> torch.Tensor:
            altered = self.alter(right(query, key, value, given))
            assert isinstance(altered, torch.Tensor)
            return altered

        return run


# -- workloads and the reference -----------------------------------------------------------------


def all_workloads() -> list[Workload]:
    limits = grid.Limits(40, 400, 1e7, 1e8, max_batch=6)
    families = [
        grid.Family(mode, causal, (side,), "float32", 16, window)
        for mode in ("forward", "train")
        for causal in (True, False)
        for side in ("none", "left", "right", "packed")
        for window in (False, True)
    ]
    families += [grid.Family("decode", False, (s,), "float32", 16) for s in ("none", "left")]  # type: ignore[arg-type]
    return list(islice(grid.workloads(families, limits, 3), 2 * len(families)))


@pytest.mark.parametrize("workload", all_workloads(), ids=str)
def test_every_backend_agrees_with_the_reference(workload: Workload) -> None:
    plan, call = workload.plan(CPU), workload.call(CPU)
    excluded: dict[str, str] = {}
    able = candidates(plan, call, BACKENDS, excluded)
    assert able
    found = measure(0, workload, CPU, (SDPA, UNPADDED, Altered(lambda x: x)), excluded, 0.001)
    assert excluded == {}
    assert len(found) >= 2
    assert {sample.status for sample in found} == {"ok"}


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("memory", ["transposed", "concatenated"])
def test_tensors_lie_as_models_hand_them_over(mode: Any, memory: Any) -> None:
    workload = replace(SMALL, mode=mode, memory=memory)
    query, key, value, leaves, grad_output = workload.tensors(CPU)
    assert query.shape == (3, 4, 20, 16)
    assert query.transpose(1, 2).is_contiguous()
    for states in (key, value):
        assert states.shape == (3, 2, 20, 16)
        assert states.is_contiguous() == (memory == "concatenated")
        assert states.transpose(1, 2).is_contiguous() == (memory == "transposed")
    assert (grad_output is not None) == (mode == "train")
    assert all(leaf.requires_grad == (mode == "train") for leaf in leaves)


def test_the_padding_is_what_was_asked_for() -> None:
    for share in (0.1, 0.3, 0.5, 0.75):
        for spread in ("uniform", "skewed", "same"):
            workload = Workload(
                "forward", True, "left", "float32", 64, 512, 512, 4, 4, 16, 0, 0, share, spread
            )
            plan = workload.plan(CPU)
            assert plan.padding_share == pytest.approx(share, abs=0.1)
            assert workload.lengths.min() >= 1
            if spread != "same":
                assert workload.lengths.max() == 512


def test_plans_of_workloads_have_the_masks_of_their_definition() -> None:
    for workload in all_workloads():
        dense = workload.plan(CPU).dense_mask()
        seen = np.stack(
            [workload.visible(r, np.arange(workload.q_len)) for r in range(workload.batch)]
        )
        if dense is None:
            assert seen.all()
            continue
        given = dense.expand(workload.batch, 1, -1, -1)[:, 0].numpy()
        real = workload.real_queries()
        assert (given == seen)[real].all()


@pytest.mark.parametrize(
    "alter",
    [
        lambda x: x * 1.001,
        lambda x: x + 1e-3,
        lambda x: x.roll(1, dims=1),
        lambda x: x.flip(2),
        lambda x: torch.where(torch.arange(x.shape[1])[:, None, None] == 0, torch.nan, x),
        lambda x: torch.zeros_like(x),
    ],
    ids=["scaled", "shifted", "next token", "other heads", "NaN at padding", "zeros"],
)
def test_wrong_outputs_are_found(alter: Any) -> None:
    tensors = SMALL.tensors(CPU)
    plan, call = SMALL.plan(CPU), SMALL.call(CPU)
    references = expected(SMALL, tensors)
    right = SDPA.run(plan, call, *tensors[:3])
    assert error_of(SMALL, right, (), references) < 1e-5
    assert error_of(SMALL, alter(right), (), references) > 2e-5


@pytest.mark.parametrize("place", [0, 1, 2])
def test_wrong_gradients_are_found(place: int) -> None:
    workload = replace(SMALL, mode="train")
    tensors = workload.tensors(CPU)
    references = expected(workload, tensors)
    output = SDPA.run(workload.plan(CPU), workload.call(CPU), *tensors[:3])
    gradients = list(torch.autograd.grad(output, tensors.leaves, tensors.grad_output))
    assert error_of(workload, output.detach(), tuple(gradients), references) < 1e-5
    gradients[place] = gradients[place] * 1.01
    assert error_of(workload, output.detach(), tuple(gradients), references) > 1e-3


def test_long_calls_are_checked_at_sampled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    from smartattn import reference

    monkeypatch.setattr(reference, "MAX_PAIRS", 1)
    monkeypatch.setattr(reference, "SAMPLED_QUERIES", 5)
    workload = replace(SMALL, mode="train")
    tensors = workload.tensors(CPU)
    references = expected(workload, tensors)
    assert len(references[0].queries) == 5
    assert not any(one.complete for one in references)
    output = SDPA.run(workload.plan(CPU), workload.call(CPU), *tensors[:3])
    gradients = torch.autograd.grad(output, tensors.leaves, tensors.grad_output)
    assert error_of(workload, output.detach(), gradients, references) < 1e-5
    assert error_of(workload, output.detach() * 1.01, gradients, references) > 1e-3


# -- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["quick", "default"])
def test_workloads_stay_within_their_limits(kind: str, mode: Any) -> None:
    limits = grid.limits(kind, mode, 10**11)
    families = grid.families(kind, mode)
    found = list(islice(grid.workloads(families[::6], limits, 0), 40))
    assert len(set(found)) == 40
    for workload in found:
        assert workload.flops <= limits.max_flops
        assert workload.bytes <= limits.max_bytes
        assert workload.kv_len * workload.batch <= limits.max_tokens
        assert workload.heads % workload.kv_heads == 0
    assert found == list(islice(grid.workloads(families[::6], limits, 0), 40))
    assert found != list(islice(grid.workloads(families[::6], limits, 1), 40))


@pytest.mark.parametrize("varlen", [True, False])
def test_gpus_are_asked_about_rows_of_several_lengths_where_a_kernel_takes_them(
    varlen: bool,
) -> None:
    """Elsewhere only SDPA would be left, and nothing to compare."""
    limits = grid.limits("cuda", "default", 10**11)
    found = {"float32": set[str](), "bfloat16": set[str]()}
    for family in grid.families("cuda", "default", varlen):
        for workload in islice(grid.workloads([family], limits, 0), 8):
            if workload.side in ("left", "right"):
                found[workload.dtype].add(workload.spread)
    assert found["float32"] == {"same"}
    assert found["bfloat16"] == ({"same", "skewed", "uniform"} if varlen else {"same"})


def test_whether_a_kernel_takes_rows_of_several_lengths() -> None:
    class Varlen(type(SDPA)):  # type: ignore[misc]
        walks = "sequences"

    assert takes_sequences(CPU, (SDPA, Varlen()))
    assert not takes_sequences(CPU, (SDPA, UNPADDED))


def test_first_runs_are_fitted_anew_as_they_become_more() -> None:
    patience = Patience(0.5)
    large = replace(SMALL, batch=64, q_len=512, kv_len=512)
    for number, seconds in enumerate([0.3] * 8 + [0.7] * 40):
        first = samples.Sample(0, replace(SMALL, seed=number), "sdpa", "ok", first_us=seconds * 1e6)
        patience.learn(first)
        if number == 7:
            assert patience.lasts("sdpa", large)
    assert not patience.lasts("sdpa", large)


def test_the_first_workloads_differ_more_than_chance_would() -> None:
    limits = grid.limits("cpu", "quick", 10**10)

    def coverage(some: list[Workload]) -> float:
        points = np.log([np.array(features(w.plan(CPU), w.call(CPU))) + 1e-4 for w in some])
        return float(points.std(axis=0).mean())

    seeds = [list(grid.workloads([ONE_FAMILY], limits, seed)) for seed in range(4)]
    ratios = [coverage(found[:6]) / coverage(found[20:]) for found in seeds]
    assert min(ratios) > 1.1
    assert np.mean(ratios) > 1.2


def test_families_cover_what_models_do() -> None:
    for kind in ("cpu", "cuda"):
        for mode in ("quick", "default"):
            families = grid.families(kind, mode)  # type: ignore[arg-type]
            assert {family.mode for family in families} == {"forward", "train", "decode"}
            assert {family.causal for family in families if family.mode == "forward"} == {
                True,
                False,
            }
            assert {64, 128} <= {family.head_dim for family in families}
            assert len(set(families)) == len(families)


def test_a_quick_run_knows_every_family_after_its_first_turn() -> None:
    # As many workloads as an H200 times in a quick run.
    limits, families = grid.limits("cuda", "quick", 10**11), grid.families("cuda", "quick")
    found = list(islice(grid.workloads(families, limits, 0, "quick"), 101))
    assert {workload.head_dim for workload in found} == {64, 128, 256}
    seen: Counter[tuple[Any, ...]] = Counter(
        (w.mode, w.causal, w.side, w.head_dim) for w in found if w.causal or w.side == "none"
    )
    for family in families:
        if family.causal or family.sides == ("none",):
            place = (family.mode, family.causal, family.sides[0], family.head_dim)
            assert seen[place] >= 1, place
    most = {dim: seen["decode", False, "none", dim] for dim in (128, 64, 256)}
    assert most == {128: 8, 64: 4, 256: 2}


# -- timing --------------------------------------------------------------------------------------


def test_times_are_those_of_the_functions() -> None:
    times = interleaved(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.008)}, CPU, seconds=0.2
    )
    assert 2_000 <= times["short"].host_us < 5_000
    assert 8_000 <= times["long"].device_us < 14_000
    assert times["short"].rounds == times["long"].rounds >= 3


def test_rounds_are_interleaved_and_take_turns() -> None:
    order: list[str] = []
    functions = {name: lambda name=name: (order.append(name), time.sleep(0.001)) for name in "abc"}
    interleaved(functions, CPU, max_rounds=3, spread=0.0, seconds=5.0)
    assert "".join(order[3:]) == "abcbcacab"


def test_slow_functions_end_early() -> None:
    start = time.perf_counter()
    times = interleaved({"slow": lambda: time.sleep(0.1)}, CPU, seconds=0.01, min_rounds=50)
    assert time.perf_counter() - start < 1.0
    assert times["slow"].rounds < 5


def test_a_hopeless_function_gets_two_rounds() -> None:
    functions = {"fast": lambda: time.sleep(0.001), "hopeless": lambda: time.sleep(0.02)}
    times = interleaved(functions, CPU, max_rounds=5, spread=0.0, seconds=5.0)
    assert times["hopeless"].rounds == 2
    assert times["fast"].rounds == 5
    assert times["hopeless"].host_us == pytest.approx(20_000, rel=0.5)


def test_one_late_call_of_a_burst_is_not_what_a_launch_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return 0.16

    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = iter([0.0] * 3 + [0.2] + [0.0] * 12)
    host_us, device_us = timing._cuda_calls(lambda: time.sleep(next(waits)), 16, 1.0)
    assert host_us < 5_000
    assert device_us == pytest.approx(10.0)


def test_one_late_call_counts_no_more_where_caches_are_flushed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([(5.0, 10.0)] * 3 + [(5000.0, 30.0)] + [(5.0, 10.0)] * 4)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(timing, "_cuda_calls", lambda *_: next(times))
    found = timing._cuda_burst(print, torch.device("cuda"), 8, 1.0, lambda: None)
    assert found == (5.0, 12.5)


def test_one_slow_round_is_not_hopeless() -> None:
    """A machine that was busy in the first round is not what a backend takes."""
    calls: list[float] = []

    def disturbed() -> None:
        # The first call of all tells how many make a burst, the second is the first round's.
        calls.append(0.05 if len(calls) == 1 else 0.002)
        time.sleep(calls[-1])

    functions = {"other": lambda: time.sleep(0.002), "disturbed": disturbed}
    times = interleaved(functions, CPU, max_rounds=5, spread=0.0, seconds=5.0)
    assert calls[1] == 0.05
    assert times["disturbed"].rounds == 5
    assert times["disturbed"].host_us < 10_000


def test_a_flush_comes_before_each_timed_call_and_is_not_timed() -> None:
    order: list[str] = []

    def flush() -> None:
        order.append("flush")
        time.sleep(0.01)

    times = interleaved(
        {"one": lambda: (order.append("call"), time.sleep(0.002))},
        CPU,
        max_rounds=3,
        spread=0.0,
        flush=flush,
    )
    assert order == ["call", *["flush", "call"] * 3]
    assert times["one"].device_us < 8_000


def test_a_cache_flush_writes_more_than_a_cache_holds() -> None:
    filler = cache_flush(CPU)()
    assert isinstance(filler, torch.Tensor)
    assert filler.nbytes >= 64 * 1024**2


class Prepares(Altered):
    """Takes its time once per forward, and more of it for the first run of all."""

    name = "prepares"

    def __init__(self) -> None:
        super().__init__(lambda output: output)
        self.runs = 0

    def bind(self, plan: Plan, call: Call) -> Runner:
        time.sleep(0.02 if self.runs else 0.1)
        self.runs += 1
        return super().bind(plan, call)


def test_preparation_is_timed_apart() -> None:
    found = {s.backend: s for s in measure(0, SMALL, CPU, (SDPA, Prepares()), {}, 0.01)}
    assert 18_000 < found["prepares"].prepare_us < 60_000
    assert found["prepares"].first_us > 100_000
    assert found["prepares"].device_us < 10_000
    assert 1.0 <= found["sdpa"].prepare_us < 10_000


class _BuildsForPadding(Altered):
    """Builds kernels for padded batches, and for others, the first time that it meets some."""

    name = "builds_for_padding"

    def __init__(self) -> None:
        super().__init__(lambda output: output)
        self.built: set[bool] = set()

    def bind(self, plan: Plan, call: Call) -> Runner:
        if plan.is_padded not in self.built:
            time.sleep(0.1)
            self.built.add(plan.is_padded)
        return super().bind(plan, call)


def test_kernels_for_padding_are_not_prepared_for_each_batch_without() -> None:
    """Little padding comes to nothing in some batches, and not in others of the same kind."""
    some = (replace(SMALL, padding_share=0.03, seed=seed) for seed in range(500))
    twins = (
        (w, [replace(w, seed=w.seed + 1 + i).plan(CPU).is_padded for i in range(3)]) for w in some
    )
    workload = next(w for w, padded in twins if not w.plan(CPU).is_padded and any(padded))
    found = measure(0, workload, CPU, (SDPA, _BuildsForPadding()), {}, 0.01)
    own = next(sample for sample in found if sample.backend == "builds_for_padding")
    assert own.first_us > 100_000
    assert own.prepare_us < 50_000


def test_first_runs_that_would_take_too_long_are_left_out() -> None:
    patience = Patience(0.5)
    # Until something is known, few groups are dared.
    unknown = replace(SMALL, batch=64, q_len=512, kv_len=512)
    assert not patience.lasts("sdpa", unknown)
    assert patience.lasts("sdpa", SMALL)
    many = [replace(SMALL, batch=batch, seed=batch) for batch in (2, 3, 4, 6, 9, 14, 20)]
    for workload in many:
        groups = len(set(workload.lengths.tolist()))
        for backend, each in (("sdpa_unpadded", 0.05), ("sdpa", 0.0)):
            seconds = 0.01 + each * groups
            sample = samples.Sample(0, workload, backend, "ok", first_us=seconds * 1e6)
            patience.learn(sample)
    large = replace(SMALL, batch=64, q_len=512, kv_len=512)
    assert patience.lasts("sdpa", large)
    assert not patience.lasts("sdpa_unpadded", large)
    assert patience.lasts("sdpa_unpadded", replace(large, spread="same"))
    found = measure(0, large, CPU, (SDPA, UNPADDED), {}, 0.01, patience)
    assert {s.backend: s.status for s in found} == {"sdpa": "ok", "sdpa_unpadded": "slow"}


def test_preparation_is_timed_on_enough_workloads_of_each_backend() -> None:
    """Also of one that some of a kind refuse: from fewer, none would be its cost."""
    patience = Patience(0.5, thrifty=True)
    timed: Counter[str] = Counter()
    for seed in range(1, 30, 3):
        workload = replace(SMALL, seed=seed)
        for backend in ("sdpa", "rare") if seed > 10 else ("sdpa",):
            timed[backend] += patience.times_preparation(backend, workload)
    assert timed == {"sdpa": grid.FEWEST, "rare": grid.FEWEST}


class _Builds(type(SDPA)):  # type: ignore[misc]
    name = "builds"


class _Takes(type(SDPA)):  # type: ignore[misc]
    name = "takes"


def test_what_builds_kernels_for_each_shape_is_left_out_of_every_second_workload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience = Patience(0.5, thrifty=True)
    monkeypatch.setattr("smartattn.measure._PREPARED", 0)
    monkeypatch.setattr("smartattn.measure._BUILT", 4)
    found: dict[int, list[str]] = {0: [], 1: []}
    for seed in range(8):
        # Of each kind some are timed in any case.
        assert patience.spares("builds", replace(SMALL, seed=9)) == (seed >= 4)
        assert not patience.spares("builds", replace(SMALL, seed=9, side="none"))
        workload = replace(SMALL, seed=seed)
        for backend, seconds in (("builds", 0.04), ("takes", 0.001), ("sdpa", 0.001)):
            first = samples.Sample(0, workload, backend, "ok", first_us=seconds * 1e6)
            patience.learn(first)
        if seed >= 4:
            every = (_Builds(), _Takes(), SDPA)
            rows = measure(0, workload, CPU, every, {}, 0.001, patience)
            found[seed % 2] += [row.backend for row in rows]
            assert {row.prepare_us > 0 for row in rows} == {seed == 6}
    assert found[0] == ["builds", "takes", "sdpa"] * 2
    assert found[1] == ["takes", "sdpa"] * 2
    # With one other there would be nothing left to compare, and judging needs all of them.
    odd = replace(SMALL, seed=9)
    assert len(measure(0, odd, CPU, (_Builds(), SDPA), {}, 0.001, patience)) == 2
    patience.thrifty = False
    assert len(measure(0, odd, CPU, (_Builds(), _Takes(), SDPA), {}, 0.001, patience)) == 3


class _Kinds(type(SDPA)):  # type: ignore[misc]
    """Builds kernels for head sizes, heads per group and directions, which takes its time."""

    name = "kinds"
    indispensable = False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.built: list[Any] = []

    def built_for(self, plan: Plan, call: Call) -> Any:
        return call.head_dim, call.group_size, call.grad

    def bind(self, plan: Plan, call: Call) -> Runner:
        kind = self.built_for(plan, call)
        if kind not in self.built:
            self.built.append(kind)
            time.sleep(self.seconds)
        return super().bind(plan, call)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Any:
    backend = _Kinds()
    monkeypatch.setitem(measuring.NAMED, "kinds", backend)
    measuring._built_for.cache_clear()
    yield backend
    measuring._built_for.cache_clear()


def test_kernels_of_kinds_have_seconds_of_their_own(kinds: Any) -> None:
    patience = Patience(0.5, building=12.0)

    def first(seconds: float, here: bool = True, **changes: Any) -> None:
        sample = samples.Sample(0, replace(SMALL, **changes), "kinds", "ok", first_us=seconds * 1e6)
        patience.learn(sample, here)

    # Longer than any first run may take, and done once.
    assert patience.lasts("kinds", SMALL)
    first(5.0)
    for seed in range(20):
        assert patience.lasts("kinds", replace(SMALL, seed=seed))
        first(0.001, seed=seed)
    assert not patience.spares("kinds", replace(SMALL, seed=1))
    assert patience.built_seconds == 5.0
    other = replace(SMALL, head_dim=32)
    assert patience.lasts("kinds", other)
    first(4.0, head_dim=32)
    # 3 s are left, and the longest took 5; of training nothing is known.
    assert not patience.lasts("kinds", replace(SMALL, head_dim=64))
    assert patience.lasts("kinds", replace(SMALL, mode="train"))
    assert patience.lasts("kinds", replace(other, seed=5))
    # What a run that was cut short has built is gone.
    first(4.0, here=False, head_dim=8)
    assert patience.built_seconds == 9.0
    assert not patience.lasts("kinds", replace(SMALL, head_dim=8))


def test_of_kinds_that_differ_in_their_groups_one_is_built(kinds: Any) -> None:
    thrifty, all_of_them = Patience(0.5, thrifty=True), Patience(0.5)
    for patience in (thrifty, all_of_them):
        patience.learn(samples.Sample(0, SMALL, "kinds", "ok", first_us=5e6))
        assert patience.lasts("kinds", replace(SMALL, heads=8, kv_heads=4))
        assert patience.lasts("kinds", replace(SMALL, head_dim=32, heads=8, kv_heads=1))
    assert not thrifty.lasts("kinds", replace(SMALL, kv_heads=4))
    assert all_of_them.lasts("kinds", replace(SMALL, kv_heads=4))


def test_building_for_kinds_is_not_measuring(
    one_family: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = _Kinds(seconds=1.5)
    monkeypatch.setitem(measuring.NAMED, "kinds", backend)
    measuring._built_for.cache_clear()
    start = time.monotonic()
    done = calibrate(quick(2.5), backends=(SDPA, UNPADDED, backend), lock=False)
    took = time.monotonic() - start
    measuring._built_for.cache_clear()
    # The others have more heads per group.
    assert len(backend.built) == 1
    assert done.profile.run is not None
    assert took - done.profile.run.seconds > 1.5
    assert done.profile.run.seconds > 1.5
    assert done.slow > 0
    _, taken = samples.load(done.samples)
    own = [sample for sample in taken if sample.backend == "kinds" and sample.status == "ok"]
    assert sum(sample.first_us > 1.4e6 for sample in own) == 1
    assert all(sample.prepare_us < 5e5 for sample in own)


def test_the_rest_of_a_layer_is_measured_before_and_after(
    one_family: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was busy with something else for a second must not count for all layers."""
    hosts = iter([1026.0, 503.0, 700.0])
    monkeypatch.setattr(
        module,
        "measure_surroundings",
        lambda device: Surroundings(host_us=next(hosts), flops_per_us=8e8, bytes_per_us=4e6),
    )
    done = calibrate(quick(0.5), backends=(SDPA, UNPADDED), lock=False)
    assert done.profile.surroundings is not None
    assert done.profile.surroundings.host_us == 503.0
    head, _ = samples.load(done.samples)
    assert head.surroundings == done.profile.surroundings


def test_windows_are_timed_beside_padding_and_in_training() -> None:
    limits = grid.limits("cuda", "default", 10**11)
    drawn = list(islice(grid.workloads(grid.families("cuda", "default"), limits, 0), 1500))
    windowed = {(w.mode, w.causal, w.side) for w in drawn if w.window}
    for mode in ("forward", "train"):
        for causal in (True, False):
            assert {(mode, causal, side) for side in ("none", "right")} <= windowed
    assert all(mode != "decode" and side != "packed" for mode, _, side in windowed)
    assert sum(bool(w.window) for w in drawn) < 0.2 * len(drawn)


def test_spread_is_relative_and_zero_for_one() -> None:
    assert relative_spread([5.0]) == 0.0
    assert relative_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


# -- what is kept --------------------------------------------------------------------------------


def some_samples(count: int = 4) -> list[samples.Sample]:
    limits = grid.limits("cuda", "default", 10**11)
    drawn = islice(grid.workloads(grid.families("cuda", "default"), limits, 0), count)
    return [
        samples.Sample(n, w, ("sdpa", "flash_attention_2")[n % 2], "ok", 1.5, 0.1, 2.5, 0.2, 7, 9)
        for n, w in enumerate(drawn)
    ]


def header() -> samples.Header:
    identity = identify(CPU)
    assert identity is not None
    return samples.Header(
        device=identity,
        versions={},  # type: ignore[arg-type]
        date="2026-01-01",
        mode="quick",
        grid="1",
        seed=0,
        excluded={"altered": "wrong output"},
    )


def test_samples_read_back_equal(tmp_path: Path) -> None:
    taken = [
        *some_samples(),
        samples.Sample(9, SMALL, "sdpa", "wrong", error=float("inf"), tolerance=1e-3),
    ]
    samples.save(tmp_path / "raw.safetensors", header(), taken)
    found, rows = samples.load(tmp_path / "raw.safetensors")
    assert rows == taken
    assert found.excluded == header().excluded
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["raw.safetensors"]


def test_samples_of_before_read_without_the_later_columns(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "calibration/samples/nvidia-h200-default.safetensors"
    head, rows = samples.load(shipped)
    assert rows
    if not any(row.prepare_us for row in rows):
        assert rows[0].us() == max(rows[0].host_us, rows[0].device_us)
    samples.save(tmp_path / "again", head, rows)
    assert samples.load(tmp_path / "again")[1] == rows


def with_word(good: bytes, word: bytes) -> bytes:
    """With a word in a dtype's place, in a header of the length that this makes."""
    end = 8 + int.from_bytes(good[:8], "little")
    head = good[8:end].replace(b"bfloat16", word)
    return len(head).to_bytes(8, "little") + head + good[end:]


def damaged(path: Path) -> dict[str, bytes]:
    samples.save(path, header(), some_samples())
    good = path.read_bytes()
    from safetensors.numpy import save

    return {
        "empty": b"",
        "truncated": good[:-50],
        "text": b"{}" * 100,
        "other tensors": save({"a": np.zeros(3)}),
        "length beyond the file": b"\xff" * 8 + good[8:],
        "other schema": good.replace(b"smartattn-samples/1", b"smartattn-samples/9"),
        "unknown word": good.replace(b"bfloat16", b"bfloat99"),
        "long word": with_word(good, b"x" * 5000),
        "not UTF-8": good[:8] + b"\xff" * (len(good) - 8),
    }


@pytest.mark.parametrize(
    "case",
    [
        "empty",
        "truncated",
        "text",
        "other tensors",
        "length beyond the file",
        "other schema",
        "unknown word",
        "long word",
        "not UTF-8",
    ],
)
def test_damaged_samples_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "raw.safetensors"
    path.write_bytes(damaged(path)[case])
    with pytest.raises(samples.SamplesError) as caught:
        samples.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "change",
    [{"device_us": float("nan")}, {"device_us": -1.0}, {"host_us": float("inf")}],
)
def test_impossible_times_are_refused(change: dict[str, float], tmp_path: Path) -> None:
    samples.save(tmp_path / "raw", header(), [replace(some_samples(1)[0], **change)])
    with pytest.raises(samples.SamplesError, match="negative or non-finite"):
        samples.load(tmp_path / "raw")


@pytest.mark.parametrize(
    "change",
    [{"batch": 2**40}, {"kv_len": 0}, {"kv_heads": 3}, {"padding_share": 1.5}, {"q_len": 4096}],
)
def test_impossible_workloads_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    bad = replace(some_samples(1)[0], workload=replace(SMALL, **change))
    samples.save(tmp_path / "raw", header(), [bad])
    with pytest.raises(samples.SamplesError, match="cannot be"):
        samples.load(tmp_path / "raw")


# -- the sweep -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_family")
def test_a_calibration_keeps_its_budget_and_changes_decisions() -> None:
    # Shorter than what the default takes the padding out of.
    long = replace(SMALL, causal=False, batch=16, q_len=240, kv_len=240, heads=4, kv_heads=4)
    long = replace(long, head_dim=64, padding_share=0.75)
    plan, call = long.plan(CPU), long.call(CPU)
    assert regime_of(plan, call) is not None
    before = choose(plan, call, profiles.profile_for(CPU), BACKENDS)
    assert before.backend.name == "sdpa"
    progress: list[Progress] = []
    start = time.perf_counter()
    outcome = calibrate(quick(4.0), progress.append)
    assert time.perf_counter() - start < 8.0
    profiles.set_profile(None)
    after = choose(plan, call, profiles.profile_for(CPU), BACKENDS)
    assert after.backend.name == "sdpa_unpadded"
    assert "fastest by profile" in after.reason
    assert outcome.profile == profile.load(outcome.path)
    assert outcome.path.parent == profiles.user_profiles()
    assert outcome.samples is not None
    head, taken = samples.load(outcome.samples)
    assert head.complete
    assert outcome.measured == len(taken) >= 8
    assert {sample.backend for sample in taken} == {"sdpa", "sdpa_unpadded"}
    assert [step.elapsed for step in progress] == sorted(step.elapsed for step in progress)
    assert progress[-1].elapsed == progress[-1].budget == 4.0


def calibrated(request: Request, stop_after: int | None = None, **more: Any) -> Outcome:
    """A calibration that Ctrl-C ends after so many workloads."""
    turn = 0

    def report(progress: Progress) -> None:
        nonlocal turn
        turn += 1
        if stop_after is not None and turn > stop_after:
            raise KeyboardInterrupt

    return calibrate(request, report, **more)


@pytest.mark.usefixtures("one_family")
def test_ctrl_c_loses_nothing_and_the_next_run_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrated(quick(60.0), stop_after=5)
    identity = identify(CPU)
    assert identity is not None
    raw = module.samples_path(identity, "quick")
    head, kept = samples.load(raw)
    assert len(kept) == 10
    assert not head.complete
    assert head.seconds > 0
    assert not module.default_path(identity).exists()
    outcome = calibrated(quick(head.seconds + 1.0))
    assert outcome.resumed == 10
    assert outcome.measured >= 2
    _, taken = samples.load(raw)
    assert taken[:10] == kept
    assert len({(sample.workload, sample.backend) for sample in taken}) == len(taken)


@pytest.mark.usefixtures("one_family")
def test_samples_are_saved_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what ends a process without warning loses a few seconds only."""
    monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)
    identity = identify(CPU)
    assert identity is not None
    counts = []

    def report(progress: Progress) -> None:
        if progress.samples:
            counts.append(len(samples.load(module.samples_path(identity, "quick"))[1]))

    calibrate(quick(1.0), report)
    assert counts[:2] == [2, 4]


@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize("change", ["seed", "mode", "force"])
def test_samples_of_another_run_are_not_mixed_in(change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrated(quick(60.0), stop_after=3)
    changes: dict[str, Any] = {"seed": {"seed": 1}, "mode": {"mode": "default"}}.get(change, {})
    request = replace(quick(1.0, force=change == "force"), **changes)
    assert calibrated(request).resumed == 0


@pytest.mark.usefixtures("one_family")
def test_a_second_run_measures_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrate(quick(1.5))
    again = calibrate(quick(60.0))
    assert again.samples is None
    assert again.profile == first.profile
    # Versions changed, more is asked for, or it is forced: then there is a need.
    identity = identify(CPU)
    assert identity is not None
    assert module.current(quick(1.0), identity) is not None
    assert module.current(replace(quick(1.0), mode="default"), identity) is None
    assert module.current(quick(1.0, cold=True), identity) is None
    real = module.versions
    monkeypatch.setattr(
        module, "versions", lambda kind: real(kind).model_copy(update={"torch": "99"})
    )
    assert module.current(quick(1.0), identity) is None
    monkeypatch.undo()
    first.path.write_text("{")
    assert module.current(quick(1.0), identity) is None


@pytest.mark.usefixtures("one_family")
def test_the_second_of_two_waits() -> None:
    lock = FileLock(profiles.user_profiles().parent / "calibrate.lock")
    profiles.user_profiles().mkdir(parents=True)
    said = threading.Event()
    done = threading.Event()

    def run() -> None:
        calibrate(quick(1.0), waiting=said.set)
        done.set()

    with lock:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert said.wait(10)
        assert not done.is_set()
    assert done.wait(20)
    thread.join()


def fails(output: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such\nkernel")


@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize(
    ("alter", "reason"),
    [(lambda x: x * 1.01, "wrong output"), (fails, "fails with ValueError: no such kernel")],
    ids=["wrong", "failing"],
)
def test_a_wrong_backend_is_excluded_and_reported(alter: Any, reason: str) -> None:
    outcome = calibrate(quick(2.5), backends=(SDPA, UNPADDED, Altered(alter)))
    assert outcome.profile.run is not None
    assert outcome.profile.run.excluded.keys() == {"altered"}
    assert reason in outcome.profile.run.excluded["altered"]
    assert {cost.backend for cost in outcome.profile.costs} == {"sdpa", "sdpa_unpadded"}
    assert outcome.samples is not None
    _, taken = samples.load(outcome.samples)
    # It is out after the first time.
    assert sum(sample.backend == "altered" for sample in taken) == 1


@pytest.mark.usefixtures("one_family")
def test_doubts_are_kept_with_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    doubt = "other work used 83% of the device before the run"
    monkeypatch.setattr(module.Watch, "complaints", lambda self: [doubt])
    outcome = calibrate(quick(6.0, cold=True))
    assert outcome.complaints == (doubt,)
    run = profile.load(outcome.path).run
    assert run is not None
    assert run.complaints == (doubt,)
    assert run.cold


def test_devices_are_calibrated_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes do not see what tests replace, but they do see the environment.
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    good = quick(1.0, output=tmp_path / "p.json")
    bad = Request(torch.device("meta"))
    found = {request.device.type: outcome for request, outcome in calibrate_all([good, bad])}
    assert isinstance(found["meta"], CalibrationError)
    outcome = found["cpu"]
    # A second is too little for a fit on a slow machine, which is an answer too.
    if isinstance(outcome, Outcome):
        assert profile.load(tmp_path / "p.json") == outcome.profile
    else:
        assert "too few" in str(outcome)
    assert list((tmp_path / "xdg").rglob("*.safetensors"))


def test_no_more_devices_at_once_than_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [at_once(n) for n in (1, 2, 4, 9)] == [1, 2, 4, 4]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert at_once(4) == 1


def lacks_memory(output: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_lack_of_memory_is_no_fault_of_the_backend() -> None:
    excluded: dict[str, str] = {}
    found = measure(0, SMALL, CPU, (SDPA, UNPADDED, Altered(lacks_memory)), excluded, 0.01)
    assert excluded == {}
    assert {sample.backend: sample.status for sample in found} == {
        "sdpa": "ok",
        "sdpa_unpadded": "ok",
        "altered": "memory",
    }


def test_nothing_is_timed_where_there_is_no_choice() -> None:
    assert measure(0, SMALL, CPU, (SDPA,), {}, 0.01) == []


def test_backends_that_need_a_dense_mask_do_not_compete_for_packed_batches() -> None:
    packed = replace(SMALL, side="packed", batch=1, sequences=3, padding_share=0.0)
    able = candidates(packed.plan(CPU), packed.call(CPU), BACKENDS, {})
    assert [backend.name for backend in able] == ["sdpa_unpadded"]


@pytest.mark.usefixtures("one_family")
def test_a_budget_too_small_for_anything_says_so() -> None:
    with pytest.raises(CalibrationError, match="larger --budget"):
        calibrate(quick(1e-9))


def test_devices_and_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be used"):
        calibrate(Request(torch.device("meta")))
    with pytest.raises(CalibrationError, match="does not exist"):
        calibrate(quick(1.0, output=tmp_path / "missing" / "p.json"))
    with pytest.raises(CalibrationError, match="is a directory"):
        calibrate(quick(1.0, output=tmp_path))
    with pytest.raises(CalibrationError, match="choose another --output"):
        calibrate(quick(1.0, output=Path("/proc/nothing.json")))


@pytest.mark.usefixtures("one_family")
def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "raw.safetensors")

    monkeypatch.setattr(samples, "save", full)
    with pytest.raises(CalibrationError, match=r"raw.safetensors \(No space left on device\)"):
        calibrate(quick(1.0))


@pytest.mark.usefixtures("one_family")
def test_output_is_written_there_and_only_there(tmp_path: Path) -> None:
    outcome = calibrate(quick(1.5, output=tmp_path / "mine.json"))
    assert outcome.path == tmp_path / "mine.json"
    assert profile.load(outcome.path).device == identify(CPU)
    assert not list(profiles.user_profiles().glob("*.json"))
