"""Which workloads are timed, in which order: those that tell most about the costs come first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from .features import Mode, features
from .workload import Side, Workload

#: Changes with the workloads that a seed yields: samples of two versions are not mixed.
VERSION = "9"

RunMode = Literal["quick", "default"]
#: Workloads drawn per family, of which the most different ones are timed first.
_CANDIDATES = 64
#: Fewest samples that a model is made from.
FEWEST = 4
#: Workloads of each family that are timed in a turn, by the place of its dtype and head_dim: what
#: the first one teaches holds for the others too, up to a factor. A quick run may have one turn.
_TURNS: dict[RunMode, tuple[int, ...]] = {"quick": (4, 2, 1), "default": (6, 4, 2)}
#: Share of workloads with a window, beside those of a family of their own.
_WINDOWS = 0.125
#: How many times as many of a mode: one query is quickly timed, and how a kernel splits its keys is
#: hard to foresee; of training the opposite holds.
_SHARES: dict[Mode, float] = {"forward": 1.0, "train": 0.5, "decode": 2.0}


@dataclass(frozen=True, slots=True)
class Family:
    """Workloads that share what a kernel branches on."""

    mode: Mode
    causal: bool
    sides: tuple[Side, ...]
    dtype: str
    head_dim: int
    #: Share of the workloads that have a window.
    windows: float = 0.0
    #: All rows have as much padding.
    alike: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a workload may be."""

    #: Keys per row, and tokens per batch.
    max_kv_len: int
    max_tokens: int
    #: Floating-point operations of one call with all masked pairs, and bytes of all its tensors.
    max_flops: float
    max_bytes: float
    max_batch: int = 256
    max_padding_share: float = 0.75
    #: Share of ``max_flops`` for float32, which GPUs are several times slower at.
    single_share: float = 1.0


def limits(kind: str, mode: RunMode, memory_bytes: int) -> Limits:
    """The limits for a device kind with that much free memory."""
    memory = 0.4 * memory_bytes
    if kind == "cpu":
        if mode == "quick":
            return Limits(2048, 32_768, 1.5e9, min(memory, 1e9), max_batch=64)
        return Limits(8192, 65_536, 5e9, min(memory, 4e9), max_padding_share=0.9)
    if mode == "quick":
        return Limits(131_072, 1_048_576, 1e12, min(memory, 1.6e10), single_share=0.1)
    return Limits(
        131_072, 1_048_576, 2e12, min(memory, 3.2e10), max_padding_share=0.9, single_share=0.1
    )


def families(kind: str, mode: RunMode, varlen: bool = True) -> list[Family]:
    """The families for a device kind, the most common uses first.

    Those are left out where only one backend could run: on a CPU, all without padding. So it is
    with rows of several lengths on a GPU, where no kernel for sequences takes them.

    Args:
        varlen: a GPU has such a kernel for half precision.
    """
    either: tuple[Side, ...] = ("left", "right")
    shapes: list[tuple[Mode, bool, tuple[Side, ...]]] = [
        ("forward", True, ("left",)),
        ("forward", False, either),
        ("decode", False, ("left",)),
        ("forward", True, ("right",)),
        ("train", True, ("right",)),
        ("train", False, either),
        ("train", True, ("left",)),
    ]
    if kind == "cpu":
        dims: tuple[int, ...] = (64, 32, 128) if mode == "quick" else (64, 32, 128, 80, 96)
        found = [Family(*shape, "float32", dim) for dim in dims for shape in shapes]
        if mode == "default":
            found += [Family(*shape, "bfloat16", dim) for dim in (64, 128) for shape in shapes[:4]]
        return found
    shapes += [
        ("forward", True, ("none",)),
        ("forward", False, ("none",)),
        ("decode", False, ("none",)),
        ("train", True, ("none",)),
        ("train", False, ("none",)),
        ("forward", True, ("packed",)),
        ("train", True, ("packed",)),
        ("forward", False, ("packed",)),
    ]
    # Those in between cost kernels what the next larger one does; more than the largest would not.
    dims = (128, 64, 256) if mode == "quick" else (128, 64, 96, 80, 256)
    found = [Family(*shape, "bfloat16", dim) for dim in dims for shape in shapes]
    if mode == "default":
        found = [replace(family, windows=_windows(family)) for family in found]
        found += [
            Family("forward", True, ("none",), "bfloat16", dim, windows=1.0) for dim in (128, 64)
        ]
        found += [Family(*shape, "float32", dim) for dim in (64, 128) for shape in shapes[:7]]
    return [replace(family, alike=family.dtype == "float32" or not varlen) for family in found]


def _windows(family: Family) -> float:
    # Kernels read no more keys than a window holds, and masks hide the rest: both change a cost.
    without = family.mode == "decode" or family.sides == ("packed",)
    return 0.0 if without else _WINDOWS


