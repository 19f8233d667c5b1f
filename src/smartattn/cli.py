"""The command line: arguments and printing only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from . import cli_doctor, cli_explain, cli_models
from ._version import __version__
from .errors import UserError

if TYPE_CHECKING:
    import torch

    from .calibrate import Outcome, Request
    from .profile import Profile, Threshold

# What needs torch is imported where it is used: --help and --version answer at once.

app = typer.Typer(
    name="smartattn",
    help="Attention for Hugging Face Transformers that picks the fastest exact backend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
profiles_app = typer.Typer(help="The profiles on this machine.", no_args_is_help=True)
app.add_typer(profiles_app, name="profiles")
cli_explain.register(app)
cli_doctor.register(app)
cli_models.register(app)

#: Exit code for what the user can put right.
USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0, 2 with one line on stderr, or 130 after Ctrl-C."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        result = app(args=arguments, prog_name="smartattn", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # typer brings its own copy of click from some version on, so the class has no one name.
        message: Callable[[], str] | None = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message())
            return USER_ERROR
        command = getattr(getattr(error, "ctx", None), "command_path", None) or "smartattn"
        return _complain(f"{message().rstrip('.')}; see {command} --help")


def _complain(message: str) -> int:
    print("smartattn:", " ".join(message.split()), file=sys.stderr)
    return USER_ERROR


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"smartattn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


# -- calibrate -----------------------------------------------------------------------------------


@app.command()
def calibrate(
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda (each distinct GPU) or cuda:N.  [default: cuda if there is one]",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller shapes, done within a minute.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds of measuring per device.", min=1.0, max=86_400.0),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File of the profile, instead of the user's own.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again although a current profile exists.")
    ] = False,
) -> None:
    """Measure this machine's backends and write a profile."""
    from .calibrate import CalibrationError, Request

    console = Console()
    devices = _devices(device)
    if output is not None and len(devices) > 1:
        raise UserError("--output takes one profile; name one GPU with --device cuda:N")
    for one in devices:
        request = Request(
            one, mode="quick" if quick else "default", budget=budget, output=output, force=force
        )
        try:
            outcome = _with_progress(request, console)
        except CalibrationError as error:
            raise UserError(str(error)) from None
        except KeyboardInterrupt:
            console.print(
                "Stopped. What was measured is kept: the same command goes on from there."
            )
            raise
        _print_outcome(outcome, console)


def _devices(name: str | None) -> list[torch.device]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name!r} is no device; use cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return [torch.device("cpu")]
    if device.type != "cuda":
        raise UserError(f"device {name!r} cannot be calibrated; use cpu, cuda or cuda:N")
    if not count:
        raise UserError("this torch sees no CUDA device; use --device cpu")
    if ":" in name:
        if device.index >= count:
            raise UserError(f"there is no {name}; this machine has cuda:0 to cuda:{count - 1}")
        return [device]
    from .machine import identify

    models: dict[Any, torch.device] = {}
    for index in range(count):
        one = torch.device("cuda", index)
        models.setdefault(identify(one), one)
    return list(models.values())


def _with_progress(request: Request, console: Console) -> Outcome:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from . import calibrate as module
    from .machine import identify

    name = identify(request.device) or request.device
    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.fields[samples]} samples, {task.description}", markup=False),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=None, samples=0)

    def report(progress: Any) -> None:
        if not bar.live.is_started:
            console.print(f"Measuring {escape(str(name))} for {progress.budget:.0f} s")
            bar.start()
        bar.update(
            task,
            total=progress.budget,
            completed=min(progress.elapsed, progress.budget),
            samples=progress.samples,
            description=progress.doing,
        )

    def waiting() -> None:
        console.print("Another calibration is running on this machine; waiting for it to end.")

    try:
        return module.calibrate(request, report, waiting)
    finally:
        if bar.live.is_started:
            bar.stop()


def _print_outcome(outcome: Outcome, console: Console) -> None:
    from .calibrate import BUSY_SPREAD

    profile = outcome.profile
    if outcome.samples is None:
        assert profile.run is not None
        console.print(
            f"Nothing to do: {escape(str(outcome.path))} was made on {profile.date} "
            f"({profile.run.mode}) with the versions in use. --force measures again.",
            soft_wrap=True,
        )
        return
    resumed = f" and {outcome.resumed} of a run before" if outcome.resumed else ""
    console.print(f"{outcome.measured} samples{resumed} on {escape(str(profile.device))}")
    assert profile.run is not None
    for backend, reason in profile.run.excluded.items():
        console.print(f"[bold red]{backend} is left out:[/] {escape(reason)}", soft_wrap=True)
    if outcome.out_of_memory:
        console.print(f"{outcome.out_of_memory} runs did not fit in memory and were left out")
    if outcome.spread > BUSY_SPREAD:
        console.print(
            f"[yellow]The timings vary by {outcome.spread:.0%}: something else was using this "
            "machine. Calibrate again when it is idle, with --force.[/]",
            soft_wrap=True,
        )
    _print_thresholds(profile.thresholds, console)
    console.print(f"Profile:     {escape(str(outcome.path))}", soft_wrap=True)
    console.print(f"Raw samples: {escape(str(outcome.samples))}", soft_wrap=True)


