"""What the examples share: timing in interleaved rounds, and how results and choices print."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from smartattn import Trace, TraceRow

#: As wide as the terminal; wide enough for the tables where the output goes to a file.
console = Console(width=None if Console().is_terminal else 120, highlight=False)


@dataclass(frozen=True)
class Result:
    """One model on one device: did "smart" agree with the reference, and what did it cost."""

    workload: str
    device: torch.device
    dtype: torch.dtype
    #: What was compared and how it came out, in words; empty where nothing was.
    agreement: str
    agrees: bool
    #: Median seconds by attention implementation.
    seconds: dict[str, float]
    trace: Trace


def pick_device() -> torch.device:
    """CUDA where there is one, otherwise the CPU; float32 means float32 (no TF32)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_rounds() -> int | None:
    """The only option of the examples: ``--rounds``, how often each implementation is timed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="timed rounds per implementation")
    rounds: int | None = parser.parse_args().rounds
    return rounds


def interleaved(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: bool = True,
) -> dict[str, float]:
    """Median seconds of each callable.

    Every round runs all of them, so that whatever else the machine does meets all alike. With
    ``warm_up`` there is one round more, which does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + warm_up):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ or not warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def results_table(results: Iterable[Result]) -> Table:
    """Agreement and times, one line per result."""
    table = Table(title="smart against sdpa, medians of interleaved rounds", title_justify="left")
    for column in ("workload", "device", "dtype", "against eager"):
        table.add_column(column, overflow="fold")
    for column in ("sdpa ms", "smart ms", "sdpa / smart"):
        table.add_column(column, justify="right", overflow="fold")
    for result in results:
        sdpa, smart = result.seconds["sdpa"], result.seconds["smart"]
        table.add_row(
            result.workload,
            result.device.type,
            str(result.dtype).removeprefix("torch."),
            result.agreement or "-",
            f"{sdpa * 1e3:.1f}",
            f"{smart * 1e3:.1f}",
            f"{sdpa / smart:.2f}",
        )
    return table


def choices_table(results: Iterable[Result]) -> Table:
    """What "smart" chose.

    ``print(trace)`` has a line per key length; here the steps of a generation share one, and the
    reason stops before its source or its prediction.
    """
    table = Table(title="what smart chose", title_justify="left")
    for column in ("workload", "call"):
        table.add_column(column, overflow="fold")
    # Names stay in one piece where there is room for it, and are whole everywhere.
    table.add_column("backend", overflow="fold", no_wrap=console.width >= 80)
    table.add_column("calls", justify="right", overflow="fold")
    table.add_column("why", overflow="fold")
    for result in results:
        groups: dict[tuple[object, ...], list[TraceRow]] = {}
        for row in result.trace.rows:
            facts = row.facts
            same = (facts["q_len"], facts["pattern"], facts["padding"], row.backend, _why(row))
            groups.setdefault(same, []).append(row)
        for (queries, pattern, padding, backend, why), rows in groups.items():
            share = _span([row.facts.get("padding_share", 0.0) for row in rows], "{:.0%}")
            where = "no padding" if padding == "none" else f"{padding} padding {share}"
            keys = _span([row.facts["kv_len"] for row in rows], "{}")
            table.add_row(
                f"{result.workload}, {rows[0].dtype}",
                f"{rows[0].facts['batch']} x {queries} on {keys} keys, {pattern}, {where}",
                str(backend),
                str(sum(row.calls for row in rows)),
                str(why),
            )
    return table


def _why(row: TraceRow) -> str:
    return row.reason.split(":")[0]


def _span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"
