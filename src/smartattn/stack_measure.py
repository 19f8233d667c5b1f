"""Times stacks of layers with and without their padding, near the sizes where packing pays.

The stacks have random weights and the shapes of an encoder (BERT) and a decoder (Llama). Whether
packing pays depends on the share of padding and on how much work the batch is for the device; the
sizes that are timed close in on where it begins to, so that a fast GPU and a single core need no
grids of their own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .control import trace
from .features import Mode
from .integration import NAME
from .measure import free_memory, lacks_memory, release
from .padding_free import padding_free
from .samples import StackSample
from .stack_fit import pays
from .stack_rule import MARGIN
from .timing import relative_spread, synchronize
from .workload import Workload, as_padded

Kind = Literal["encoder", "decoder"]
#: (share of padding, power of two of the work), and whether packing pays there: None where that
#: was too much work for the time or the memory.
Point = tuple[float, int]
Search = Generator[Point, "bool | None", None]

#: Layers of each stack. What packing costs once per forward weighs more than in most models, so
#: that a rule made from these errs on the side of the padded batch.
LAYERS = 4
#: Shares of padding that are looked at, the largest first.
SHARES = (0.5, 0.25, 0.1, 0.05)
HEAD_DIM = 64
#: Powers of two of (tokens x hidden^2): where to begin, and the bounds of the search.
_START = {"cuda": 34, "cpu": 22}
_LOWEST, _HIGHEST = 16, 38
#: Powers of two between two sizes while looking for the one where it begins to pay.
_STRIDE = 2
_FEWEST_TOKENS = 64
_ROWS: dict[Kind, int] = {"encoder": 32, "decoder": 8}
_LENGTHS: dict[Kind, tuple[int, int]] = {"encoder": (16, 512), "decoder": (16, 4096)}
_MIN_ROUNDS, _MAX_ROUNDS = 3, 15
#: Share of the seconds that one batch may take.
_PER_BATCH = 0.1
#: Bytes that a layer holds at once per token, hidden unit and byte of an element, as a multiple:
#: of one layer in a forward, of each in a training step.
_HELD = 24
_SHARE_OF_MEMORY = 0.4
_VOCABULARY = 1024

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers to measure, in one mode."""

    kind: Kind
    hidden: int
    mode: Mode

    def __str__(self) -> str:
        return f"padding-free {self.kind} of hidden size {self.hidden}, {self.mode}"


def stages(device_kind: str) -> tuple[tuple[Stack, ...], ...]:
    """The stacks, those of a stage side by side and the most telling stages first."""
    small, middle, large = (512, 1024, 2048) if device_kind == "cuda" else (256, 256, 512)
    return (
        (Stack("encoder", middle, "forward"), Stack("decoder", large, "forward")),
        # A second size shows how much longer narrow layers take than their products.
        (Stack("encoder", small if small != middle else large, "forward"),),
        (Stack("encoder", middle, "train"), Stack("decoder", large, "train")),
    )


def search(start: int, lowest: int = _LOWEST, highest: int = _HIGHEST) -> Search:
    """Asks for points until it is known, per share of padding, from which work on packing pays.

    Less padding never pays earlier, so that each share is looked at from where the one before it
    began to pay, and nothing is asked once a share pays nowhere.
    """
    level = min(max(start, lowest), highest)
    for place, share in enumerate(SHARES):
        pays = yield share, level
        while pays is None and place == 0 and level - _STRIDE >= lowest:
            level = highest = level - _STRIDE
            pays = yield share, level
        if pays is None:
            return
        lost = level if not pays else lowest - 1
        if pays and place == 0:
            while level - _STRIDE >= lowest:
                if not (yield share, level - _STRIDE):
                    lost = level - _STRIDE
                    break
                level -= _STRIDE
        elif pays:
            lost = level - 1
        else:
            while True:
                if level + _STRIDE > highest:
                    return
                level += _STRIDE
                pays = yield share, level
                if pays is None:
                    return
                if pays:
                    break
                lost = level
        while level - lost > 1 and lost >= lowest:
            middle = (level + lost) // 2
            if (yield share, middle):
                level = middle
            else:
                lost = middle


