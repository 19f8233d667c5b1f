"""Runs all tests that need a GPU and writes a report: ``python -m tests.gpu_report [--out DIR]``.

The report is ``gpu.md`` for people and ``gpu.json`` for programs. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

import smartattn

from . import gpu_results

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """The GPUs and the versions of everything that may change a figure."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    facts: dict[str, Any] = {"date": today.isoformat()}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = ", ".join(f"{n} x {name}" for name, n in collections.Counter(names).items())
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    facts["python"] = sys.version.split()[0]
    facts["smartattn"] = f"{smartattn.__version__}, source {source_digest()}"
    modules = {
        "flash-attn": "flash_attn",
        "fa3-fwd": "fa3_fwd_interface",
        "flash-attn-4": "flash_attn.cute",
    }
    for package in ("torch", "transformers", *modules, "accelerate", "triton"):
        # What benchmarks.everything hides has a version, and cannot be imported.
        try:
            there = importlib.util.find_spec(modules.get(package, package)) is not None
        except ImportError:
            there = False
        try:
            facts[package] = importlib.metadata.version(package) if there else None
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def source_digest() -> str:
    """Which code was tested: a digest of the package's sources and profiles."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("src/smartattn/**/*.py"), *ROOT.glob("calibration/profiles/*.json")]
    for file in sorted(files):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip()


def run_tests(folder: Path, extra: list[str]) -> tuple[int, dict[str, Any]]:
    """Runs pytest; returns its status and the counts, failures and reasons of skips."""
    matrix = str(ROOT / "tests" / "test_backends_matrix.py")
    # What is measured runs alone on the device; the many small cases share it.
    first, found = _run_pytest(folder, [str(ROOT / "tests"), f"--ignore={matrix}", *extra])
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    second, cases = _run_pytest(folder, [matrix, *parallel, *extra])
    return first or second, merged(found, cases)


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The summaries of two runs as one."""
    if not first or not second:
        return first or second
    counts = collections.Counter(first["counts"]) + collections.Counter(second["counts"])
    return {
        "counts": dict(counts),
        "seconds": round(first["seconds"] + second["seconds"], 1),
        **{k: {**first[k], **second[k]} for k in ("functions", "failures")},
        "skips": dict(collections.Counter(first["skips"]) + collections.Counter(second["skips"])),
    }


def _run_pytest(folder: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    log = folder / "junit.xml"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={log}", "--tb=short", *arguments]
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    status = subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            gpu_results.FOLDER: str(folder),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        },
    ).returncode
    return status, read_junit(log) if log.exists() else {}


def read_junit(log: Path) -> dict[str, Any]:
    """Counts per test function, failures with their first line, reasons of skips."""
    functions: dict[str, collections.Counter[str]] = {}
    failures: dict[str, str] = {}
    skips: collections.Counter[str] = collections.Counter()
    seconds = 0.0
    for case in ElementTree.parse(log).getroot().iter("testcase"):
        outcome, message = "passed", ""
        for kind in ("failure", "error", "skipped"):
            if (found := case.find(kind)) is not None:
                outcome = "skipped" if kind == "skipped" else "failed"
                message = "".join((found.get("message") or "").splitlines()[:1])
        name = str(case.get("name"))
        module = str(case.get("classname")).rpartition(".")[2]
        function = f"{module}::{name.partition('[')[0]}"
        functions.setdefault(function, collections.Counter())[outcome] += 1
        if outcome == "failed":
            failures[f"{module}::{name}"] = message
        if outcome == "skipped":
            skips[message] += 1
        seconds += float(case.get("time") or 0.0)
    total = sum(functions.values(), collections.Counter())
    return {
        "counts": dict(total),
        "seconds": round(seconds, 1),
        "functions": {name: dict(counts) for name, counts in sorted(functions.items())},
        "failures": failures,
        "skips": dict(skips),
    }


