"""``smartattn explain``: arguments and printing only."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .cli_errors import UserError


def explain(
    seq_len: Annotated[int, typer.Option(help="Tokens per row, padding included.", min=1)],
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)],
    head_dim: Annotated[int, typer.Option(help="Size of a head.", min=1)],
    batch: Annotated[int, typer.Option(help="Rows of the batch.", min=1)] = 1,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads.  \\[default: as many as heads]", min=1)
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option(
            help="Hidden size of the model, for padding_free.  \\[default: heads x head-dim]", min=1
        ),
    ] = None,
    padding: Annotated[
        float, typer.Option(help="Share of the tokens that are padding, e.g. 0.4.")
    ] = 0.0,
    side: Annotated[
        Literal["left", "right"] | None,
        typer.Option(help="Where the padding lies.  \\[default: right; left when decoding]"),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="A decoder's attention.")] = False,
    window: Annotated[
        int | None, typer.Option(help="Size of a sliding window, in tokens.", min=1)
    ] = None,
    packed: Annotated[
        int | None, typer.Option(help="Sequences behind each other in one row.", min=1)
    ] = None,
    grad: Annotated[bool, typer.Option("--grad", help="Forward and backward.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="One new token per row.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="E.g. bf16.  \\[default: bf16 on a GPU, float32 on a CPU]")
    ] = None,
    pad_output: Annotated[
        Literal["zeros", "sdpa"] | None, typer.Option(help="As in smartattn.use.")
    ] = None,
    objective: Annotated[
        Literal["latency", "memory", "accuracy"] | None, typer.Option(help="What is to be small.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:N, or the name of a measured GPU: nvidia-h200."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what would be chosen for one attention call, and why. Runs nothing."""
    from .explaining import explain as explained

    try:
        answer = explained(
            batch=batch,
            seq_len=seq_len,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=hidden,
            causal=causal,
            padding=padding,
            side=side,
            window=window,
            packed=packed,
            grad=grad,
            decode=decode,
            dtype=dtype,
            pad_output=pad_output,
            objective=objective,
            device=device,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if as_json:
        print(answer.to_json())
        return
    console = Console()
    table = Table(
        Column("backend", no_wrap=True),
        *(Column(name, justify="right", overflow="fold") for name in answer.header[1:-1]),
        Column("remark", overflow="fold"),
    )
    for row in answer.rows():
        style = "bold" if row[0] == answer.backend else None
        table.add_row(*map(escape, row), style=style)
    title = escape(f"{answer.workload}, on {answer.device}")
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)
    for line in answer.lines():
        console.print(escape(line), soft_wrap=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(explain)
