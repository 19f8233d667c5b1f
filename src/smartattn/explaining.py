"""What would be chosen for a call of given sizes, what every backend says of it, and where the
choice changes. Nothing runs, so that the profile of a GPU can be asked without that GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from .backends import BACKENDS
from .call import Call
from .choose import LATENCY, Decision, Goal, UnsupportedCallError, choose
from .control import PadOutput, Settings, checked, settings_for
from .cost import MAX_EXTRAPOLATION
from .explanation import Explanation, Option, Status, Winner
from .features import Mode
from .machine import versions
from .packed_stack import packed_plan, plan_refusal
from .plan import Plan
from .stack_choice import KEEPS_PADDING, Worth, backend_refusal, pays
from .target import Target, target_of
from .workload import WORDS, Side, Workload, as_padded, usual_memory

#: Most tokens of a batch, and of any other size, that are explained.
MAX_TOKENS = 1 << 26
MAX_SIZE = 1 << 24
#: The lengths between which a change of the choice is looked for, and the steps per octave.
_SHORTEST, _LONGEST, _STEPS = 16, 1 << 17, 2
#: Lengths that are asked about from step to step.
_PARTS = 4


def explain(
    *,
    batch: int = 1,
    seq_len: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    hidden: int | None = None,
    causal: bool = False,
    padding: float = 0.0,
    side: Literal["left", "right"] | None = None,
    window: int | None = None,
    packed: int | None = None,
    grad: bool = False,
    decode: bool = False,
    dtype: torch.dtype | str | None = None,
    pad_output: PadOutput | None = None,
    backends: Sequence[str] | None = None,
    objective: Goal | None = None,
    max_slowdown: float | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """What ``"smart"`` would choose for one attention call, and why.

    Args:
        batch, seq_len: shape of the batch in tokens, padding included; when decoding ``seq_len``
            counts the keys, the token that is generated included.
        heads, kv_heads, head_dim: of the model; ``kv_heads`` None stands for ``heads``.
        hidden: size of the model's hidden states, on which it depends whether a padding-free model
            packs the batch; None is heads times head_dim.
        causal: a token sees nothing after it; implied by ``decode``.
        padding: share of the tokens that are padding, 0 to below 1. Lengths are drawn at random.
        side: where the padding lies; None is left when decoding, otherwise right.
        window: keys that a token sees on its left (causal, itself included) or on each side.
        packed: number of sequences that lie behind each other in a single row.
        grad: forward and backward instead of the forward alone.
        decode: one query per sequence.
        dtype: of the tensors; None is bfloat16 on a GPU and float32 on a CPU.
        pad_output, backends, objective, max_slowdown: as in :func:`smartattn.use`; None is what is
            in force here.
        device: "cpu", "cuda", "cuda:N", or the name of a device that a profile was measured on,
            such as "NVIDIA H200". None is the GPU if there is one.

    Raises:
        ValueError: sizes that cannot be, an unknown dtype or device; one line.
    """
    target = target_of(device)
    if dtype is None:
        dtype = "bfloat16" if target.device.type == "cuda" else "float32"
    mode: Mode = "train" if grad else "decode" if decode else "forward"
    if grad and decode:
        raise ValueError("a gradient and decoding exclude each other")
    place: Side = "none"
    if packed is not None:
        if padding or decode or batch != 1:
            raise ValueError("packed sequences lie in a batch of 1, without padding or decoding")
        place = "packed"
    elif padding:
        place = side or ("left" if decode else "right")
    workload = Workload(
        mode=mode,
        causal=causal or decode,
        side=place,
        dtype=_dtype_name(dtype),
        batch=batch,
        q_len=1 if decode else seq_len,
        kv_len=seq_len,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        sequences=packed or 0,
        window=window or 0,
        padding_share=padding,
        memory=usual_memory(mode, causal, place),
    )
    _check(workload)
    hidden = heads * head_dim if hidden is None else hidden
    if not 1 <= hidden <= MAX_SIZE:
        raise ValueError(f"hidden is 1 to {MAX_SIZE}, given {hidden}")
    given = checked(backends, pad_output, objective, max_slowdown)
    return _explained(workload, hidden, target, replace(settings_for(None), **given))


# -- the answer ----------------------------------------------------------------------------------


def _explained(workload: Workload, hidden: int, target: Target, settings: Settings) -> Explanation:
    profile = target.found.profile
    plan, call = _request(workload, target, settings)
    decision: Decision | None = None
    try:
        decision = _choose(plan, call, target, settings)
        reason = decision.reason
    except UnsupportedCallError as error:
        reason = str(error)
    differences: Sequence[str] = ()
    if target.here and target.identity is not None and profile.versions is not None:
        differences = profile.versions.differences(versions(target.identity.kind))
    path = target.found.path
    packing = _packs(workload, hidden, target, settings)
    estimates = [profile.estimate(backend.name, plan, call) for backend in BACKENDS]
    known = next((one for one in estimates if one is not None), None)
    winners = _winners(workload, target, settings) if decision else ()
    unmeasured = None
    if decision and profile.costs and _by_rule(decision):
        unmeasured = _unmeasured(workload.kv_len, winners)
    return Explanation(
        workload=workload,
        pad_output=settings.pad_output or "zeros",
        objective=str(settings.objective or LATENCY),
        device=str(target.identity or target.device),
        assumption=None
        if target.here
        else "this machine has no such device; the packages that the profile names are there, in "
        "its versions, and no others",
        profile=profile.name,
        profile_source=target.found.source,
        profile_path=None if path is None else _shown(path),
        version_differences=tuple(differences),
        backend=decision.backend.name if decision else None,
        reason=reason,
        options=_options(plan, call, target, settings, decision),
        winners=winners,
        packs=None if packing is None else packing.packs,
        packs_because=None if packing is None else packing.reason,
        packs_asked=None if packing is None else packing.asked,
        packing=packing,
        unmeasured=unmeasured,
        waits_for=known.bottleneck if known else None,
        idle_us=abs(known.slack_us) if known and known.bottleneck else None,
    )


def _by_rule(decision: Decision) -> bool:
    """Whether there were several backends to choose from and no two predictions to compare."""
    predicted = sum(verdict.predicted_us is not None for verdict in decision.verdicts)
    return predicted < 2 and not decision.reason.startswith("the only one")


def _unmeasured(seq_len: int, winners: Sequence[Winner]) -> str:
    """Why no two backends are predicted for a length that a rule decides."""
    before = [winner for winner in winners if winner.from_seq_len <= seq_len]
    if before and before[-1].by_rule and not all(winner.by_rule for winner in before):
        return (
            f"predictions for such calls end at {MAX_EXTRAPOLATION} times the longest length "
            "measured; a rule decides beyond"
        )
    return "the profile predicts fewer than two backends for such calls; a rule decides"


def _packs(workload: Workload, hidden: int, target: Target, settings: Settings) -> Worth | None:
    """Whether a padding-free model would pack a batch, and why: as it asks in a forward."""
    if workload.side not in ("left", "right"):
        return None
    plan, call = _request(workload, target, settings)
    refusal = plan_refusal(plan)
    if refusal is not None:
        return Worth(False, refusal)
    worth = pays(plan, hidden, target.found.profile)
    if not worth.packs:
        return worth
    if call.keep_padding_output:
        return Worth(False, KEEPS_PADDING)
    packed = packed_plan(plan)
    # The cache is filled on the side: layers of a packed forward get their keys as they made them.
    call = replace(call, batch=1, q_len=packed.q_len, kv_len=packed.kv_len, token_major_keys=True)
    try:
        backend = _choose(packed, call, target, settings).backend
    except UnsupportedCallError as error:
        return Worth(False, str(error))
    refusal = backend_refusal(backend, packed, call)
    return worth if refusal is None else Worth(False, refusal)


def _request(workload: Workload, target: Target, settings: Settings) -> tuple[Plan, Call]:
    workload = as_padded(workload)
    call = workload.call(target.device)
    call = replace(call, keep_padding_output=settings.pad_output == "sdpa", has_eager=True)
    return workload.plan(target.device), call


def _choose(plan: Plan, call: Call, target: Target, settings: Settings) -> Decision:
    objective = settings.objective or LATENCY
    profile = target.found.profile
    return choose(plan, call, profile, BACKENDS, settings.backends, objective, target.ask)


def _options(
    plan: Plan,
    call: Call,
    target: Target,
    settings: Settings,
    decision: Decision | None,
) -> tuple[Option, ...]:
    profile, allowed = target.found.profile, settings.backends
    options = []
    for backend in BACKENDS:
        refusals = target.ask(backend, plan, call)
        estimate = None if refusals else profile.estimate(backend.name, plan, call)
        status: Status
        reasons = tuple(refusals)
        if decision is not None and backend.name == decision.backend.name:
            status = "chosen"
        elif refusals:
            status = "refuses"
        elif allowed is not None and backend.name not in allowed:
            status, reasons = "set aside", ("not among the backends that are allowed",)
        elif reason := backend.set_aside(plan, call):
            # A time would look like a reason to choose it.
            status, reasons, estimate = "set aside", (reason,), None
        else:
            status = "unmeasured" if estimate is None else "slower"
        options.append(
            Option(
                backend=backend.name,
                status=status,
                predicted_us=estimate and estimate.us,
                host_us=estimate and estimate.host_us,
                device_us=estimate and estimate.device_us,
                shared_us=estimate and estimate.shared_us,
                predicted_bytes=estimate and estimate.peak_bytes,
                expected_error=estimate and estimate.error,
                reasons=reasons,
                beyond=estimate.longest_kv_len
                if estimate and 0 < estimate.longest_kv_len < call.kv_len
                else None,
            )
        )
    order: list[Status] = ["chosen", "slower", "unmeasured", "set aside", "refuses"]
    return tuple(sorted(options, key=lambda o: (order.index(o.status), o.predicted_us or 0.0)))


def _winners(workload: Workload, target: Target, settings: Settings) -> tuple[Winner, ...]:
    """The choice at growing lengths. A change is narrowed down to a few tokens."""
    shortest = max(_SHORTEST, 2 * workload.sequences)
    if workload.batch * shortest > MAX_TOKENS:
        return ()

    def chosen(length: int) -> tuple[str, bool]:
        q_len = 1 if workload.mode == "decode" else length
        other = replace(workload, kv_len=length, q_len=q_len)
        plan, call = _request(other, target, settings)
        try:
            decision = _choose(plan, call, target, settings)
        except UnsupportedCallError:
            return "none", False
        return decision.backend.name, _by_rule(decision)

    steps = [shortest]
    longest = min(_LONGEST, MAX_TOKENS // 8 // workload.batch)
    # Powers of two among them, as in the crossover map.
    while (following := round(shortest * 2 ** (len(steps) / _STEPS))) <= longest:
        steps.append(following)
    lengths = set(steps)
    for low, high in itertools.pairwise(steps):
        # Tiles are full at powers of two, and between most lengths of real batches.
        lengths |= {low + (high - low) * part // _PARTS + 1 for part in range(_PARTS)}
    return tuple(_changes(chosen, sorted(lengths)))


def _changes(chosen: Callable[[int], tuple[str, bool]], lengths: list[int]) -> list[Winner]:
    """The winners; ``chosen`` says which one is at a length, and whether a rule decides it."""
    winners = [Winner(0, *chosen(lengths[0]))]
    for low, high in itertools.pairwise(lengths):
        after = chosen(high)
        if after == (winners[-1].backend, winners[-1].by_rule):
            continue
        # Lengths are drawn at random, so finer steps would be noise.
        while high - low > max(1, high // 64):
            middle = (low + high) // 2
            low, high = (low, middle) if chosen(middle) == after else (middle, high)
        winners.append(Winner(high, *after))
    return winners


# -- checking ----------------------------------------------------------------------------------


def _dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.get(
        name, name
    )
    if name not in WORDS["dtype"]:
        raise ValueError(f"dtype is one of {', '.join(WORDS['dtype'])}, given {name}")
    return name


def _check(workload: Workload) -> None:
    sizes = {
        "batch": workload.batch,
        "seq_len": workload.kv_len,
        "heads": workload.heads,
        "kv_heads": workload.kv_heads,
        "head_dim": workload.head_dim,
    }
    for name, size in sizes.items():
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"{name} is 1 to {MAX_SIZE}, given {size}")
    if workload.batch * workload.kv_len > MAX_TOKENS:
        raise ValueError(f"a batch has at most {MAX_TOKENS} tokens")
    if workload.heads % workload.kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, given {workload.kv_heads}")
    if not 0 <= workload.padding_share < 1:
        raise ValueError(
            f"padding is a share from 0 to below 1, 0.4 for 40%, given {workload.padding_share}"
        )
    if workload.side == "packed" and not 1 <= workload.sequences <= workload.kv_len:
        raise ValueError(f"packed is 1 to seq_len sequences, given {workload.sequences}")
    if workload.window < 0:
        raise ValueError(f"window is at least 1, given {workload.window}")


def _shown(path: Path) -> str:
    home = str(Path.home())
    text = str(path)
    return text.replace(home, "~", 1) if len(home) > 1 and text.startswith(home + "/") else text
