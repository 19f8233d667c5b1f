"""Padded batches with their padding taken out around all layers, against every other way.

Run from the repository's root: ``python -m benchmarks.padding_free --help``. Beside ``sdpa``,
``flash_attention_2`` and ``smart`` every round runs ``smart`` under ``smartattn.padding_free`` and
the ideal: a batch that holds the same tokens at the same lengths, packed by hand. Times are wall
times with the device synchronised before and after; compare ratios within one run.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import smartattn

from .models import Workload, build, padded_batch, versions

PADDING_FREE = "smart + padding_free"
IDEAL = "ideal"
WAYS = ("sdpa", "flash_attention_2", "smart", PADDING_FREE, IDEAL)
#: What a user has without smartattn.
OTHERS = ("sdpa", "flash_attention_2")


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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    workload: Workload,
    model: Any,
    device: torch.device,
    rounds: int,
    seconds: float,
    always: bool = False,
) -> Result:
    """Interleaved rounds of all ways on one workload.

    Args:
        always: pack whether or not the profile says that it pays.
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
            if device.type == "cuda":
                gc.collect()
                torch.cuda.reset_peak_memory_stats(device)
            with way(name, model, always):
                output = run()
            if device.type == "cuda":
                result.peak_mib[name] = torch.cuda.max_memory_allocated(device) / 2**20
        except (ImportError, ValueError, torch.cuda.OutOfMemoryError) as error:
            result.failed[name] = f"{type(error).__name__}: {error}"
            continue
        times[name] = []
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
    end = time.perf_counter() + seconds
    order = list(times)
    for number in range(rounds):
        for name in order:
            with way(name, model, always):
                run = packed if name == IDEAL else padded
                _synchronize(device)
                start = time.perf_counter()
                run()
                _synchronize(device)
                times[name].append((time.perf_counter() - start) * 1e3)
        order.append(order.pop(0))
        if number >= 2 and time.perf_counter() > end:
            break
    for name, values_ms in times.items():
        result.median_ms[name] = statistics.median(values_ms)
        quartiles = statistics.quantiles(values_ms, n=4) if len(values_ms) > 2 else [0.0, 0.0, 0.0]
        result.spread_ms[name] = quartiles[2] - quartiles[0]
    return result


def table(results: list[Result]) -> str:
    """Markdown, one row per workload."""
    times = " | ".join(f"{name} ms" for name in WAYS)
    lines = [
        f"| workload | {times} | over the better | over smart | of the ideal | "
        "peak MiB: sdpa, ours | how |",
        "|---|" + "---|" * (len(WAYS) + 5),
    ]
    for result in results:
        times = [_number(result.median_ms.get(name), ".2f") for name in WAYS]
        shares = (result.speedup, result.over("smart"), result.over(IDEAL))
        peaks = [_number(result.peak_mib.get(name), ",.0f") for name in ("sdpa", PADDING_FREE)]
        how = "packed" if result.packed else f"padded: {result.reason.split(':')[0]}"
        cells = [*times, *(_number(share, ".2f") for share in shares), ", ".join(peaks), how]
        lines.append(f"| {result.workload} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", help="workloads by name, * is a wildcard")
    parser.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    parser.add_argument("--always", action="store_true", help="pack even where it does not pay")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=15.0, help="per workload, once warm")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = list(tiny_workloads() if arguments.tiny else workloads())
    if arguments.only:
        chosen = [w for w in chosen if any(fnmatch.fnmatch(w.name, p) for p in arguments.only)]
    results: list[Result] = []
    for model_name in dict.fromkeys(w.model for w in chosen):
        model = build(model_name, device, dtype)
        for workload in (w for w in chosen if w.model == model_name):
            results.append(
                measure(
                    workload, model, device, arguments.rounds, arguments.seconds, arguments.always
                )
            )
            print(table(results[-1:]).splitlines()[2], flush=True)
            if arguments.json:
                document = {"versions": versions(device), "results": [asdict(r) for r in results]}
                arguments.json.write_text(json.dumps(document, indent=1))
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n" + table(results))


if __name__ == "__main__":
    main()
