"""``smartattn show``: the profile in force, its thresholds, and who wins where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .cli_errors import UserError
from .units import LAYOUTS, LEAD, TIMES_AS_FAST, in_words

if TYPE_CHECKING:
    from .profile import Profile, Rule, Threshold, When, Winner
    from .stack_rule import StackRule, StackWhen

#: How conditions print that always hold.
_OTHERWISE = "otherwise"
_Conditions = TypeVar("_Conditions", "When", "StackWhen")


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
    everything: Annotated[
        bool, typer.Option("--all", help="Show the thresholds of all head sizes and dtypes.")
    ] = False,
) -> None:
    """Show the profile in force for each device, and its thresholds or its crossover map."""
    from .profile import ProfileError, load

    console = Console()
    if profile is not None:
        try:
            found = load(profile)
        except ProfileError as error:
            raise UserError(f"{profile} cannot be used: {error}") from None
        kind = found.device.kind if found.device else None
        _print_profile(found, console, crossover or plot is not None, kind, everything)
        if plot is not None:
            _plot(found, plot, console)
        return
    import torch

    from .machine import changed_since, identify, versions
    from .profiles import find

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
            differences = looked_up.profile.versions.differences(versions(identity.kind))
            if differences:
                console.print(f"  {escape(changed_since(differences))}", soft_wrap=True)
        drawing = crossover or plot is not None
        _print_profile(looked_up.profile, console, drawing, one.type, everything)
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


def _print_profile(
    profile: Profile, console: Console, crossover: bool, kind: str | None, everything: bool
) -> None:
    """Prints what a profile says of one kind of device; of any if that is None."""
    from .profiles import stack_rules

    if profile.device is not None:
        made = f", {profile.run.mode} run, {profile.run.samples} samples" if profile.run else ""
        console.print(f"Measured on {escape(str(profile.device))}, {profile.date}{made}")
    for backend, reason in (profile.run.excluded if profile.run else {}).items():
        console.print(f"{backend} is left out: {escape(reason)}", soft_wrap=True)
    for complaint in profile.run.complaints if profile.run else ():
        console.print(f"[yellow]{escape(complaint)}: calibrate again when this machine is idle[/]")
    if crossover and profile.costs:
        from .crossover import maps
        from .crossover import show as show_maps

        show_maps(maps(profile), console)
    elif profile.thresholds:
        print_thresholds(profile.thresholds, console, everything=everything)
    elif profile.rules:
        _print_rules(profile.rules, console, kind)
    print_stack_rules(stack_rules(profile), console, kind, default=not profile.padding_free)


def _print_rules(rules: Iterable[Rule], console: Console, kind: str | None) -> None:
    from .backends import NAMED

    def runs(name: str) -> bool:
        devices = NAMED[name].support.devices if name in NAMED else None
        return kind is None or devices is None or kind in devices

    table = Table("when", "prefer", Column("because", overflow="fold"), title="Rules")
    for rule in rules:
        when = _applying(rule.when, kind)
        if when is not None:
            prefer = ", ".join(filter(runs, rule.prefer)) or "the first that can run the call"
            table.add_row(str(when), prefer, escape(rule.because))
    if table.row_count:
        console.print(table)


def print_stack_rules(
    rules: Iterable[StackRule], console: Console, kind: str | None, *, default: bool = False
) -> None:
    """Prints when padding-free models leave the padding out on a kind of device.

    Args:
        default: the rules are those of the built-in default.
    """
    title = "padding_free" + ", by the built-in default" * default
    table = Table("when", "packs", Column("because", overflow="fold"), title=title)
    last = ""
    for rule in rules:
        when = _applying(rule.when, kind)
        if when is not None:
            table.add_row(str(when), "yes" if rule.pack else "no", escape(rule.because))
            last = str(when)
    if table.row_count:
        if last != _OTHERWISE:
            table.add_row(_OTHERWISE, "no", "no rule says that it pays")
        console.print(table)
        console.print("the first row that holds decides", highlight=False)


def _applying(when: _Conditions, kind: str | None) -> _Conditions | None:
    """Conditions without the device that is asked about; None if they are of another one."""
    if kind is None:
        return when
    return when.model_copy(update={"device": None}) if when.device in (None, kind) else None


def _usual(thresholds: list[Threshold]) -> tuple[list[Threshold], str]:
    """Those of one head size and one dtype, and which others there are."""
    sizes = Counter(one.head_dim for one in thresholds)
    dtypes = Counter(one.dtype for one in thresholds)
    size = max(sizes, key=lambda one: (sizes[one], one == 128, one))
    dtype = max(dtypes, key=lambda one: (dtypes[one], one == "bfloat16", one))
    usual = [one for one in thresholds if one.head_dim == size and one.dtype == dtype]
    del sizes[size], dtypes[dtype]
    others = [f"heads of {', '.join(map(str, sorted(sizes)))}"] if sizes else []
    return usual, " and of ".join(others + ([", ".join(sorted(dtypes))] if dtypes else []))


def _lead(winner: Winner) -> str:
    ratio = winner.largest_speedup
    return f" ({ratio:.2f})" if ratio is not None and ratio >= LEAD else ""


def print_thresholds(
    thresholds: Iterable[Threshold], console: Console, *, everything: bool = False
) -> None:
    """Prints who wins from which key length on.

    Args:
        everything: of all head sizes and dtypes, not of the usual ones alone.
    """
    from .thresholds import THRESHOLD_LENGTHS

    thresholds = list(thresholds)
    others = ""
    if thresholds and not everything:
        thresholds, others = _usual(thresholds)
    kinds = dict.fromkeys(one.ratio_of for one in thresholds if one.ratio_of is not None)
    # What all have in common is said once.
    sizes = {one.head_dim for one in thresholds}
    dtypes = {one.dtype for one in thresholds}
    title = "Thresholds by key length, for 8 rows or packed sequences and 16/16 heads"
    if len(sizes) == len(dtypes) == 1:
        title += f" of {sizes.pop()}, {dtypes.pop()}"
    table = Table(
        "call",
        *(["head dim"] if sizes else []),
        "padding",
        Column("fastest from (lead at most)", no_wrap=True),
        Column("measured to", justify="right"),
        title=title,
    )
    last = None
    for threshold in thresholds:
        # Who is fastest is looked for with these.
        more = {
            "masked": "a window of a quarter of the length, no padding",
            "packed": "packed sequences of that mean length",
        }
        padding = more.get(threshold.layout, LAYOUTS[threshold.layout])
        if threshold.causal and threshold.layout == "padded":
            padding += " on the left"
        call = in_words(threshold.mode, threshold.causal, padding)
        if sizes:
            call += f", {threshold.dtype}"
        group = (call, threshold.head_dim)
        if last is not None and group != last:
            table.add_section()
        winners = [
            f"{winner.from_kv_len:,}: {winner.backend}{_lead(winner) if threshold.ratio_of else ''}"
            for winner in threshold.winners
        ]
        table.add_row(
            call if group != last else "",
            *([str(threshold.head_dim) if group != last else ""] if sizes else []),
            f"{threshold.padding_share:.0%}" + " of each row" * threshold.alike,
            "\n".join(winners),
            "-" if threshold.measured_to is None else f"{threshold.measured_to:,}",
        )
        last = group
    if table.row_count:
        console.print(table)
        if others:
            console.print(f"of {others}: smartattn show --all", soft_wrap=True, highlight=False)
        if any(one.alike for one in thresholds):
            console.print(
                '"of each row": all rows have as much padding. Where their lengths differ one '
                "backend alone is considered, so that there is no threshold",
                soft_wrap=True,
                highlight=False,
            )
        for kind in kinds:
            console.print(
                f"(1.25): {TIMES_AS_FAST[kind]}, at most; none: less than {LEAD}",
                soft_wrap=True,
                highlight=False,
            )
        asked = ", ".join(map(str, THRESHOLD_LENGTHS[:5]))
        console.print(
            f"asked at {asked}, ... tokens: a change lies anywhere between two of these, where "
            "another one that is about as fast may win; smartattn explain asks any length\n"
            "measured to: the longest row that every backend named there was timed on, in calls "
            "of this kind with heads of any size, causal and bidirectional ones together, and "
            "padding on the right together with none; of packed sequences it is an eighth of that "
            "row. Not every number of rows was timed at every length, and a change beyond this one "
            "is extrapolated\n"
            "other numbers of rows and heads have other thresholds",
            soft_wrap=True,
            highlight=False,
        )
