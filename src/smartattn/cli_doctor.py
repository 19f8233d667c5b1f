"""``smartattn doctor``: arguments and printing only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from .doctor import BackendReport, DeviceReport, Report

#: Exit code where a backend gives wrong answers.
UNHEALTHY = 1
#: Longest test of a device that is asked for.
MAX_SECONDS = 3600.0

_STYLES = {"works": "green", "wrong": "bold red", "fails": "bold red"}


def doctor(
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=MAX_SECONDS,
            help="Test each device for so long; 2 if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> int:
    """Look at devices, versions, profiles and backends, and test each backend.

    Exits with 1 if one gives wrong answers or fails.
    """
    from .doctor import SECONDS, examine

    report = examine(seconds=SECONDS if seconds is None else seconds)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report, Console())
    return 0 if report.healthy else UNHEALTHY


def _print(report: Report, console: Console) -> None:
    found = [f"{name.replace('_', '-')} {version}" for name, version in report.versions.items()
             if version is not None]  # fmt: skip
    console.print(escape(", ".join(found)), soft_wrap=True, highlight=False)
    for problem, fix in report.problems:
        console.print(f"[bold red]{escape(problem)}[/]\n  try: {escape(fix)}", soft_wrap=True)
    for device in report.devices:
        _print_device(device, console)
    if report.healthy:
        all_tried = all(device.reached == device.cases for device in report.devices)
        tried = "" if all_tried else " in the calls that were tried"
        untested = ", ".join(report.untested)
        beside = f"; {untested} was not tested" if untested else ""
        console.print(f"Every backend that was tested gives right answers{tried}{beside}.")
    else:
        console.print(
            "[bold red]Not every backend that was tested gives right answers, see above.[/]"
        )


def _print_device(device: DeviceReport, console: Console) -> None:
    memory = "" if device.memory is None else f", {device.memory:.0f} GiB"
    console.print(f"\n[bold]{device.device}[/]: {escape(device.name)}{memory}", highlight=False)
    path = f", {device.profile_path}" if device.profile_path else ""
    console.print(
        f"profile {escape(device.profile)}, {device.profile_source}{escape(path)}",
        soft_wrap=True,
        highlight=False,
    )
    for remark in device.remarks:
        console.print(f"  {escape(remark)}", soft_wrap=True, highlight=False)
    table = Table(
        Column("backend", overflow="fold"),
        "health",
        Column("passed", justify="right"),
        Column("remark", overflow="fold"),
    )
    for backend in device.backends:
        style = _STYLES.get(backend.health, "dim")
        counts = f"{backend.passed} of {backend.tried}" if backend.tried else "-"
        table.add_row(
            backend.backend, f"[{style}]{backend.health}[/]", counts, escape(_remark(backend))
        )
    console.print(table)
    if device.reached < device.cases:
        console.print(
            f"Stopped after {device.seconds:.1f} s with {device.reached} of {device.cases} calls "
            f"done{_missed(device)}; --seconds tests for longer.",
            soft_wrap=True,
            highlight=False,
        )


def _missed(device: DeviceReport) -> str:
    if not device.unreached:
        return ", one of each kind at least"
    return f", not tested: {', '.join(device.unreached)}"


def _remark(backend: BackendReport) -> str:
    if backend.health == "works":
        return f"largest error {backend.worst:.0%} of what is allowed"
    remark = "; ".join(backend.problems)
    return f"{remark}\ntry: {backend.fix}" if backend.fix else remark


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(doctor)
