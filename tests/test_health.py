"""What is noticed of a device that is busy, shared or throttling."""

from __future__ import annotations

import time

import pytest
import torch

from smartattn.health import Watch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def watched(kernel: list[float], clock: list[float] | None = None) -> Watch:
    return Watch(CPU, kernel=kernel, clock=clock or [])


def test_a_steady_device_gives_no_cause_for_complaint() -> None:
    steady = [1.0, 1.02, 1.01, 1.0, 1.03, 1.02, 1.01, 1.0]
    assert watched(steady, [1980.0] * 8).complaints() == []
    # One look that coincides with something else is none either.
    assert watched([*steady, 3.0, *steady]).complaints() == []


@pytest.mark.parametrize(
    ("kernel", "clock", "says"),
    [
        ([1.0] * 4 + [1.2] * 4, [], "20% longer in the end"),
        ([1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0, 1.0, 1.0], [], "took 50% longer"),
        ([], [1980.0] * 5 + [1400.0] * 3, "clock fell by 29%"),
    ],
)
def test_throttling_and_other_work_are_said(
    kernel: list[float], clock: list[float], says: str
) -> None:
    (complaint,) = watched(kernel, clock).complaints()
    assert says in complaint


def test_few_looks_say_nothing() -> None:
    assert watched([1.0, 2.0, 2.0]).complaints() == []


def test_looks_are_rare_and_take_the_time_of_a_kernel() -> None:
    clock = iter([100.0, 100.0, 101.0, 103.0, 103.0])
    watch = Watch(CPU, now=lambda: next(clock))
    for _ in range(3):
        watch.tick()
    assert len(watch.kernel) == 2
    assert all(0 < seconds < 1 for seconds in watch.kernel)


def test_a_gpu_that_others_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 83)
    watch = Watch(CUDA)
    watch.begin()
    assert watch.complaints() == ["other work used 83% of the device before the run"]


def test_a_driver_that_says_nothing_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", fails)
    watch = Watch(CUDA)
    watch.begin()
    assert watch.busy is None
    assert watch.complaints() == []


def test_looking_costs_little() -> None:
    watch = Watch(CPU)
    watch.tick()
    start = time.perf_counter()
    for _ in range(1000):
        watch.tick()
    assert time.perf_counter() - start < 0.5
    assert len(watch.kernel) == 1