# -- fit -----------------------------------------------------------------------------------------


@app.command()
def fit(
    samples: Annotated[Path, typer.Argument(help="Raw samples of a calibration.")],
    output: Annotated[
        Path | None, typer.Option(help="File of the profile, instead of the user's own.")
    ] = None,
) -> None:
    """Make the profile again from raw samples. Needs no GPU."""
    from . import profile as profiles
    from .fit import fit_profile
    from .samples import SamplesError, load

    try:
        header, rows = load(samples)
    except SamplesError as error:
        raise UserError(f"{samples} cannot be used: {error}") from None
    made = fit_profile(header, rows, profiles.default_rules(), samples.name)
    if not made.costs:
        raise UserError(f"{samples} holds too few samples for a model; calibrate for longer")
    try:
        if output is None:
            output = profiles.save_for_user(made)
        else:
            profiles.save(made, output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror}); choose --output") from None
    console = Console()
    _print_thresholds(made.thresholds, console)
    console.print(f"Profile: {escape(str(output))}", soft_wrap=True)


# -- show ----------------------------------------------------------------------------------------


@app.command()
def show(
    profile: Annotated[
        Path | None, typer.Option(help="A profile to show, instead of those in force.")
    ] = None,
) -> None:
    """Show the profile in force for each device, and its thresholds."""
    from .profile import ProfileError, load

    console = Console()
    if profile is not None:
        try:
            _print_profile(load(profile), console)
        except ProfileError as error:
            raise UserError(f"{profile} cannot be used: {error}") from None
        return
    import torch

    from .machine import identify, versions
    from .profile import find

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for one in [torch.device("cuda", n) for n in range(count)] + [torch.device("cpu")]:
        identity = identify(one)
        found = find(identity)
        console.print(
            f"[bold]{one}[/] ({escape(str(identity))}): profile [bold]{escape(found.profile.name)}"
            f"[/], {found.source}, {escape(str(found.path))}",
            soft_wrap=True,
        )
        for phrase in found.passed_over:
            console.print(f"  {escape(phrase)}", soft_wrap=True)
        if identity is not None and found.profile.versions is not None:
            for difference in found.profile.versions.differences(versions(identity.kind)):
                console.print(f"  measured with {escape(difference)}: calibrate again")
        _print_profile(found.profile, console)


def _print_profile(profile: Profile, console: Console) -> None:
    if profile.device is not None:
        made = f", {profile.run.mode}, {profile.run.samples} samples" if profile.run else ""
        console.print(f"Measured on {escape(str(profile.device))}, {profile.date}{made}")
    for backend, reason in (profile.run.excluded if profile.run else {}).items():
        console.print(f"{backend} is left out: {escape(reason)}", soft_wrap=True)
    if profile.thresholds:
        _print_thresholds(profile.thresholds, console)
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


def _print_thresholds(thresholds: Iterable[Threshold], console: Console) -> None:
    table = Table(
        "call",
        "head dim",
        "padding",
        "fastest from which key length on (times faster than the next one there)",
        title="Thresholds",
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
            f"{threshold.padding_share:.0%}",
            ", ".join(winners),
        )
        last = group
    if table.row_count:
        console.print(table)


# -- profiles ------------------------------------------------------------------------------------


@profiles_app.command("list")
def list_profiles() -> None:
    """List the user's own and the shipped profiles."""
    from .profile import ProfileError, load, shipped_profiles, user_profiles

    table = Table("whose", "profile", "device", "date", Column("file", overflow="fold"))
    for whose, folder in (("yours", user_profiles()), ("shipped", shipped_profiles())):
        for path in sorted(folder.glob("*.json")):
            try:
                found = load(path)
            except ProfileError as error:
                table.add_row(whose, "unusable", escape(str(error)), "", escape(str(path)))
                continue
            device = escape(str(found.device)) if found.device else "any"
            table.add_row(whose, escape(found.name), device, found.date or "", escape(str(path)))
    Console().print(table)
