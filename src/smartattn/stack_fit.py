"""From timings of stacks with and without their padding to the rules of a profile."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .least_squares import FloatArray
from .plan import BoolArray
from .samples import Header, StackSample
from .stack_host import LayerTimes, multiplications
from .stack_rule import MARGIN, MAX_WIDTH, MAX_WORK, StackRule, StackWhen

#: Fewest samples that rules are made from.
FEWEST = 2
#: A sample speaks against packing others that have up to so much more padding and work: lengths
#: are drawn, so that two samples of one share of padding differ a little.
_ALIKE = 0.9
#: Bounds on padding that differ by less become one, within the room that ``_ALIKE`` makes.
_SAME = 0.95
#: How far beyond the samples that contradict it a rule of the default begins to hold.
_BEYOND = 2.0
#: A forward that takes so much longer than the shortest one waits for the device, not for the host.
_DEVICE_BOUND = 2.0


def pays(sample: StackSample) -> bool:
    """Whether packing was faster by ``MARGIN``, beyond what the rounds leave open."""
    return sample.speedup * (1 - sample.spread / math.sqrt(max(1, sample.rounds))) >= 1 + MARGIN


def fit_stack_rules(
    samples: Sequence[StackSample], header: Header, default: Sequence[StackRule] = ()
) -> tuple[StackRule, ...]:
    """When packing pays on a device, and that it does not otherwise; nothing from few samples.

    A batch is packed that has at least the padding and the work of a sample that pays, unless with
    as much of both or more there was one where packing was not faster by ``MARGIN``. With more of
    either nothing is skipped that was packed with less. Work is that of the padded batch: it says
    whether a forward waits for the host, which packing only adds to, and with the share of padding
    what there is to gain.

    Args:
        default: rules that hold where nothing was measured; each begins beyond the samples that
            contradict it.
    """
    if len(samples) < FEWEST:
        return ()
    kind = header.device.kind
    measured = f"measured on {header.device} on {header.date}"
    speedups = np.array([sample.speedup for sample in samples])
    packed = np.zeros(len(samples), dtype=bool)
    rules = []
    for when in _bounds(samples, kind, _width(samples)):
        packed |= np.array([_holds(when, sample, kind) for sample in samples])
        inside = np.array([_counts(when, sample, kind) for sample in samples])
        batches = f"{_count(inside)} with at least that padding and work"
        because = f"{measured}: {batches} ran {_times(speedups[inside])}"
        because += f" ({_described(samples, inside)})"
        rules.append(StackRule(when=when, pack=True, because=because))
    beyond = [
        _beyond(rule, samples, kind)
        for rule in default
        if rule.pack and rule.when.device in (None, kind)
    ]
    for rule in beyond:
        packed |= np.array([_holds(rule.when, sample, kind) for sample in samples])
    because = f"{measured}: smaller batches and less padding were not timed"
    if not packed.all():
        some = packed.any()
        batches = f"{_count(~packed)} {'below all bounds ' if some else ''}ran"
        faster = sum(pays(one) for one, under in zip(samples, ~packed, strict=True) if under)
        certain = f", {faster or 'none'} of them {MARGIN:.0%} faster for certain"
        because = f"{measured}: {batches} {_times(speedups[~packed])}{certain}"
        because += f" ({_described(samples, ~packed)})"
    never = StackRule(when=StackWhen(device=kind), pack=False, because=because)
    return (*rules, *beyond, never)


def fit_layer_times(samples: Sequence[StackSample], header: Header) -> LayerTimes | None:
    """What padded layers take a device, by the forwards that wait for it; None where unknown."""
    if header.device.kind == "cpu":
        return None
    width = _width(samples) or 0.0
    rates = {causal: _rate(samples, causal, width) for causal in (False, True)}
    if rates == {False: None, True: None}:
        return None
    return LayerTimes(encoder=rates[False], decoder=rates[True], width=width)


def _rate(samples: Sequence[StackSample], causal: bool, width: float) -> float | None:
    """See :class:`LayerTimes`."""
    forwards = [s for s in samples if s.workload.mode == "forward" and s.workload.causal == causal]
    shortest = min((sample.padded_us for sample in forwards), default=0.0)
    rates = []
    for sample in forwards:
        if sample.padded_us >= _DEVICE_BOUND * shortest:
            work = sample.workload
            count = multiplications(
                causal, work.batch, work.kv_len, sample.hidden, weights(sample), width
            )
            rates.append(1e9 * sample.padded_us / sample.layers / count)
    return _rounded_down(statistics.median(rates)) if rates else None


def weights(sample: StackSample) -> float:
    """How many numbers a token is multiplied by in a layer, see :func:`.stack_measure.build`."""
    attention = 2.0 + 2.0 * sample.workload.kv_heads / sample.workload.heads
    # A Llama's MLP has a gate.
    return (attention + 4.0 * (3 if sample.workload.causal else 2)) * sample.hidden**2


def _beyond(
    rule: StackRule, samples: Sequence[StackSample], kind: Literal["cuda", "cpu"]
) -> StackRule:
    """A rule of the default, as far as no sample contradicts it."""
    width = rule.when.width or 0.0
    lost = [
        sample.spared_work * (1 + width / sample.hidden)
        for sample in samples
        if sample.speedup < 1 + MARGIN and _holds(rule.when, sample, kind)
    ]
    if not lost:
        return rule
    least = min(MAX_WORK, _BEYOND * max(lost))
    because = f"beyond the batches that contradict it, by the default: {rule.because}"[:2000]
    when = rule.when.model_copy(update={"min_spared_work": least})
    return rule.model_copy(update={"when": when, "because": because})


def _holds(when: StackWhen, sample: StackSample, kind: Literal["cuda", "cpu"]) -> bool:
    return when.holds(kind, sample.padding_share, sample.spared_work, sample.hidden)


def _counts(when: StackWhen, sample: StackSample, kind: Literal["cuda", "cpu"]) -> bool:
    """Whether a sample is one of those that a rule speaks of.

    Lengths are drawn, so that of batches meant to be half padding some have 49.99%: a share that
    prints as that of the rule is as good as it.
    """
    share, least = sample.padding_share, when.min_padding_share or 0.0
    if round(share, 2) == round(least, 2) and share >= _ALIKE * least:
        share = max(share, least)
    return when.holds(kind, share, share * sample.work, sample.hidden)


def _width(samples: Sequence[StackSample]) -> float | None:
    """``StackWhen.width`` by the padded forwards of encoders of two sizes; None where unknown.

    The time of a token / hidden size is a line over the hidden size: its height at 0, of the reads
    and writes, over its slope. Narrow forwards that wait for the host would make it too high.
    """
    forwards = [s for s in samples if s.workload.mode == "forward" and not s.workload.causal]
    if not forwards:
        return None
    shortest = min(sample.padded_us for sample in forwards)
    times: dict[int, float] = {}
    for sample in forwards:
        if sample.padded_us >= _DEVICE_BOUND * shortest:
            us = sample.padded_us * sample.hidden / sample.work / sample.layers
            times[sample.hidden] = min(us, times.get(sample.hidden, math.inf))
    if len(times) < 2:
        return None
    narrow, wide = min(times), max(times)
    slope = (times[wide] - times[narrow]) / (wide - narrow)
    height = times[narrow] - slope * narrow
    # Wider layers are never quicker by themselves: such times say nothing.
    if slope <= 0 or not 0 < height / slope <= MAX_WIDTH:
        return None
    return _rounded_down(height / slope, 2)


def _bounds(
    samples: Sequence[StackSample], kind: Literal["cuda", "cpu"], width: float | None
) -> list[StackWhen]:
    """The least padding and work that are packed: more padding first, and with it less work."""
    points = np.array(
        [(s.padding_share, s.work * (1 + (width or 0.0) / s.hidden)) for s in samples]
    )
    lost = points[[sample.speedup < 1 + MARGIN for sample in samples]]
    least: list[tuple[float, float]] = []
    for share, work in sorted(map(tuple, points[[pays(sample) for sample in samples]])):
        if (lost >= _ALIKE * np.array((share, work))).all(axis=1).any():
            continue
        # The one before it has less padding, and may have less work as well.
        if least and work >= least[-1][1]:
            continue
        if least and least[-1][0] >= _SAME * share:
            share, _ = least.pop()
        least.append((share, work))
    return [
        StackWhen(
            device=kind,
            min_padding_share=_rounded_down(share),
            min_work=_rounded_down(work),
            width=width,
        )
        for share, work in reversed(least)
    ]


def _rounded_down(value: float, digits: int = 3) -> float:
    """A shorter number, by less than ``_ALIKE`` makes room for."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.floor(value / unit) * unit:.{digits}g}")


