"""The command line: arguments and printing only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from . import cli_doctor, cli_explain, cli_models
from ._version import __version__
from .cli_errors import UserError
from .cli_profiles import profiles_app
from .cli_show import print_stack_rules, print_thresholds, show
from .machine import DEVICE_NAMES

if TYPE_CHECKING:
    import torch

    from .calibrate import Outcome, Request

# The package itself imports torch and Transformers' modeling_utils, where AttentionInterface is, to
# register "smart"; commands import where they are used what comes on top of that.

app = typer.Typer(
    name="smartattn",
    help="Attention for Hugging Face Transformers that picks the fastest exact backend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(profiles_app, name="profiles")
app.command()(show)
cli_explain.register(app)
cli_doctor.register(app)
cli_models.register(app)

#: Exit code for what the user can put right.
USER_ERROR = 2
INTERRUPTED = 130
_WAITING = "Another calibration is running on this machine; waiting for it to end."


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
            help="cpu, cuda (each distinct GPU) or cuda:N.  \\[default: cuda if there is one]",
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
    cold: Annotated[
        bool, typer.Option("--cold", help="Flush the caches before every timed call.")
    ] = False,
) -> None:
    """Measure this machine's backends and write a profile."""
    from .calibrate import CalibrationError, Request

    console = Console()
    devices = _devices(device)
    if output is not None and len(devices) > 1:
        raise UserError("--output takes one profile; name one GPU with --device cuda:N")
    requests = [
        Request(
            one,
            mode="quick" if quick else "default",
            budget=budget,
            output=output,
            force=force,
            cold=cold,
        )
        for one in devices
    ]
    try:
        if len(requests) > 1:
            _several(requests, console)
            return
        outcome = _with_progress(requests[0], console)
    except CalibrationError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        console.print("Stopped. What was measured is kept: the same command goes on from there.")
        raise
    _print_outcome(outcome, console)


def _several(requests: list[Request], console: Console) -> None:
    """Calibrates distinct GPUs side by side, and says what came of each."""
    from .calibrate import CalibrationError
    from .parallel import at_once, calibrate_all

    names = ", ".join(str(request.device) for request in requests)
    console.print(f"Measuring {names}, {at_once(len(requests))} at a time")
    failed = []
    for request, outcome in calibrate_all(requests, lambda: console.print(_WAITING)):
        if isinstance(outcome, CalibrationError):
            failed.append(f"{request.device}: {outcome}")
        else:
            console.print(f"[bold]{request.device}[/]")
            _print_outcome(outcome, console)
    if failed:
        raise UserError("; ".join(failed))


def _devices(name: str | None) -> list[torch.device]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name!r} is no device; use {DEVICE_NAMES}") from None
    if device.type == "cpu":
        return [torch.device("cpu")]
    if device.type != "cuda":
        raise UserError(f"device {name!r} cannot be calibrated; use {DEVICE_NAMES}")
    if not count:
        raise UserError("this torch sees no CUDA device; use --device cpu")
    if ":" in name:
        if device.index >= count:
            there = f"'cuda:0' to 'cuda:{count - 1}'"
            raise UserError(f"there is no {name!r}; this machine has {there}")
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
        console.print(_WAITING)

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
    if outcome.slow:
        console.print(
            f"{outcome.slow} runs were left out: kernels would have to be built there, which "
            "would have taken too long"
        )
    for complaint in outcome.complaints:
        console.print(f"[yellow]{escape(complaint[0].upper() + complaint[1:])}.[/]", soft_wrap=True)
    if outcome.complaints and outcome.spread <= BUSY_SPREAD:
        console.print("[yellow]Calibrate again when the device is idle and cool, with --force.[/]")
    if outcome.spread > BUSY_SPREAD:
        console.print(
            f"[yellow]The timings vary by {outcome.spread:.0%}: something else was using this "
            "machine. Calibrate again when it is idle, with --force.[/]",
            soft_wrap=True,
        )
    print_thresholds(profile.thresholds, console)
    kind = profile.device.kind if profile.device else None
    print_stack_rules(profile.padding_free, console, kind)
    if outcome.unmeasured is not None:
        console.print(f"padding_free: {escape(outcome.unmeasured)}", soft_wrap=True)
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
    from . import profiles
    from .fit import fit_profile
    from .profile import save
    from .samples import SamplesError, load, load_stacks

    try:
        header, rows = load(samples)
        stacks = load_stacks(samples)
    except SamplesError as error:
        raise UserError(f"{samples} cannot be used: {error}") from None
    made = fit_profile(header, rows, profiles.default_rules(), samples.name, stacks)
    if not made.costs:
        raise UserError(f"{samples} holds too few samples for a model; calibrate for longer")
    try:
        if output is None:
            output = profiles.save_for_user(made)
        else:
            save(made, output)
    except OSError as error:
        file = output or error.filename or "the profile"
        raise UserError(f"cannot write {file} ({error.strerror}); choose --output") from None
    console = Console()
    print_thresholds(made.thresholds, console)
    print_stack_rules(made.padding_free, console, header.device.kind)
    console.print(f"Profile: {escape(str(output))}", soft_wrap=True)