def workloads(
    families: list[Family], limits: Limits, seed: int, mode: RunMode = "default"
) -> Iterator[Workload]:
    """Workloads in turns over the families; within a family, each unlike the ones before it.

    Families of one dtype and head_dim come together and take turns, the most common ones with the
    most workloads: a run that ends early knows something of all that models do with those.
    """
    chosen: dict[Family, list[Workload]] = {}
    blocks: dict[tuple[str, int], list[Family]] = {}
    for family in families:
        blocks.setdefault((family.dtype, family.head_dim), []).append(family)
    for cycle in range(_CANDIDATES):
        for place, block in enumerate(blocks.values()):
            turns = _TURNS[mode][min(place, len(_TURNS[mode]) - 1)]
            own = {family: max(1, round(turns * _SHARES[family.mode])) for family in block}
            for turn in range(max(own.values())):
                for family in block:
                    if turn >= own[family]:
                        continue
                    if family not in chosen:
                        # Drawn when its turn comes first: waiting for all would be felt.
                        seeds = [seed, families.index(family)]
                        chosen[family] = _family(family, limits, seeds)
                    number = cycle * own[family] + turn
                    if number < len(chosen[family]):
                        yield chosen[family][number]


def _family(family: Family, limits: Limits, seed: list[int]) -> list[Workload]:
    rng = np.random.default_rng(seed)
    candidates: list[Workload] = []
    max_flops = limits.max_flops * (limits.single_share if family.dtype == "float32" else 1.0)
    for _ in range(_CANDIDATES * 40):
        workload = _drawn(family, limits, rng)
        if workload.flops > max_flops or workload.bytes > limits.max_bytes:
            continue
        # Little padding may come to nothing in short rows: a workload of another family.
        if workload.side not in ("left", "right") or not workload.real_keys().all():
            candidates.append(workload)
            if len(candidates) == _CANDIDATES:
                break
    return _most_different_first(candidates)


def _drawn(family: Family, limits: Limits, rng: np.random.Generator) -> Workload:
    def between(low: float, high: float) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))

    kv_len = between(16, limits.max_kv_len)
    side = family.sides[int(rng.integers(len(family.sides)))]
    # With one row of left or right padding the batch is a shorter batch; models rarely make one.
    fewest = 2 if side in ("left", "right") else 1
    batch = between(fewest, min(limits.max_batch, max(fewest, limits.max_tokens // kv_len)))
    sequences = 0
    if side == "packed":
        kv_len, batch = min(kv_len * batch, limits.max_tokens), 1
        sequences = between(2, max(2, min(256, kv_len // 16)))
    group = int(rng.choice([1, 1, 1, 4, 4, 8, 8, 16, 64]))
    heads = max(group, int(rng.choice([4, 8, 12, 16, 32])) // group * group)
    windowed = family.windows > 0 and rng.random() < family.windows
    workload = Workload(
        mode=family.mode,
        causal=family.causal,
        side=side,
        dtype=family.dtype,
        batch=batch,
        q_len=1 if family.mode == "decode" else kv_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=heads // group,
        head_dim=family.head_dim,
        sequences=sequences,
        window=max(1, between(16, kv_len) - 1) if windowed else 0,
        padding_share=float(rng.uniform(0.02, limits.max_padding_share)),
        spread="same"
        if rng.random() < 0.1 or family.alike
        else "skewed"
        if rng.random() < 0.3
        else "uniform",
        # What a model with a cache hands over, and only that has a causal decode.
        memory="concatenated"
        if family.mode == "decode" or (family.causal and rng.random() < 0.5)
        else "transposed",
        seed=int(rng.integers(2**31)),
    )
    return replace(workload, padding_share=0.0) if side in ("none", "packed") else workload


def _most_different_first(candidates: list[Workload]) -> list[Workload]:
    """Orders by greedy choice of whatever is farthest from all chosen so far, in log features."""
    if len(candidates) < 3:
        return candidates
    cpu = torch.device("cpu")
    amounts = np.array([features(w.plan(cpu), w.call(cpu)) for w in candidates])
    points = np.log(amounts + 1e-4)
    deviation = points.std(axis=0)
    points = (points - points.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    # The first is the one in the middle: right enough alone if the time ends there.
    order = [int(np.square(points).sum(axis=1).argmin())]
    nearest = np.square(points - points[order[0]]).sum(axis=1)
    while len(order) < len(candidates):
        farthest = int(nearest.argmax())
        order.append(farthest)
        nearest[order] = -1.0
        distance = np.square(points - points[farthest]).sum(axis=1)
        nearest = np.where(nearest < 0, nearest, np.minimum(nearest, distance))
    return [candidates[place] for place in order]
