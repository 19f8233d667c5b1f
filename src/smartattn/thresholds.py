"""Who wins from which key length on: what the cost models say, for people to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from .backends import NAMED
from .call import Call
from .choose import TIE
from .cost import Cost, Predictor
from .features import Layout, Regime
from .plan import Plan
from .profile import Threshold, Winner
from .surroundings import Surroundings
from .workload import Side, Workload, as_padded, usual_memory

#: The key lengths and padding shares at which thresholds are looked for.
THRESHOLD_LENGTHS = tuple(
    round(2**exponent * step) for exponent in range(5, 17) for step in (1.0, 1.5)
)
THRESHOLD_SHARES = (0.1, 0.3, 0.5, 0.75)


def thresholds(
    costs: Sequence[Cost], device: torch.device, surroundings: Surroundings | None = None
) -> list[Threshold]:
    """Who wins from which key length on, for a usual shape of each regime with several backends.

    Args:
        surroundings: the rest of the layers that calls are in; None for calls on their own.
    """
    predictor = Predictor(costs, surroundings)
    measured: dict[Regime, list[Cost]] = defaultdict(list)
    # A backend that was measured with other head sizes is chosen for this one too.
    backends: dict[Regime, set[str]] = defaultdict(set)
    for cost in costs:
        measured[cost.regime].append(cost)
        backends[cost.regime._replace(head_dim=0)].add(cost.backend)
    found = []
    for regime, rivals in sorted(measured.items()):
        names = sorted(backends[regime._replace(head_dim=0)])
        if len(names) < 2:
            continue
        reach = {cost.backend: cost.longest_kv_len for cost in rivals}
        longest = max(reach.values())
        for share in THRESHOLD_SHARES if regime.layout in ("padded", "right") else (0.0,):
            usual = _usual(regime, share)
            winners = _winners(usual, regime.layout, predictor, names, longest, device)
            if not winners:
                # Rows of several lengths may leave nothing to choose.
                usual = replace(usual, spread="same")
                winners = _winners(usual, regime.layout, predictor, names, longest, device)
            if winners:
                found.append(
                    Threshold(
                        mode=regime.mode,
                        layout=regime.layout,
                        causal=regime.causal,
                        dtype=regime.dtype,
                        head_dim=regime.head_dim,
                        batch=usual.batch if regime.layout != "packed" else usual.sequences,
                        heads=usual.heads,
                        kv_heads=usual.kv_heads,
                        padding_share=share,
                        alike=usual.spread == "same",
                        ratio_of="layer" if predictor.of_layers else "call",
                        winners=tuple(winners),
                        # A packed row was measured as a whole, and is asked about by sequence.
                        measured_to=min(reach.get(one.backend, longest) for one in winners)
                        // max(1, usual.sequences),
                    )
                )
    return found


def predictions(
    predictor: Predictor, names: Sequence[str], plan: Plan, call: Call
) -> list[tuple[float, str]]:
    """(microseconds, backend) of those that would be considered for a call.

    The one that would be chosen comes first, then the others by their time.
    """
    predicted = [
        (predictor.predict(name, plan, call), name)
        for name in names
        if name not in NAMED or NAMED[name].set_aside(plan, call) is None
    ]
    times = sorted((us, name) for us, name in predicted if us is not None)
    # As in ``choose``: of those that count as equal the first in order is chosen.
    equal = {name: us for us, name in times if us <= times[0][0] * (1 + TIE)}
    first = next((name for name in NAMED if name in equal), None)
    return sorted(times, key=lambda one: one[1] != first)


def speedup(
    predictor: Predictor, times: Sequence[tuple[float, str]], plan: Plan, call: Call
) -> float | None:
    """How many times as fast as with the next backend the chosen one makes a call's layer.

    Where nothing is known of the layer, of the calls alone. What one of two calls adds may be all
    but hidden behind the layer, so that a ratio of what they add says nothing of the time spent.

    Args:
        times: as :func:`predictions` has them.
    """
    if len(times) < 2 or times[0][0] <= 0:
        return None
    rest_us = predictor.rest_us(plan, call)
    return (rest_us + times[1][0]) / (rest_us + times[0][0])


def _usual(regime: Regime, share: float) -> Workload:
    # As in maps: an encoder's tokenizer pads on the right.
    anywhere: Side = "left" if regime.causal or regime.mode == "decode" else "right"
    sides: dict[str, Side] = {"right": "right", "padded": anywhere, "packed": "packed"}
    packed = regime.layout == "packed"
    side = sides.get(regime.layout, "none")
    return Workload(
        mode=regime.mode,
        causal=regime.causal,
        side=side,
        dtype=regime.dtype,
        batch=1 if packed else 8,
        q_len=1,
        kv_len=1,
        heads=16,
        kv_heads=16,
        head_dim=regime.head_dim,
        sequences=8 if packed else 0,
        padding_share=share,
        memory=usual_memory(regime.mode, regime.causal, side),
    )


def _winners(
    usual: Workload,
    layout: Layout,
    predictor: Predictor,
    names: list[str],
    longest: int,
    device: torch.device,
) -> list[Winner]:
    """The winners by key length; of a packed batch, by the mean length of its sequences."""
    winners: list[Winner] = []
    for length in THRESHOLD_LENGTHS:
        total = length * max(1, usual.sequences)
        if total > longest:
            break
        workload = replace(usual, q_len=1 if usual.mode == "decode" else total, kv_len=total)
        if layout == "masked":
            workload = replace(workload, window=max(1, length // 4))
        workload = as_padded(workload)
        plan, call = workload.plan(device), workload.call(device)
        times = predictions(predictor, names, plan, call)
        ratio = speedup(predictor, times, plan, call)
        if ratio is None:
            continue
        ratio = round(max(1.0, ratio), 3)
        if not winners or winners[-1].backend != times[0][1]:
            winners.append(Winner(from_kv_len=length, backend=times[0][1], speedup=ratio))
        largest = max(ratio, winners[-1].largest_speedup or 1.0)
        winners[-1] = winners[-1].model_copy(update={"largest_speedup": largest})
    return winners
