"""What one decoding step costs by the number of its thread blocks, for every backend that splits.

Run from the repository's root: ``python -m benchmarks.decode --help``. One query per sequence keeps
only as many thread blocks busy as there are sequences times key/value heads; kernels cut the keys
of a sequence into parts when these are few, each by rules of its own, and pay for waves of blocks
that do not fill a device. The tables show both, as the rate at which real keys and values are read.
With ``--grids`` each kernel's name and grid of blocks are kept, in the JSON. ``--parts`` times
FlashAttention-2 alone, told to cut sequences into every number of parts.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from smartattn.backends import NAMED, flash_attention_2
from smartattn.timing import interleaved
from smartattn.workload import Spread
from smartattn.workload import Workload as Shape

from . import common
from .common import mean_of, number

BACKENDS = ("sdpa", "flash_attention_2", "flash_attention_3")
BLOCKS = (
    *(4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 104, 112, 128, 136),
    *(160, 192, 208, 216, 256, 272, 320, 400, 528),
)
#: Numbers of parts; 0 is the kernel's own rule.
PARTS = (0, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
#: Largest difference of two backends, relative to the largest value.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Workload:
    """A decoding step. ``model`` says what is the same in the rows of a table."""

    shape: Shape

    @property
    def model(self) -> str:
        """All but the number of blocks."""
        s = self.shape
        padding = f"left padding {s.padding_share:.0%} {s.spread}" if s.padding_share else "full"
        return f"{s.heads // s.kv_heads} x {s.head_dim} on {s.kv_len} keys, {padding}"

    @property
    def blocks(self) -> int:
        """Thread blocks that an undivided step has."""
        return self.shape.batch * self.shape.kv_heads

    @property
    def name(self) -> str:
        """As it is printed and asked for."""
        return f"{self.model}, {self.blocks} blocks"


@dataclass
class Result:
    """Microseconds of the device per step, and the bytes of real keys and values."""

    workload: str
    model: str
    blocks: int
    bytes: float
    us: dict[str, float] = field(default_factory=dict)
    #: (name, grid) of each kernel, if asked for.
    kernels: dict[str, list[tuple[str, list[int]]]] = field(default_factory=dict)
    #: Microseconds of FlashAttention-2 by number of parts, "0" for its own rule, if asked for.
    parts: dict[str, float] = field(default_factory=dict)
    #: What smartattn tells it.
    chosen: str = ""

    def rate(self, name: str) -> float | None:
        """Terabytes per second."""
        us = self.us.get(name)
        return self.bytes / us / 1e6 if us else None


def workloads() -> list[Workload]:
    """Heads of every size, caches that are full, padded alike, and padded by all lengths."""
    layouts: tuple[tuple[float, Spread], ...] = ((0.0, "uniform"), (0.5, "same"), (0.5, "uniform"))
    return [
        _workload(blocks, group, head_dim, kv_len, share, spread)
        for group, head_dim, kv_len in (
            *((1, 64, 16384), (1, 80, 16384), (1, 96, 16384), (1, 128, 16384), (1, 256, 8192)),
            *((4, 64, 16384), (4, 128, 16384), (4, 128, 2048), (8, 128, 65536)),
        )
        for share, spread in layouts
        for blocks in BLOCKS
        if blocks * head_dim * kv_len < 2**31
    ]


def part_workloads() -> list[Workload]:
    """Steps of all kinds, few sequences and many."""
    layouts: tuple[tuple[float, Spread], ...] = (
        *((0.0, "uniform"), (0.5, "same"), (0.5, "uniform"), (0.75, "skewed")),
    )
    return [
        _workload(blocks, group, head_dim, kv_len, share, spread)
        for group, head_dim, kv_len in (
            *((4, 128, 16384), (1, 64, 16384), (4, 128, 2048), (1, 80, 8192), (1, 256, 8192)),
            *((8, 128, 4000), (4, 64, 1000)),
        )
        for share, spread in layouts
        for blocks in (8, 16, 32, 64, 72, 112, 136, 216, 256, 320, 528, 1024)
        if blocks * head_dim * kv_len < 2**30
    ]


def tiny_workloads() -> list[Workload]:
    """A few that a CPU can run."""
    return [_workload(blocks, 2, 16, 32, 0.5, "uniform", "float32") for blocks in (2, 4)]


def _workload(
    blocks: int,
    group: int,
    head_dim: int,
    kv_len: int,
    share: float,
    spread: Spread,
    dtype: str = "bfloat16",
) -> Workload:
    kv_heads = 4 if blocks % 4 == 0 else 2
    shape = Shape(
        "decode", True, "left" if share else "none", dtype, blocks // kv_heads, 1, kv_len,
        kv_heads * group, kv_heads, head_dim,
        padding_share=share, spread=spread, memory="concatenated",
    )  # fmt: skip
    return Workload(shape)


def measure(
    workload: Workload,
    model: None,
    device: torch.device,
    rounds: int,
    seconds: float,
    end: float,
    *,
    grids: bool = False,
    parts: bool = False,
) -> Result:
    """Times all backends that take the step, or one of them with all numbers of parts, in turns."""
    shape = workload.shape
    plan, call = shape.plan(device), shape.call(device)
    tensors = shape.tensors(device)
    able = [NAMED[name] for name in BACKENDS if not NAMED[name].refusals(plan, call)]
    steps: dict[str, Callable[[], torch.Tensor]] = {
        backend.name: partial(backend.bind(plan, call), *tensors[:3], {}) for backend in able
    }
    result = Result(
        workload.name,
        workload.model,
        workload.blocks,
        bytes=2.0 * plan.real_k * shape.kv_heads * shape.head_dim * shape.torch_dtype.itemsize,
    )
    with torch.no_grad():
        right = steps["sdpa"]().float()
        if parts:
            result.chosen = str(flash_attention_2._parts(plan, call))
            steps = {}
            for number in dict.fromkeys((*PARTS, int(result.chosen))):
                with mock.patch.object(flash_attention_2, "_parts", return_value=number):
                    bound = NAMED["flash_attention_2"].bind(plan, call)
                steps[str(number)] = partial(bound, *tensors[:3], {})
        for name, step in steps.items():
            error = float((step().float() - right).abs().max() / right.abs().max())
            if not error <= _TOLERANCE:
                raise AssertionError(f"{name} differs by {error:.2g} on {workload.name}")
        times = interleaved(steps, device, max_rounds=rounds, seconds=seconds)
        if grids:
            result.kernels = {name: kernels(step) for name, step in steps.items()}
    took = {name: times[name].device_us for name in steps}
    if parts:
        result.parts = took
    else:
        result.us = took
    return result


def kernels(function: Callable[[], object]) -> list[tuple[str, list[int]]]:
    """(name, grid) of every kernel that a function launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [
        (event["name"], event["args"]["grid"]) for event in events if event.get("cat") == "kernel"
    ]


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    if result.parts:
        own, chosen = result.parts["0"], result.parts[result.chosen]
        best = min(result.parts, key=result.parts.__getitem__)
        return (
            f"{result.blocks}",
            *(f"{us:.1f}" for us in (own, chosen, result.parts[best])),
            *(result.chosen, best, f"{chosen / own:.2f}", f"{chosen / result.parts[best]:.2f}"),
        )
    return (
        f"{result.blocks}",
        *(number(result.us.get(name), ".1f") for name in BACKENDS),
        *(number(result.rate(name), ".2f") for name in BACKENDS),
    )


