"""Whole models under ``sdpa``, ``flash_attention_2`` and ``smart``, interleaved in every round.

Run from the repository's root: ``python -m benchmarks.models --help``. Models have the shapes of
real ones and random weights. Times are wall times of one forward, generation or training step with
the device synchronised before and after; compare ratios within one run, not times between runs.
Generations take turns, one token each, and their times are the sums of these: a host that others
use is slow for seconds, which would otherwise be that of one implementation and not of the next.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import smartattn

from . import common
from .common import FEWEST_ROUNDS, mean_of, number, timed
from .turns import Turn, Turns, by_forwards, twin

IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "smart")
#: Seconds that each implementation runs between its first call and the rounds, and calls at least.
WARM_UP = 0.3
FEWEST_WARM_UPS = 2
#: Milliseconds from which one call warms up enough.
LONG = 1000.0
#: Seconds in which smart may build kernels for what comes back, see ``smartattn.first_use``.
SETTLING = 2.0
#: Fewest rounds of tasks whose rounds take seconds: three of them say little.
MORE_ROUNDS = {"generate": 7, "train": 7, "train-packed": 7}


@dataclass(frozen=True)
class Workload:
    """One model under one batch.

    ``padding`` is the share of the (batch, length) tokens that are padding; ``side`` where it lies.
    """

    model: str
    task: str
    batch: int
    length: int
    padding: float
    side: str = "right"
    new_tokens: int = 0
    sequences: int = 0

    @property
    def name(self) -> str:
        """A short unique name, which ``--only`` matches."""
        pad = f" pad{self.padding:.0%} {self.side}" if self.padding else ""
        extra = f" +{self.new_tokens}" if self.new_tokens else ""
        extra += f" {self.sequences}seq" if self.sequences else ""
        return f"{self.model} {self.task} {self.batch}x{self.length}{pad}{extra}"


@dataclass
class Result:
    """Milliseconds per call (median and interquartile range) and agreement per implementation."""

    workload: str
    #: The very first call in this process, which builds and loads what the later ones find.
    first_ms: dict[str, float] = field(default_factory=dict)
    median_ms: dict[str, float] = field(default_factory=dict)
    spread_ms: dict[str, float] = field(default_factory=dict)
    #: Largest |difference from sdpa| / largest |sdpa|, at real tokens; of training, of the loss.
    difference: dict[str, float] = field(default_factory=dict)
    #: Generation: share of the new tokens that are those of sdpa.
    equal_tokens: dict[str, float] = field(default_factory=dict)
    #: Peak of the memory that tensors hold, weights included.
    peak_mib: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    #: Rounds that the medians are of.
    rounds: int = 0
    chosen: str = ""
    #: Backends whose kernels were not built when the rounds began, although they are faster.
    waiting_for: str = ""

    def over(self, name: str) -> float | None:
        """Time of another implementation divided by that of smart."""
        other, smart = self.median_ms.get(name), self.median_ms.get("smart")
        return other / smart if other and smart else None

    @property
    def speedup(self) -> float | None:
        """Time of the better of the two others divided by that of smart."""
        others = [over for name in IMPLEMENTATIONS[:2] if (over := self.over(name)) is not None]
        return min(others) if others else None

    @property
    def uncertainty(self) -> float | None:
        """Standard error of :attr:`speedup` within its run, relative.

        Times are taken as normally distributed; for fewer than seven rounds it is a third too
        large.
        """
        if self.rounds < 3 or self.speedup is None:
            return None
        others = [name for name in IMPLEMENTATIONS[:2] if name in self.median_ms]
        better = min(others, key=lambda name: self.median_ms[name])
        # 1.349 standard deviations are the interquartile range, 1.253 / sqrt(n) of them the error
        # of a median.
        errors = (self.spread_ms[name] / self.median_ms[name] for name in (better, "smart"))
        return 1.253 / 1.349 * math.hypot(*errors) / math.sqrt(self.rounds)


def workloads() -> Iterator[Workload]:
    """The grid of the report."""
    for length in (128, 512):
        for batch in (1, 32, 128):
            for padding in (0.0, 0.25, 0.5, 0.75):
                yield Workload("bert-large", "forward", batch, length, padding)
    for model in ("llama-1b", "llama-8b-4l"):
        for batch, length in ((8, 256), (8, 1024), (8, 4096), (4, 16384), (1, 32768)):
            for padding in (0.0, 0.25, 0.6):
                if batch > 1 or not padding:
                    yield Workload(model, "prefill", batch, length, padding, "left")
    for batch, length, padding in ((8, 512, 0.5), (32, 2048, 0.5), (8, 8192, 0.5), (1, 16384, 0.0)):
        yield Workload("llama-1b", "generate", batch, length, padding, "left", new_tokens=64)
    for batch, length, padding in ((8, 512, 0.5), (8, 2048, 0.5), (4, 4096, 0.2), (2, 16384, 0.05)):
        yield Workload("llama-1b", "train", batch, length, padding)
    yield Workload("llama-1b", "train-packed", 1, 16384, 0.0, sequences=16)
    yield Workload("bert-large", "stream", 200, 2048, 0.0)
    yield Workload("bert-large", "stream-again", 200, 2048, 0.0)


def tiny_workloads() -> Iterator[Workload]:
    """The same kinds on models that a CPU can run, to test the benchmark itself."""
    yield Workload("tiny-bert", "forward", 4, 64, 0.5)
    yield Workload("tiny-llama", "prefill", 4, 64, 0.5, "left")
    yield Workload("tiny-llama", "generate", 2, 32, 0.5, "left", new_tokens=4)
    yield Workload("tiny-llama", "train", 2, 32, 0.5)
    yield Workload("tiny-llama", "train-packed", 1, 64, 0.0, sequences=4)
    yield Workload("tiny-bert", "stream", 6, 64, 0.0)
    yield Workload("tiny-bert", "stream-again", 6, 64, 0.0)


def build(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model by name, random weights, in evaluation mode."""
    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    llama = {"vocab_size": 32000, "max_position_embeddings": 65536}
    with torch.device(device):
        if name == "bert-large":
            config = BertConfig(
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                max_position_embeddings=2048,
            )
            model = BertModel(config)
        elif name == "llama-1b":
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=2048,
                    intermediate_size=8192,
                    num_hidden_layers=16,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    **llama,
                )
            )
        elif name == "llama-8b-4l":
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=4096,
                    intermediate_size=14336,
                    num_hidden_layers=4,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    **llama,
                )
            )
        elif name == "tiny-bert":
            model = BertModel(BertConfig(num_attention_heads=4, **tiny))
        elif name == "tiny-llama":
            model = LlamaForCausalLM(
                LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **tiny)
            )
        else:
            raise ValueError(f"no such model: {name}")
    return model.to(dtype).eval()


