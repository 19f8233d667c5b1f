"""A model under eager, sdpa, flash_attention_2, smart and padding-free, in interleaved rounds."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .control import trace
from .models import (
    IMPLEMENTATIONS,
    Batch,
    count_calls,
    forward,
    generate,
    one_line,
    output_of,
    relative,
    set_implementation,
    side_of,
)
from .padding_free import padding_free
from .record import brief
from .timing import relative_spread, synchronize

#: Rounds that are measured at least, and without which nothing is said of a difference.
MIN_ROUNDS = 3
#: Per cent that count as equal however small the spread is.
EQUAL = 2
#: Rounds from which on the spread says how far off a median is. The spread of fewer is larger than
#: it looks and is taken sqrt(_STEADY / rounds) times: of two rows that are alike, 1 of 11 pairs
#: then differ by chance after 3 rounds, and 1 of 25 after 9 (of 40,000 drawn from a normal
#: distribution; fewer from skewed ones).
_STEADY = 9
#: Per cent left open by the rounds up to which "no difference" says something.
_TELLING = 5
#: Spread of the rounds above which the times are in doubt.
BUSY_SPREAD = 0.25
#: Dtypes in which the largest logits are often equal.
_COARSE = ("bfloat16", "float16")

#: The row of a model under ``smartattn.padding_free``, which packs where the profile says so.
PADDING_FREE = "smart + padding_free"
_OURS = ("smart", PADDING_FREE)

#: (implementation, round, rounds at most)
Report = Callable[[str, int, int], None]


@dataclass(slots=True)
class Row:
    """One implementation. Seconds are those of all batches once; empty where it did not run."""

    implementation: str
    seconds: list[float] = field(default_factory=list)
    #: Bytes allocated at the worst moment, above what the model holds; None on a CPU.
    peak_bytes: int | None = None
    #: Largest |difference from eager| / largest |eager| at real tokens; None for generation.
    difference: float | None = None
    #: Share of the generated tokens that are those of eager; None for a forward.
    equal_tokens: float | None = None
    #: Backends that ran when all batches ran once, with the number of calls: of smart's rows.
    ran: dict[str, int] = field(default_factory=dict)
    #: What became of the batches under padding_free: "packed" or "padded", and why.
    stacks: list[str] = field(default_factory=list)
    #: Whether padding_free took the padding out of any forward.
    packed: bool = False
    error: str | None = None

    @property
    def median(self) -> float | None:
        """Median of the rounds in seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float:
        """Interquartile range of the rounds divided by their median."""
        return relative_spread(self.seconds)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two rows, and whether their rounds tell them apart."""

    one: Row
    other: Row

    @property
    def ratio(self) -> float:
        """How many times as fast as the other the one is."""
        return (self.other.median or 0.0) / (self.one.median or math.inf)

    @property
    def rounds(self) -> int:
        return min(len(self.one.seconds), len(self.other.seconds))

    @property
    def spread(self) -> float:
        return max(self.one.spread, self.other.spread)

    @property
    def open(self) -> int:
        """Per cent by which the rounds let medians differ by chance."""
        few = max(1.0, math.sqrt(_STEADY / self.rounds))
        return max(EQUAL, round(100 * self.spread * few))

    @property
    def overlap(self) -> bool:
        """A round of the faster one took as long as one of the slower one."""
        fast, slow = (self.one, self.other) if self.ratio > 1 else (self.other, self.one)
        return max(fast.seconds) >= min(slow.seconds)

    @property
    def beyond(self) -> bool:
        """The two differ by more than the rounds leave open, in the figures that are printed."""
        return round(100 * max(self.ratio, 1 / self.ratio)) - 100 > self.open

    @property
    def tells(self) -> bool:
        """The two differ, and not by chance."""
        if self.rounds < MIN_ROUNDS or not self.beyond:
            return False
        # Other work on the machine comes and goes: the spread of a few rounds says little then.
        return self.spread <= BUSY_SPREAD or not self.overlap

    @property
    def faster(self) -> bool:
        """The one is the faster one, and not by chance."""
        return self.tells and self.ratio > 1

    @property
    def vague(self) -> bool:
        """The rounds do not even tell that the two are about equal."""
        return self.rounds < MIN_ROUNDS or self.open > _TELLING

    @property
    def words(self) -> str:
        """What the one is to the other, up to the other's name."""
        ratio = self.ratio
        if round(100 * max(ratio, 1 / ratio)) == 100:
            return "is as fast as"
        return (
            f"is {ratio:.2f} times as fast as"
            if ratio > 1
            else (f"takes {1 / ratio:.2f} times as long as")
        )

    @property
    def unsettled(self) -> str:
        """Why they are not told apart."""
        if self.rounds < MIN_ROUNDS:
            return f"less than {MIN_ROUNDS} rounds tell nothing"
        if self.beyond:
            return "their rounds overlap"
        return (
            "the rounds tell nothing"
            if self.open > 100
            else f"up to {self.open}% is within the scatter of the rounds"
        )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All implementations on the same batches."""

    rows: tuple[Row, ...]
    device: str
    dtype: str
    #: Real tokens of all batches, or tokens generated: what tokens per second counts.
    tokens: int
    real_tokens: int
    padding_tokens: int
    new_tokens: int
    #: (rows, tokens per row, padding included) of each batch.
    shapes: tuple[tuple[int, int], ...] = ()
    #: Where their padding lies, "left" or "right"; None without any, or on both sides.
    padding_side: str | None = None

    @property
    def rounds(self) -> int:
        """Rounds that were measured."""
        return max((len(row.seconds) for row in self.rows), default=0)

    def tokens_per_second(self, row: Row) -> float | None:
        """Real or generated tokens per second."""
        return None if not row.median else self.tokens / row.median

    @property
    def speedup(self) -> float | None:
        """Time of the best other implementation divided by that of smart."""
        smart, best = self._smart(), self._best()
        if smart is None or best is None or not smart.median or not best.median:
            return None
        return best.median / smart.median

    @property
    def verdict(self) -> str:
        """Whether smart pays for this workload, in a sentence."""
        smart, best = self._smart(), self._best()
        if smart is None or smart.error is not None:
            return f"smart did not run: {smart.error if smart else 'not measured'}"
        if best is None or not smart.median:
            return "only smart ran"
        name, alone = best.implementation, _Pair(smart, best)
        free = self._row(PADDING_FREE)
        # What packed nothing is smart once more, and differs from it by chance alone.
        if free is not None and free.packed and free.median:
            packed = _Pair(free, best)
            if packed.faster and (_Pair(free, smart).faster or not alone.faster):
                return (
                    f"smart with padding_free pays here: it {packed.words} {name}, the best of the "
                    f"others; {_beside(alone, name)}"
                )
        if alone.faster:
            return f"smart pays here: it {alone.words} {name}, the best of the others"
        if alone.tells:
            return (
                f"smart does not pay here: it {alone.words} {name}; "
                f"load this model with attn_implementation={name!r} for batches like these"
            )
        about = f"it {alone.words} {name}, and {alone.unsettled}"
        if alone.vague:
            return f"whether smart pays here cannot be told: {about}"
        return f"smart makes no difference here: {about}"

    @property
    def doubt(self) -> str | None:
        """Why the times may mean little, in a sentence; None where the rounds agree."""
        worst = max(self.rows, key=lambda row: row.spread, default=None)
        if worst is None or worst.spread <= BUSY_SPREAD:
            return None
        return (
            f"the rounds of {worst.implementation} vary by {worst.spread:.0%}: something else was "
            "using this machine, or the work is too short to time; bench again when it is idle, or "
            "larger batches"
        )

    @property
    def padding_free(self) -> str | None:
        """What padding_free changes for this workload, in a sentence; None if it did not run."""
        smart, free = self._smart(), self._row(PADDING_FREE)
        if smart is None or free is None or not smart.median or not free.median:
            return None
        went = "; ".join(brief(stack) for stack in free.stacks)
        if not free.packed:
            return f"padding_free packed nothing: its row is smart's once more; each time it {went}"
        pair = _Pair(free, smart)
        doubt = "" if pair.tells else f", and {pair.unsettled}"
        return f"padding_free {pair.words} smart{doubt}; each time it {went}"

    @property
    def remark(self) -> str | None:
        """Why other tokens were generated than under eager attention; None if none were."""
        equal = [row.equal_tokens for row in self.rows if row.equal_tokens is not None]
        if self.dtype not in _COARSE or min(equal, default=1.0) == 1.0:
            return None
        return (
            f"greedy tokens part early in {self.dtype}: the largest logits are often equal or "
            "within rounding, and a token that differs changes all that follow it"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        rows = [
            {**asdict(row), "median": row.median, "spread": row.spread,
             "tokens_per_second": self.tokens_per_second(row)}
            for row in self.rows
        ]  # fmt: skip
        return {**asdict(self), "rows": rows, "speedup": self.speedup, "verdict": self.verdict,
                "padding_free": self.padding_free, "doubt": self.doubt,
                "remark": self.remark}  # fmt: skip

    def _smart(self) -> Row | None:
        return self._row("smart")

    def _row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.implementation == name), None)

    def _best(self) -> Row | None:
        ran = [row for row in self.rows if row.implementation not in _OURS and row.median]
        return min(ran, key=lambda row: row.median or 0.0, default=None)


def _beside(alone: _Pair, name: str) -> str:
    """What is said of smart alone where padding_free is what pays."""
    if alone.tells:
        return f"smart alone {alone.words} {name}"
    if alone.vague:
        return f"whether smart alone pays cannot be told: {alone.unsettled}"
    return "smart alone makes no difference"


def bench(
    model: Any,
    batches: Sequence[Batch],
    *,
    new_tokens: int = 0,
    rounds: int = 9,
    seconds: float = 30.0,
    report: Report = lambda name, number, rounds: None,
) -> Benchmark:
    """Times a model under every implementation.

    Every round runs all of them, in turns, so that whatever else the machine does meets all alike.

    Args:
        new_tokens: generate that many tokens instead of running a forward.
        rounds, seconds: it ends after so many rounds, or so long once ``MIN_ROUNDS`` are done.
    """
    device: torch.device = model.device
    rows = [Row(name) for name in (*IMPLEMENTATIONS, PADDING_FREE)]
    reference: list[torch.Tensor] | None = None
    for row in rows:
        report(row.implementation, 0, rounds)
        outputs = _first(model, batches, new_tokens, row, device)
        if outputs is not None and reference is None:
            reference = outputs
        if outputs is not None and reference is not None:
            _agreement(row, outputs, reference, batches, new_tokens)
        del outputs
    del reference
    order = [row for row in rows if row.error is None]
    start = time.perf_counter()
    for number in range(1, rounds + 1):
        for row in order:
            report(row.implementation, number, rounds)
            with _under(model, row):
                synchronize(device)
                before = time.perf_counter()
                for batch in batches:
                    _run(model, batch, new_tokens)
                synchronize(device)
                row.seconds.append(time.perf_counter() - before)
        order.append(order.pop(0))
        if number >= min(MIN_ROUNDS, rounds) and time.perf_counter() - start > seconds:
            break
    real = sum(batch.tokens for batch in batches)
    sequences = sum(len(batch.real) for batch in batches)
    return Benchmark(
        rows=tuple(rows),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=new_tokens * sequences if new_tokens else real,
        real_tokens=real,
        padding_tokens=sum(batch.real.numel() for batch in batches) - real,
        new_tokens=new_tokens,
        shapes=tuple(batch.shape for batch in batches),
        padding_side=side_of(batches),
    )


@contextlib.contextmanager
def _under(model: Any, row: Row) -> Iterator[None]:
    """Sets a model up for a row; a reason why that cannot be done goes into the row."""
    free = row.implementation == PADDING_FREE
    row.error = set_implementation(model, "smart" if free else row.implementation)
    with contextlib.ExitStack() as stack:
        if free and row.error is None:
            try:
                stack.enter_context(padding_free(model))
            except ValueError as error:
                row.error = str(error)
        yield


def _run(model: Any, batch: Batch, new_tokens: int) -> torch.Tensor:
    if new_tokens:
        return generate(model, batch, new_tokens)
    return output_of(forward(model, batch))


def _first(
    model: Any, batches: Sequence[Batch], new_tokens: int, row: Row, device: torch.device
) -> list[torch.Tensor] | None:
    """The outputs of one implementation on the host; the first run warms up, the second counts."""
    with _under(model, row):
        if row.error is not None:
            return None
        return _first_runs(model, batches, new_tokens, row, device)


def _first_runs(
    model: Any, batches: Sequence[Batch], new_tokens: int, row: Row, device: torch.device
) -> list[torch.Tensor] | None:
    try:
        with trace() as recorded:
            outputs = [_run(model, batch, new_tokens).cpu() for batch in batches]
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            for batch in batches:
                _run(model, batch, new_tokens)
            synchronize(device)
            row.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    except Exception as error:
        # Out of memory under eager attention must not end the comparison of the others.
        row.error = one_line(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    count_calls(recorded, row.ran)
    row.packed = any(stack.packed for stack in recorded.stacks)
    row.stacks = [
        f"ran {stack.calls} forward{'s' * (stack.calls != 1)} "
        f"{'packed' if stack.packed else 'padded'}: {stack.reason}"
        for stack in recorded.stacks
    ]
    return outputs


def _agreement(
    row: Row,
    outputs: list[torch.Tensor],
    reference: list[torch.Tensor],
    batches: Sequence[Batch],
    new_tokens: int,
) -> None:
    if new_tokens:
        equal = sum(int((a == b).sum()) for a, b in zip(outputs, reference, strict=True))
        row.equal_tokens = equal / sum(tokens.numel() for tokens in reference)
        return
    largest = scale = 0.0
    for given, right, batch in zip(outputs, reference, batches, strict=True):
        real = batch.real.cpu()
        difference = (given[real].float() - right[real].float()).abs().nan_to_num(float("inf"))
        largest = max(largest, float(difference.max()))
        scale = max(scale, float(right[real].abs().max()))
    row.difference = relative(largest, scale)
