"""What the benchmarks share: command line, time limit, timing, versions, JSON and tables."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers

import smartattn

from . import HIDDEN

T = TypeVar("T")

#: Rounds that are measured however long they take.
FEWEST_ROUNDS = 3
#: Optional packages: distribution, and the module that ``--hide`` would name.
OPTIONAL = (
    ("flash-attn", "flash_attn"),
    ("fa3-fwd", "fa3_fwd_interface"),
    ("flash-attn-4", "flash_attn.cute"),
)


# -- command line ----------------------------------------------------------------------------------


def parser(description: str | None, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have, with the defaults of one."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--only", action="append", help="workloads by name, * is a wildcard")
    made.add_argument("--skip", action="append", help="workloads to leave out, likewise")
    made.add_argument(
        "--hide", action="append", metavar="PACKAGE", help="run as if it were not installed"
    )
    made.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    made.add_argument("--rounds", type=int, default=rounds, help="at most, per workload")
    made.add_argument("--seconds", type=float, default=seconds, help="per workload, once warm")
    made.add_argument("--budget", type=float, help="seconds for all: what is left is not run")
    made.add_argument("--json", type=Path, help="where to write the figures")
    made.add_argument("--page", type=Path, help="where to write a page of them, Markdown")
    made.add_argument(
        "--from-json", type=Path, nargs="+", metavar="FILE", help="show these, measure nothing"
    )
    return made


def selected(
    workloads: Iterable[T], only: Sequence[str] | None, skip: Sequence[str] | None
) -> list[T]:
    """The workloads that ``--only`` and ``--skip`` leave, in their order."""

    def matches(workload: Any, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(workload.name, pattern) for pattern in patterns)

    return [
        workload
        for workload in workloads
        if (not only or matches(workload, only)) and not matches(workload, skip or ())
    ]


# -- time ------------------------------------------------------------------------------------------


class Budget:
    """The time that a whole benchmark may take; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.perf_counter() + seconds

    @property
    def spent(self) -> bool:
        """Nothing further is to be started."""
        return time.perf_counter() >= self.end


def synchronize(device: torch.device) -> None:
    """Waits until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """(milliseconds, what it returned) of a call, with the device done before and after."""
    synchronize(device)
    start = time.perf_counter()
    output = call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3, output


def middle(times: Sequence[float]) -> tuple[float, float]:
    """(median, interquartile range); the range is 0 for fewer than three."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 2 else (0.0, 0.0, 0.0)
    return statistics.median(times), quartiles[2] - quartiles[0]


def reset_peak(device: torch.device) -> None:
    """Begins to look for the peak of the memory that tensors hold."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float | None:
    """The peak since then in MiB, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


# -- runs ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The results of one benchmark with one set of packages."""

    versions: dict[str, Any]
    results: list[Any] = field(default_factory=list)
    #: Names of workloads for which the time limit left no time.
    not_run: list[str] = field(default_factory=list)
    #: Figures that belong to no workload.
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Which flash packages it had."""
        if self.versions.get("fa3-fwd"):
            return "with FlashAttention-3"
        return "flash-attn alone" if self.versions.get("flash-attn") else "without flash-attn"


def versions(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "smartattn": smartattn.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cudnn"] = torch.backends.cudnn.version()
    for distribution, module in OPTIONAL:
        try:
            there = importlib.util.find_spec(module) is not None
        except ImportError:
            # The package around it is hidden, absent or broken.
            there = False
        try:
            found[distribution] = metadata.version(distribution) if there else None
        except metadata.PackageNotFoundError:
            found[distribution] = None
    found["hidden"] = sorted(HIDDEN)
    return found


def measured(
    chosen: Sequence[Any],
    build: Callable[[str], Any],
    measure: Callable[[Any, Any], Any],
    show: Callable[[Any], str],
    *,
    device: torch.device,
    budget: Budget,
    json_file: Path | None,
    extra: dict[str, Any] | None = None,
) -> Run:
    """Runs workloads model by model, prints a line of each, and saves after each.

    Args:
        chosen: workloads, with a ``name`` and a ``model``.
        build: a model by its name.
        measure: the result of a workload with its model.
        show: the line of a result.
        extra: figures that belong to no workload.
    """
    run = Run(versions(device), not_run=[w.name for w in chosen], extra=extra or {})
    for model_name in dict.fromkeys(workload.model for workload in chosen):
        if budget.spent:
            break
        model = build(model_name)
        for workload in (w for w in chosen if w.model == model_name):
            if budget.spent:
                break
            run.results.append(measure(workload, model))
            run.not_run.remove(workload.name)
            print(show(run.results[-1]), flush=True)
            if json_file is not None:
                save(json_file, run)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if run.not_run:
        print(f"not run, the time was over: {', '.join(run.not_run)}", flush=True)
    if json_file is not None:
        save(json_file, run)
    return run


def runs_of(
    arguments: argparse.Namespace,
    kind: type[Any],
    grid: Iterable[Any],
    build: Callable[..., Any],
    measure: Callable[..., Any],
    row: Callable[[Any], Sequence[str]],
    table: Callable[[list[Any]], str],
) -> list[Run]:
    """The runs that the command line asks for, measured or read, with their tables printed.

    Args:
        kind: the dataclass of a result.
        build: a model by name, device and dtype.
        measure: the result of (workload, model, device, rounds, seconds), which takes ``end``, of
            ``time.perf_counter()``, as well.
        row: the cells of a result.
        table: all results of a run.
    """
    if arguments.from_json:
        runs = load(arguments.from_json, kind)
    else:
        device = torch.device(arguments.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        budget = Budget(arguments.budget)
        asked = (device, arguments.rounds, arguments.seconds)
        runs = [
            measured(
                selected(grid, arguments.only, arguments.skip),
                lambda name: build(name, device, dtype),
                lambda workload, model: measure(workload, model, *asked, end=budget.end),
                lambda result: f"| {' | '.join(row(result))} |",
                device=device,
                budget=budget,
                json_file=arguments.json,
            )
        ]
    for run in runs:
        print(f"\n{run.label}\n\n{table(run.results)}")
    return runs


def save(path: Path, run: Run) -> None:
    """Writes a run as JSON."""
    document = {
        "versions": run.versions,
        "results": [asdict(result) for result in run.results],
        "not_run": run.not_run,
        "extra": run.extra,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def load(paths: Sequence[Path], kind: type[Any]) -> list[Run]:
    """Runs from JSON; files with the same packages make one run, later files replacing results.

    Args:
        kind: the dataclass of a result, which has a ``workload``.

    Raises:
        OSError, ValueError: a file cannot be read, or is none of this benchmark.
    """
    runs: dict[str, Run] = {}
    known = {one.name for one in fields(kind)}
    for path in paths:
        document = json.loads(path.read_text())
        try:
            results = [
                kind(**{k: v for k, v in row.items() if k in known}) for row in document["results"]
            ]
            skipped, extra = document.get("not_run", []), document.get("extra", {})
            read = Run(document["versions"], results, skipped, extra)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not of this benchmark: {error!r}") from None
        run = runs.setdefault(read.label, Run(read.versions))
        together = {result.workload: result for result in [*run.results, *read.results]}
        run.results = list(together.values())
        run.extra |= read.extra
        left = dict.fromkeys([*run.not_run, *read.not_run])
        run.not_run = [name for name in left if name not in together]
    return list(runs.values())


# -- pages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A figure that is wanted of a run, and what was measured."""

    what: str
    run: str
    wanted: str
    measured: str
    verdict: Literal["reached", "missed", "incomplete", "not run"]