def table(results: list[Result]) -> str:
    """Markdown, one table per kind of step."""
    header = ("blocks", *(f"{name} us" for name in BACKENDS), *(f"{n} TB/s" for n in BACKENDS))
    if results and results[0].parts:
        header = (
            *("blocks", "own rule us", "chosen us", "best us", "chosen parts", "best parts"),
            *("chosen / own", "chosen / best"),
        )
    tables: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        tables[result.model].append(result)
    text = "\n\n".join(
        f"### {model}\n\n{common.markdown(header, list(map(row, found)))}"
        for model, found in tables.items()
    )
    cut = [result for result in results if result.parts]
    if cut:
        over = [one.parts[one.chosen] / one.parts["0"] for one in cut]
        lost = [one.parts[one.chosen] / min(one.parts.values()) for one in cut]
        text += (
            f"\n\nchosen / own rule: geometric mean {mean_of(over):.3f}, {min(over):.2f} to "
            f"{max(over):.2f}; chosen / best: {mean_of(lost):.3f}, worst {max(lost):.2f}."
        )
    return text


def page(runs: Sequence[Any]) -> list[str]:
    """The parts of the page, in Markdown."""
    name = next((run.versions.get("device") for run in runs), None) or "unknown device"
    parts = [
        f"# Decoding by the number of thread blocks: {name}",
        "Made by `python -m benchmarks.decode`: microseconds of the device per step, and the rate "
        "at which it reads real keys and values. Blocks are sequences x key/value heads.",
        common.described(runs),
    ]
    for run in runs:
        parts += [f"## Times, {run.label}", table(run.results)]
    return parts


def main() -> None:
    """Runs the benchmark, prints its tables and writes what was asked for."""
    parser = common.parser(__doc__, rounds=7, seconds=0.03)
    parser.add_argument("--grids", action="store_true", help="keep each kernel's grid of blocks")
    parser.add_argument("--parts", action="store_true", help="all numbers of parts")
    arguments = parser.parse_args()
    measuring = not arguments.from_json
    if measuring and arguments.grids and not arguments.device.startswith("cuda"):
        parser.error("--grids needs a GPU")
    if measuring and arguments.parts and NAMED["flash_attention_2"].unavailable():
        parser.error("--parts needs flash-attn")
    whole = part_workloads() if arguments.parts else workloads()
    grid = tiny_workloads() if arguments.tiny else whole
    step = partial(measure, grids=arguments.grids, parts=arguments.parts)
    runs = common.runs_of(arguments, Result, grid, lambda *_: None, step, row, table)
    if arguments.page:
        common.write(arguments.page, page(runs))


if __name__ == "__main__":
    main()
