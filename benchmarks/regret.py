"""How close the choices of a profile are to the best, on calls that no grid holds.

Run from the repository's root: ``python -m benchmarks.regret --help``. Calls are drawn at random,
every backend that can run one is timed on it in interleaved rounds, and the time of what the
profile chooses is divided by the time of the fastest: the regret, 1 at best. The raw timings are
kept, so that another profile can be judged on them later, anywhere: ``--samples FILE``. With
``--folds N`` the raw samples of a calibration are judged, each by a fit to the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from smartattn import evaluate, profile, profiles, samples
from smartattn.backends import BACKENDS
from smartattn.cost import Predictor
from smartattn.evaluate import Judged, Policy, Regret
from smartattn.features import Mode
from smartattn.grid import Limits, limits
from smartattn.machine import Device, identify, processors, versions
from smartattn.measure import Patience, free_memory, measure, warm_up
from smartattn.profile import Profile
from smartattn.samples import Header, Sample
from smartattn.surroundings import Surroundings
from smartattn.workload import Side, Workload

#: (heads, kv_heads, head_dim) of models that are in use: BERT, ViT, GPT-2, Llama, Qwen, Mistral,
#: Phi, Gemma, Falcon, and the shares of them that tensor parallelism leaves to one GPU.
HEADS = (
    *((12, 12, 64), (16, 16, 64), (32, 8, 64), (14, 2, 64), (25, 5, 64), (71, 1, 64)),
    *((32, 32, 80), (20, 20, 80), (16, 16, 80)),
    *((32, 32, 96), (24, 8, 96), (16, 16, 96)),
    *((32, 32, 128), (32, 8, 128), (28, 4, 128), (16, 2, 128), (8, 1, 128), (40, 8, 128)),
    *((8, 4, 256), (16, 16, 256), (4, 1, 256)),
)
#: What share of the calls has each mode.
MODES: dict[Mode, float] = {"forward": 0.4, "train": 0.3, "decode": 0.3}
#: Seconds that the rounds of one call may take, and a first run of a backend.
SECONDS, FIRST_RUN = 0.1, 1.0
#: Calls that are printed with all their timings.
WORST = 15


def drawn(rng: np.random.Generator, mode: Mode, bounds: Limits, dtype: str) -> Workload:
    """A call of a model: unlike the grid's, with the heads and the padding that batches have."""

    def between(low: float, high: float) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))

    heads, kv_heads, head_dim = HEADS[int(rng.integers(len(HEADS)))]
    causal = mode != "decode" and bool(rng.random() < 0.6)
    sides: tuple[Side, ...] = ("none", "left", "right", "packed")
    shares = (0.2, 0.8, 0.0, 0.0) if mode == "decode" else (0.2, 0.3, 0.35, 0.15)
    side = sides[int(rng.choice(4, p=shares))]
    kv_len = between(16, bounds.max_kv_len)
    fewest = 2 if side in ("left", "right") else 1
    batch = between(fewest, min(bounds.max_batch, max(fewest, bounds.max_tokens // kv_len)))
    sequences = 0
    if side == "packed":
        kv_len, batch = min(kv_len * batch, bounds.max_tokens), 1
        sequences = between(2, max(2, min(256, kv_len // 16)))
    windowed = causal and side in ("none", "left", "right") and rng.random() < 0.15
    cached = mode == "decode" or (mode == "forward" and causal and rng.random() < 0.7)
    return Workload(
        mode=mode,
        causal=causal,
        side=side,
        dtype=dtype,
        batch=batch,
        q_len=1 if mode == "decode" else kv_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        sequences=sequences,
        window=between(16, kv_len) if windowed else 0,
        padding_share=float(rng.uniform(0.02, 0.9)) if side in ("left", "right") else 0.0,
        spread=("uniform", "skewed", "same")[int(rng.choice(3, p=(0.6, 0.3, 0.1)))],
        memory="concatenated" if cached else "transposed",
        seed=int(rng.integers(2**31)),
    )


def calls(seed: int, bounds: Limits, dtype: str) -> Any:
    """Calls in random order of mode, without an end. No seed of the grid's draws the same ones."""
    rng = np.random.default_rng([seed, 0x48656C64])
    modes, shares = list(MODES), list(MODES.values())
    while True:
        mode = modes[int(rng.choice(len(modes), p=shares))]
        workload = drawn(rng, mode, bounds, dtype)
        if workload.flops <= bounds.max_flops and workload.bytes <= bounds.max_bytes:
            yield workload


def measured(
    device: torch.device, wanted: int, seconds: float, seed: int, say: Any
) -> tuple[Header, list[Sample]]:
    """Raw timings of up to ``wanted`` calls between which there is a choice."""
    identity = identify(device)
    if identity is None:
        raise SystemExit(f"device {device} cannot be used here")
    bounds = limits(device.type, "default", free_memory(device))
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    taken: list[Sample] = []
    excluded: dict[str, str] = {}
    warm_up(device, BACKENDS)
    patience = Patience(FIRST_RUN, building=0.5 * seconds)
    start, done = time.monotonic(), 0
    for index, workload in enumerate(calls(seed, bounds, dtype)):
        if done >= wanted or time.monotonic() - start >= seconds:
            break
        rows = measure(index, workload, device, BACKENDS, excluded, SECONDS, patience)
        taken += rows
        done += sum(row.status == "ok" for row in rows) > 1
        say(f"\r{done} of {wanted} calls, {time.monotonic() - start:.0f} s")
    say("\n")
    header = Header(
        device=identity,
        versions=versions(identity.kind),
        date=datetime.date.today().isoformat(),
        mode="default",
        grid="held-out",
        seed=seed,
        seconds=time.monotonic() - start,
        complete=done >= wanted,
        excluded=excluded,
        processors=processors(device),
    )
    return header, taken


def policies(made: Profile) -> dict[str, Policy]:
    """The profile, and what one would do without it."""
    rule = profile.load(profiles.shipped_profiles() / "default.json")
    return {
        "profile": evaluate.by_profile(made),
        "always sdpa": evaluate.always("sdpa"),
        "always flash_attention_2": evaluate.always("flash_attention_2", "sdpa"),
        "3000-token rule": evaluate.by_profile(rule),
    }


def remembered(
    earlier: Sequence[Sample], device: torch.device, surroundings: Surroundings | None = None
) -> Policy:
    """What was fastest when the same calls were timed another time.

    It says how far one timing is to be trusted.

    Args:
        surroundings: the layers that the calls are in, as in :func:`smartattn.evaluate.judge`.
    """
    known = evaluate.timings(earlier, device, surroundings)

    def pick(workload: Workload, device: torch.device, names: Sequence[str]) -> str | None:
        us = known.get(workload, {})
        return min((name for name in names if name in us), key=lambda name: us[name], default=None)

    return pick


def in_force(device: Device, given: Path | None) -> tuple[Profile, str]:
    """The profile that a process on this device would use, and where it is from."""
    if given is not None:
        return profile.load(given), str(given)
    found = profiles.find(device)
    return found.profile, f"{found.source}, {found.path}"


def table(judged: dict[str, list[Judged]]) -> list[dict[str, Any]]:
    """One row per policy and mode, the last one per policy of all modes."""
    rows = []
    for name, found in judged.items():
        parts: dict[str, list[Judged]] = {
            mode: evaluate.by_mode(found).get(mode, []) for mode in get_args(Mode)
        }
        for mode, part in {**parts, "all": found}.items():
            figures = Regret.of(part)
            if figures is not None:
                rows.append({"policy": name, "mode": mode, **asdict(figures)})
    return rows


@dataclass(frozen=True)
class Agreement:
    """How two profiles of one device choose on the same calls."""

    calls: int
    #: Share of the calls for which both choose the same backend.
    same: float
    #: Share for which they choose the same, or one of the two is at most 5 % slower.
    close: float
    #: Mean of the slower one's time / the faster one's - 1 where they choose differently.
    mean_loss: float

    @staticmethod
    def of(one: list[Judged], other: list[Judged]) -> Agreement:
        """The agreement of two judgements of the same calls."""
        losses = []
        for a, b in zip(one, other, strict=True):
            if a.chosen != b.chosen:
                times = sorted((a.us[a.chosen], a.us[b.chosen]))
                losses.append(times[1] / times[0] - 1)
        count = max(1, len(one))
        return Agreement(
            len(one),
            1 - len(losses) / count,
            1 - sum(loss > 0.05 for loss in losses) / count,
            sum(losses) / len(losses) if losses else 0.0,
        )


def agreements(
    taken: list[Sample], made: Profile, other: Profile, device: torch.device
) -> dict[str, Agreement]:
    """Of calls on their own, and in the layers that the first profile knows.

    "in a layer" the other profile chooses for layers of the machine that it is from, whose host may
    take twice as long; "in the same layer" for those of the first: only the costs differ then.
    """
    found = {}
    for name, layer, others in (
        ("alone", None, None),
        ("in a layer", made.surroundings, other.surroundings),
        ("in the same layer", made.surroundings, made.surroundings),
    ):
        if name == "alone" or layer is not None:
            first = evaluate.judge(taken, evaluate.by_profile(made, layer), device, layer)
            second = evaluate.judge(taken, evaluate.by_profile(other, others), device, layer)
            found[name] = Agreement.of(first, second)
    return found


def agreements_of_timings(
    taken: list[Sample],
    earlier: list[Sample],
    device: torch.device,
    surroundings: Surroundings | None,
) -> dict[str, Agreement]:
    """How often two timings of the same calls have the same fastest: no two profiles agree more."""
    found = {}
    for name, layer in (("alone", None), ("in a layer", surroundings)):
        if name == "alone" or layer is not None:
            now, then = (
                evaluate.judge(taken, remembered(timings, device, layer), device, layer)
                for timings in (taken, earlier)
            )
            both = {one.workload for one in then}
            found[name] = Agreement.of([one for one in now if one.workload in both], then)
    return found


def show_agreements(heading: str, found: dict[str, Agreement]) -> None:
    """Prints how often two ways to choose do so alike."""
    print(f"\n{heading}")
    for where, agreed in found.items():
        alike = f"{agreed.same:.1%} the same, {agreed.close:.1%} the same or within 5%"
        loss = f"{agreed.mean_loss:.1%} lost on average where they differ"
        print(f"{where:<18}{agreed.calls:>5} calls: {alike}; {loss}")


def show(rows: list[dict[str, Any]], judged: list[Judged], made: Profile, kind: str) -> None:
    """Prints the table and the worst calls."""
    print(f"{'policy':<38}{'mode':<10}{'calls':>6}{'mean':>8}{'p95':>8}{'worst':>8}")
    for row in rows:
        print(
            f"{row['policy']:<38}{row['mode']:<10}{row['calls']:>6}"
            f"{row['mean']:>8.3f}{row['p95']:>8.3f}{row['worst']:>8.2f}"
        )
    device = torch.device(kind)
    predictor = Predictor(made.costs)
    print(f"\nThe {WORST} worst choices of calls on their own: microseconds measured (predicted)")
    for one in sorted(judged, key=lambda one: -one.regret)[:WORST]:
        plan, call = one.workload.plan(device), one.workload.call(device)
        print(f"{one.regret:.2f}  {one.workload}, {one.workload.memory}, {one.workload.spread}")
        for name, us in sorted(one.us.items(), key=lambda pair: pair[1]):
            predicted = predictor.predict(name, plan, call)
            guess = "no model" if predicted is None else f"{predicted:.0f}"
            print(f"      {name:<20}{us:>10.0f} ({guess}){' <- chosen' * (name == one.chosen)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.regret", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=270.0, help="budget for measuring")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", type=Path, help="instead of the one in force")
    parser.add_argument(
        "--samples", type=Path, help="raw timings to judge on, instead of measuring"
    )
    parser.add_argument("--keep", type=Path, help="where to write raw timings (safetensors)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--against", type=Path, help="another profile, to compare the choices with")
    parser.add_argument(
        "--again",
        type=Path,
        help="raw timings of the same calls at another time: what going by them would lose",
    )
    parser.add_argument("--folds", type=int, default=0, help="with --samples: cross-validate")
    given = parser.parse_args(arguments)
    if given.samples is not None:
        header, taken = samples.load(given.samples)
    else:

        def say(text: str) -> None:
            print(text, end="", file=sys.stderr, flush=True)

        header, taken = measured(given.device, given.calls, given.seconds, given.seed, say)
        keep = given.keep or Path(f"heldout-{header.device.slug}-{given.seed}.safetensors")
        samples.save(keep, header, taken)
        print(f"raw timings: {keep}")
    made, source = in_force(header.device, given.profile)
    device = torch.device(header.device.kind)
    again = [] if given.again is None else samples.load(given.again)[1]
    picks = policies(made)
    if again:
        picks |= {"timed another time": remembered(again, device)}
    judged = {name: evaluate.judge(taken, pick, device) for name, pick in picks.items()}
    if (layer := made.surroundings) is not None:
        # Host and device wait for each other only within a layer; there another backend may win.
        picks |= {"profile": evaluate.by_profile(made, layer)}
        if again:
            picks |= {"timed another time": remembered(again, device, layer)}
        judged |= {
            f"{name}, in a layer": evaluate.judge(taken, pick, device, layer)
            for name, pick in picks.items()
        }
    if given.folds:
        source = f"{given.folds} folds of {given.samples}"
        judged["profile"] = evaluate.cross_validated(
            taken, made, device, given.folds, processors=header.processors
        )
        if (layer := made.surroundings) is not None:
            judged["profile, in a layer"] = evaluate.cross_validated(
                taken, made, device, given.folds, surroundings=layer, processors=header.processors
            )
    elif made.run is not None and given.samples and made.run.raw_samples == given.samples.name:
        source += ", made from these very timings: --folds 10 would be fair"
    if all(sample.backend != "flash_attention_2" for sample in taken):
        judged = {name: one for name, one in judged.items() if "flash_attention_2" not in name}
    rows = table(judged)
    print(f"{header.device}; profile {made.name} ({source}); {header.seconds:.0f} s of measuring")
    for name, reason in header.excluded.items():
        print(f"{name} is left out: {reason}")
    slow = sum(sample.status == "slow" for sample in taken)
    print(f"{slow} runs left out: their first time alone would have taken over {FIRST_RUN} s")
    show(rows, judged["profile"], made, header.device.kind)
    compared: dict[str, Agreement] = {}
    if given.against is not None:
        compared = agreements(taken, made, profile.load(given.against), device)
        show_agreements(f"Choices of {given.against.name} beside those of this profile", compared)
    if again:
        fastest = agreements_of_timings(taken, again, device, made.surroundings)
        show_agreements("The fastest by timings of another time beside the fastest here", fastest)
    if given.json is not None:
        figures = {
            "device": header.device.model_dump(exclude_none=True),
            "versions": header.versions.model_dump(exclude_none=True),
            "date": header.date,
            "seed": header.seed,
            "seconds": round(header.seconds, 1),
            "profile": source,
            "regret": rows,
            "agreement": {where: asdict(agreed) for where, agreed in compared.items()},
        }
        given.json.write_text(json.dumps(figures, indent=1) + os.linesep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
