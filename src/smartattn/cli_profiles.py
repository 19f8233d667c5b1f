"""``smartattn profiles``: what is there, and moving it between machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .cli_errors import UserError

if TYPE_CHECKING:
    from .machine import Device
    from .profile import Profile

profiles_app = typer.Typer(help="The profiles on this machine.", no_args_is_help=True)

_Name = Annotated[
    str, typer.Argument(help="Name of a profile as `list` shows it, or path of its file.")
]
_Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]


@profiles_app.command("list")
def list_profiles() -> None:
    """List the user's own and the shipped profiles."""
    from .profile import ProfileError, load
    from .profiles import find, shipped_profiles, user_profiles

    console = Console()
    # The name is what other commands are given; it is that of the file.
    table = Table("whose", Column("profile", no_wrap=True), "device", "date")
    folders = (("yours", user_profiles()), ("shipped", shipped_profiles()))
    for whose, folder in folders:
        for path in sorted(folder.glob("*.json")):
            try:
                found = load(path)
            except ProfileError as error:
                table.add_row(whose, escape(path.stem), f"unusable: {escape(str(error))}", "")
                continue
            device = escape(str(found.device)) if found.device else "any other"
            table.add_row(whose, escape(path.stem), device, found.date or "")
    console.print(table)
    for whose, folder in folders:
        console.print(f"{whose}: {escape(str(folder))}", soft_wrap=True, highlight=False)
    for device, identity in _here():
        looked_up = find(identity)
        where = f", {looked_up.path}" if looked_up.source.startswith("given") else ""
        console.print(
            f"in force for {device} ({escape(str(identity))}): {escape(looked_up.profile.name)}, "
            f"{looked_up.source}{escape(where)}",
            soft_wrap=True,
            highlight=False,
        )


@profiles_app.command("show")
def show_profile(
    name: _Name,
    crossover: Annotated[
        bool, typer.Option("--map", help="Show who wins by length and padding, and by how much.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show the thresholds of all head sizes and dtypes.")
    ] = False,
) -> None:
    """Show a profile that need not be in force."""
    from .cli_show import show

    show(profile=_found(name)[0], crossover=crossover, plot=None, everything=everything)


@profiles_app.command("export")
def export_profile(
    name: _Name,
    output: Annotated[Path, typer.Argument(help="File, or folder, to write to.")],
    force: _Force = False,
) -> None:
    """Copy a profile into one file, to be imported on other machines."""
    path, found = _found(name)
    target = output / path.name if output.is_dir() else output
    _write(found, target, force)
    Console().print(f"Exported {escape(found.name)} to {escape(str(target))}", soft_wrap=True)


@profiles_app.command("import")
def import_profile(
    file: Annotated[Path, typer.Argument(help="A profile that was exported.")],
    force: _Force = False,
) -> None:
    """Take over a profile as the user's own for the device that it was measured on."""
    from .profile import ProfileError, load
    from .profiles import user_profiles

    try:
        found = load(file)
    except ProfileError as error:
        raise UserError(f"{file} cannot be used: {error}") from None
    if found.device is None:
        raise UserError(f"{file} names no device, so that it would never be found")
    target = user_profiles() / f"{found.device.slug}.json"
    _write(found, target, force)
    console = Console()
    console.print(f"Imported {escape(found.name)} to {escape(str(target))}", soft_wrap=True)
    if found.device not in [identity for _, identity in _here()]:
        console.print(
            f"This machine has no {escape(str(found.device))}: the profile is kept, not used.",
            soft_wrap=True,
        )


@profiles_app.command("remove")
def remove_profile(name: _Name) -> None:
    """Remove a profile of the user's own; the raw samples stay."""
    from .profiles import user_profiles

    path = _found(name)[0]
    if path.parent.resolve() != user_profiles().resolve():
        raise UserError(f"{path} is not among your own profiles; those alone are removed")
    try:
        path.unlink()
    except OSError as error:
        raise UserError(f"cannot remove {path} ({error.strerror})") from None
    Console().print(f"Removed {escape(str(path))}", soft_wrap=True)


def _here() -> list[tuple[str, Device | None]]:
    """The devices of this machine and what they are."""
    import torch

    from .machine import identify

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [*(torch.device("cuda", n) for n in range(count)), torch.device("cpu")]
    return [(str(device), identify(device)) for device in devices]


def _found(name: str) -> tuple[Path, Profile]:
    """The file of a profile and what it holds: the user's own before the shipped one."""
    from .profile import ProfileError, load
    from .profiles import shipped_profiles, user_profiles

    path = Path(name)
    if path.suffix != ".json":
        stem = Path(name).name
        files = [folder / f"{stem}.json" for folder in (user_profiles(), shipped_profiles())]
        existing = [file for file in files if file.is_file()]
        if stem != name or not existing:
            raise UserError(f"there is no profile {name!r}; see smartattn profiles list")
        path = existing[0]
    try:
        return path, load(path)
    except ProfileError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _write(found: Profile, target: Path, force: bool) -> None:
    from .profile import save

    if target.exists() and not force:
        raise UserError(f"{target} exists; --force replaces it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(found, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror})") from None
