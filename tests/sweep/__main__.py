"""Command line of the architecture sweep: `python -m tests.sweep --help`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .architectures import Architecture, choose
from .examine import BASELINE, ERROR, Examination, Verdict, examine, prepare_worker, register
from .pool import run_jobs
from .report import format_summary, summarize, versions
from .scenarios import SCENARIOS


def main() -> int:
    options = parse_arguments()
    register(options.implementation)  # fails here once rather than in every worker
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the workers, which inherit it before they import
    architectures = choose(options.architectures, options.sample)
    started = time.perf_counter()
    examinations = sweep(architectures, options)
    seconds = time.perf_counter() - started
    summary = summarize(examinations, options.implementation)
    print(format_summary(summary, options.implementation, seconds))
    if options.json:
        content = {
            "implementation": options.implementation,
            "versions": versions(),
            "tolerances": {name: SCENARIOS[name].tolerance for name in options.scenarios},
            "seconds": round(seconds, 1),
            "summary": summary,
            "architectures": examinations,
        }
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 1 if summary["beyond_baseline"] or not summary["compared"] else 0


def sweep(
    architectures: Sequence[Architecture], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The examination of every architecture, by name.

    One that takes its worker down is examined again under sdpa alone: if that works, the tested
    implementation is to blame, in every scenario.
    """
    examinations: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for architecture, answer, failure in _examine_all(
        architectures, options, options.implementation
    ):
        _show_progress(len(examinations) + len(failures) + 1, len(architectures), architecture)
        if failure:
            failures[architecture.name] = failure
        else:
            examinations[architecture.name] = answer
    fallen = [architecture for architecture in architectures if architecture.name in failures]
    for architecture, answer, failure in _examine_all(fallen, options, BASELINE):
        name = architecture.name
        examinations[name] = answer or asdict(
            Examination(list(architecture.model_types), architecture.kind, reason=failure)
        )
        for verdicts in examinations[name]["scenarios"].values():
            verdicts.setdefault(
                options.implementation, asdict(Verdict(ERROR, reason=failures[name]))
            )
    return dict(sorted(examinations.items()))


def _examine_all(
    architectures: Sequence[Architecture], options: argparse.Namespace, implementation: str
) -> Iterator[tuple[Architecture, Any, str]]:
    return run_jobs(
        architectures,
        functools.partial(examine, implementation=implementation, scenarios=options.scenarios),
        prepare=functools.partial(prepare_worker, implementation),
        workers=options.jobs,
        timeout=options.timeout,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument(
        "--implementation", default="smart", help="the one under test (default: %(default)s)"
    )
    parser.add_argument(
        "--architectures", type=_names, default=[], help="class names or model types, with commas"
    )
    parser.add_argument(
        "--scenarios",
        type=_scenario_names,
        default=list(SCENARIOS),
        help=f"with commas, from: {', '.join(SCENARIOS)}",
    )
    parser.add_argument("--sample", type=int, help="only this many architectures, evenly spread")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="seconds per architecture (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _scenario_names(text: str) -> list[str]:
    names = _names(text)
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such scenario: {', '.join(unknown)}")
    return names


def _show_progress(done: int, total: int, architecture: Architecture) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\033[K{done}/{total} {architecture.name}", end=end, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