def batch_of(stack: Stack, share: float, power: int, dtype: str) -> Workload | None:
    """The attention of a stack on a batch with that much padding and work; None for no such batch.

    Encoders pad on the right, decoders on the left but for training.
    """
    tokens = 2**power // stack.hidden**2
    if tokens < _FEWEST_TOKENS:
        return None
    shortest, longest = _LENGTHS[stack.kind]
    length = min(longest, max(shortest, tokens // _ROWS[stack.kind]))
    heads = stack.hidden // HEAD_DIM
    decoder = stack.kind == "decoder"
    return as_padded(
        Workload(
            mode=stack.mode,
            causal=decoder,
            side="left" if decoder and stack.mode == "forward" else "right",
            dtype=dtype,
            batch=tokens // length,
            q_len=length,
            kv_len=length,
            heads=heads,
            kv_heads=max(1, heads // 4) if decoder else heads,
            head_dim=HEAD_DIM,
            padding_share=share,
        )
    )


def build(kind: Kind, hidden: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A stack of ``LAYERS`` layers with random weights under "smart", in evaluation mode."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    heads = hidden // HEAD_DIM
    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "max_position_embeddings": _LENGTHS[kind][1],
    }
    made: Any = LlamaModel
    config: Any
    if kind == "encoder":
        # Dropout would time its random numbers as well.
        none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        made, config = BertModel, BertConfig(**sizes, **none)
    else:
        config = LlamaConfig(**sizes, num_key_value_heads=max(1, heads // 4))
    with torch.device(device):
        model = made._from_config(config, attn_implementation=NAME)
    return model.to(device=device, dtype=dtype).eval()


@dataclass
class StackTimer:
    """Times the stacks of a device for so many seconds.

    Args:
        device: with its index, if it has one.
        seconds: that all of it may take, models included.
        report: called with what is timed, before each batch.

    Everything that was timed is in ``samples``, also if the run is cut short.
    """

    device: torch.device
    seconds: float
    report: Report = lambda doing: None
    samples: list[StackSample] = field(default_factory=list)
    #: Why a batch could not be packed, where that was so.
    refusal: str | None = None
    _models: dict[tuple[Kind, int], Any] = field(default_factory=dict)
    #: Microseconds of a padded forward per unit of work, of the last batch of each mode.
    _rates: dict[Mode, float] = field(default_factory=dict)
    _end: float = 0.0

    def run(self) -> list[StackSample]:
        """Goes through the stages until the time is over."""
        self._end = time.monotonic() + self.seconds
        release(self.device)
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                for stage in stages(self.device.type):
                    if not self._stage(stage):
                        break
        finally:
            self._models.clear()
            release(self.device)
        return self.samples

    @property
    def _left(self) -> float:
        return self._end - time.monotonic()

    def _stage(self, stage: tuple[Stack, ...]) -> bool:
        """Whether there was time for all batches of the stacks, which take turns."""
        searches: dict[Stack, tuple[Search, Point]] = {}
        for stack in stage:
            begun = search(_START[self.device.type])
            searches[stack] = (begun, next(begun))
        while searches:
            for stack, (asking, point) in list(searches.items()):
                if self._left <= 0 or self.refusal is not None:
                    return False
                answer = self._answer(stack, *point)
                try:
                    searches[stack] = (asking, asking.send(answer))
                except StopIteration:
                    del searches[stack]
        return True

    def _answer(self, stack: Stack, share: float, power: int) -> bool | None:
        dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        workload = batch_of(stack, share, power, dtype)
        if workload is None:
            # Below every size that models run.
            return False
        for known in self.samples:
            # Of a run that was cut short.
            if known.workload == workload:
                return pays(known)
        if not self._fits(workload, stack):
            return None
        self.report(f"{stack}, {workload.batch} x {workload.kv_len}, {share:.0%} padding")
        try:
            key = (stack.kind, stack.hidden)
            model = self._models.get(key)
            if model is None:
                model = self._models[key] = build(*key, self.device, workload.torch_dtype)
            sample = self._timed(model, workload)
        except Exception as problem:
            if not lacks_memory(problem):
                raise
            sample = None
        if sample is None:
            # Only now: the traceback of an error holds the tensors of the forward that failed.
            release(self.device)
            return None
        self.samples.append(sample)
        return pays(sample)

    def _fits(self, workload: Workload, stack: Stack) -> bool:
        """Whether a batch is worth beginning with what memory and time are left."""
        tokens = workload.batch * workload.kv_len
        layers = LAYERS if workload.mode == "train" else 1
        held = tokens * stack.hidden * workload.torch_dtype.itemsize * _HELD * layers
        if held > _SHARE_OF_MEMORY * free_memory(self.device):
            return False
        rate = self._rates.get(workload.mode)
        if rate is None:
            return True
        expected = rate * tokens * stack.hidden**2 * 1e-6
        return expected * 2 * (_MIN_ROUNDS + 1) <= self._left

    def _timed(self, model: Any, workload: Workload) -> StackSample | None:
        """Interleaved rounds of both ways; None if they would take longer than there is time."""
        task = _task(model, workload, self.device)
        start = time.monotonic()
        ways = (False, True)
        for packed in ways:
            with trace() as recorded:
                wall_us = self._once(model, task, packed)
            if packed and not (recorded.stacks and recorded.stacks[0].packed):
                self.refusal = next((row.reason for row in recorded.stacks), "it was not packed")
                return None
        padded_us = self._once(model, task, False)
        tokens = workload.batch * workload.kv_len
        hidden = workload.heads * workload.head_dim
        self._rates[workload.mode] = padded_us / (tokens * hidden**2)
        if max(padded_us, wall_us) * 1e-6 * len(ways) * _MIN_ROUNDS > self._left:
            return None
        times: dict[bool, list[float]] = {way: [] for way in ways}
        for number in range(1, _MAX_ROUNDS + 1):
            for packed in ways if number % 2 else ways[::-1]:
                times[packed].append(self._once(model, task, packed))
            ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
            if number < _MIN_ROUNDS:
                continue
            over = time.monotonic() - start > _PER_BATCH * self.seconds or self._left <= 0
            if over or _is_clear(ratios):
                break
        return StackSample(
            workload=workload,
            layers=LAYERS,
            padded_us=statistics.median(times[False]),
            packed_us=statistics.median(times[True]),
            speedup=statistics.median(ratios),
            spread=relative_spread(ratios),
            rounds=len(ratios),
        )

    def _once(self, model: Any, task: Callable[[], object], packed: bool) -> float:
        """Wall time of one call in microseconds, hooks in place before it begins.

        Wall time, since a forward reads its mask from the device: bursts that are queued behind a
        sleeping device would wait for it there.
        """
        with padding_free(model, always=True) if packed else nullcontext():
            synchronize(self.device)
            start = time.perf_counter()
            task()
            synchronize(self.device)
            return (time.perf_counter() - start) * 1e6


def _is_clear(ratios: list[float]) -> bool:
    """Whether more rounds would hardly change whether packing pays."""
    away = abs(math.log(statistics.median(ratios) / (1 + MARGIN)))
    return away > 3 * relative_spread(ratios) / math.sqrt(len(ratios))


def _task(model: Any, workload: Workload, device: torch.device) -> Callable[[], object]:
    """A forward, or a forward and backward, on random tokens."""
    real = torch.from_numpy(workload.real_keys().copy()).to(device)
    generator = torch.Generator(device=device).manual_seed(workload.seed)
    ids = torch.randint(1, _VOCABULARY, real.shape, generator=generator, device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    if workload.causal:
        inputs["use_cache"] = False
    if workload.mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return model(**inputs).last_hidden_state

        return forward

    seen = real[:, :, None]

    def step() -> object:
        model.zero_grad(set_to_none=True)
        states = model(**inputs).last_hidden_state
        (states.float() * seen).square().mean().backward()
        return states

    return step