def judged(
    what: str,
    run: Run,
    value: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    missing: int = 0,
    note: str = "",
) -> Judged:
    """One row of :func:`judgements`.

    Args:
        value: None if nothing was measured.
        at_least, at_most: the wanted bound; give one.
        missing: workloads that belong to the figure and were not measured: then it is never
            "reached".
    """
    if at_least is not None:
        bound, sign, reached = at_least, "≥", value is not None and value >= at_least
    else:
        assert at_most is not None
        bound, sign, reached = at_most, "≤", value is not None and value <= at_most
    wanted = f"{sign} {bound:g}"
    if value is None:
        return Judged(what, run.label, wanted, "-", "not run")
    shown = f"{value:.3f}{f', {note}' if note else ''}"
    if missing:
        shown += f"; {missing} workload{'s' * (missing > 1)} not measured"
    if not reached:
        return Judged(what, run.label, wanted, shown, "missed")
    return Judged(what, run.label, wanted, shown, "incomplete" if missing else "reached")


def judgements(rows: Sequence[Judged]) -> str:
    """A Markdown table of wanted and measured figures."""
    return markdown(
        ("figure", "run", "wanted", "measured", "verdict"),
        [
            (
                row.what,
                row.run,
                row.wanted,
                row.measured,
                row.verdict if row.verdict == "reached" else f"**{row.verdict}**",
            )
            for row in rows
        ],
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def number(value: float | None, form: str) -> str:
    """A number, or ``-`` for None."""
    return "-" if value is None else format(value, form)


def mean_of(ratios: Sequence[float]) -> float | None:
    """The geometric mean, None of nothing."""
    return statistics.geometric_mean(ratios) if ratios else None


def described(runs: Sequence[Run]) -> str:
    """The versions of runs, a list item each."""
    items = []
    for run in runs:
        facts = [
            f"{name} {', '.join(value) if isinstance(value, list) else value}"
            for name, value in run.versions.items()
            if value
        ]
        items.append(f"- {run.label}: {', '.join(facts)}")
    return "\n".join(items)


def left_out(runs: Sequence[Run], expected: Sequence[str]) -> str:
    """What of the benchmark is not in a run, and why; nothing if all is there."""
    items = []
    for run in runs:
        there = {result.workload for result in run.results}
        absent = [name for name in expected if name not in there and name not in run.not_run]
        if run.not_run:
            items.append(f"- {run.label}: the time was over before {_listed(run.not_run)}.")
        if absent:
            items.append(f"- {run.label}: not asked for: {_listed(absent)}.")
    return "\n".join(["## Not run", "", *items]) if items else ""


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} workload{'s' * (len(names) > 1)}: {', '.join(names)}"


def write(path: Path, parts: Iterable[str]) -> None:
    """Writes the parts of a page, one blank line between them."""
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
