"""The fit: exact on what it can represent, robust on what it cannot; and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartattn import grid
from smartattn.backends import BACKENDS, NAMED
from smartattn.backends.base import Walk
from smartattn.backends.sdpa import needs_no_mask
from smartattn.cost import BEND_LIMIT, LAYERS, Cost, Predictor
from smartattn.features import BEND_TERMS, FEATURES, Kernel, features, regime_of
from smartattn.fit import fit_costs, fit_profile
from smartattn.least_squares import nonnegative_least_squares, relative_fit
from smartattn.machine import Device, Versions
from smartattn.profiles import default_rules
from smartattn.samples import Header, Sample
from smartattn.surroundings import Surroundings
from smartattn.thresholds import thresholds
from smartattn.workload import Workload, as_padded

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: Microseconds per unit: one backend walks the padded tensors, the other the real tokens.
TRUE = {
    "sdpa": {"call": 20.0, "padded_tiles": 2.0, "mask_pairs": 4.0, "dense_keys": 0.4},
    "torch_varlen": {"call": 45.0, "sequences": 1.0, "real_tiles": 2.5, "dense_queries": 0.5},
}
FAMILY = grid.Family("forward", True, ("left",), "bfloat16", 64)


def drawn(count: int, seed: int = 0, family: grid.Family = FAMILY) -> Iterator[Workload]:
    limits = grid.limits("cuda", "quick", 10**11)
    return islice(grid.workloads([family], limits, seed), count)


def work(
    workload: Workload, backend: str = "sdpa", device: torch.device = CUDA, slots: int = 0
) -> dict[str, float]:
    """The features of a workload by name, as a backend's kernel cuts it up."""
    plan, call = workload.plan(device), workload.call(device)
    kernel = Kernel.of(NAMED[backend], plan, call, slots)
    return dict(zip(FEATURES, features(plan, call, kernel), strict=True))


def true_us(backend: str, workload: Workload, device: torch.device = CUDA) -> float:
    named = work(workload, backend, device)
    return sum(value * named[name] for name, value in TRUE[backend].items())


def samples_of(
    workloads: Iterator[Workload], disturb: Callable[[int], float] = lambda place: 1.0
) -> list[Sample]:
    found = []
    for index, workload in enumerate(workloads):
        for backend in TRUE:
            us = true_us(backend, workload) * disturb(len(found))
            found.append(Sample(index, workload, backend, "ok", 10.0, 0.0, us, 0.01, 5))
    return found


def header(**changes: object) -> Header:
    given = Header(
        device=Device(kind="cuda", name="NVIDIA Imaginary", capability="9.0"),
        versions=Versions(torch="2.11"),
        date="2026-01-01",
        mode="quick",
        grid=grid.VERSION,
        seed=0,
        seconds=12.0,
        complete=True,
    )
    return given.model_copy(update=changes)


def test_kernels_that_are_built_for_each_shape_are_noticed() -> None:
    samples = []
    for place, sample in enumerate(samples_of(drawn(16))):
        # The first calls of a process load code, whatever the backend.
        loading = 4e5 if place < 4 else 0.0
        builds = 37_000.0 if sample.backend == "sdpa" else 300.0
        first_us = sample.device_us + builds + loading
        samples.append(replace(sample, first_us=first_us))
    found = {cost.backend: cost.build_us for cost in fit_costs(samples, CUDA)}
    assert found == {"sdpa": 37_000.0, "torch_varlen": 0.0}
    unknown = [replace(sample, first_us=0.0) for sample in samples]
    assert {cost.build_us for cost in fit_costs(unknown, CUDA)} == {0.0}


def test_kernels_that_are_built_for_kinds_of_calls_are_noticed() -> None:
    """The first call of a kind alone takes long, and that may be one of another layout."""
    found: list[Sample] = []
    seen = set()
    device = torch.device("cuda", 0)
    for index, workload in enumerate(drawn(40)):
        for backend in ("sdpa", "flash_attention_4"):
            us = true_us(backend if backend in TRUE else "torch_varlen", workload)
            kind = NAMED[backend].built_for(workload.plan(CPU), workload.call(CPU))
            assert kind == NAMED[backend].built_for(workload.plan(CPU), workload.call(device))
            builds = 5e6 if kind is not None and kind not in seen else 0.0
            # One of them was there already.
            builds *= bool(seen) or backend == "sdpa"
            if kind is not None:
                seen.add(kind)
            sample = Sample(index, workload, backend, "ok", 10.0, 0.0, us, 0.01, 5)
            found.append(replace(sample, first_us=us + builds + 200.0))
    assert 2 < len(seen) < 40
    costs = fit_costs(found, CUDA)
    assert {c.build_us for c in costs if c.backend == "sdpa"} == {0.0}
    assert {c.build_us for c in costs if c.backend == "flash_attention_4"} == {5e6}
    quick = [replace(sample, first_us=min(sample.first_us, 4000.0)) for sample in found]
    assert {c.build_us for c in fit_costs(quick, CUDA)} == {0.0}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**31))
