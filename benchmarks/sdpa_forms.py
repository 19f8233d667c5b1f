"""How torch's SDPA is best asked for a call: which kernel, and how grouped heads are handed over.

Run from the repository's root: ``python -m benchmarks.sdpa_forms --help``. Each call of one layer,
without gradients, is run in every form that computes it: as torch takes grouped heads
(``grouped``), with keys and values repeated (``repeated``), with the heads of a group as queries of
one head (``folded``); on GPUs by each of torch's kernels, which its own order chooses from; and as
the backend ``sdpa`` does it (``smart``). All are interleaved in each round.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from smartattn.backends import NAMED
from smartattn.backends.sdpa import repeated
from smartattn.call import Call
from smartattn.plan import Pattern, Plan
from smartattn.timing import interleaved

from . import common
from .common import mean_of, number

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
FORMS = ("smart", "grouped", "repeated", "folded", *KERNELS)
#: (heads, kv_heads, head_dim) of SmolLM2, Llama 3, Qwen2-0.5B and BERT-base.
HEADS = ((9, 3, 64), (32, 8, 128), (14, 2, 64), (12, 12, 64))
#: Largest difference between two forms, relative to the largest value.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
#: Scores that the math kernel may hold.
_MOST_SCORES = 2**28


@dataclass(frozen=True)
class Workload:
    """One call. ``model`` is its dtype: calls of one dtype come together."""

    model: str
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    #: Share of the keys that is padding on the left, in all rows but the first.
    padding: float

    @property
    def name(self) -> str:
        """As it is printed and asked for."""
        padded = f" padded {self.padding:.0%}" if self.padding else ""
        return (
            f"{self.model} {self.batch}x{self.q_len}/{self.kv_len} "
            f"{self.heads}/{self.kv_heads}x{self.head_dim}{padded}"
        )


@dataclass
class Result:
    """Microseconds per call by form, those of the device on a GPU; forms that refuse are absent."""

    workload: str
    us: dict[str, float]
    host_us: dict[str, float]


def workloads() -> list[Workload]:
    """Steps of decoding, a few queries at once (assisted decoding), and prefills."""
    return _workloads(((1, 8), (1, 4)), (128, 1024, 8192, 65_536), (1, 8, 32))


def tiny_workloads() -> list[Workload]:
    """The same for a CPU."""
    return _workloads(((1, 2), (1, 1)), (32, 128, 512, 2048), (1, 8))


def _workloads(
    prefills: Sequence[tuple[int, int]], lengths: Sequence[int], batches: Sequence[int]
) -> list[Workload]:
    found = []
    for dtype in ("float32", "bfloat16"):
        for heads in HEADS:
            for padding in (0.0, 0.4):
                for batch in batches:
                    for length in lengths:
                        # One row of left padding is a shorter row.
                        if batch == 1 and padding:
                            continue
                        found.append(Workload(dtype, batch, 1, length, *heads, padding))
                    if not padding:
                        found.append(Workload(dtype, batch, 5, lengths[2], *heads, 0.0))
                for batch, share in prefills:
                    length = lengths[2] // share
                    rows = batch * (2 if padding else 1)
                    found.append(Workload(dtype, rows, length, length, *heads, padding))
    return found


def measure(
    workload: Workload, model: None, device: torch.device, rounds: int, seconds: float, end: float
) -> Result:
    """Times every form that computes the call, checked against the form ``repeated``."""
    one, dtype = workload, getattr(torch, workload.model)
    generator = torch.Generator(device=device).manual_seed(0)

    def made(heads: int, length: int) -> torch.Tensor:
        shape = (one.batch, heads, length, one.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    query, key, value = (
        made(one.heads, one.q_len),
        made(one.kv_heads, one.kv_len),
        made(one.kv_heads, one.kv_len),
    )
    real = None
    if one.padding:
        real = np.ones((one.batch, one.kv_len), dtype=bool)
        real[1:, : int(one.padding * one.kv_len)] = False
    shift = one.kv_len - one.q_len
    plan = Plan(one.batch, one.q_len, one.kv_len, Pattern.CAUSAL, device, shift=shift, real=real)
    call = Call(
        device, dtype, one.batch, one.q_len, one.kv_len, one.heads, one.kv_heads, one.head_dim,
        one.head_dim, self_attention=one.q_len == one.kv_len,
    )  # fmt: skip
    forms = _forms(plan, call, query, key, value)
    right = forms["repeated"]().float()
    scale = float(right.abs().max())
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    with torch.no_grad():
        for name, form in forms.items():
            try:
                output = form().float()
            except (RuntimeError, torch.OutOfMemoryError):
                # torch's guards: this kernel does not take the call.
                continue
            # Rows that see nothing are anybody's.
            seen = torch.isfinite(right) & torch.isfinite(output)
            error = float((output - right)[seen].abs().max()) / scale
            if not error <= _TOLERANCE[one.model]:
                raise AssertionError(f"{name} differs by {error:.2g} on {one.name}")
            runs[name] = form
        times = interleaved(runs, device, max_rounds=rounds, seconds=seconds)
    return Result(
        one.name,
        {name: time.device_us for name, time in times.items()},
        {name: time.host_us for name, time in times.items()},
    )


def _forms(
    plan: Plan, call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    mask = None
    causal = plan.is_causal and call.q_len > 1
    if plan.is_padded or (causal and not plan.is_aligned):
        mask, causal = plan.bias(call.dtype), False
    group = call.group_size
    run = NAMED["sdpa"].bind(plan, call)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    def by_repeating() -> torch.Tensor:
        return attend(query, repeated(key, group), repeated(value, group))

    def by_folding() -> torch.Tensor:
        shape = (call.batch, call.kv_heads, group * call.q_len, call.head_dim)
        rows = mask
        if rows is not None and call.q_len > 1:
            rows = rows.repeat(1, 1, group, 1)
        folded = scaled_dot_product_attention(query.reshape(shape), key, value, attn_mask=rows)
        return folded.reshape(query.shape)

    def by_kernel(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            # torch says why each of the other kernels does not run.
            warnings.simplefilter("ignore")
            return attend(query, key, value)

    forms: dict[str, Callable[[], torch.Tensor]] = {
        "smart": lambda: run(query, key, value, {}).transpose(1, 2),
        "repeated": by_repeating,
    }
    if group > 1:
        forms["grouped"] = lambda: attend(query, key, value)
        if not causal:
            forms["folded"] = by_folding
    if call.device.type == "cuda":
        scores = call.batch * call.heads * call.q_len * call.kv_len
        for name, kernel in KERNELS.items():
            if name != "math" or scores <= _MOST_SCORES:
                forms[name] = lambda kernel=kernel: by_kernel(kernel)  # type: ignore[misc]
    return forms


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    best = min(result.us, key=lambda name: result.us[name])
    return (
        result.workload,
        *(number(result.us.get(name), ".0f") for name in FORMS),
        best,
        f"{result.us['smart'] / result.us[best]:.2f}",
    )


def table(results: list[Result]) -> str:
    """Markdown, one row per call; forms that no call has are left out."""
    header = ("microseconds", *FORMS, "best", "smart / best")
    rows = [header, *map(row, results)]
    kept = [
        place
        for place, name in enumerate(header)
        if name not in FORMS or any(name in result.us for result in results)
    ]
    header, *cells = (tuple(one[place] for place in kept) for one in rows)
    text = common.markdown(header, cells)
    if results:
        ratios = [result.us["smart"] / min(result.us.values()) for result in results]
        text += f"\n\nsmart / best: geometric mean {mean_of(ratios):.3f}, worst {max(ratios):.2f}."
    return text


def page(runs: Sequence[Any]) -> list[str]:
    """The parts of the page, in Markdown."""
    name = next((run.versions.get("device") for run in runs), None) or "unknown device"
    parts = [
        f"# How SDPA is asked: {name}",
        "Made by `python -m benchmarks.sdpa_forms`: one attention call by batch x queries / keys "
        "and heads / key heads x head size, in every form that computes it. `smart` is the "
        "backend `sdpa`, whose output lies as (batch, queries, heads, head size).",
        common.described(runs),
    ]
    for run in runs:
        parts += [f"## Times, {run.label}", table(run.results)]
    return parts


def main() -> None:
    """Runs the benchmark, prints its table and writes what was asked for."""
    arguments = common.parser(__doc__, rounds=15, seconds=0.3).parse_args()
    grid = tiny_workloads() if arguments.tiny else workloads()
    runs = common.runs_of(arguments, Result, grid, lambda *_: None, measure, row, table)
    if arguments.page:
        common.write(arguments.page, page(runs))


if __name__ == "__main__":
    main()
