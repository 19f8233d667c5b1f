"""``smartattn verify`` and ``smartattn bench``: arguments and printing only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
)
from rich.table import Column, Table

from .cli_errors import UserError
from .machine import DEVICE_NAMES

if TYPE_CHECKING:
    from .bench import Benchmark, Row
    from .models import Batch
    from .verify import Comparison, Difference, Verification

#: Exit code where smart computes something else than eager attention.
DISAGREES = 1

_PADDING = (
    "at padding positions implementations differ by design; to get sdpa's values there: "
    'pad_output="sdpa"'
)
_AS_SDPA = "at padding positions smart is as far from eager as sdpa is"
_AS_FAR = (
    "at padding positions no implementation agrees with eager; to get sdpa's values there: "
    'pad_output="sdpa"'
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, or a name on the hub.")
]
GgufFile = Annotated[str | None, typer.Option(help="GGUF file in that folder.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch", help="Rows of a batch.  \\[default: 8; 4 on a CPU]", min=1)
]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens per row, padding included.  \\[default: 1024; 128 on a CPU]", min=1),
]
Padding = Annotated[float, typer.Option(help="Share of the tokens that are padding.")]
Side = Annotated[
    Literal["left", "right"] | None,
    typer.Option(help="Where the padding lies.  \\[default: left for decoders, else right]"),
]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file, one prompt per line, instead of random tokens.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N.  \\[default: cuda if there is one]")
]
Dtype = Annotated[
    str | None, typer.Option(help="E.g. float16.  \\[default: bfloat16 on a GPU, else float32]")
]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]


def verify(
    model: Model,
    gguf_file: GgufFile = None,
    batch: BatchSize = None,
    seq_len: SeqLen = None,
    padding: Padding = 0.3,
    side: Side = None,
    prompts: Prompts = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="The states after every layer too.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> int:
    """Compare a model's outputs with those of eager attention. Exits with 1 if smart's differ."""
    from .models import Shape
    from .verify import verify as verified

    console = Console()
    loaded, batches = _loaded(
        model, gguf_file, device, dtype, Shape(batch, seq_len, padding, side, prompts)
    )
    with _progress(None) as step:
        try:
            found = verified(loaded, batches, per_layer=per_layer, report=lambda name: step(name))
        except RuntimeError as error:
            raise UserError(str(error)) from None
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _print_verification(found, console)
    return 0 if found.agrees else DISAGREES


def bench(
    model: Model,
    gguf_file: GgufFile = None,
    batch: BatchSize = None,
    seq_len: SeqLen = None,
    padding: Padding = 0.3,
    side: Side = None,
    prompts: Prompts = None,
    new_tokens: Annotated[
        int, typer.Option(help="Generate that many tokens instead of running a forward.", min=0)
    ] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds at most.", min=1)] = 9,
    seconds: Annotated[
        float, typer.Option(help="Seconds after which no round begins.", min=0)
    ] = 30.0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Time a model under eager, sdpa, flash_attention_2, smart and padding_free, side by side."""
    from .bench import bench as benched
    from .models import Shape

    console = Console()
    loaded, batches = _loaded(
        model, gguf_file, device, dtype, Shape(batch, seq_len, padding, side, prompts)
    )
    if new_tokens and not loaded.can_generate():
        raise UserError(f"{model} does not generate; leave --new-tokens out")
    with _progress(rounds) as step:
        found = benched(
            loaded,
            batches,
            new_tokens=new_tokens,
            rounds=rounds,
            seconds=seconds,
            report=lambda name, number, _: step(name if number else f"{name}, warming up", number),
        )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _print_benchmark(found, console)


def _loaded(
    name: str,
    gguf_file: str | None,
    device: str | None,
    dtype: str | None,
    shape: Any,
) -> tuple[Any, list[Batch]]:
    import torch
    from transformers.utils import logging

    from .models import ModelError, batches, load, load_tokenizer

    given = torch.float32
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is not None:
            given = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype))
            if not (isinstance(given, torch.dtype) and given.is_floating_point):
                raise AttributeError
    except RuntimeError:
        raise UserError(f"{device!r} is no device; use {DEVICE_NAMES}") from None
    except AttributeError:
        raise UserError(f"{dtype!r} is no dtype of a model; use bfloat16 or float32") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this torch sees no CUDA device; use --device cpu")
    # It has a progress bar of its own.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with _progress(None) as step:
            step(f"loading {name}")
            loaded = load(name, gguf_file, place, None if dtype is None else given)
            tokenizer = load_tokenizer(name, gguf_file, loaded) if shape.prompts else None
        return loaded, batches(loaded, shape, tokenizer)
    except ModelError as error:
        raise UserError(str(error)) from None


@contextmanager
def _progress(total: int | None) -> Iterator[Any]:
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
    ]
    if total is not None:
        columns += [BarColumn(bar_width=24), MofNCompleteColumn()]
    # Standard output is the result alone.
    stderr = Console(stderr=True)
    bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    with bar:
        task = bar.add_task("", total=total)

        def step(doing: str, completed: int = 0) -> None:
            bar.update(task, description=doing, completed=completed)

        yield step


