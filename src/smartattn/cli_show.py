"""``smartattn show``: the profile in force, its thresholds, and who wins where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .cli_errors import UserError

if TYPE_CHECKING:
    from .profile import Profile, Threshold
    from .stack_rule import StackRule


def show(
    profile: Annotated[
        Path | None, typer.Option(help="A profile to show, instead of those in force.")
    ] = None,
    crossover: Annotated[
        bool, typer.Option("--map", help="Show who wins by length and padding, and by how much.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw that map into a PNG file.", show_default=False)
    ] = None,
) -> None:
    """Show the profile in force for each device, and its thresholds or its crossover map."""
    from .profile import ProfileError, load

    console = Console()
    if profile is not None:
        try:
            found = load(profile)
        except ProfileError as error:
            raise UserError(f"{profile} cannot be used: {error}") from None
        _print_profile(found, console, crossover or plot is not None)
        if plot is not None:
            _plot(found, plot, console)
        return
    import torch

    from .machine import identify, versions
    from .profile import find

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    drawn = False
    for one in [torch.device("cuda", n) for n in range(count)] + [torch.device("cpu")]:
        identity = identify(one)
        looked_up = find(identity)
        name = escape(looked_up.profile.name)
        console.print(
            f"[bold]{one}[/] ({escape(str(identity))}): profile [bold]{name}[/], "
            f"{looked_up.source}, {escape(str(looked_up.path))}",
            soft_wrap=True,
        )
        for phrase in looked_up.passed_over:
            console.print(f"  {escape(phrase)}", soft_wrap=True)
        if identity is not None and looked_up.profile.versions is not None:
            for difference in looked_up.profile.versions.differences(versions(identity.kind)):
                console.print(f"  measured with {escape(difference)}: calibrate again")
        _print_profile(looked_up.profile, console, crossover or plot is not None)
        if plot is not None and looked_up.profile.costs and not drawn:
            drawn = True
            _plot(looked_up.profile, plot, console)
    if plot is not None and not drawn:
        raise UserError(
            "there is nothing to draw: no profile in force has measurements; run `smartattn "
            "calibrate` or name one with --profile"
        )


def _plot(profile: Profile, path: Path, console: Console) -> None:
    from . import crossover

    found = crossover.maps(profile)
    if not found:
        raise UserError(f"profile {profile.name} has no measurements to draw; see calibrate --help")
    try:
        crossover.plot(found, str(profile.device or profile.name), path)
    except crossover.PlotError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); name another file") from None
    console.print(f"Crossover map: {escape(str(path))}", soft_wrap=True)


def _print_profile(profile: Profile, console: Console, crossover: bool) -> None:
    if profile.device is not None:
        made = f", {profile.run.mode}, {profile.run.samples} samples" if profile.run else ""
        console.print(f"Measured on {escape(str(profile.device))}, {profile.date}{made}")
    for backend, reason in (profile.run.excluded if profile.run else {}).items():
        console.print(f"{backend} is left out: {escape(reason)}", soft_wrap=True)
    for complaint in profile.run.complaints if profile.run else ():
        console.print(f"[yellow]{escape(complaint)}: calibrate again when it is idle[/]")
    if crossover and profile.costs:
        from .crossover import maps
        from .crossover import show as show_maps

        show_maps(maps(profile), console)
    elif profile.thresholds:
        print_thresholds(profile.thresholds, console)
    elif profile.rules:
        table = Table("when", "prefer", Column("because", overflow="fold"), title="Rules")
        for rule in profile.rules:
            conditions = rule.when.model_dump(exclude_none=True)
            table.add_row(
                ", ".join(f"{name} {value}" for name, value in conditions.items()) or "otherwise",
                ", ".join(rule.prefer),
                escape(rule.because),
            )
        console.print(table)
    print_stack_rules(profile.padding_free, console)


def print_stack_rules(rules: Iterable[StackRule], console: Console) -> None:
    """Prints when padding-free models leave the padding out."""
    table = Table("when", "packs", Column("because", overflow="fold"), title="padding_free")
    for rule in rules:
        table.add_row(str(rule.when), "yes" if rule.pack else "no", escape(rule.because))
    if table.row_count:
        console.print(table)


def print_thresholds(thresholds: Iterable[Threshold], console: Console) -> None:
    """Prints who wins from which key length on."""
    table = Table(
        "call",
        "head dim",
        "padding",
        "fastest from which key length on (times faster than the next one there)",
        title="Thresholds, for 8 rows or packed sequences and 16 heads",
    )
    last = None
    for threshold in thresholds:
        pattern = (
            "" if threshold.mode == "decode" else " causal" if threshold.causal else " both ways"
        )
        call = f"{threshold.mode}{pattern}, {threshold.layout}, {threshold.dtype}"
        group = (call, threshold.head_dim)
        if last is not None and group != last:
            table.add_section()
        winners = [
            f"{winner.from_kv_len}: {winner.backend} ({winner.speedup:.2f})"
            for winner in threshold.winners
        ]
        table.add_row(
            call if group != last else "",
            str(threshold.head_dim) if group != last else "",
            f"{threshold.padding_share:.0%}" + " of all rows" * threshold.alike,
            ", ".join(winners),
        )
        last = group
    if table.row_count:
        console.print(table)
