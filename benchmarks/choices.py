"""Whole models under every backend: is the one that ``smart`` chooses the best, or close to it?

Run from the repository's root: ``python -m benchmarks.choices --help``. Beside what ``smart``
chooses, every round runs ``smart`` held to one backend after the other. Models from a few tokens,
whose layers wait for the host, to many, whose layers wait for the device. Wall times with the
device synchronised before and after; compare ratios within one run.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import smartattn
from smartattn.backends import BACKENDS

from . import common
from .common import FEWEST_ROUNDS, number, timed
from .models import Workload, build, task

CHOSEN = "smart"
#: What counts as equal to the best.
CLOSE = 1.03
#: Seconds and calls that every way runs before the rounds: kernels of this shape are built then.
WARM_UP, FEWEST_WARM_UPS = 0.3, 3


def workloads() -> Iterator[Workload]:
    """From bound by the host to bound by the device; names say what is padded."""
    for batch, length, padding in (
        *((1, 32, 0.0), (1, 512, 0.0), (8, 64, 0.5), (8, 128, 0.5), (32, 128, 0.0)),
        *((32, 128, 0.5), (32, 512, 0.5), (128, 512, 0.0), (128, 512, 0.25), (128, 512, 0.75)),
    ):
        yield Workload("bert-large", "forward", batch, length, padding)
    for batch, length, padding in (
        *((1, 32, 0.0), (8, 64, 0.5), (1, 1024, 0.0), (8, 256, 0.25), (8, 1024, 0.0)),
        *((8, 1024, 0.6), (8, 4096, 0.0), (8, 4096, 0.25), (1, 32768, 0.0)),
    ):
        yield Workload("llama-1b", "prefill", batch, length, padding, "left")
    for batch, length, padding in ((1, 512, 0.0), (8, 512, 0.5), (1, 16384, 0.0), (32, 2048, 0.5)):
        yield Workload("llama-1b", "generate", batch, length, padding, "left", new_tokens=8)
    for batch, length, padding in ((2, 128, 0.5), (8, 512, 0.5), (8, 2048, 0.5), (2, 16384, 0.05)):
        yield Workload("llama-1b", "train", batch, length, padding)


def tiny_workloads() -> Iterator[Workload]:
    """The same kinds on models that a CPU can run, to test the benchmark itself."""
    yield Workload("tiny-bert", "forward", 4, 64, 0.5)
    yield Workload("tiny-llama", "generate", 2, 32, 0.5, "left", new_tokens=4)


@dataclass
class Result:
    """Milliseconds per call (median and interquartile range) of ``smart`` and of each backend."""

    workload: str
    median_ms: dict[str, float] = field(default_factory=dict)
    spread_ms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    chosen: str = ""
    #: What the profile says that the layers wait for.
    bottleneck: str = ""

    @property
    def best(self) -> str | None:
        """The fastest backend."""
        held = {name: ms for name, ms in self.median_ms.items() if name != CHOSEN}
        return min(held, key=lambda name: held[name], default=None)

    @property
    def ratio(self) -> float | None:
        """Time of ``smart`` divided by that of the fastest backend."""
        best, ours = self.best, self.median_ms.get(CHOSEN)
        return ours / self.median_ms[best] if best is not None and ours is not None else None


def measure(
    workload: Workload,
    model: Any,
    device: torch.device,
    rounds: int,
    seconds: float,
    end: float = math.inf,
) -> Result:
    """Interleaved rounds of all ways on one workload; see :func:`benchmarks.models.measure`."""
    result = Result(workload.name)
    model.set_attn_implementation("smart")
    run, _ = task(workload, model, device, rounds + 1)
    times: dict[str, list[float]] = {}
    for name in (CHOSEN, *held_backends(device)):
        try:
            with _held_to(name), smartattn.trace() as trace:
                timed(lambda: run(0), device)
                _warm_up(run, device)
        except (smartattn.UnsupportedCallError, torch.cuda.OutOfMemoryError) as error:
            result.refused[name] = str(error)[:200]
            continue
        times[name] = []
        if name == CHOSEN:
            result.chosen = ", ".join(sorted({row.backend for row in trace.rows}))
            waits = {row.bottleneck for row in trace.rows if row.bottleneck}
            result.bottleneck = " and ".join(sorted(waits))
    end = min(end, time.perf_counter() + seconds)
    order, shuffle = list(times), random.Random(0)
    for number_ in range(1, rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            with _held_to(name):
                times[name].append(timed(lambda: run(number_), device)[0])  # noqa: B023
        if number_ >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
    for name, values_ms in times.items():
        result.median_ms[name], result.spread_ms[name] = common.middle(values_ms)
    return result


def held_backends(device: torch.device) -> list[str]:
    """The backends that a model is held to, one after the other."""
    names = [backend.name for backend in BACKENDS if not backend.last_resort]
    if device.type == "cuda":
        # cuDNN would build kernels for every length of a batch, for seconds.
        names.remove("sdpa_unpadded")
    return names


def _held_to(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name == CHOSEN else smartattn.use(backends=[name])


def _warm_up(run: Callable[[int], Any], device: torch.device) -> None:
    start, calls = time.perf_counter(), 0
    while calls < FEWEST_WARM_UPS or time.perf_counter() - start < WARM_UP:
        ms, _ = timed(lambda: run(0), device)
        calls += 1
        if ms > 1000 * WARM_UP:
            break


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    held = (number(result.median_ms.get(b.name), ".2f") for b in BACKENDS if not b.last_resort)
    return (
        result.workload,
        result.bottleneck,
        number(result.median_ms.get(CHOSEN), ".2f"),
        *held,
        number(result.ratio, ".3f"),
        result.chosen,
    )


def table(results: list[Result]) -> str:
    """Markdown, one row per workload, and how many are close to the best."""
    names = [b.name for b in BACKENDS if not b.last_resort]
    header = ("workload", "waits for", "smart ms", *names, "smart / best", "chosen")
    text = common.markdown(header, map(row, results))
    ratios = [r.ratio for r in results if r.ratio is not None]
    if ratios:
        close = sum(ratio <= CLOSE for ratio in ratios)
        text += (
            f"\n\nAt most {CLOSE - 1:.0%} slower than the best backend: {close} of {len(ratios)} "
            f"workloads; mean {common.mean_of(ratios):.3f}, worst {max(ratios):.3f}."
        )
    return text


def main() -> None:
    """Runs the benchmark, prints its table and writes what was asked for."""
    arguments = common.parser(__doc__, rounds=9, seconds=2.0).parse_args()
    grid = tiny_workloads() if arguments.tiny else workloads()
    runs = common.runs_of(arguments, Result, grid, build, measure, row, table)
    if arguments.page:
        parts = ["# Every backend under whole models", __doc__ or "", common.described(runs)]
        for run in runs:
            parts += [f"## {run.label.capitalize()}", table(run.results)]
        expected = [workload.name for workload in workloads()]
        common.write(arguments.page, [*parts, common.left_out(runs, expected)])


if __name__ == "__main__":
    main()