def distribution(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Worst, 99th percentile and median per backend, dtype and direction, beside sdpa's own.

    sdpa is judged on the very cases that the other backend ran.
    """
    of_sdpa = {(e["case"], e["what"]): e["error"] for e in errors if e["backend"] == "sdpa"}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in errors:
        direction = "forward" if entry["what"] == "output" else "backward"
        groups.setdefault((entry["backend"], entry["dtype"], direction), []).append(entry)
    rows = []
    for (backend, dtype, direction), entries in sorted(groups.items()):
        same = [of_sdpa[key] for e in entries if (key := (e["case"], e["what"])) in of_sdpa]
        rows.append(
            {
                "backend": backend,
                "dtype": dtype,
                "direction": direction,
                "cases": len({e["case"] for e in entries}),
                **_spread([e["error"] for e in entries]),
                "sdpa_on_the_same": _spread(same) if same else None,
                "worst_case": max(entries, key=lambda e: e["error"])["case"],
            }
        )
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "worst": ordered[-1],
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "median": statistics.median(ordered),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    tests, results = report["tests"], report["results"]
    lines = ["# Tests on a GPU", ""]
    lines += ["Written by `python -m tests.gpu_report`.", ""]
    lines += ["| | |", "| --- | --- |"]
    for name, value in report["environment"].items():
        lines.append(f"| {name} | {'not installed' if value is None else value} |")
    counts = ", ".join(f"{n} {outcome}" for outcome, n in tests.get("counts", {}).items())
    lines += ["", f"**{counts or 'no test ran'}** in {tests.get('seconds', 0)} s.", ""]
    if tests.get("failures"):
        lines += ["## Failures", ""]
        for name, message in list(tests["failures"].items())[:100]:
            lines.append(f"- `{name}`: {message}")
        lines.append("")
    if tests.get("functions"):
        lines += ["## Tests", "", "| test | passed | failed | skipped |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        for name, found in tests["functions"].items():
            cells = " | ".join(str(found.get(k, 0)) for k in ("passed", "failed", "skipped"))
            lines.append(f"| `{name}` | {cells} |")
        lines.append("")
    if tests.get("skips"):
        lines += ["Skipped: " + "; ".join(f"{r} ({n})" for r, n in tests["skips"].items()), ""]
    if report["distribution"]:
        lines += _distribution_table(report["distribution"])
    lines += _measurements(results)
    return "\n".join(lines).rstrip() + "\n"


def _distribution_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Errors against attention in float64",
        "",
        "Largest |difference| at real tokens divided by the largest |reference|, on the same",
        "rounded inputs; backward: gradients of query, key, value. In brackets: torch's sdpa on",
        "the same cases.",
        "",
        "| backend | dtype | direction | cases | worst | p99 | median |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = []
        for key in ("worst", "p99", "median"):
            own = f"{row[key]:.1e}"
            if row["backend"] != "sdpa" and row["sdpa_on_the_same"]:
                own += f" ({row['sdpa_on_the_same'][key]:.1e})"
            cells.append(own)
        facts = [row["backend"], row["dtype"], row["direction"], str(row["cases"])]
        lines.append("| " + " | ".join([*facts, *cells]) + " |")
    return [*lines, ""]


def _measurements(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if syncs := results.get("syncs"):
        lines += [
            "## Device syncs per forward",
            "",
            "BERT-large shape (24 layers, 1024 wide, 16 heads), 16 x 512 tokens padded right,",
            "bf16; counted by `torch.cuda.set_sync_debug_mode`.",
            "",
            "| implementation | syncs |",
            "| --- | ---: |",
            *(f"| {name} | {found['syncs']} |" for name, found in syncs.items()),
            "",
        ]
    if overhead := results.get("overhead"):
        low, high = overhead["quartiles_us"]
        lines += [
            "## Host time per layer",
            "",
            f"smart {overhead['smart_us']} us, Transformers' `sdpa_attention_forward` "
            f"{overhead['sdpa_us']} us: **{overhead['overhead_us']} us** more "
            f"(quartiles {low} to {high}; unpadded 2 x 16 tokens, 4 heads of 16).",
            "",
        ]
    if memory := results.get("packed_memory"):
        lines += [
            f"## Peak memory of a packed batch: {memory['tokens']} tokens, "
            f"{memory['sequences']} sequences",
            "",
            f"2 layers, 512 wide, 8 heads on 2, bf16; smart ran `{memory['backend']}`.",
            "",
            "| implementation | MiB over the weights |",
            "| --- | ---: |",
            *(
                f"| {name} | {found['peak_mib']} |"
                for name, found in memory.items()
                if isinstance(found, dict)
            ),
            "",
        ]
    if tokens := results.get("tokens"):
        lines += [
            "## SmolLM2-135M-Instruct, 64 prompts of unequal length, 64 greedy tokens",
            "",
            "| dtype | implementation | tokens equal to eager's | prompts equal throughout |",
            "| --- | --- | ---: | ---: |",
        ]
        for dtype, shares in tokens.items():
            for name, share in shares.items():
                lines.append(
                    f"| {dtype} | {name} | {share['equal_tokens']:.2%} "
                    f"| {share['equal_prompts']} of 64 |"
                )
        lines.append("")
    for model in ("minilm", "smollm2"):
        if forward := results.get(f"forward_{model}"):
            lines += [
                f"## Padded forward of {model}, bf16, against eager",
                "",
                f"Share of padding {forward['padding_share']:.0%}; "
                f"smart chose {', '.join(forward['backends'])}.",
                "",
                "| implementation | largest difference | relative |",
                "| --- | ---: | ---: |",
                *(
                    f"| {name} | {found['absolute']:.1e} | {found['relative']:.1e} |"
                    for name, found in forward.items()
                    if isinstance(found, dict)
                ),
                "",
            ]
    shown = {"syncs", "overhead", "packed_memory", "tokens", "forward_minilm", "forward_smollm2"}
    others = {name: value for name, value in results.items() if name not in shown}
    if others:
        lines += ["## Other measurements", ""]
        lines += [f"- {name}: `{json.dumps(value)}`" for name, value in sorted(others.items())]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Runs the tests and writes the report; returns pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reports")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        status, tests = run_tests(Path(folder), options.pytest)
        results = {p.stem: json.loads(p.read_text()) for p in sorted(Path(folder).glob("*.json"))}
    parts = [name for name in results if name.startswith("errors-")]
    errors = [entry for name in parts for entry in results.pop(name)]
    report = {
        "environment": environment(),
        "status": status,
        "tests": tests,
        "distribution": distribution(errors),
        "results": results,
    }
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "gpu.md").write_text(markdown(report))
    print(f"wrote {options.out / 'gpu.md'} and gpu.json")
    return status


if __name__ == "__main__":
    sys.exit(main())