def test_least_squares_meets_its_optimality_conditions(columns: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    # Karush, Kuhn, Tucker: no descent from any bound, none at all inside.
    assert (gradient >= -1e-6).all()
    assert abs(gradient[x > 0]).max(initial=0.0) < 1e-6


def test_least_squares_of_columns_that_say_the_same() -> None:
    column = np.arange(1.0, 6.0)
    x = nonnegative_least_squares(np.stack([column, column, 0 * column], axis=1), 3 * column)
    assert x[0] + x[1] == pytest.approx(3.0)
    assert x[2] == 0


def test_a_known_model_is_found_from_noisy_samples() -> None:
    rng = np.random.default_rng(1)
    noise = rng.lognormal(0.0, 0.03, 1000)
    costs = fit_costs(samples_of(drawn(40), lambda place: noise[place]), CUDA)
    assert {cost.backend for cost in costs} == set(TRUE)
    predictor = Predictor(costs)
    errors, losses = [], []
    for workload in drawn(60, seed=77):
        plan, call = workload.plan(CUDA), workload.call(CUDA)
        right = {backend: true_us(backend, workload) for backend in TRUE}
        found = {backend: predictor.predict(backend, plan, call) or 0.0 for backend in TRUE}
        errors += [abs(found[backend] / right[backend] - 1) for backend in TRUE]
        losses.append(right[min(found, key=found.__getitem__)] / min(right.values()))
    assert np.median(errors) < 0.03
    assert max(errors) < 0.2
    assert np.mean(losses) < 1.005
    # The shapes do ask for both backends, or the losses would say nothing.
    picks = [true_us("sdpa", w) < true_us("torch_varlen", w) for w in drawn(60, seed=77)]
    assert 5 < sum(picks) < 55


def test_it_extrapolates_in_length() -> None:
    predictor = Predictor(fit_costs(samples_of(drawn(40)), CUDA))
    long = Workload("forward", True, "left", "bfloat16", 4, 65536, 65536, 16, 4, 64, 0, 0, 0.5)
    for backend in TRUE:
        found = predictor.predict(backend, long.plan(CUDA), long.call(CUDA))
        assert found == pytest.approx(true_us(backend, long), rel=0.1)


def test_a_few_wild_samples_do_not_move_the_model() -> None:
    costs = fit_costs(samples_of(drawn(40), lambda n: 30.0 if n % 11 == 3 else 1.0), CUDA)
    predictor = Predictor(costs)
    for workload in drawn(20, seed=5):
        for backend in TRUE:
            found = predictor.predict(backend, workload.plan(CUDA), workload.call(CUDA))
            assert found == pytest.approx(true_us(backend, workload), rel=0.25)


def test_head_dims_share_what_they_have_in_common() -> None:
    """A head_dim with the fewest samples is still told apart by what the others know."""
    many = samples_of(drawn(40))
    few = [
        replace(sample, workload=replace(sample.workload, head_dim=128), device_us=2 * us)
        for sample in samples_of(drawn(grid.FEWEST, seed=3))
        for us in [sample.device_us]
    ]
    predictor = Predictor(fit_costs(many + few, CUDA))
    errors = []
    for workload in drawn(30, seed=9):
        wide = replace(workload, head_dim=128)
        for backend in TRUE:
            found = predictor.predict(backend, wide.plan(CUDA), wide.call(CUDA))
            assert found is not None
            errors.append(abs(found / (2 * true_us(backend, workload)) - 1))
    assert np.median(errors) < 0.15


def test_what_hardly_counts_in_a_few_samples_is_what_the_others_say() -> None:
    """One slow sample of a rare head_dim must not make its sequences cost a hundredfold."""
    many = samples_of(drawn(40))
    long = [
        Workload("forward", True, "left", "bfloat16", batch, kv_len, kv_len, 4, 4, 64, seed=kv_len)
        for batch, kv_len in ((8, 1100), (4, 1500), (3, 2900), (2, 3700), (2, 5000), (2, 8000))
    ]
    few = [
        replace(sample, workload=replace(sample.workload, head_dim=80), device_us=factor * us)
        for sample in samples_of(replace(w, padding_share=0.4) for w in long)
        for us, factor in [(sample.device_us, 1.4 if sample.workload.batch == 8 else 1.0)]
    ]
    predictor = Predictor(fit_costs(many + few, CUDA))
    for batch, kv_len in ((200, 20), (128, 40), (250, 16)):
        short = Workload("forward", True, "left", "bfloat16", batch, kv_len, kv_len, 16, 16, 64)
        short = replace(short, padding_share=0.5)
        rare = replace(short, head_dim=80)
        for backend in TRUE:
            found = predictor.predict(backend, rare.plan(CUDA), rare.call(CUDA))
            assert found == pytest.approx(true_us(backend, short), rel=0.5), backend


def test_coefficients_are_held_by_the_samples_that_the_prior_is_from() -> None:
    # The second amount is next to nothing in three samples, one of which took twice as long.
    amounts = np.array([[1.0, 1e-3], [1.0, 1e-3], [1.0, 2e-3]])
    times, prior = np.array([10.0, 10.0, 20.0]), np.array([10.0, 5.0])
    free = relative_fit(amounts, times, prior, strength=1.0)
    shares = np.array([0.1, 0.1])
    held = relative_fit(amounts, times, prior, strength=1.0, prior_shares=shares)
    assert free[1] > 500
    assert held[1] == pytest.approx(5.0, abs=0.5)
    # What the samples do tell of is theirs to say.
    assert 10.0 < held[0] < 20.0
    exact = relative_fit(amounts, amounts @ prior, prior, prior_shares=shares)
    assert exact == pytest.approx(prior)


@pytest.mark.parametrize(
    ("side", "causal", "mode", "window"),
    [
        # More sequences than queries, in a mask that all of them share.
        ("none", True, "forward", -7),
        ("none", True, "forward", 0),
        ("none", True, "forward", 7),
        ("none", False, "train", 0),
        ("left", True, "train", 0),
        ("left", False, "forward", 0),
        ("right", True, "forward", 0),
        ("right", True, "forward", 9),
        ("right", False, "train", 0),
        ("packed", True, "forward", 0),
        ("left", False, "decode", 0),
        ("none", False, "decode", 0),
    ],
)
def test_the_mask_that_is_counted_is_the_one_that_is_made(
    side: Any, causal: bool, mode: Any, window: int
) -> None:
    q_len, batch = 1 if mode == "decode" else 40, 6
    if window < 0:
        batch, window = 60, -window
    workload = Workload(mode, causal, side, "float32", batch, q_len, 40, 8, 2, 64, window=window)
    if side in ("left", "right"):
        workload = replace(workload, padding_share=0.5, seed=1)
    if side == "packed":
        workload = replace(workload, batch=1, sequences=5)
    plan, call = workload.plan(CPU), workload.call(CPU)
    counted = work(workload, device=CPU)
    mask = None if needs_no_mask(plan, call) else plan.bias(torch.float32)
    assert counted["mask_pairs"] == pytest.approx((0 if mask is None else mask.numel()) / 1e6)
    pairs = workload.batch * q_len * 40 * 8 / 1e6
    rows_differ = mask is not None and mask.shape[2] > 1
    assert counted["bias_pairs"] == pytest.approx(pairs if rows_differ else 0.0)
    # A kernel that is handed a mask computes what is masked, too.
    assert counted["dense_tiles"] == pytest.approx(pairs)
    spared = mask is None and causal and q_len > 1
    assert counted["padded_tiles"] == pytest.approx(pairs * (41 / 80 if spared else 1.0))


def test_slices_are_as_large_as_their_tensor_in_a_backward_alone() -> None:
    padded = Workload("train", True, "left", "float32", 6, 40, 40, 8, 2, 64, padding_share=0.5)
    groups = work(padded)["groups"]
    assert groups > 1
    assert work(padded)["group_tokens"] == pytest.approx(groups * 6 * 40 * (8 + 2 * 2) / 1e3)
    for mode, q_len in (("forward", 40), ("decode", 1)):
        other = replace(padded, mode=mode, q_len=q_len)  # type: ignore[arg-type]
        assert work(other)["groups"] == groups
        assert work(other)["group_tokens"] == 0


def test_host_time_counts_where_the_device_is_faster() -> None:
    samples = [replace(sample, host_us=500.0) for sample in samples_of(drawn(20))]
    tiny = Workload("forward", True, "left", "bfloat16", 2, 16, 16, 4, 4, 64, 0, 0, 0.3)
    plan, call = tiny.plan(CUDA), tiny.call(CUDA)
    predictor = Predictor(fit_costs(samples, CUDA))
    assert true_us("sdpa", tiny) < 100
    assert predictor.predict("sdpa", plan, call) == pytest.approx(500.0, rel=0.05)


def test_other_work_on_the_cores_does_not_count_as_launches() -> None:
    """Most host times are longer than the launches take, some by several times; none is shorter."""
    rng = np.random.default_rng(2)
    samples = [
        replace(sample, host_us=30.0 * (1.0 + rng.exponential(0.7)))
        for sample in samples_of(drawn(40))
    ]
    assert np.median([sample.host_us for sample in samples]) > 40
    tiny = Workload("forward", True, "left", "bfloat16", 2, 16, 16, 4, 4, 64, 0, 0, 0.3)
    plan, call = tiny.plan(CUDA), tiny.call(CUDA)
    found = Predictor(fit_costs(samples, CUDA)).predict("sdpa", plan, call)
    assert found is not None
    assert 25 < found < 38


def of_step(
    batch: int,
    kv_len: int,
    slots: int,
    kv_heads: int = 4,
    backend: str = "flash_attention_2",
    **changes: Any,
) -> dict[str, float]:
    """The features of a decoding step."""
    step = Workload("decode", False, "none", "bfloat16", batch, 1, kv_len, 8, kv_heads, 64)
    return work(replace(step, **changes), backend, slots=slots)


def block_keys(batch: int, kv_len: int, slots: int, **changes: Any) -> float:
    """10^3 keys that the busiest block of a decoding step walks."""
    return of_step(batch, kv_len, slots, **changes)["busiest_keys"]


def test_the_busiest_block_is_what_the_backend_says() -> None:
    # 8 blocks share what they have to read among 100 slots; cuDNN cuts them into parts of 128 keys
    # at least.
    assert block_keys(2, 1000, 100, backend="torch_varlen") == pytest.approx(0.08)
    assert block_keys(2, 1000, 100, backend="sdpa") == pytest.approx(0.25)
    padded = {"side": "left", "padding_share": 0.8, "spread": "skewed"}
    assert block_keys(2, 1000, 100, backend="torch_varlen", **padded) < 0.06
    # What reads the padding reads all keys of every row.
    assert block_keys(2, 1000, 100, backend="sdpa", **padded) == pytest.approx(0.25)
    # More heads of a group than one block takes.
    many = block_keys(25, 1000, 100, backend="torch_varlen", heads=71, kv_heads=1)
    assert many == pytest.approx(50 * 1000 / 100 * 1e-3)


def test_the_busiest_block_is_unknown_without_slots_and_of_one_query_only() -> None:
    assert block_keys(25, 1000, 0) == 0
    assert block_keys(25, 1000, 100, mode="forward", q_len=1000) == 0


def test_the_blocks_of_a_decoding_step_are_shared_by_the_heads_of_a_group() -> None:
    for heads in (4, 8, 64):
        assert of_step(25, 1000, 100, heads=heads)["blocks"] == pytest.approx(0.1)
    # A block takes 64 heads of a group.
    assert of_step(25, 1000, 100, heads=71, kv_heads=1)["blocks"] == pytest.approx(0.05)
    # Neither known without the device, nor what other modes start.
    assert of_step(25, 1000, 0)["blocks"] == 0
    assert of_step(25, 1000, 100, mode="forward", q_len=1000)["blocks"] == 0


def starting_us(workload: Workload) -> float:
    """Decoding in which starting a block takes as long as reading 400 keys."""
    named = work(workload, slots=132)
    return 5.0 + 20.0 * named["blocks"] + 0.05 * named["real_keys"] * workload.head_dim / 64


def starting(dims: tuple[int, ...], seed: int = 0, count: int = 40) -> list[Sample]:
    found = []
    for dim in dims:
        decode = grid.Family("decode", False, ("none",), "bfloat16", dim)
        for index, workload in enumerate(drawn(count, seed, decode)):
            us = starting_us(workload)
            found.append(Sample(index, workload, "sdpa", "ok", 1.0, 0.0, us, 0.01, 5))
    return found


def test_many_short_rows_take_the_time_of_starting_their_blocks() -> None:
    costs = fit_costs(starting((64,)), CUDA, 132)
    assert {cost.slots for cost in costs} == {132}
    short = Workload("decode", False, "none", "bfloat16", 200, 1, 24, 16, 16, 64)
    found = Predictor(costs).predict("sdpa", short.plan(CUDA), short.call(CUDA))
    assert found == pytest.approx(starting_us(short), rel=0.1)


def test_between_the_head_dims_measured_a_decoding_step_reads_in_proportion() -> None:
    """Nothing pads what is read once; starting blocks takes as long for every head_dim."""
    predictor = Predictor(fit_costs(starting((64, 128)), CUDA, 132))
    for shape in ((200, 24, 16, 16), (64, 30_000, 8, 8), (4, 60_000, 32, 8)):
        batch, kv_len, heads, kv_heads = shape
        for dim in (80, 96, 192):
            step = Workload(
                "decode", False, "none", "bfloat16", batch, 1, kv_len, heads, kv_heads, dim
            )
            found = predictor.predict("sdpa", step.plan(CUDA), step.call(CUDA))
            assert found == pytest.approx(starting_us(step), rel=0.1)


def test_other_modes_pad_to_the_next_head_dim_measured() -> None:
    family = grid.Family("forward", True, ("left",), "bfloat16", 128)
    predictor = Predictor(fit_costs(samples_of(drawn(20, family=family)), CUDA))
    (wide,) = drawn(1, seed=5, family=family)
    us = [
        predictor.predict("sdpa", one.plan(CUDA), one.call(CUDA))
        for one in (replace(wide, head_dim=80), wide)
    ]
    assert us[0] == us[1]


def test_few_decoding_steps_learn_nothing_from_rows_of_another_layout() -> None:
    """What this kernel does about padding takes 20 times as long as reading the keys."""
    samples = []
    for side in ("none", "left"):
        decode = grid.Family("decode", False, (side,), "bfloat16", 64)  # type: ignore[arg-type]
        for index, workload in enumerate(drawn(12, family=decode)):
            us = starting_us(workload) * (20.0 if side == "left" else 1.0)
            samples.append(Sample(index, workload, "sdpa", "ok", 1.0, 0.0, us, 0.01, 5))
    predictor = Predictor(fit_costs(samples, CUDA, 132))
    decode = grid.Family("decode", False, ("left",), "bfloat16", 64)
    ratios = []
    for workload in drawn(30, seed=7, family=decode):
        found = predictor.predict("sdpa", workload.plan(CUDA), workload.call(CUDA))
        assert found is not None
        ratios.append(found / (20.0 * starting_us(workload)))
    assert 0.8 < float(np.median(ratios)) < 1.25


def waving(slots: int, count: int = 80, seed: int = 0) -> list[Sample]:
    """Decoding that takes as long as its busiest block."""
    decode = grid.Family("decode", False, ("none",), "bfloat16", 64)
    found = []
    for index, workload in enumerate(drawn(count, seed, decode)):
        us = 5.0 + 30.0 * work(workload, "torch_varlen", slots=slots)["busiest_keys"]
        found.append(Sample(index, workload, "torch_varlen", "ok", 1.0, 0.0, us, 0.01, 5))
    return found


def test_waves_of_blocks_are_fitted_where_the_processors_are_known() -> None:
    def worst_error(predictor: Predictor) -> float:
        errors = []
        for sample in waving(264, seed=3):
            plan, call = sample.workload.plan(CUDA), sample.workload.call(CUDA)
            found = predictor.predict(sample.backend, plan, call)
            assert found is not None
            errors.append(abs(np.log(found / sample.device_us)))
        return float(np.quantile(errors, 0.9))

    known, unknown = (fit_costs(waving(264), CUDA, number) for number in (132, None))
    assert {cost.slots for cost in known} == {264}
    assert {cost.slots for cost in unknown} == {0}
    assert worst_error(Predictor(known)) < 0.05
    assert worst_error(Predictor(unknown)) > 2 * worst_error(Predictor(known))


def test_predictions_of_two_devices_for_one_plan_do_not_mix() -> None:
    (cost, *_) = fit_costs(waving(264), CUDA, 132)
    one, other = Predictor([cost]), Predictor([cost.model_copy(update={"slots": 20})])
    step = Workload("decode", False, "none", "bfloat16", 64, 1, 4096, 8, 8, 64)
    plan, call = step.plan(CUDA), step.call(CUDA)
    first = one.predict("torch_varlen", plan, call)
    assert other.predict("torch_varlen", plan, call) > 2 * first
    assert one.predict("torch_varlen", plan, call) == first


def test_a_layout_with_few_samples_learns_from_the_other() -> None:
    """Two decoding steps without padding, and many with it: the work per key is the same."""
    plain = grid.Family("decode", False, ("none",), "bfloat16", 64)
    padded = grid.Family("decode", False, ("left",), "bfloat16", 64)
    samples = samples_of(drawn(2, family=plain)) + samples_of(drawn(30, seed=4, family=padded))
    costs = fit_costs(samples, CUDA)
    assert {cost.layout for cost in costs} == {"plain", "padded"}
    predictor = Predictor(costs)
    errors = []
    for workload in drawn(20, seed=6, family=plain):
        found = predictor.predict("sdpa", workload.plan(CUDA), workload.call(CUDA))
        assert found is not None
        errors.append(abs(found / true_us("sdpa", workload) - 1))
    assert np.median(errors) < 0.1


def test_a_cpu_has_one_time_only() -> None:
    family = replace(FAMILY, dtype="float32")
    costs = fit_costs(samples_of(drawn(12, family=family)), CPU)
    assert costs
    assert all(not cost.host_us for cost in costs)


def test_too_few_and_bad_samples_make_no_model() -> None:
    few = samples_of(drawn(grid.FEWEST - 1))
    assert fit_costs(few, CUDA) == []
    many = samples_of(drawn(20))
    assert fit_costs([replace(sample, status="wrong") for sample in many], CUDA) == []
    assert fit_costs([replace(sample, device_us=0.0) for sample in many], CUDA) == []


def test_an_all_zero_fit_is_not_a_model_that_always_wins() -> None:
    fitted = relative_fit(np.ones((5, len(FEATURES))), np.full(5, 10.0))
    assert np.ones(len(FEATURES)) @ fitted == pytest.approx(10.0, rel=1e-3)


def test_thresholds_are_what_the_models_say() -> None:
    costs = fit_costs(samples_of(drawn(40)), CUDA)
    predictor = Predictor(costs)
    found = thresholds(costs, CUDA)
    assert [threshold.padding_share for threshold in found] == [0.1, 0.3, 0.5, 0.75]
    crossings = 0
    for threshold in found:
        lengths = [winner.from_kv_len for winner in threshold.winners]
        assert lengths == sorted(set(lengths))
        crossings += len(lengths) > 1
        for winner in threshold.winners:
            workload = as_padded(
                Workload(
                    "forward",
                    True,
                    "left",
                    "bfloat16",
                    threshold.batch,
                    winner.from_kv_len,
                    winner.from_kv_len,
                    threshold.heads,
                    threshold.kv_heads,
                    64,
                    padding_share=threshold.padding_share,
                    memory="concatenated",
                )
            )
            real = workload.plan(CUDA).padding_share
            assert real == pytest.approx(threshold.padding_share, abs=0.03)
            plan, call = workload.plan(CUDA), workload.call(CUDA)
            assert regime_of(plan, call) == costs[0].regime
            times = {name: predictor.predict(name, plan, call) or 0.0 for name in TRUE}
            assert min(times, key=times.__getitem__) == winner.backend
            assert max(times.values()) / min(times.values()) == pytest.approx(
                winner.speedup, abs=1e-3
            )
    assert crossings


def flat(backend: str, us: float, per_token: float = 0.0) -> Cost:
    """Decoding steps of so many microseconds, and so many more for each token of a row."""
    return Cost(
        backend=backend,
        mode="decode",
        layout="padded",
        causal=False,
        dtype="bfloat16",
        head_dim=64,
        host_us={},
        device_us={"call": us, "width": 1e3 * per_token},
        longest_kv_len=1024,
        samples=10,
        median_error=0.0,
    )


def test_thresholds_name_what_is_chosen_of_backends_that_count_as_equal() -> None:
    costs = (flat("sdpa", 100.5), flat("flash_attention_2", 100.0))
    for one in thresholds(costs, CUDA):
        assert [winner.backend for winner in one.winners] == ["sdpa"]
        assert one.winners[0].speedup == one.winners[0].largest_speedup == 1.0
    (faster, *_) = thresholds((costs[0], flat("flash_attention_2", 99.0)), CUDA)
    assert [winner.backend for winner in faster.winners] == ["flash_attention_2"]


def test_thresholds_say_how_far_ahead_the_fastest_gets() -> None:
    costs = (flat("sdpa", 10.0, 0.1), flat("torch_varlen", 40.0))
    for one in thresholds(costs, CUDA):
        first, second = one.winners
        assert (first.backend, second.backend) == ("sdpa", "torch_varlen")
        # The further to the left the further ahead sdpa is; the other one the further to the right.
        assert first.largest_speedup == first.speedup
        assert second.largest_speedup is not None
        assert second.largest_speedup > second.speedup
        assert second.largest_speedup == pytest.approx((10 + 0.1 * 1024) / 40, rel=1e-3)


def test_ratios_are_of_whole_layers_where_something_is_known_of_them() -> None:
    """What calls add to a layer that hides them has a ratio without bound."""
    costs = (flat("sdpa", 809.0), flat("torch_varlen", 800.1))
    around = Surroundings(host_us=800.0, flops_per_us=1e9, bytes_per_us=1e9)
    for rest, kind in ((around, "layer"), (None, "call")):
        for one in thresholds(costs, CUDA, rest):
            assert one.ratio_of == kind
            assert one.winners[0].largest_speedup == pytest.approx(809 / 800.1, abs=1e-3)


def test_thresholds_know_backends_that_were_measured_with_other_head_sizes() -> None:
    families = [grid.Family("forward", True, ("left",), "bfloat16", dim) for dim in (64, 128)]
    both = [sample for family in families for sample in samples_of(drawn(30, family=family))]
    gone = [s for s in both if (s.workload.head_dim, s.backend) != (64, "sdpa")]
    found = [thresholds(fit_costs(samples, CUDA), CUDA) for samples in (both, gone)]
    named = [
        {winner.backend for one in part if one.head_dim == 64 for winner in one.winners}
        for part in found
    ]
    assert named[0] == named[1] == {"sdpa", "torch_varlen"}


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_thresholds_of_what_is_set_aside_are_of_rows_that_lie_alike(device: torch.device) -> None:
    names = {"sdpa": "sdpa", "torch_varlen": "sdpa_unpadded"}
    costs = [
        cost.model_copy(update={"backend": names[cost.backend]})
        for cost in fit_costs(samples_of(drawn(40)), CUDA)
        if cost.backend in names
    ]
    found = thresholds(costs, device)
    assert {winner.backend for one in found for winner in one.winners} == {"sdpa", "sdpa_unpadded"}
    assert {threshold.alike for threshold in found} == {device == CUDA}


@pytest.mark.parametrize(
    ("mode", "side"),
    [(mode, side) for mode in ("forward", "train") for side in ("none", "right", "packed")]
    + [("decode", "none"), ("decode", "left")],
)
def test_every_layout_has_thresholds(mode: str, side: str) -> None:
    family = grid.Family(mode, mode != "decode", (side,), "bfloat16", 64)  # type: ignore[arg-type]
    costs = fit_costs(samples_of(drawn(20, family=family)), CUDA)
    if side == "packed":
        assert not thresholds(costs, CUDA), "sdpa would need a mask of all tokens by all tokens"
        flash = {"sdpa": "flash_attention_2"}
        costs = [c.model_copy(update={"backend": flash.get(c.backend, c.backend)}) for c in costs]
    assert thresholds(costs, CUDA)


def test_windows_have_thresholds() -> None:
    family = grid.Family("forward", True, ("none",), "bfloat16", 64, windows=1.0)
    costs = fit_costs(samples_of(drawn(20, family=family)), CUDA)
    assert {cost.layout for cost in costs} >= {"masked"}
    assert "masked" in {threshold.layout for threshold in thresholds(costs, CUDA)}


def test_the_profile_of_a_gpu_is_made_without_one() -> None:
    samples = samples_of(drawn(20))
    made = fit_profile(header(), samples, default_rules(), "raw.safetensors")
    assert made.device == header().device
    assert made.run is not None
    assert (made.run.samples, made.run.raw_samples) == (len(samples), "raw.safetensors")
    assert {cost.backend for cost in made.costs} == set(TRUE)
    assert made.thresholds
    assert made.rules == default_rules()


def test_excluded_backends_are_in_no_part_of_the_profile() -> None:
    why = {"torch_varlen": "wrong output"}
    made = fit_profile(header(excluded=why), samples_of(drawn(20)), default_rules(), None)
    assert {cost.backend for cost in made.costs} == {"sdpa"}
    assert all("torch_varlen" not in rule.prefer for rule in made.rules)
    assert any("flash_attention_2" in rule.prefer for rule in made.rules)
    assert made.run is not None
    assert made.run.excluded == why


def test_kernels_of_gpus_cost_whole_tiles() -> None:
    plain = Workload("forward", False, "none", "bfloat16", 2, 130, 130, 4, 4, 64, 0, 0, 0.0)
    found = {}
    for device in (CUDA, torch.device("cpu")):
        for workload in (
            plain,
            replace(plain, causal=True),
            replace(plain, mode="decode", q_len=1),
        ):
            named = work(workload, "torch_varlen", device)
            tiles = [named[f"{kind}_tiles"] * 1e6 / 8 for kind in ("dense", "padded", "real")]
            found[device.type, workload.mode, workload.causal] = [round(pairs) for pairs in tiles]
    assert found == {
        ("cuda", "forward", False): [256 * 256] * 3,
        ("cuda", "forward", True): [256 * 256, *[128 * 128 + 128 * 256] * 2],
        ("cuda", "decode", False): [130] * 3,
        ("cpu", "forward", False): [130 * 130] * 3,
        ("cpu", "forward", True): [130 * 130, *[130 * 131 // 2] * 2],
        ("cpu", "decode", False): [130] * 3,
    }


def test_each_backend_has_tiles_of_its_own() -> None:
    plain = Workload("forward", False, "none", "bfloat16", 1, 130, 130, 4, 4, 64, 0, 0, 0.0)
    packed = replace(plain, side="packed", kv_heads=1, sequences=1)

    def pairs(workload: Workload, backend: str) -> int:
        return round(work(workload, backend)["real_tiles"] * 1e6 / 4)

    assert pairs(plain, "sdpa") == 256 * 256
    assert pairs(replace(plain, head_dim=128), "flash_attention_2") == 256 * 192
    assert pairs(replace(plain, head_dim=256), "flash_attention_2") == 192 * 192
    for head_dim, causal, tiles in (
        (64, False, 192 * 192),
        (64, True, 192 * 256),
        (80, True, 192 * 144),
        (128, False, 256 * 176),
        (128, True, 128 * 128 + 128 * 256),
        (256, False, 256 * 160),
    ):
        shape = replace(plain, head_dim=head_dim, causal=causal)
        assert pairs(shape, "flash_attention_3") == tiles, (head_dim, causal)
    # The heads of a group share a tile: 48 queries of four, instead of 192 of one.
    assert pairs(packed, "flash_attention_3") == 144 * 192
    # Without sequences only where that leaves less of a tile empty.
    assert pairs(replace(plain, kv_heads=1), "flash_attention_3") == 144 * 192
    whole = replace(plain, kv_heads=1, causal=True, q_len=192, kv_len=192)
    assert pairs(whole, "flash_attention_3") == 192 * 256


def test_every_backend_that_is_measured_says_what_it_walks() -> None:
    for backend in BACKENDS:
        if not backend.last_resort:
            assert backend.walks in get_args(Walk), backend.name


def test_a_multiprocessor_runs_more_blocks_of_one_kernel_than_of_another() -> None:
    samples = [
        replace(sample, backend=backend)
        for sample in waving(264)
        for backend in ("sdpa", "flash_attention_2", "flash_attention_3")
    ]
    found = {cost.backend: cost.slots for cost in fit_costs(samples, CUDA, 132)}
    assert found == {"sdpa": 132, "flash_attention_2": 264, "flash_attention_3": 132}


def test_the_cost_of_collecting_keys_from_a_cache_is_told_apart() -> None:
    """Half of the samples lie as a cache concatenates them, and reading those takes longer."""
    samples = []
    for index, workload in enumerate(drawn(40)):
        workload = replace(workload, memory=("transposed", "concatenated")[index % 2])
        named = work(workload, "torch_varlen")
        us = 20.0 + 2.0 * named["real_tiles"] + 3.0 * named["concatenated_keys"]
        samples.append(Sample(index, workload, "torch_varlen", "ok", 10.0, 0.0, us, 0.01, 5))
    predictor = Predictor(fit_costs(samples, CUDA))
    wide = Workload("forward", True, "left", "bfloat16", 32, 512, 512, 16, 16, 64, 0, 0, 0.5)
    apart, together = (
        predictor.predict("torch_varlen", one.plan(CUDA), one.call(CUDA)) or 0.0
        for one in (replace(wide, memory="concatenated"), wide)
    )
    keys = features(wide.plan(CUDA), wide.call(CUDA))[list(FEATURES).index("real_keys")]
    assert apart - together == pytest.approx(3.0 * keys, rel=0.1)


def test_preparation_is_shared_by_the_layers_of_a_forward() -> None:
    samples = [replace(sample, prepare_us=LAYERS * 100.0) for sample in samples_of(drawn(20))]
    plain, prepared = (
        Predictor(fit_costs(some, CUDA)) for some in (samples_of(drawn(20)), samples)
    )
    for workload in drawn(5, seed=4):
        plan, call = workload.plan(CUDA), workload.call(CUDA)
        before = plain.predict("sdpa", plan, call) or 0.0
        assert prepared.predict("sdpa", plan, call) == pytest.approx(before + 100.0, rel=0.02)


def test_memory_and_error_are_modelled_where_they_were_measured() -> None:
    def memory(workload: Workload) -> int:
        named = work(workload)
        return round(2e6 * named["mask_pairs"] + 1e5 * named["dense_queries"])

    samples = [
        replace(sample, peak_bytes=memory(sample.workload), error=2e-3)
        for sample in samples_of(drawn(40))
    ]
    predictor = Predictor(fit_costs(samples, CUDA))
    unmeasured = Predictor(fit_costs(samples_of(drawn(40)), CUDA))
    for workload in drawn(20, seed=8):
        plan, call = workload.plan(CUDA), workload.call(CUDA)
        found = predictor.estimate("sdpa", plan, call)
        assert found is not None
        assert found.peak_bytes == pytest.approx(memory(workload), rel=0.05)
        assert found.error == 2e-3
        without = unmeasured.estimate("sdpa", plan, call)
        assert without is not None
        assert without.peak_bytes is None


def occupied_us(backend: str, workload: Workload) -> float:
    """What half of the work takes four times as long as, where few blocks share it."""
    blocks = workload.batch * workload.kv_heads
    return true_us(backend, workload) * (1.0 + 3.0 / (1.0 + blocks / 64))


def occupied(count: int, seed: int = 0) -> list[Sample]:
    decode = grid.Family("decode", False, ("left",), "bfloat16", 64)
    return [
        Sample(i, w, backend, "ok", 1.0, 0.0, occupied_us(backend, w), 0.01, 5)
        for i, w in enumerate(drawn(count, seed, decode))
        for backend in TRUE
    ]


def median_error(predictor: Predictor) -> float:
    errors = []
    for sample in occupied(60, seed=5):
        plan, call = sample.workload.plan(CUDA), sample.workload.call(CUDA)
        found = predictor.predict(sample.backend, plan, call)
        assert found is not None
        errors.append(abs(found / sample.device_us - 1))
    return float(np.median(errors))


def test_models_bend_where_work_is_not_all_that_counts() -> None:
    costs = fit_costs(occupied(60), CUDA)
    assert all(len(cost.bend) == BEND_TERMS for cost in costs)
    straight = [cost.model_copy(update={"bend": ()}) for cost in costs]
    assert median_error(Predictor(costs)) < 0.6 * median_error(Predictor(straight))


def test_few_samples_do_not_bend_a_model() -> None:
    assert {cost.bend for cost in fit_costs(occupied(7), CUDA)} == {()}


def test_a_straight_model_is_hardly_bent() -> None:
    for cost in fit_costs(samples_of(drawn(60)), CUDA):
        assert max(map(abs, cost.bend)) < 0.03


def test_no_bend_is_beyond_its_limit_however_far_the_shape() -> None:
    (cost, *_) = fit_costs(occupied(60), CUDA)
    steep = cost.model_copy(update={"bend": (5.0, *cost.bend[1:])})
    flat = cost.model_copy(update={"bend": (-5.0, *cost.bend[1:])})
    far = Workload("decode", False, "left", "bfloat16", 4096, 1, 60_000, 64, 8, 64, 0, 0, 0.5)
    plan, call = far.plan(CUDA), far.call(CUDA)
    us = [
        Predictor([one]).predict(cost.backend, plan, call)
        for one in (flat, cost.model_copy(update={"bend": ()}), steep)
    ]
    assert us[1] == pytest.approx(BEND_LIMIT * us[0])
    assert us[2] == pytest.approx(BEND_LIMIT * us[1])


def test_a_bend_has_all_of_its_terms_or_none() -> None:
    (cost, *_) = fit_costs(occupied(60), CUDA)
    with pytest.raises(ValueError, match="terms"):
        Cost.model_validate(cost.model_dump() | {"bend": (0.1, 0.2)})