def _print_verification(found: Verification, console: Console) -> None:
    console.print(
        f"{_batches(found)}, {found.dtype}\n"
        "differences from eager: largest / mean (largest relative to the largest eager value at "
        "real positions)",
        soft_wrap=True,
        highlight=False,
    )
    table = Table(
        Column("implementation", overflow="fold"),
        "after",
        Column("at real positions", overflow="fold"),
        Column("at padding positions", overflow="fold"),
    )
    for comparison in found.comparisons:
        if comparison.error is not None:
            table.add_row(comparison.implementation, "-", "did not run", "-", style="dim")
        _add_layers(table, comparison)
        table.add_section()
    console.print(table)
    _print_errors(found.comparisons, console)
    smart = next(one for one in found.comparisons if one.implementation == "smart")
    _print_ran(smart, console)
    output = smart.output
    if output and output.padding and output.padding.relative > found.allowed:
        sdpa = next((one for one in found.comparisons if one.implementation == "sdpa"), None)
        theirs = sdpa.output.padding if sdpa is not None and sdpa.output else None
        said = _PADDING
        if theirs is not None and theirs.relative > found.allowed:
            said = _AS_SDPA if theirs == output.padding else _AS_FAR
        console.print(said, soft_wrap=True, highlight=False)
    if found.problem is None:
        assert output is not None
        console.print(
            "smart agrees with eager: at real positions it differs by "
            f"{output.real.relative:.1e} of the largest eager value there, {found.allowed:.1e} is "
            "allowed",
            soft_wrap=True,
            highlight=False,
        )
    else:
        console.print(f"[bold red]smart does not agree with eager:[/] {escape(found.problem)}")


def _batches(found: Verification | Benchmark) -> str:
    """The batch that ran, as rows x length, and what is in it."""
    from .models import shapes_in_words

    return (
        f"{shapes_in_words(found.shapes)}: {found.real_tokens:,} real and "
        f"{found.padding_tokens:,} padding tokens"
        + (f" on the {found.padding_side}" if found.padding_side else "")
    )


def _add_layers(table: Table, comparison: Comparison) -> None:
    for layer in comparison.layers:
        first = layer is comparison.layers[0]
        after = "output" if layer.index is None else f"layer {layer.index}"
        after = "embeddings" if layer.index == 0 else after
        table.add_row(
            comparison.implementation if first else "",
            after,
            _shown(layer.real),
            _shown(layer.padding),
        )


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return "no padding"
    return f"{difference.largest:.2e} / {difference.mean:.2e} ({difference.relative:.1e})"


def _print_benchmark(found: Benchmark, console: Console) -> None:
    # As ``models.forward`` does it.
    alone = "forward of the layers alone (no cache, no logits)"
    doing = f"{found.new_tokens} new tokens" if found.new_tokens else alone
    console.print(
        f"{doing}, {_batches(found)}, {found.dtype}, {found.device}; medians of {found.rounds} "
        f"interleaved round{'s' * (found.rounds != 1)}",
        soft_wrap=True,
        highlight=False,
    )
    right = {"justify": "right", "overflow": "fold"}
    table = Table(
        Column("implementation", overflow="fold"),
        Column("ms", **right),  # type: ignore[arg-type]
        Column("spread", **right),  # type: ignore[arg-type]
        Column("tokens/s", **right),  # type: ignore[arg-type]
        Column("peak MiB", **right),  # type: ignore[arg-type]
        "against eager",
    )
    for row in found.rows:
        if row.median is None:
            table.add_row(row.implementation, "-", "-", "-", "-", "did not run", style="dim")
            continue
        speed = found.tokens_per_second(row) or 0.0
        table.add_row(
            row.implementation,
            _milliseconds(row.median),
            f"{row.spread:.0%}" if len(row.seconds) > 1 else "-",
            f"{speed:,.0f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            _agreement(row),
        )
    console.print(table)
    _print_errors(found.rows, console)
    smart = next(row for row in found.rows if row.implementation == "smart")
    _print_ran(smart, console)
    if found.remark is not None:
        console.print(found.remark, soft_wrap=True, highlight=False)
    if found.padding_free is not None:
        console.print(escape(found.padding_free), soft_wrap=True, highlight=False)
    if found.doubt is not None:
        console.print(f"[yellow]{found.doubt}[/]", soft_wrap=True, highlight=False)
    console.print(found.verdict, soft_wrap=True, highlight=False)


def _milliseconds(seconds: float) -> str:
    """With three digits at least, and one after the point."""
    # Rounded first, so that 9.996 ms are 10.0.
    value = float(f"{seconds * 1e3:.3g}")
    digits = 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{seconds * 1e3:.{digits}f}"


def _print_ran(smart: Row | Comparison, console: Console) -> None:
    if smart.ran:
        backends = sorted(smart.ran.items(), key=lambda one: -one[1])
        calls = [f"{name} in {count:,} call{'s' * (count != 1)}" for name, count in backends]
        console.print(f"smart ran {', '.join(calls)}", soft_wrap=True, highlight=False)


def _print_errors(ran: Iterable[Row | Comparison], console: Console) -> None:
    for one in ran:
        if one.error is not None:
            text = escape(f"{one.implementation} did not run: {one.error}")
            console.print(text, soft_wrap=True, highlight=False)


def _agreement(row: Row) -> str:
    if row.implementation == "eager":
        return "-"
    if row.equal_tokens is not None:
        return f"{row.equal_tokens:.0%} of the tokens equal"
    return "-" if row.difference is None else f"differs by {row.difference:.1e}"


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(verify)
    app.command()(bench)