def _count(which: BoolArray) -> str:
    count = int(which.sum())
    return f"{count} batch{'es' * (count != 1)}"


def _times(speedups: FloatArray) -> str:
    low, high = f"{speedups.min():.2f}", f"{speedups.max():.2f}"
    span = low if low == high else f"{low} to {high}"
    return f"{span} times as fast packed as padded"


def _described(every: Sequence[StackSample], which: BoolArray) -> str:
    """What some batches were of, as a phrase."""
    samples = [sample for sample, one in zip(every, which, strict=True) if one]
    stacks = dict.fromkeys(
        ("Llama" if s.workload.causal else "BERT", s.hidden, s.workload.mode) for s in samples
    )
    kinds = []
    for name in ("BERT", "Llama"):
        sizes = sorted({hidden for other, hidden, _ in stacks if other == name})
        if sizes:
            kinds.append(f"{name}-like of hidden size {' and '.join(map(str, sizes))}")
    modes = [m for m in ("forward", "train") if any(mode == m for *_, mode in stacks)]
    words = {"forward": "forward", "train": "training"}
    layers = " and ".join(map(str, sorted({sample.layers for sample in samples})))
    dtypes = ", ".join(dict.fromkeys(sample.workload.dtype for sample in samples))
    return f"{', '.join(kinds)}, {layers} layers, {dtypes}, {' and '.join(words[m] for m in modes)}"
