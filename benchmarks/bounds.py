"""How much of a forward is attention, and so how much any attention could save.

Run from the repository's root: ``python -m benchmarks.bounds --help``. Beside the implementations
of :mod:`benchmarks.models`, whole models run with two that do not compute attention: "packed" runs
the fastest kernel for sequences on tokens that were packed beforehand and puts nothing back, which
is the least that attention can take under such a mask; "free" does nothing at all. Neither makes a
mask. What they return is zero, so that the figures are of time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from smartattn.backends import BACKENDS
from smartattn.call import Call
from smartattn.plan import Pattern, Plan
from smartattn.timing import interleaved

from . import common, models
from .calls import VARLEN
from .common import Run, mean_of, number
from .models import Result, Workload
from .models_page import is_padded

PACKED, FREE = "packed", "free"
IMPLEMENTATIONS = (*models.IMPLEMENTATIONS, PACKED, FREE)


@dataclass
class Attention:
    """The two attention functions, for one batch at a time."""

    #: (batch,) real tokens of each row.
    lengths: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    kernels: dict[Any, Callable[[], torch.Tensor]] = field(default_factory=dict)
    outputs: dict[Any, torch.Tensor] = field(default_factory=dict)

    def begin(self, lengths: np.ndarray[Any, Any]) -> None:
        """Takes the lengths of another batch, and forgets what belongs to the one before."""
        self.lengths = lengths
        self.kernels.clear()
        self.outputs.clear()

    def free(
        self, module: torch.nn.Module, query: torch.Tensor, *arguments: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Zeros, of (batch, q_len, heads, head_dim)."""
        batch, heads, length, dim = shape = query.shape
        if shape not in self.outputs:
            self.outputs[shape] = query.new_zeros(batch, length, heads, dim)
        return self.outputs[shape], None

    def packed(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *arguments: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """The same, after the kernel has run on packed tokens of the batch's lengths."""
        causal = bool(getattr(module, "is_causal", True))
        place = (query.shape, key.shape, causal)
        if place not in self.kernels:
            self.kernels[place] = fastest(self.lengths, causal, query, key)
        self.kernels[place]()
        return self.free(module, query)


def fastest(
    lengths: np.ndarray[Any, Any], causal: bool, query: torch.Tensor, key: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The fastest kernel for sequences of these lengths, on random tokens in one row.

    Args:
        query, key: padded tensors whose heads, dim, dtype and device it takes.
    """
    total, device = int(lengths.sum()), query.device
    starts = np.zeros((1, total), dtype=bool)
    starts[0, np.cumsum(lengths)[:-1]] = True
    pattern = Pattern.CAUSAL if causal else Pattern.BIDIRECTIONAL
    plan = Plan(1, total, total, pattern, device, packed=starts)
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    call = Call(
        device, query.dtype, 1, total, total, heads, kv_heads, dim, dim, self_attention=True
    )
    states = [
        torch.randn(1, total, count, dim, dtype=query.dtype, device=device).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    ]
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    for backend in BACKENDS:
        if backend.name in VARLEN and not backend.refusals(plan, call):
            run = backend.bind(plan, call)
            runs[backend.name] = lambda run=run: run(*states, {})  # type: ignore[misc]
    times = interleaved(runs, device, max_rounds=9, seconds=0.1)
    return runs[min(times, key=lambda name: times[name].device_us)]


ATTENTION = Attention()


def register() -> None:
    """Makes both known to Transformers."""
    for name, function in ((PACKED, ATTENTION.packed), (FREE, ATTENTION.free)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *arguments, **kwargs: None)


def workloads() -> list[Workload]:
    """The forwards of :func:`benchmarks.models.workloads`."""
    return [one for one in models.workloads() if one.task in ("forward", "prefill")]


def tiny_workloads() -> list[Workload]:
    """The same for a CPU."""
    return [one for one in models.tiny_workloads() if one.task in ("forward", "prefill")]


def measure(workload: Workload, model: Any, *asked: Any, **options: Any) -> Result:
    """See :func:`benchmarks.models.measure`."""
    lengths = models.lengths_for(workload, torch.Generator().manual_seed(1))
    ATTENTION.begin(lengths.numpy())
    try:
        return models.measure(workload, model, *asked, implementations=IMPLEMENTATIONS, **options)
    finally:
        model.set_attn_implementation("sdpa")
        ATTENTION.begin(np.zeros(0, dtype=np.int64))


def gains(result: Result) -> dict[str, float]:
    """Time of the better of sdpa and FA2 over that of each of the others."""
    better = min(
        result.median_ms[name] for name in models.IMPLEMENTATIONS[:2] if name in result.median_ms
    )
    return {
        name: better / result.median_ms[name]
        for name in ("smart", PACKED, FREE)
        if name in result.median_ms
    }


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    found = gains(result)
    return (
        result.workload,
        *(number(result.median_ms.get(name), ".2f") for name in IMPLEMENTATIONS),
        *(number(found.get(name), ".3f") for name in ("smart", PACKED, FREE)),
    )


def table(results: list[Result]) -> str:
    """Markdown, one row per workload, and the means of what each saves."""
    over = [f"better / {name}" for name in ("smart", PACKED, FREE)]
    header = ("workload", "sdpa ms", "FA2 ms", *(f"{n} ms" for n in IMPLEMENTATIONS[2:]), *over)
    text = common.markdown(header, map(row, results))
    padded = {one.name for one in [*workloads(), *tiny_workloads()] if is_padded(one)}
    parts = [
        ("of all", results),
        (
            "of padded forwards of at least 8,000 tokens",
            [r for r in results if r.workload in padded],
        ),
    ]
    for what, chosen in parts:
        if chosen:
            means = _means(chosen)
            text += f"\n\nGeometric means {what}, {len(chosen)} workloads: {means}"
    return text


def _means(results: Sequence[Result]) -> str:
    cells = []
    for name in ("smart", PACKED, FREE):
        mean = mean_of([found[name] for result in results if name in (found := gains(result))])
        over = [r.median_ms["sdpa"] / r.median_ms[name] for r in results if name in r.median_ms]
        cells.append(
            f"better / {name} {number(mean, '.3f')} (sdpa / {name} {number(mean_of(over), '.3f')})"
        )
    return ", ".join(cells) + "."


def page(runs: Sequence[Run]) -> list[str]:
    """The parts of the page, in Markdown."""
    name = next((run.versions.get("device") for run in runs), None) or "unknown device"
    parts = [
        f"# What attention could save at most: {name}",
        "Made by `python -m benchmarks.bounds`.",
    ]
    parts += [_HOW_TO_READ, common.described(runs)]
    for run in runs:
        parts += [f"## Times, {run.label}", table(run.results)]
    names = [one.name for one in workloads()]
    return [*parts, common.left_out(runs, names)]


_HOW_TO_READ = """\
Milliseconds per forward, the median of interleaved rounds. "packed" runs the fastest kernel for
sequences on tokens that were packed beforehand, and puts nothing back; "free" computes no attention
at all. Neither makes a mask, and what both return is zero. "better" is the better one of `sdpa` and
`flash_attention_2`: "better / packed" is what an attention implementation could gain at most with
these kernels, "better / free" with any, each as far as the rounds of a run agree."""


def main() -> None:
    """Runs the benchmark, prints its table and writes what was asked for."""
    arguments = common.parser(__doc__, rounds=30, seconds=2.0).parse_args()
    register()
    grid = tiny_workloads() if arguments.tiny else workloads()
    runs = common.runs_of(arguments, Result, grid, models.build, measure, row, table)
    if arguments.page:
        common.write(arguments.page, page(runs))


if __name__ == "__main__":
    main()
