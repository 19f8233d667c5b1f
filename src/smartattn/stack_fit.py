"""From timings of stacks with and without their padding to the rules of a profile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .grid import FEWEST
from .least_squares import FloatArray
from .samples import Header, StackSample
from .stack_rule import StackRule, StackWhen

#: How much faster packing has to be before it counts as paying: what a rule promises must hold for
#: other models too, and of plain "smart" nothing may be lost.
MARGIN = 0.03


def fit_stack_rules(samples: Sequence[StackSample], header: Header) -> tuple[StackRule, ...]:
    """When packing pays on a device, and that it does not otherwise; nothing from few samples.

    The conditions are lower bounds on the share of padding, on the work of the padded batch and on
    the work that is spared: with more of each nothing is skipped that was packed with less. They
    are the bounds that gain the most time of those that let in no sample where packing was not
    faster by ``MARGIN``, and each is the smallest value of a sample that they let in.
    """
    if len(samples) < FEWEST:
        return ()
    kind = header.device.kind
    measured = f"measured on {header.device} on {header.date}"
    speedups = np.array([sample.speedup for sample in samples])
    inside = np.zeros(len(samples), dtype=bool)
    rules = []
    when = _best_bounds(samples, kind)
    if when is not None:
        inside = np.array([_holds(when, sample, kind) for sample in samples])
        because = f"{measured}: from there on {_times(speedups[inside])} ({_described(samples)})"
        rules.append(StackRule(when=when, pack=True, because=because))
    outside = speedups[~inside]
    because = f"{measured}: smaller batches and less padding were not timed"
    if outside.size:
        where = "with less of any of these" if rules else f"nowhere {MARGIN:.0%} faster,"
        because = f"{measured}: {where} {_times(outside)}"
        because += "" if rules else f" ({_described(samples)})"
    rules.append(StackRule(when=StackWhen(device=kind), pack=False, because=because))
    return tuple(rules)


def _best_bounds(samples: Sequence[StackSample], kind: str) -> StackWhen | None:
    points = np.array([(s.padding_share, s.work, s.spared_work) for s in samples])
    speedups = np.array([sample.speedup for sample in samples])
    pays = speedups >= 1 + MARGIN
    best, most = None, 0.0
    for share in np.unique(points[pays, 0]):
        for work in np.unique(points[pays, 1]):
            within = (points[:, 0] >= share) & (points[:, 1] >= work)
            lost = points[within & ~pays, 2].max(initial=-1.0)
            chosen = within & pays & (points[:, 2] > lost)
            gain = float(np.log(speedups[chosen]).sum())
            if gain > most:
                best, most = points[chosen].min(axis=0), gain
    if best is None:
        return None
    # Short numbers, unless rounding would let in a sample that was not to be packed; never exact
    # ones, which the sample that they come from may miss by the last bit.
    for bounds in (_rounded_down(best), best * (1 - 1e-9)):
        when = StackWhen(
            device="cuda" if kind == "cuda" else "cpu",
            min_padding_share=float(bounds[0]),
            min_work=float(bounds[1]),
            min_spared_work=float(bounds[2]),
        )
        if all(_holds(when, s, kind) <= paid for s, paid in zip(samples, pays, strict=True)):
            break
    return when


def _holds(when: StackWhen, sample: StackSample, kind: str) -> bool:
    return when.holds(kind, sample.padding_share, sample.spared_work)


def _rounded_down(values: FloatArray, digits: int = 3) -> FloatArray:
    units = [10.0 ** (math.floor(math.log10(value)) + 1 - digits) for value in values]
    return np.array([math.floor(v / u) * u for v, u in zip(values, units, strict=True)])


def _times(speedups: FloatArray) -> str:
    low, high = float(speedups.min()), float(speedups.max())
    count = f"{len(speedups)} batch{'es' * (len(speedups) != 1)}"
    return f"{low:.2f} to {high:.2f} times as fast in {count}"


def _described(samples: Sequence[StackSample]) -> str:
    """What was measured, as a phrase."""
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
