"""Padded batches with their padding taken out around all layers, against every other way.

Run from the repository's root: ``python -m benchmarks.padding_free --help``. Beside ``sdpa``,
``flash_attention_2`` and ``smart`` every round runs ``smart`` under ``smartattn.padding_free`` and
the ideal: a batch that holds the same tokens at the same lengths, packed by hand. Times are wall
times with the device synchronised before and after; compare ratios within one run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import smartattn

from . import common
from .common import FEWEST_ROUNDS, Judged, Run, judged, number, timed
from .models import Workload, build, padded_batch

PADDING_FREE = "smart + padding_free"
IDEAL = "ideal"
WAYS = ("sdpa", "flash_attention_2", "smart", PADDING_FREE, IDEAL)
#: What a user has without smartattn.
OTHERS = ("sdpa", "flash_attention_2")
#: Milliseconds below which a call is run once, untimed, after the model was set up for it.
BRIEF = 50.0
#: Such calls in one turn. They get all the seconds of their workload: the host's scatter is larger
#: than what is asked of them.
BRIEF_CALLS = 5


def workloads() -> Iterator[Workload]:
    """The batches of the report."""
    yield Workload("bert-large", "forward", 128, 512, 0.5)
    yield Workload("llama-1b", "prefill", 8, 4096, 0.25, "left")
    yield Workload("llama-1b", "prefill", 8, 4096, 0.6, "left")
    yield Workload("llama-1b", "prefill", 4, 16384, 0.4, "left")
    yield Workload("llama-1b", "train", 8, 2048, 0.5)
    yield Workload("llama-1b", "first-token", 32, 2048, 0.5, "left")
    # Bound by the host: these must not get slower.
    yield Workload("bert-large", "forward", 8, 128, 0.5)
    yield Workload("bert-large", "forward", 8, 128, 0.0)


def tiny_workloads() -> Iterator[Workload]:
    """The same kinds on models that a CPU can run, to test the benchmark itself."""
    yield Workload("tiny-bert", "forward", 8, 64, 0.5)
    yield Workload("tiny-llama", "prefill", 8, 64, 0.6, "left")
    yield Workload("tiny-llama", "train", 8, 32, 0.5)
    yield Workload("tiny-llama", "first-token", 8, 32, 0.5, "left")


@dataclass
class Result:
    """Milliseconds per call (median and interquartile range), agreement and memory of each way."""

    workload: str
    #: Share of the padded tokens that is padding, as the batch came out.
    padding: float = 0.0
    median_ms: dict[str, float] = field(default_factory=dict)
    spread_ms: dict[str, float] = field(default_factory=dict)
    #: Largest |difference from sdpa| / largest |sdpa|, at real tokens.
    difference: dict[str, float] = field(default_factory=dict)
    #: Peak of the memory that tensors hold, weights included.
    peak_mib: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    #: Whether padding_free packed the batch, and why.
    packed: bool = False
    reason: str = ""
    chosen: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Time of the better of the two others divided by that of padding_free."""
        others = [self.median_ms[name] for name in OTHERS if name in self.median_ms]
        ours = self.median_ms.get(PADDING_FREE)
        return min(others) / ours if ours and others else None

    def over(self, way: str) -> float | None:
        """Time of another way divided by that of padding_free; of the ideal: the share of it."""
        ours, theirs = self.median_ms.get(PADDING_FREE), self.median_ms.get(way)
        return theirs / ours if ours and theirs else None


