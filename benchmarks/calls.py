"""What one attention call of ``smart`` costs, on the device and on the host.

Run from the repository's root: ``python -m benchmarks.calls --help``. Five things are measured: the
device time of a padded call against the same kernel on tokens that were packed beforehand; the host
time of a layer's call against that of the kernel alone; what the plan of a forward costs; the
import and the first call; and the memory of a call.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import masking_utils

from smartattn import trace
from smartattn.backends import (
    BACKENDS,
    Backend,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    torch_varlen,
    triton_varlen,
)
from smartattn.call import Call
from smartattn.choose import choose
from smartattn.integration import smart_attention
from smartattn.masking import smart_mask
from smartattn.plan import Plan
from smartattn.profiles import profile_for
from smartattn.timing import cache_flush, interleaved
from smartattn.triton_launch import Launcher
from smartattn.workload import Memory, Side, Tensors, Workload, as_padded

from . import HIDDEN, common
from .common import Budget, Judged, Run, judged, markdown, mean_of, number, synchronize

#: Backends whose kernels take packed sequences.
VARLEN = (
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
    *("torch_varlen", "triton_varlen", "sdpa_unpadded"),
)
PADDING = 0.5
#: What is wanted: device time over that of packed tokens, microseconds of the host per layer.
_DEVICE, _HOST_US = 1.15, 5.0
#: Calls in a round of host times, and rounds.
_CALLS, _ROUNDS = 50, 11


@dataclass(frozen=True)
class Case:
    """A padded call to time on the device."""

    workload: Workload
    model: str = ""

    @property
    def name(self) -> str:
        """A short unique name, which ``--only`` matches."""
        w = self.workload
        return f"{self.group} {w.batch}x{w.kv_len}"

    @property
    def group(self) -> str:
        """The name without the size."""
        w = self.workload
        pattern = "causal" if w.causal else "bidirectional"
        keys = "token-major" if w.memory == "transposed" else "head-major"
        return f"{pattern} {w.side} {w.heads}/{w.kv_heads}x{w.head_dim} {keys}"


def cases(dtype: str = "bfloat16") -> Iterator[Case]:
    """The calls of the report, 2,048 to 16,384 padded tokens each."""
    # Caches, which concatenate the keys head-major, belong to causal models.
    kinds: tuple[tuple[bool, Side, Memory], ...] = (
        (True, "left", "concatenated"),
        (True, "left", "transposed"),
        (True, "right", "concatenated"),
        (True, "right", "transposed"),
        (False, "left", "transposed"),
        (False, "right", "transposed"),
    )
    for causal, side, memory in kinds:
        for heads, kv_heads in ((32, 8), (16, 16)):
            for head_dim in (64, 128):
                for batch in (8, 32):
                    for tokens in (2048, 4096, 8192, 16384):
                        length = tokens // batch
                        shape = (batch, length, length, heads, kv_heads, head_dim)
                        yield _case("forward", causal, side, dtype, shape, memory)


def tiny_cases() -> Iterator[Case]:
    """A few that a CPU can run, to test the benchmark itself."""
    for causal, side in ((True, "left"), (True, "right"), (False, "right")):
        yield _case("forward", causal, side, "float32", (4, 24, 24, 4, 2, 16), "transposed")
    yield _case("forward", True, "left", "float32", (4, 24, 24, 4, 2, 16), "concatenated")


def _case(
    mode: Any, causal: bool, side: Any, dtype: str, shape: tuple[int, ...], memory: Memory
) -> Case:
    share = 0.0 if side == "none" else PADDING
    made = Workload(mode, causal, side, dtype, *shape, padding_share=share, memory=memory)
    return Case(as_padded(made))


# -- device time and memory ------------------------------------------------------------------------


@dataclass
class Result:
    """Microseconds of device time and bytes above the inputs, of one call.

    "cold" is with the caches of the device flushed before each call, "warm" with the inputs of the
    call before in them, as far as they fit.
    """

    workload: str
    group: str
    size: str
    #: The chosen backend, and the one whose kernel ran on the packed tokens.
    chosen: str
    kernel: str
    warm_us: float
    cold_us: float
    packed_warm_us: float
    packed_cold_us: float
    peak_bytes: int
    packed_peak_bytes: int
    #: Of the padded output, and of the packed one.
    output_bytes: int
    packed_output_bytes: int
    #: Largest |difference| of the two at real tokens / largest value.
    difference: float

    @property
    def warm(self) -> float:
        """Device time over that of packed tokens, caches warm."""
        return self.warm_us / self.packed_warm_us

    @property
    def cold(self) -> float:
        """The same with the caches flushed."""
        return self.cold_us / self.packed_cold_us


def packed_beforehand(
    workload: Workload, tensors: Tensors
) -> tuple[Plan, Call, list[torch.Tensor]]:
    """(plan, call, query, key and value) of the real tokens of a padded batch in one row."""
    device = tensors.query.device
    real = torch.from_numpy(workload.real_keys()).to(device)
    lengths = workload.real_keys().sum(axis=1)
    total = int(lengths.sum())
    starts = np.zeros((1, total), dtype=bool)
    starts[0, np.cumsum(lengths)[:-1]] = True
    plan = Plan(1, total, total, workload.plan(device).pattern, device, packed=starts)
    call = replace(workload.call(device), batch=1, q_len=total, kv_len=total, token_major_keys=True)
    states = [one.transpose(1, 2)[real][None].transpose(1, 2) for one in tensors[:3]]
    return plan, call, states


def _chosen(plan: Plan, call: Call, allowed: tuple[str, ...] | None = None) -> Backend:
    return choose(plan, call, profile_for(call.device), BACKENDS, allowed).backend


@torch.no_grad()
def measure(case: Case, device: torch.device, rounds: int, seconds: float) -> Result:
    """Times the chosen backend on a padded call, and its kernel on the tokens packed beforehand.

    Where the chosen backend takes no packed tokens, the best one that does is the reference.

    Args:
        seconds: for warm and for cold caches each.
    """
    workload = case.workload
    tensors = workload.tensors(device)
    plan, call = workload.plan(device), workload.call(device)
    backend = _chosen(plan, call)
    run = backend.bind(plan, call)
    packed_plan, packed_call, states = packed_beforehand(workload, tensors)
    allowed = (backend.name,) if backend.name in VARLEN else VARLEN
    kernel = _chosen(packed_plan, packed_call, allowed)
    run_packed = kernel.bind(packed_plan, packed_call)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "smart": lambda: run(*tensors[:3], {}),
        "packed": lambda: run_packed(*states, {}),
    }
    outputs = {name: function() for name, function in functions.items()}
    real = torch.from_numpy(workload.real_queries()).to(device)
    right = outputs["packed"][0].float()
    difference = (outputs["smart"][real].float() - right).abs().max() / right.abs().max()
    sizes = {name: output.numel() * output.element_size() for name, output in outputs.items()}
    del outputs, right
    warm = interleaved(functions, device, max_rounds=rounds, seconds=seconds)
    flush = cache_flush(device)
    cold = interleaved(functions, device, max_rounds=rounds, seconds=seconds, flush=flush)
    return Result(
        workload=case.name,
        group=case.group,
        size=f"{workload.batch}x{workload.kv_len}",
        chosen=backend.name,
        kernel=kernel.name,
        warm_us=warm["smart"].device_us,
        cold_us=cold["smart"].device_us,
        packed_warm_us=warm["packed"].device_us,
        packed_cold_us=cold["packed"].device_us,
        peak_bytes=warm["smart"].peak_bytes,
        packed_peak_bytes=warm["packed"].peak_bytes,
        output_bytes=sizes["smart"],
        packed_output_bytes=sizes["packed"],
        difference=float(difference),
    )


# -- host time -------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A self-attention layer as Transformers' are declared."""

    is_causal = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Never called."""
        return hidden_states


def host_cases(dtype: str = "bfloat16") -> dict[str, Workload]:
    """The kinds of calls whose host time is measured, by name."""
    shapes: dict[str, tuple[Any, bool, Any, tuple[int, ...], Memory]] = {
        "encoder, no padding": ("forward", False, "none", (32, 128, 128, 16, 16, 64), "transposed"),
        "encoder, right": ("forward", False, "right", (32, 128, 128, 16, 16, 64), "transposed"),
        "encoder, right, large": (
            *("forward", False, "right"),
            *((32, 512, 512, 16, 16, 64), "transposed"),
        ),
        "prefill, no padding": ("forward", True, "none", (8, 256, 256, 32, 8, 64), "concatenated"),
        "prefill, left": ("forward", True, "left", (8, 256, 256, 32, 8, 64), "concatenated"),
        "prefill, left, large": (
            *("forward", True, "left"),
            *((8, 1024, 1024, 32, 8, 128), "concatenated"),
        ),
        "prefill, right": ("forward", True, "right", (8, 256, 256, 32, 8, 64), "concatenated"),
        "decode, no padding": ("decode", True, "none", (8, 1, 512, 32, 8, 64), "concatenated"),
        "decode, left": ("decode", True, "left", (8, 1, 512, 32, 8, 64), "concatenated"),
    }
    return {
        name: _case(mode, causal, side, dtype, shape, memory).workload
        for name, (mode, causal, side, shape, memory) in shapes.items()
    }


def _small(workload: Workload) -> Workload:
    """The same kind for a CPU."""
    length = 16 if workload.q_len > 1 else 1
    small = replace(workload, batch=2, q_len=length, kv_len=16, heads=4, kv_heads=2, head_dim=16)
    return as_padded(replace(small, dtype="float32"))


def mask_of(workload: Workload, device: torch.device) -> Callable[[Any], Any]:
    """A function that has a mask function of Transformers make the mask of a batch."""
    causal = workload.causal or workload.mode == "decode"
    real = None
    if workload.side != "none":
        real = torch.from_numpy(workload.real_keys()).to(device)
    pattern = (
        masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    )
    given: dict[str, Any] = {
        "batch_size": workload.batch,
        "q_length": workload.q_len,
        "kv_length": workload.kv_len,
        "q_offset": workload.shift,
        "mask_function": pattern,
        "attention_mask": real,
        "allow_is_bidirectional_skip": not causal,
        "dtype": workload.torch_dtype,
        "device": device,
    }
    return lambda function: function(**given)


class _Recorder:
    """Stands for a function, keeps what it is called with, and calls it."""

    def __init__(self, function: Callable[..., Any], calls: list[Callable[[], Any]]) -> None:
        self._function, self._calls = function, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.append(lambda: self._function(*args, **kwargs))
        return self._function(*args, **kwargs)


class _Namespace:
    """Stands for a module, and records the calls of its functions."""

    def __init__(self, module: Any, calls: list[Callable[[], Any]]) -> None:
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        return _Recorder(getattr(self._module, name), self._calls)


class _Launches:
    """Stands for a launcher of Triton's kernels; what it records launches what was built."""

    def __init__(self, launcher: Launcher, calls: list[Callable[[], Any]]) -> None:
        self._launcher, self._calls = launcher, calls

    def __call__(
        self,
        device: torch.device,
        kind: Any,
        grid: Any,
        tensors: Any,
        arguments: Any,
        **options: int,
    ) -> None:
        self._launcher(device, kind, grid, tensors, arguments, **options)
        built = self._launcher.built(device, kind)
        assert built is not None
        stream = torch.cuda.current_stream(device).cuda_stream
        # The tensors have to be there for as long as their addresses.
        self._calls.append(lambda: (built.launch(grid, stream, arguments), tensors))


