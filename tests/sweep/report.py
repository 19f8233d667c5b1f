"""Turns examinations into counts, lists and the printed summary."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .examine import AGREE, BASELINE, DISAGREE, ERROR, REJECTED

# A wrong answer is worse than an error, which says so itself.
SEVERITY = {AGREE: 0, ERROR: 1, DISAGREE: 2}

Examinations = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One architecture in one scenario."""

    architecture: str
    scenario: str
    baseline: Mapping[str, Any]
    tested: Mapping[str, Any]

    @property
    def compared(self) -> bool:
        return self.tested["verdict"] in SEVERITY

    @property
    def beyond_baseline(self) -> bool:
        """Worse than sdpa; where a model does not load with sdpa, worse than eager itself."""
        if not self.compared:
            return False
        allowed = SEVERITY.get(self.baseline["verdict"], SEVERITY[AGREE])
        return SEVERITY[self.tested["verdict"]] > allowed

    @property
    def baseline_fails(self) -> bool:
        return self.baseline["verdict"] in (DISAGREE, ERROR)

    @property
    def better_than_baseline(self) -> bool:
        return self.baseline_fails and self.tested["verdict"] == AGREE


def cells(examinations: Examinations, implementation: str) -> Iterator[Cell]:
    for name, examination in examinations.items():
        for scenario, verdicts in examination["scenarios"].items():
            yield Cell(name, scenario, verdicts[BASELINE], verdicts[implementation])


def versions() -> dict[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "smartattn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            module = sys.modules.get(package)  # on the path without being installed
            if version := getattr(module, "__version__", None):
                found[package] = version
    return found


def summarize(examinations: Examinations, implementation: str) -> dict[str, Any]:
    """The counts and lists that the sweep is run for, ready for JSON."""
    table = list(cells(examinations, implementation))
    built = [e for e in examinations.values() if e["built"]]
    agreeing = [c.tested["figure"] for c in table if c.tested["verdict"] == AGREE]
    return {
        "architectures": len(examinations),
        "built": len(built),
        "call_the_interface": sum(bool(e["interface_calls"]) for e in built),
        "compared": sum(cell.compared for cell in table),
        "per_scenario": dict(Counter(cell.scenario for cell in table if cell.compared)),
        "verdicts": dict(Counter(cell.tested["verdict"] for cell in table)),
        "largest_agreeing_error": max(agreeing, default=None),
        "padding_ignored": [name for name, e in examinations.items() if _ignores_padding(e)],
        "not_built": {name: e["reason"] for name, e in examinations.items() if not e["built"]},
        "rejected_by_baseline": _architectures(
            c for c in table if c.baseline["verdict"] == REJECTED
        ),
        "rejected": _architectures(c for c in table if c.tested["verdict"] == REJECTED),
        "baseline_disagrees": _listing((c for c in table if c.baseline_fails), "baseline"),
        "beyond_baseline": _listing((c for c in table if c.beyond_baseline), "tested"),
        "better_than_baseline": _listing((c for c in table if c.better_than_baseline), "baseline"),
    }


def format_summary(summary: Mapping[str, Any], implementation: str, seconds: float) -> str:
    """The summary as lines for a terminal."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(summary["verdicts"].items()))
    error = summary["largest_agreeing_error"] or 0.0
    lines = [
        f"{summary['built']} of {summary['architectures']} architectures built, "
        f"{summary['call_the_interface']} of them call the attention interface, "
        f"{len(summary['rejected_by_baseline'])} do not load with {BASELINE}",
        f"{summary['compared']} comparisons of {implementation} with eager: {counts}",
        f"largest relative error that counts as agreement: {error:.1e}",
        f"{seconds:.0f} s with " + ", ".join(f"{k} {v}" for k, v in versions().items()),
        "",
        "architectures compared per scenario: "
        + ", ".join(f"{name} {count}" for name, count in summary["per_scenario"].items()),
    ]
    for title, key in (
        ("not built", "not_built"),
        ("refuse every registered name at load", "rejected"),
        (f"{BASELINE} disagrees with eager or raises", "baseline_disagrees"),
        (f"{implementation} agrees with eager where {BASELINE} does not", "better_than_baseline"),
        (f"{implementation} DISAGREES BEYOND {BASELINE}", "beyond_baseline"),
    ):
        entries = summary[key]
        lines += ["", f"{title}: {len(entries)}"]
        if isinstance(entries, Mapping):
            lines += [f"  {name}: {_text(entry)}" for name, entry in entries.items()]
        else:
            lines += [f"  {name}" for name in entries]
    return "\n".join(lines)


def _text(entry: str | Mapping[str, str]) -> str:
    """A reason, or per reason the scenarios that it holds for."""
    if isinstance(entry, str):
        return entry
    by_reason: dict[str, list[str]] = {}
    for scenario, reason in entry.items():
        by_reason.setdefault(reason, []).append(scenario)
    return "".join(f"\n    {', '.join(names)}: {why}" for why, names in by_reason.items())


def _ignores_padding(examination: Mapping[str, Any]) -> bool:
    return examination["padding_matters"] is False


def _architectures(found: Iterable[Cell]) -> list[str]:
    return sorted({cell.architecture for cell in found})


def _listing(found: Iterable[Cell], side: str) -> dict[str, dict[str, str]]:
    """Per architecture and scenario, what is wrong with one side of the comparison."""
    listing: dict[str, dict[str, str]] = {}
    for cell in found:
        verdict = getattr(cell, side)
        listing.setdefault(cell.architecture, {})[cell.scenario] = (
            verdict["reason"] or verdict["verdict"]
        )
    return listing