def hand_packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The real tokens of a padded batch in one row, with what tells their sequences apart."""
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(dim=1).tolist()
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(mask.device)
    return {
        "input_ids": batch["input_ids"][mask][None],
        "position_ids": positions[None].to(mask.device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def tasks(workload: Workload, model: Any, device: torch.device) -> tuple[Callable[[], Any], ...]:
    """(padded, packed by hand): calls that return what is compared, real tokens alone."""
    batch = padded_batch(workload, model.config.vocab_size, device)
    real = batch["attention_mask"].bool()
    packed = hand_packed(batch)
    base = getattr(model, "model", model)
    if workload.task == "train":
        labels = batch["input_ids"].masked_fill(~real, -100)
        packed_labels = packed["input_ids"].clone()
        # No sequence predicts the first token of the next one.
        packed_labels[0, packed["cu_seq_lens_q"][:-1].long()] = -100
        return (
            lambda: _train(model, {**batch, "labels": labels}),
            lambda: _train(model, {**packed, "labels": packed_labels}),
        )
    if workload.task == "first-token":
        last = packed["cu_seq_lens_q"][1:].long() - 1

        def first_token() -> torch.Tensor:
            with torch.no_grad():
                out = model.generate(
                    **batch,
                    max_new_tokens=1,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            return out.logits[0]

        def first_token_packed() -> torch.Tensor:
            with torch.no_grad():
                return model(**packed, logits_to_keep=last).logits[0]

        return first_token, first_token_packed

    def forward() -> torch.Tensor:
        with torch.no_grad():
            # The base model: the head's logits would be most of the memory and little of the time.
            return base(**batch).last_hidden_state

    def forward_packed() -> torch.Tensor:
        with torch.no_grad():
            return base(**packed).last_hidden_state[0]

    return forward, forward_packed


def _train(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach()


@contextlib.contextmanager
def way(name: str, model: Any, always: bool) -> Iterator[None]:
    """Sets a model up for one way and takes it back."""
    model.set_attn_implementation(name if name in OTHERS else "smart")
    with contextlib.ExitStack() as stack:
        if name == PADDING_FREE:
            stack.enter_context(smartattn.padding_free(model, always=always))
        yield


def measure(
    workload: Workload,
    model: Any,
    device: torch.device,
    rounds: int,
    seconds: float,
    always: bool = False,
    end: float = math.inf,
) -> Result:
    """Interleaved rounds of all ways on one workload.

    Args:
        rounds, seconds: it ends after so many rounds, or so long once ``FEWEST_ROUNDS`` are done;
            brief calls by the seconds alone.
        always: pack whether or not the profile says that it pays.
        end: of ``time.perf_counter()``, when the fewest rounds have to do.
    """
    result = Result(workload.name)
    padded, packed = tasks(workload, model, device)
    real = padded_batch(workload, model.config.vocab_size, device)["attention_mask"].bool()
    result.padding = round(1.0 - float(real.float().mean()), 4)
    times: dict[str, list[float]] = {}
    reference = None
    for name in WAYS:
        run = packed if name == IDEAL else padded
        try:
            with way(name, model, always), smartattn.trace() as trace:
                run()  # First calls compile, allocate and load.
            common.reset_peak(device)
            with way(name, model, always):
                output = run()
            peak = common.peak_mib(device)
        except (ImportError, OSError, ValueError, torch.cuda.OutOfMemoryError) as error:
            result.failed[name] = f"{type(error).__name__}: {error}"
            continue
        times[name] = []
        if peak is not None:
            result.peak_mib[name] = peak
        if trace.rows:
            result.chosen[name] = ", ".join(sorted({row.backend for row in trace.rows}))
        for row in trace.stacks:
            result.packed, result.reason = row.packed, row.reason
        if output.shape[:2] == real.shape:
            output = output[real]
        values = output.float()
        if name == "sdpa":
            reference = values
        if reference is not None:
            scale = reference.abs().max().clamp(min=1e-12)
            result.difference[name] = float((values - reference).abs().max() / scale)
        del output, values
    del reference
    end = min(end, time.perf_counter() + seconds)
    order = list(times)
    for count in itertools.count(1):
        brief = all(one and common.middle(one)[0] < BRIEF for one in times.values())
        for name in order:
            run = packed if name == IDEAL else padded
            with way(name, model, always):
                # A model is set up once and called often; first calls are told elsewhere.
                calls = 1
                if not times[name] or times[name][-1] < BRIEF:
                    run()
                    calls = BRIEF_CALLS
                for _ in range(calls):
                    times[name].append(timed(run, device)[0])
        order.append(order.pop(0))
        if count >= rounds and not brief:
            break
        if count >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
    for name, values_ms in times.items():
        result.median_ms[name], result.spread_ms[name] = common.middle(values_ms)
    return result


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    times = (number(result.median_ms.get(name), ".2f") for name in WAYS)
    shares = (result.speedup, result.over("smart"), result.over(IDEAL))
    peaks = (number(result.peak_mib.get(name), ",.0f") for name in ("sdpa", PADDING_FREE))
    how = "packed" if result.packed else f"padded: {result.reason.split(':')[0]}"
    shown = (number(share, ".2f") for share in shares)
    return (result.workload, *times, *shown, ", ".join(peaks), how)


def table(results: list[Result]) -> str:
    """Markdown, one row per workload."""
    times = (f"{name} ms" for name in WAYS)
    shares = ("over the better", "over smart", "of the ideal")
    header = ("workload", *times, *shares, "peak MiB: sdpa, ours", "how")
    return common.markdown(header, map(row, results))


#: What is wanted over the better of the two others, per workload.
_SPEEDUPS = {
    Workload("bert-large", "forward", 128, 512, 0.5): 2.0,
    Workload("llama-1b", "prefill", 8, 4096, 0.25, "left"): 1.4,
    Workload("llama-1b", "prefill", 8, 4096, 0.6, "left"): 2.2,
    Workload("llama-1b", "prefill", 4, 16384, 0.4, "left"): 1.75,
    Workload("llama-1b", "train", 8, 2048, 0.5): 1.5,
    Workload("llama-1b", "first-token", 32, 2048, 0.5, "left"): 1.6,
}
#: What is wanted of the ideal, for the forwards among them.
_OF_THE_IDEAL = 0.93


def wanted(run: Run) -> list[Judged]:
    """What a run is to show."""
    found = {result.workload: result for result in run.results}
    rows = []
    for workload, speedup in _SPEEDUPS.items():
        result = found.get(workload.name)
        value = result.speedup if result else None
        what = f"{workload.name}: over the better of sdpa and FA2"
        rows.append(judged(what, run, value, at_least=speedup))
    for workload in _SPEEDUPS:
        if workload.task in ("forward", "prefill"):
            result = found.get(workload.name)
            value = result.over(IDEAL) if result else None
            what = f"{workload.name}: share of the ideal"
            rows.append(judged(what, run, value, at_least=_OF_THE_IDEAL))
    for workload in workloads():
        if (workload.batch, workload.length) == (8, 128):
            result = found.get(workload.name)
            over = result.over("smart") if result else None
            what = f"{workload.name}: time / smart's without it"
            rows.append(judged(what, run, 1 / over if over else None, at_most=1.02))
    for workload in _SPEEDUPS:
        result = found.get(workload.name)
        peaks = result.peak_mib if result else {}
        ours, sdpa = peaks.get(PADDING_FREE), peaks.get("sdpa")
        note = f"{ours:,.0f} of {sdpa:,.0f} MiB" if ours and sdpa else ""
        share = ours / sdpa if ours and sdpa else None
        what = f"{workload.name}: peak memory / sdpa's"
        rows.append(judged(what, run, share, at_most=1.0, note=note))
    return rows


_HOW_TO_READ = """\
Milliseconds per call, the median of interleaved rounds: every round runs all the ways. "smart +
padding_free" takes the padding out around all layers, "ideal" is a batch without padding that holds
the same tokens at the same lengths, packed by hand. Models have the shapes of real ones and random
weights, in bfloat16 on a GPU. Compare ratios within one run, not times between runs. Peaks are of
the memory that tensors hold, weights included."""


def page(runs: list[Run]) -> list[str]:
    """The parts of the page."""
    name = next((run.versions.get("device") for run in runs), None) or "unknown device"
    parts = [f"# Padding-free forwards: {name}", "Made by `python -m benchmarks.padding_free`."]
    parts += [_HOW_TO_READ, common.described(runs)]
    for run in runs:
        parts += [f"## Times, {run.label}", table(run.results)]
        differences = [
            f"- {result.workload}: "
            + ", ".join(f"{name} {value:.1e}" for name, value in result.difference.items())
            for result in run.results
            if result.difference
        ]
        text = "Largest difference from sdpa at real tokens, relative to the largest value (of"
        parts += [f"{text} training, of the loss):", "\n".join(differences)]
        failed = [
            f"- {result.workload}, {name}: {why}"
            for result in run.results
            for name, why in result.failed.items()
        ]
        parts += ["Did not run:", "\n".join(failed)] if failed else []
    every = [workload.name for workload in workloads()]
    if any(result.workload in every for run in runs for result in run.results):
        parts.append(common.left_out(runs, every))
        rows = [one for run in runs for one in wanted(run)]
        parts += ["## Wanted and measured", common.judgements(rows)]
    else:
        parts.append(common.left_out(runs, [workload.name for workload in tiny_workloads()]))
    return parts


def main() -> None:
    """Runs the benchmark, prints its table and writes what was asked for."""
    parser = common.parser(__doc__, rounds=9, seconds=25.0)
    parser.add_argument("--always", action="store_true", help="pack even where it does not pay")
    arguments = parser.parse_args()
    grid = tiny_workloads() if arguments.tiny else workloads()
    runs = common.runs_of(
        arguments,
        Result,
        grid,
        build,
        functools.partial(measure, always=arguments.always),
        row,
        table,
    )
    if arguments.page:
        common.write(arguments.page, page(runs))


if __name__ == "__main__":
    main()