def lengths_for(workload: Workload, generator: torch.Generator) -> torch.Tensor:
    """(batch,) lengths with about the wanted padding; one sequence fills the width."""
    length, share = workload.length, 1.0 - workload.padding
    low = max(1, int(length * max(0.0, 2 * share - 1)))
    high = min(length, int(length * 2 * share)) if share < 0.5 else length
    lengths = torch.randint(low, max(low, high) + 1, (workload.batch,), generator=generator)
    if workload.padding == 0.0:
        lengths[:] = length
    if workload.batch > 1:
        lengths[0] = length
        # Moves the others until the share is as wanted, as far as their range allows.
        wanted = share * length * workload.batch - length
        scale = wanted / max(1, int(lengths[1:].sum()))
        lengths[1:] = (lengths[1:] * scale).round().clamp(1, length).long()
    return lengths


def padded_batch(workload: Workload, vocabulary: int, device: torch.device) -> dict[str, Any]:
    """Token ids and mask of a workload."""
    generator = torch.Generator().manual_seed(1)
    lengths = lengths_for(workload, generator)
    ids = torch.randint(5, vocabulary, (workload.batch, workload.length), generator=generator)
    positions = torch.arange(workload.length)
    if workload.side == "left":
        mask = positions >= (workload.length - lengths)[:, None]
    else:
        mask = positions < lengths[:, None]
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def stream(
    workload: Workload, vocabulary: int, device: torch.device, seed: int
) -> list[dict[str, Any]]:
    """Batches whose sizes and lengths have the long tail of real traffic."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(workload.batch):
        size = int(2 ** torch.randint(0, 7, (1,), generator=generator))
        drawn = torch.empty(size).log_normal_(mean=4.6, std=1.0, generator=generator)
        lengths = drawn.long().clamp(4, workload.length)
        width = int(lengths.max())
        ids = torch.randint(5, vocabulary, (size, width), generator=generator)
        mask = (torch.arange(width) < lengths[:, None]).long()
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


def task(
    workload: Workload, model: Any, device: torch.device, rounds: int
) -> tuple[Callable[[int], Any], Any]:
    """(what to time, mask of real positions or None).

    What to time takes the number of the round and returns the output to compare. Every round of
    "stream" brings batches that no round before had, as traffic does; "stream-again" repeats one.
    """
    vocabulary = model.config.vocab_size
    if workload.task.startswith("stream"):
        fresh = rounds if workload.task == "stream" else 1
        streams = [stream(workload, vocabulary, device, 2 + number) for number in range(fresh)]

        def run_stream(number: int) -> Any:
            with torch.no_grad():
                for batch in streams[number % fresh]:
                    hidden = model(**batch).last_hidden_state
            return hidden

        return run_stream, streams[0][-1]["attention_mask"].bool()
    if workload.task == "train-packed":
        size = workload.length // workload.sequences
        ids = torch.randint(5, vocabulary, (1, workload.length), device=device)
        positions = torch.arange(workload.length, device=device)[None] % size
        inputs = {"input_ids": ids, "position_ids": positions}
        return lambda _: _train(model, inputs, ids), None
    batch = padded_batch(workload, vocabulary, device)
    real = batch["attention_mask"].bool()
    if workload.task == "train":
        labels = batch["input_ids"].masked_fill(~real, -100)
        return lambda _: _train(model, batch, labels), None
    if workload.task == "generate":

        def generate(_: int) -> Any:
            with torch.no_grad():
                return model.generate(
                    **batch,
                    min_new_tokens=workload.new_tokens,
                    max_new_tokens=workload.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )

        return generate, None

    def forward(_: int) -> Any:
        with torch.no_grad():
            # The base model: the head's logits would be most of the memory and little of the time.
            return getattr(model, "model", model)(**batch).last_hidden_state

    return forward, real


def _train(model: Any, batch: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach()


def measure(
    workload: Workload,
    model: Any,
    device: torch.device,
    rounds: int,
    seconds: float,
    end: float = math.inf,
    implementations: Sequence[str] = IMPLEMENTATIONS,
) -> Result:
    """Interleaved rounds of all implementations on one workload.

    Args:
        rounds, seconds: it ends after so many rounds, or so long once ``FEWEST_ROUNDS`` are done;
            see :data:`MORE_ROUNDS`.
        end: of ``time.perf_counter()``, when the fewest rounds have to do.
    """
    result = Result(workload.name)
    if workload.task.startswith("stream"):
        # Each is long, and brings its own batches.
        rounds = min(rounds, FEWEST_ROUNDS)
    # Round 0 is for the output and the first call alone.
    run, real = task(workload, model, device, rounds + 1)
    times: dict[str, list[float]] = {}
    reference = None
    for name in implementations:
        try:
            model.set_attn_implementation(name)
            common.reset_peak(device)
            with smartattn.trace() as trace:
                result.first_ms[name], output = timed(lambda: run(0), device)
            if workload.task != "stream":
                # Batches that never come back are never warm.
                del output
                common.reset_peak(device)
                again_ms, output = timed(lambda: run(0), device)
            peak = common.peak_mib(device)
        except (ImportError, OSError, ValueError, torch.cuda.OutOfMemoryError) as error:
            result.failed[name] = f"{type(error).__name__}: {error}"
            continue
        times[name] = []
        if peak is not None:
            result.peak_mib[name] = peak
        if name == "smart":
            result.chosen = _names(row.backend for row in trace.rows)
        # On the host: a reference on the device would count as memory of the others.
        values = (output if real is None else output[real]).cpu()
        del output
        if name == "sdpa":
            reference = values
        if reference is not None and reference.shape == values.shape:
            _compare(result, workload, name, values, reference, device)
        del values
        if workload.task != "stream":
            _warm_up(run, device, again_ms)
            if name == "smart":
                result.chosen, result.waiting_for = _settle(run, device, again_ms)
    del reference
    stop = time.perf_counter() + seconds
    fewest = MORE_ROUNDS.get(workload.task, FEWEST_ROUNDS)
    order, shuffle = list(times), random.Random(0)
    calls = _by_tokens(workload, model, device, order) if workload.task == "generate" else {}
    with Turns(calls, device) as turns:
        for name in calls:
            # What the copy or its thread has not done yet is not what is timed.
            for _ in range(FEWEST_WARM_UPS):
                turns.alone(name)
        for number_ in range(1, rounds + 1):
            # Whoever comes first or after another must not always be the same.
            shuffle.shuffle(order)
            if calls:
                for name, ms in turns.round(order).items():
                    times[name].append(ms)
            else:
                for name in order:
                    model.set_attn_implementation(name)
                    times[name].append(timed(lambda: run(number_), device)[0])  # noqa: B023
            result.rounds = number_
            now = time.perf_counter()
            if (number_ >= fewest and now > stop) or (number_ >= FEWEST_ROUNDS and now > end):
                break
    for name, values_ms in times.items():
        result.median_ms[name], result.spread_ms[name] = common.middle(values_ms)
    return result


def _by_tokens(
    workload: Workload, model: Any, device: torch.device, names: Sequence[str]
) -> dict[str, Callable[[Turn], Any]]:
    """A generation under each implementation, in turns of one token."""
    calls = {}
    for name in names:
        other = twin(model)
        other.set_attn_implementation(name)
        run, _ = task(workload, other, device, 1)
        calls[name] = by_forwards(other, functools.partial(run, 0))
    return calls


def _compare(
    result: Result,
    workload: Workload,
    name: str,
    values: torch.Tensor,
    reference: torch.Tensor,
    device: torch.device,
) -> None:
    if workload.task == "generate":
        new = slice(workload.length, None)
        equal = values[:, new] == reference[:, new]
        result.equal_tokens[name] = float(equal.float().mean())
        return
    ours, theirs = values.to(device).float(), reference.to(device).float()
    scale = theirs.abs().max().clamp(min=1e-12)
    result.difference[name] = float((ours - theirs).abs().max() / scale)


def _warm_up(run: Callable[[int], Any], device: torch.device, ms: float) -> None:
    """What comes back often is built by now, and the clocks of the device are up.

    Args:
        ms: what the warm call before took.
    """
    end, number_ = time.perf_counter() + WARM_UP - ms / 1e3, 1
    while ms < LONG and (number_ < FEWEST_WARM_UPS or time.perf_counter() < end):
        ms, _ = timed(lambda: run(0), device)
        number_ += 1


def _settle(run: Callable[[int], Any], device: torch.device, ms: float) -> tuple[str, str]:
    """Runs until no kernels are left to be built, or time is over.

    Returns:
        The backends that run now, and those that still wait.
    """
    end = time.perf_counter() + SETTLING
    while True:
        with smartattn.trace() as trace:
            timed(lambda: run(0), device)
        waiting = _names(row.waiting_for for row in trace.rows)
        if not waiting or ms >= LONG or time.perf_counter() > end:
            return _names(row.backend for row in trace.rows), waiting


def _names(backends: Iterable[str | None]) -> str:
    return ", ".join(sorted({name for name in backends if name}))


def ratio(result: Result) -> float | None:
    """Time of smart divided by that of the better of the two others."""
    return 1.0 / result.speedup if result.speedup else None


def row(result: Result) -> tuple[str, ...]:
    """The cells of a workload in :func:`table`."""
    times = (number(result.median_ms.get(name), ".2f") for name in IMPLEMENTATIONS)
    chosen = result.chosen
    if result.waiting_for:
        chosen += f", waiting for {result.waiting_for}"
    return (result.workload, *times, number(ratio(result), ".3f"), chosen)


def table(results: list[Result]) -> str:
    """Markdown, one row per workload."""
    header = ("workload", "sdpa ms", "FA2 ms", "smart ms", "smart / better", "chosen")
    text = common.markdown(header, map(row, results))
    shares = [share for result in results if (share := ratio(result)) is not None]
    if shares:
        mean, worst = mean_of(shares), max(shares)
        text += f"\n\ngeometric mean {mean:.3f}, worst {worst:.3f}, {len(shares)} workloads"
    return text


def main() -> None:
    """Runs the benchmark, prints its table and writes what was asked for."""
    from . import models_page

    parser = common.parser(__doc__, rounds=40, seconds=2.0)
    parser.add_argument("--plot", type=Path, help="where to draw the speed-ups, PNG")
    arguments = parser.parse_args()
    grid = tiny_workloads() if arguments.tiny else workloads()
    runs = common.runs_of(arguments, Result, grid, build, measure, row, table)
    # A picture that cannot be drawn must not cost the page.
    if arguments.page:
        models_page.write(arguments.page, runs, arguments.plot)
    if arguments.plot:
        models_page.plot(arguments.plot, runs)


if __name__ == "__main__":
    main()