@contextlib.contextmanager
def recorded() -> Iterator[list[Callable[[], Any]]]:
    """The calls of kernels that backends bound inside the block make, as functions to repeat.

    What is recorded is the thinnest entry point that a backend uses: the functions of flash-attn's
    extension, the operators of FlashAttention-3 and of torch, the functions of FlashAttention-4,
    what Triton has built, and ``scaled_dot_product_attention``.
    """
    calls: list[Callable[[], Any]] = []
    extension, package = flash_attention_2._extension(), flash_attention_2._package()
    operator, why = flash_attention_3._operator()
    newest, newest_why = flash_attention_4._functions()
    aten, varlen = torch_varlen._operator(), torch_varlen._varlen_attn()
    dense = torch_varlen._dense_operator()
    stand_ins: list[tuple[Any, str, Any]] = [
        (flash_attention_2, "_extension", extension and _Namespace(extension, calls)),
        (flash_attention_2, "_package", (_Namespace(package[0], calls), *package[1:])),
        (flash_attention_3, "_operator", (_Recorder(operator, calls), why)),
        (
            flash_attention_4,
            "_functions",
            (newest and type(newest)(*(_Recorder(one, calls) for one in newest)), newest_why),
        ),
        (torch_varlen, "_operator", aten and _Recorder(aten, calls)),
        (torch_varlen, "_dense_operator", dense and _Recorder(dense, calls)),
        (torch_varlen, "_varlen_attn", (_Recorder(varlen[0], calls), *varlen[1:])),
    ]
    functional = torch.nn.functional
    attention = _Recorder(functional.scaled_dot_product_attention, calls)
    with contextlib.ExitStack() as stack:
        for module, name, value in stand_ins:
            stack.enter_context(mock.patch.object(module, name, _constant(value)))
        stack.enter_context(
            mock.patch.object(functional, "scaled_dot_product_attention", attention)
        )
        launch = _Launches(triton_varlen._launch, calls)
        stack.enter_context(mock.patch.object(triton_varlen, "_launch", launch))
        yield calls


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _host_us(
    functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int, calls: int
) -> dict[str, float]:
    """Microseconds until a call returns, medians of interleaved rounds, the device kept busy."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize(device)
            if device.type == "cuda":
                # Nothing is ever waited for: all calls are queued before the first one runs.
                torch.cuda._sleep(20_000_000)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    synchronize(device)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def host_times(
    name: str, workload: Workload, device: torch.device, rounds: int = _ROUNDS, calls: int = _CALLS
) -> dict[str, Any]:
    """Microseconds of a layer's call under smart, and of the calls of kernels that it makes.

    What comes beyond has two parts: ``layer_us`` is smart's own, the look-up of the choice;
    ``runner_us`` is the backend's, such as views, gathering and scattering. ``views_us`` is what
    views of query, key and value as (batch, length, heads, head_dim) take, which all kernels but
    SDPA's want of whoever calls them with what Transformers hands over.
    """
    tensors, layer = workload.tensors(device), Layer()
    query, key, value = tensors[:3]
    mask = mask_of(workload, device)(smart_mask)
    scaling = workload.head_dim**-0.5

    def smart() -> torch.Tensor:
        return smart_attention(layer, query, key, value, mask, dropout=0.0, scaling=scaling)[0]

    def choice() -> str:
        nonlocal mask
        kept = mask
        with trace() as traced:
            # A plan keeps the settings of when it was made, so this takes another one.
            mask = mask_of(workload, device)(smart_mask)
            smart()
        mask = kept
        return traced.rows[-1].backend

    for _ in range(calls):
        smart()
    # A backend that has kernels to build comes once a shape has come often enough.
    for _ in range(3):
        chosen = choice()
        # A plan keeps what it has chosen, too.
        mask = mask_of(workload, device)(smart_mask)
        smart()
        backend = next(one for one in BACKENDS if one.name == chosen)
        plan, call = mask.plan, workload.call(device)
        assert plan is not None
        with recorded() as kernels:
            backend.bind(plan, call)(query, key, value, {})
        assert kernels, f"{chosen} runs a kernel that is not known here"
        run, thin = backend.bind(plan, call), tuple(kernels)

        def bare() -> None:
            for kernel in thin:  # noqa: B023
                kernel()

        functions = {
            "smart": smart,
            "runner": lambda: run(query, key, value, {}),  # noqa: B023
            "bare": bare,
            "views": lambda: [states.transpose(1, 2) for states in (query, key, value)],
        }
        found = _host_us(functions, device, rounds, calls)
        if choice() == chosen:
            break
    return {
        "case": name,
        "chosen": chosen,
        "kernels": len(thin),
        "smart_us": found["smart"],
        "kernel_us": found["bare"],
        "layer_us": found["smart"] - found["runner"],
        "runner_us": found["runner"] - found["bare"],
        "views_us": found["views"],
        "beyond_us": found["smart"] - found["bare"],
    }


@torch.no_grad()
def plan_times(
    name: str, workload: Workload, device: torch.device, rounds: int = 21
) -> dict[str, Any]:
    """Microseconds of the host that a forward pays once: the plan, and what its first layer adds.

    The plan's include the copy of the mask to the host, with the device idle.
    """
    query, key, value = workload.tensors(device)[:3]
    make, layer = mask_of(workload, device), Layer()
    found: dict[str, list[float]] = {"plan": [], "sdpa": [], "first": [], "second": []}

    def timed(kind: str, function: Callable[[], Any]) -> Any:
        synchronize(device)
        start = time.perf_counter()
        output = function()
        found[kind].append((time.perf_counter() - start) * 1e6)
        return output

    for _ in range(rounds):
        timed("sdpa", lambda: make(masking_utils.sdpa_mask))
        mask = timed("plan", lambda: make(smart_mask))
        for kind in ("first", "second"):
            timed(kind, lambda: smart_attention(layer, query, key, value, mask))  # noqa: B023
    medians = {kind: statistics.median(times[1:] or times) for kind, times in found.items()}
    return {
        "case": name,
        "plan_us": medians["plan"],
        "sdpa_mask_us": medians["sdpa"],
        "first_layer_us": medians["first"] - medians["second"],
    }


# -- start -----------------------------------------------------------------------------------------

_START = """
import json, sys, time
import benchmarks
benchmarks.hide(sys.argv[2:])
import torch, transformers
from transformers import LlamaForCausalLM, AttentionInterface, masking_utils
start = time.perf_counter()
import smartattn
seconds = time.perf_counter() - start
from benchmarks import calls
print(json.dumps({"import": seconds * 1e3, **calls.first_calls(torch.device(sys.argv[1]))}))
"""


@torch.no_grad()
def first_calls(device: torch.device) -> dict[str, float]:
    """Milliseconds of the first and later forwards' masks and layers in this process.

    The device is up, and torch's SDPA has run once on other shapes.
    """
    name = "prefill, left"
    workload = host_cases("bfloat16" if device.type == "cuda" else "float32")[name]
    if device.type != "cuda":
        workload = _small(workload)
    query, key, value = workload.tensors(device)[:3]
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
    make, layer = mask_of(workload, device), Layer()
    found = {}
    for kind in ("first", "second"):
        found[f"{kind} mask"], mask = common.timed(lambda: make(smart_mask), device)
        run = lambda: smart_attention(layer, query, key, value, mask)  # noqa: B023, E731
        found[f"{kind} layer"], _ = common.timed(run, device)
    return found


def start_times(device: torch.device, runs: int) -> dict[str, float]:
    """Medians of :func:`first_calls` and of the import, each in processes of their own."""
    hidden = [word for name in HIDDEN for word in ("--hide", name)]
    command = [sys.executable, "-c", _START, str(device), *hidden]
    rows = []
    for _ in range(runs):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            raise RuntimeError(f"the process that times the import failed: {done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


# -- page ------------------------------------------------------------------------------------------


def wanted(run: Run, expected: int) -> list[Judged]:
    """What a run is to show."""
    rows = []
    for kind, of in (("warm", lambda r: r.warm), ("cold", lambda r: r.cold)):
        worst = max(run.results, key=of, default=None)
        above = sum(of(result) > _DEVICE for result in run.results)
        rows.append(
            judged(
                f"device time / that on packed tokens, caches {kind}, the worst",
                run,
                of(worst) if worst else None,
                at_most=_DEVICE,
                missing=expected - len(run.results),
                note=f"{worst.workload}; {above} of {len(run.results)} above" if worst else "",
            )
        )
    worst_host = max(run.extra.get("host", []), key=lambda row: row["beyond_us"], default=None)
    rows.append(
        judged(
            "host time of a layer beyond its kernel, µs, the worst",
            run,
            worst_host["beyond_us"] if worst_host else None,
            at_most=_HOST_US,
            note=f"{worst_host['case']}, {worst_host['chosen']}" if worst_host else "",
        )
    )
    return rows


_HOW_TO_READ = """\
Each call is of one layer, without gradients, at 50% padding with lengths drawn uniformly. "Packed"
is the same kernel on the real tokens alone, which were put together beforehand and are not put
back: what a padded call could cost at best. Where the chosen backend takes no packed tokens, the
reference is the best one that does."""


def page(run: Run, expected: list[str]) -> list[str]:
    """The parts of the page of one run."""
    parts = [
        f"# One attention call: {run.versions.get('device')}",
        "Made by `python -m benchmarks.calls`.",
        _HOW_TO_READ,
        common.described([run]),
    ]
    if run.results:
        parts += ["## Device time", *_device_tables(run.results)]
    extra = run.extra
    if extra.get("host"):
        parts += [
            "## Host time of a layer",
            'Microseconds until the call returns. "Beyond" is what the call costs more than the\n'
            "kernels it runs, called at their thinnest entry points: smart's own look-up of the\n"
            "choice, and the backend's work around the kernel (views, gathering, scattering).\n"
            '"Views" is what three transposes take, which kernels of (batch, length, heads,\n'
            "head_dim) want of every caller that gets what Transformers hands over.",
            markdown(
                ("call", "chosen", "smart", "kernel", "look-up", "backend", "beyond", "views"),
                [
                    (
                        row["case"],
                        row["chosen"],
                        *(
                            number(row.get(key), ".1f")
                            for key in (
                                *("smart_us", "kernel_us", "layer_us", "runner_us", "beyond_us"),
                                "views_us",
                            )
                        ),
                    )
                    for row in extra["host"]
                ],
            ),
        ]
    if extra.get("plan"):
        parts += [
            "## Once per forward",
            "Microseconds of the host: the plan with its copy of the mask to the host, what\n"
            "Transformers' sdpa takes for its mask (its work on the device not counted), and what\n"
            "the first layer takes longer than the second.",
            markdown(
                ("call", "plan", "mask of sdpa", "first layer"),
                [
                    (
                        row["case"],
                        *(
                            f"{row[key]:.0f}"
                            for key in ("plan_us", "sdpa_mask_us", "first_layer_us")
                        ),
                    )
                    for row in extra["plan"]
                ],
            ),
        ]
    if extra.get("start"):
        parts += [
            "## Start",
            "Milliseconds in a fresh process: `import smartattn` once torch, Transformers and a\n"
            "model class are imported; and the first and the second forward's mask and layer.",
            markdown(
                tuple(extra["start"]), [[f"{value:.1f}" for value in extra["start"].values()]]
            ),
        ]
    parts.append(common.left_out([run], expected))
    if not any(case.name in expected for case in tiny_cases()):
        parts += ["## Wanted and measured", common.judgements(wanted(run, len(expected)))]
    return parts


def _device_tables(results: list[Result]) -> list[str]:
    sizes = list(dict.fromkeys(result.size for result in results))
    by_group: dict[str, dict[str, Result]] = {}
    for result in results:
        by_group.setdefault(result.group, {})[result.size] = result
    ratios = [
        [
            group,
            *(f"{r.cold:.2f}, {r.warm:.2f}" if (r := row.get(size)) else "-" for size in sizes),
            ", ".join(sorted({r.chosen for r in row.values()})),
        ]
        for group, row in by_group.items()
    ]
    worst = sorted(results, key=lambda r: -max(r.cold, r.warm))[:15]
    times = [
        (
            r.workload,
            r.chosen,
            r.kernel,
            *(f"{us:.1f}" for us in (r.cold_us, r.packed_cold_us, r.warm_us, r.packed_warm_us)),
        )
        for r in worst
    ]
    means = [mean_of([getattr(r, kind) for r in results]) for kind in ("cold", "warm")]
    largest = max(results, key=lambda r: r.difference)
    parts = [
        "Device time over that on packed tokens, with the caches flushed before each call and\n"
        "with warm caches; by sequences x padded length.",
        markdown(("call", *sizes, "chosen"), ratios),
        f"Geometric means {number(means[0], '.3f')} cold, {number(means[1], '.3f')} warm. Outputs "
        f"differ by {largest.difference:.1e} of the largest value at most ({largest.workload}).",
        "The largest ratios, microseconds:",
        markdown(
            ("call", "chosen", "packed by", "cold", "packed", "warm", "packed"),
            times,
        ),
    ]
    if any(r.peak_bytes for r in results):
        peaks = sorted(results, key=lambda r: -r.peak_bytes / max(1, r.output_bytes))
        rows = [
            (
                r.workload,
                r.chosen,
                *(
                    f"{size / 2**20:.1f}"
                    for size in (
                        *(r.peak_bytes, r.output_bytes),
                        *(r.packed_peak_bytes, r.packed_output_bytes),
                    )
                ),
            )
            for r in (*peaks[:8], peaks[-1])
        ]
        parts += [
            "## Memory",
            "MiB above the inputs at the worst moment of a call, and of its output; the calls\n"
            "with the most for their output, and the one with the least.",
            markdown(("call", "chosen", "peak", "output", "peak, packed", "output, packed"), rows),
        ]
    return parts


def main() -> None:
    """Runs the benchmark, prints its page and writes what was asked for."""
    parser = common.parser(__doc__, rounds=15, seconds=0.06)
    parser.add_argument("--imports", type=int, default=3, help="processes that time the import")
    arguments = parser.parse_args()
    budget = Budget(arguments.budget)
    device = torch.device(arguments.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    grid = list(tiny_cases() if arguments.tiny else cases(dtype))
    if arguments.from_json:
        runs = common.load(arguments.from_json, Result)
        tiny = {case.name for case in tiny_cases()}
        if any(result.workload in tiny for run in runs for result in run.results):
            grid = list(tiny_cases())
    else:
        kinds = host_cases(dtype)
        if arguments.tiny:
            kinds = {name: _small(workload) for name, workload in kinds.items()}
        rounds, calls = (3, 5) if arguments.tiny else (_ROUNDS, _CALLS)
        extra: dict[str, Any] = {
            "host": [host_times(name, one, device, rounds, calls) for name, one in kinds.items()],
            "plan": [plan_times(name, one, device) for name, one in kinds.items()],
        }
        if arguments.imports:
            extra["start"] = start_times(device, arguments.imports)
        runs = [
            common.measured(
                common.selected(grid, arguments.only, arguments.skip),
                lambda _: None,
                lambda case, _: measure(case, device, arguments.rounds, arguments.seconds),
                lambda r: f"{r.workload}: {r.chosen}, cold {r.cold:.2f}, warm {r.warm:.2f}",
                device=device,
                budget=budget,
                json_file=arguments.json,
                extra=extra,
            )
        ]
    parts = [part for run in runs for part in page(run, [case.name for case in grid])]
    print("\n" + "\n\n".join(part for part in parts if part))
    if arguments.page:
        common.write(arguments.page, parts)


if __name__ == "__main__":
    main()
