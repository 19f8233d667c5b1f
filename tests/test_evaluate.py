"""Regret: what it is of choices that are right, wrong, or cannot be made."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from smartattn import grid
from smartattn.backends import NAMED
from smartattn.cost import LAYERS
from smartattn.evaluate import Regret, always, by_mode, by_profile, cross_validated, judge, timings
from smartattn.features import FEATURES, Kernel, features
from smartattn.fit import fit_costs
from smartattn.profile import Profile
from smartattn.profiles import default_rules
from smartattn.samples import Sample
from smartattn.workload import Workload

CUDA = torch.device("cuda")
RULES = Profile(name="rules", rules=default_rules())


def sample(workload: Workload, backend: str, us: float, **more: float) -> Sample:
    return Sample(0, workload, backend, "ok", host_us=1.0, device_us=us, rounds=3, **more)  # type: ignore[arg-type]


def padded(length: int) -> Workload:
    return Workload("forward", True, "left", "bfloat16", 4, length, length, 8, 8, 64, 0, 0, 0.5)


def drawn(count: int) -> list[Sample]:
    """A backend that walks all pairs, and one that walks the real ones but starts later."""
    family = grid.Family("forward", True, ("left",), "bfloat16", 64)
    found = []
    for workload in islice(
        grid.workloads([family], grid.limits("cuda", "quick", 10**11), 0), count
    ):
        plan, call = workload.plan(CUDA), workload.call(CUDA)
        for backend, start, pairs in (
            ("sdpa", 20, "padded_tiles"),
            ("flash_attention_2", 90, "real_tiles"),
        ):
            work = features(plan, call, Kernel.of(NAMED[backend], plan, call, slots=0))
            amounts = dict(zip(FEATURES, work, strict=True))
            found.append(sample(workload, backend, start + 3 * amounts[pairs]))
    return found


def test_regret_is_the_time_of_the_chosen_over_that_of_the_best() -> None:
    short, long = padded(128), padded(4096)
    samples = [
        sample(short, "sdpa", 10.0),
        sample(short, "flash_attention_2", 20.0),
        sample(long, "sdpa", 90.0),
        sample(long, "flash_attention_2", 30.0),
    ]
    assert [one.regret for one in judge(samples, always("sdpa"), CUDA)] == [1.0, 3.0]
    assert [one.best for one in judge(samples, always("sdpa"), CUDA)] == [
        "sdpa",
        "flash_attention_2",
    ]
    flash = Regret.of(judge(samples, always("flash_attention_2"), CUDA))
    assert flash == Regret(2, 1.5, pytest.approx(1.95), 2.0)
    # The built-in rules are right about both.
    assert Regret.of(judge(samples, by_profile(RULES), CUDA)) == Regret(2, 1.0, 1.0, 1.0)
    assert {
        mode: len(found) for mode, found in by_mode(judge(samples, always("sdpa"), CUDA)).items()
    } == {"forward": 2}


def test_preparation_counts_once_per_forward() -> None:
    work = padded(128)
    samples = [
        sample(work, "sdpa", 30.0),
        sample(work, "sdpa_unpadded", 20.0, prepare_us=20.0 * LAYERS),
    ]
    assert timings(samples, torch.device("cpu"))[work] == {"sdpa": 30.0, "sdpa_unpadded": 40.0}


def test_workloads_without_a_choice_are_left_out() -> None:
    one, other = padded(128), padded(256)
    samples = [
        sample(one, "sdpa", 10.0),
        sample(other, "torch_varlen", 10.0),
        sample(other, "sdpa_unpadded", 10.0),
    ]
    assert Regret.of(judge(samples, always("sdpa"), CUDA)) is None
    assert [found.chosen for found in judge(samples, always("sdpa", "torch_varlen"), CUDA)] == [
        "torch_varlen"
    ]


def test_left_out_workloads_are_judged_by_the_others() -> None:
    samples = drawn(30)
    judged = cross_validated(samples, RULES, CUDA, folds=5)
    found = Regret.of(judged)
    assert found is not None
    assert found.calls == 30
    assert found.mean < 1.02
    assert {one.best for one in judged} == {"sdpa", "flash_attention_2"}
    # It is the fit that is judged: with timings that follow no law the choices are bad.
    fitted = Profile(name="fitted", costs=tuple(fit_costs(samples, CUDA)))
    assert Regret.of(judge(samples, by_profile(fitted), CUDA)).mean < 1.02  # type: ignore[union-attr]
    swapped = {"sdpa": "flash_attention_2", "flash_attention_2": "sdpa"}
    wrong = [
        Sample(s.index, s.workload, swapped[s.backend], "ok", 1.0, 0.0, s.device_us)
        for s in samples
    ]
    assert Regret.of(judge(wrong, by_profile(fitted), CUDA)).mean > 1.2  # type: ignore[union-attr]
