"""From which padding on flash kernels skip right padding under a causal mask, which none has to.

Run from the repository's root: ``python -m benchmarks.skipping --help``. Real tokens never see what
comes after them, so that the padded tensors can be handed over as they are (``dense``), and the
padding is computed; or as one row of sequences, between which it is skipped (``in place``). Both
are timed against the same kernel on tokens that were packed beforehand, without gradients. Another
way of FlashAttention-3 is timed beside them: the padding as sequences of its own without keys, for
which it writes zeros (``own blocks``), without keeping NaN in the padding from its tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from smartattn.backends import NAMED, Backend, flash, flash_attention_3
from smartattn.backends.flash import Route, bind_varlen
from smartattn.call import Call, Runner
from smartattn.packing import Told
from smartattn.plan import Plan
from smartattn.timing import interleaved
from smartattn.workload import Memory, as_padded
from smartattn.workload import Workload as Shape

from . import common
from .calls import packed_beforehand
from .common import mean_of, number

BACKENDS = ("flash_attention_2", "flash_attention_3", "torch_varlen")
FORMS = ("dense", "in place", "own blocks")
#: Largest difference of two forms at real tokens, relative to the largest value.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Workload:
    """A call of one backend. ``model`` is that backend: its calls come together."""

    model: str
    shape: Shape

    @property
    def name(self) -> str:
        """As it is printed and asked for."""
        s = self.shape
        keys = "token-major" if s.memory == "transposed" else "head-major"
        return (
            f"{self.model} {s.batch}x{s.kv_len} {s.heads}/{s.kv_heads}x{s.head_dim} "
            f"pad{s.padding_share:.0%} {keys}"
        )


@dataclass
class Result:
    """Microseconds of the device per call by form, and on tokens packed beforehand."""

    workload: str
    #: Padding tokens per row, and rows of the kernel's tiles.
    spared: float
    rows: int
    us: dict[str, float]
    packed_us: float
    #: What the backend does as it is.
    chosen: str


def workloads(dtype: str = "bfloat16") -> list[Workload]:
    """Short rows, where it is not plain which is faster; as many tokens in few and many."""
    return [
        _workload(backend, (batch, length, *heads), share, dtype, memory)
        for backend in BACKENDS
        for heads in ((32, 8, 64), (32, 8, 128), (16, 16, 64), (16, 16, 128))
        for batch, length in ((32, 64), (32, 128), (32, 256), (8, 512), (32, 512), (8, 1024))
        for share in (0.25, 0.5, 0.75)
        for memory in ("transposed", "concatenated")
    ]


def tiny_workloads() -> list[Workload]:
    """A few that a CPU can run."""
    return [
        _workload(backend, (3, 24, 4, 2, 16), share, "float32", "transposed")
        for backend in BACKENDS
        for share in (0.25, 0.5)
    ]


def _workload(
    backend: str, shape: tuple[int, int, int, int, int], share: float, dtype: str, memory: Memory
) -> Workload:
    batch, length, heads, kv_heads, head_dim = shape
    made = Shape(
        "forward", True, "right", dtype, batch, length, length, heads, kv_heads, head_dim,
        padding_share=share, memory=memory,
    )  # fmt: skip
    return Workload(backend, as_padded(made))


def _bound(backend: Backend, plan: Plan, call: Call, needed: float) -> Runner:
    with mock.patch.object(flash, "_SPARED_TOKENS", needed):
        return backend.bind(plan, call)


def measure(
    workload: Workload, model: None, device: torch.device, rounds: int, seconds: float, end: float
) -> Result:
    """Times both ways and the packed tokens, in turns."""
    shape, backend = workload.shape, NAMED[workload.model]
    plan, call = shape.plan(device), shape.call(device)
    tensors = shape.tensors(device)
    runners = {
        "dense": _bound(backend, plan, call, math.inf),
        "in place": _bound(backend, plan, call, -math.inf),
    }
    if workload.model == "flash_attention_3":
        kernel = flash_attention_3._varlen(plan, call, in_place=False)
        runners["own blocks"] = bind_varlen(kernel, Route.IN_PLACE, plan, call, Told.KEYS)
    packed_plan, packed_call, states = packed_beforehand(shape, tensors)
    run_packed = backend.bind(packed_plan, packed_call)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda run=run: run(*tensors[:3], {})  # type: ignore[misc]
        for name, run in runners.items()
    }
    forms["packed"] = lambda: run_packed(*states, {})
    real = torch.from_numpy(shape.real_queries()).to(device)
    with torch.no_grad():
        right = forms["packed"]()[0].float()
        for name in runners:
            error = float((forms[name]()[real].float() - right).abs().max() / right.abs().max())
            if not error <= _TOLERANCE:
                raise AssertionError(f"{name} differs by {error:.2g} on {workload.name}")
        times = interleaved(forms, device, max_rounds=rounds, seconds=seconds)
    return Result(
        workload.name,
        spared=(plan.batch * plan.q_len - plan.real_q) / plan.batch,
        rows=backend.tile(plan, call)[0],
        us={name: times[name].device_us for name in runners},
        packed_us=times["packed"].device_us,
        chosen="in place" if flash.skipping_pays(plan, call) else "dense",
    )


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    return (
        result.workload,
        f"{result.spared:.0f}",
        f"{result.rows}",
        *(number(result.us.get(name), ".1f") for name in FORMS),
        f"{result.packed_us:.1f}",
        f"{result.us['in place'] / result.us['dense']:.2f}",
        result.chosen,
        f"{result.us[result.chosen] / min(result.us['dense'], result.us['in place']):.2f}",
    )


def table(results: list[Result]) -> str:
    """Markdown, by padding tokens per row in units of the rows of a tile."""
    header = (
        *("call", "spared per row", "rows of a tile", *FORMS, "packed"),
        *("in place / dense", "chosen", "chosen / better"),
    )
    ordered = sorted(results, key=lambda r: (r.workload.split()[0], r.spared / r.rows))
    text = common.markdown(header, list(map(row, ordered)))
    lost = [r.us[r.chosen] / min(r.us["dense"], r.us["in place"]) for r in results]
    if lost:
        text += f"\n\nchosen / better: geometric mean {mean_of(lost):.3f}, worst {max(lost):.2f}."
    return text


def page(runs: Sequence[Any]) -> list[str]:
    """The parts of the page, in Markdown."""
    name = next((run.versions.get("device") for run in runs), None) or "unknown device"
    parts = [
        f"# Right padding under a causal mask, computed or skipped: {name}",
        "Made by `python -m benchmarks.skipping`: microseconds of the device.",
        common.described(runs),
    ]
    for run in runs:
        parts += [f"## Times, {run.label}", table(run.results)]
    return parts


def main() -> None:
    """Runs the benchmark, prints its table and writes what was asked for."""
    arguments = common.parser(__doc__, rounds=11, seconds=0.05).parse_args()
    grid = tiny_workloads() if arguments.tiny else workloads()
    usable = [w for w in grid if arguments.tiny or NAMED[w.model].unavailable() is None]
    runs = common.runs_of(arguments, Result, usable, lambda *_: None, measure, row, table)
    if arguments.page:
        common.write(arguments.page, page(runs))


if __name__ == "__main__":
    main()
