"""Why: what would be chosen for a call of given sizes, what every backend says of it, and where the
choice changes. Nothing runs, so that the profile of a GPU can be asked without that GPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from .backends import BACKENDS
from .call import Call
from .choose import LATENCY, TIE, Decision, Goal, UnsupportedCallError, choose
from .control import PadOutput, Settings, checked, settings_for
from .cost import LAYERS, MAX_EXTRAPOLATION
from .features import Mode
from .machine import changed_since, versions
from .packed_stack import packed_plan, plan_refusal
from .plan import Plan
from .record import brief
from .stack_choice import KEEPS_PADDING, Worth, backend_refusal, pays
from .target import Target, target_of
from .units import format_us
from .workload import WORDS, Side, Workload, as_padded, usual_memory

#: Most tokens of a batch, and of any other size, that are explained.
MAX_TOKENS = 1 << 26
MAX_SIZE = 1 << 24
#: The lengths between which a change of the choice is looked for, and the steps per octave.
_SHORTEST, _LONGEST, _STEPS = 16, 1 << 17, 2
#: Lengths that are asked about from step to step.
_PARTS = 4

Status = Literal["chosen", "slower", "unmeasured", "set aside", "refuses"]


@dataclass(frozen=True, slots=True)
class Option:
    """One backend. Its times, in microseconds, are None where its profile holds no measurement."""

    backend: str
    #: "slower" (or faster by too little to count, or worse by another objective) and "unmeasured"
    #: backends could run the call; "set aside" ones too, but are not
    #: considered, for the reason given; "refuses": cannot run it exactly.
    status: Status
    #: What ranks the backends: by how much one call lengthens its layer, and its share of what is
    #: made once per forward. Host and device work at once, so that in a layer that waits for one of
    #: them (``Explanation.waits_for``) this is less than a kernel takes, see ``device_us``.
    predicted_us: float | None
    #: How long one call keeps the host and the device busy; None on a CPU, where both are the same.
    host_us: float | None
    device_us: float | None
    #: What of ``predicted_us`` is the layer's share of what is made once per forward.
    shared_us: float | None
    #: Peak memory in bytes, and error against float64 relative to the largest value.
    predicted_bytes: float | None
    expected_error: float | None
    #: All reasons why it cannot run the call, or why it is set aside.
    reasons: tuple[str, ...]
    #: The longest length measured, in tokens, where the prediction is for a longer one.
    beyond: int | None = None


@dataclass(frozen=True, slots=True)
class Winner:
    """The backend that is chosen from a sequence length (in tokens) on, all else being equal."""

    from_seq_len: int
    backend: str
    #: Nothing that was measured decides there, but a rule or the order of the backends.
    by_rule: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would be chosen for a call, and why."""

    workload: Workload
    pad_output: PadOutput
    #: What is to be small, e.g. "latency".
    objective: str
    #: The device in words, and what is assumed of it because it is not this machine's.
    device: str
    assumption: str | None
    #: Name, source and file of the profile, and what differs from what it was measured with.
    profile: str
    profile_source: str
    profile_path: str | None
    version_differences: tuple[str, ...]
    #: None if no backend that is allowed can run the call; ``reason`` then has all refusals.
    backend: str | None
    reason: str
    #: Best first; those that cannot run it last.
    options: tuple[Option, ...]
    #: The choice by sequence length; a single entry means that it never changes.
    winners: tuple[Winner, ...]
    #: Whether a padding-free model would leave the padding out by the profile, and why; None for a
    #: batch without padding. What the model itself refuses is not known here.
    packs: bool | None = None
    packs_because: str | None = None
    #: What a rule that decided so was asked of this batch; None where none did.
    packs_asked: str | None = None
    #: All of that at once; left out of what programs get.
    packing: Worth | None = None
    #: Why no prediction decides although the profile has some; None where one does.
    unmeasured: str | None = None
    #: What the rest of the layer that makes this call waits for, the predictions being by how much
    #: the call lengthens it; None where they are times of the call on its own.
    waits_for: Literal["host", "device"] | None = None
    #: For how long, in microseconds, the rest of the layer leaves the other one of host and device
    #: idle: as much of what a call asks of that one lengthens nothing.
    idle_us: float | None = None

    @property
    def crossovers(self) -> str:
        """``winners`` as a phrase."""
        # Where no length is predicted the reason says so once.
        some = not all(winner.by_rule for winner in self.winners)
        groups = itertools.groupby(self.winners, lambda winner: winner.backend)
        runs = _in_turn([list(run) for _, run in groups]) or [[Winner(0, "none")]]
        phrases = [
            (f"from {_start(run[0], some)} tokens " if place else "")
            + run[0].backend
            + " at every length" * (len(runs) == 1)
            + (_by_rules(run) if some else "")
            for place, run in enumerate(runs)
        ]
        return ", ".join(phrases)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON. Times in microseconds, lengths in tokens.

        ``captions`` says what the times of the options are.
        """
        values = asdict(replace(self, packing=None))
        del values["packing"]
        return {**values, "captions": self.captions()}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of :meth:`rows`: what is to be small has one beside the times."""
        more = {"memory": ("peak memory",), "accuracy": ("expected error",)}
        return (
            "backend",
            "adds to layer" if self.waits_for else "predicted",
            *(("host", "device", "shared") if self._apart else ()),
            *more.get(self._goal, ()),
            "remark",
        )

    @property
    def _apart(self) -> bool:
        """Whether the times of host and device are known apart."""
        return any(option.device_us is not None for option in self.options)

    def rows(self) -> list[tuple[str, ...]]:
        """The columns of :attr:`header`, per option."""
        chosen = next((o for o in self.options if o.status == "chosen"), None)
        figures = {"memory": _memory, "accuracy": _error}
        figure = figures.get(self._goal)
        return [
            (
                o.backend,
                format_us(o.predicted_us),
                *(map(format_us, (o.host_us, o.device_us, o.shared_us)) if self._apart else ()),
                *(() if figure is None else (figure(o),)),
                self._remark(o, chosen),
            )
            for o in self.options
        ]

    def _remark(self, option: Option, chosen: Option | None) -> str:
        """What is said of an option beside its figures."""
        if option.status == "slower" and chosen is not None:
            long = "adds {} times as much" if self.waits_for else "{} times as long"
            compared = [(option.predicted_us, chosen.predicted_us, long, "as fast")]
            # What is to be small comes first.
            if self._goal == "memory":
                sizes = option.predicted_bytes, chosen.predicted_bytes
                compared.insert(0, (*sizes, "{} times the memory", "as much memory"))
            elif self._goal == "accuracy":
                errors = option.expected_error, chosen.expected_error
                compared.insert(0, (*errors, "{} times the error", "as exact"))
            said = [_beside(*one) for one in compared]
            return ", ".join(filter(None, said)) or option.status
        if option.status == "unmeasured":
            return "could run it; not measured"
        if option.status == "chosen" and option.predicted_us is None:
            return "chosen; not measured"
        if option.status in ("refuses", "set aside"):
            return f"{option.status}: {'; '.join(option.reasons)}"
        return option.status

    @property
    def _beyond(self) -> str:
        """Whose predictions go beyond what was measured, as a phrase; "" if none do."""
        ends: dict[int, list[str]] = {}
        for option in self.options:
            if option.beyond is not None:
                ends.setdefault(option.beyond, []).append(option.backend)
        predicted = sum(option.predicted_us is not None for option in self.options)
        packed = self.workload.side == "packed"
        tokens = "tokens of a packed row" if packed else "tokens of a row"
        if len(ends) == 1 and len(next(iter(ends.values()))) == predicted:
            return f"beyond the {next(iter(ends)):,} {tokens} measured"
        return "; ".join(
            f"{', '.join(names)} beyond the {end:,} {tokens} measured"
            for end, names in ends.items()
        )

    @property
    def _goal(self) -> str:
        return self.objective.split()[0]

    def captions(self) -> list[str]:
        """What the columns of figures mean."""
        share = f"1/{LAYERS} of what is made once per forward"
        # Each objective ranks by what it is about.
        ranks = "; this ranks the backends" + self.objective.removeprefix(self._goal)
        if self.waits_for:
            other = "device" if self.waits_for == "host" else "host"
            captions = [
                "adds to layer: by how much one call lengthens its layer"
                + (ranks if self._goal == LATENCY.goal else ""),
                f"  the rest of the layer leaves the {other} idle for {format_us(self.idle_us)}: "
                f"of a call's {other} time only what goes beyond that adds",
            ]
        elif self._apart:
            captions = ["predicted: the longer one of host and device, and what is shared"]
        else:
            captions = [f"predicted: the time of one call, and {share}"]
        if self._apart:
            captions.append("host, device: how long one call keeps each of them busy")
            captions.append(f"shared: {share}, which is in the first figure")
        if self._goal == "memory":
            captions.append(f"peak memory: what one call takes above its inputs{ranks}")
        elif self._goal == "accuracy":
            of = "relative to the largest value, against float64"
            captions.append(f"expected error: {of}{ranks}")
        captions.append('"-": not measured, set aside or refused, as the remark says')
        return captions

    def lines(self) -> list[str]:
        """What is said beside the table."""
        path = f", {self.profile_path}" if self.profile_path else ""
        lines = self.captions()
        if self.workload.side == "packed":
            lengths = self.workload.lengths
            lines.append(
                f"lengths: drawn at random, the shortest sequence has {lengths.min():,} tokens, "
                f"the longest {lengths.max():,}"
            )
        lines.append(f"profile: {self.profile} ({self.profile_source}{path})")
        if self._goal != LATENCY.goal:
            lines.append(f"objective: {self.objective}")
        if self.version_differences:
            lines.append(changed_since(self.version_differences))
        if self.assumption:
            lines.append(f"assumed: {self.assumption}")
        lines.append(f"chosen:  {self.backend or 'nothing'}: {self.reason}")
        if self.unmeasured:
            lines.append(f"not measured: {self.unmeasured}")
        if self._beyond:
            lines.append(f"extrapolated: {self._beyond}")
        if self.winners:
            lines.append(f"by length, all else equal: {self.crossovers}")
        if (packing := self.packing) is not None:
            does = "packs this batch" if packing.packs else "runs this batch padded"
            # Bounds, and what was measured where, are lines of their own, or none would fit a
            # terminal.
            asked = packing.asked and f"this batch: {packing.asked}"
            source = brief(packing.because or "").replace(": ", ":\n  ", 1)
            parts = [f"padding_free {does}: {packing.rule}", packing.bounds, asked, source]
            lines.append("\n  ".join(filter(None, parts)))
        return lines

    def __str__(self) -> str:
        table = [self.header, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.header) - 1)]
        body = [
            "  ".join(
                (
                    row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:], strict=True)),
                    row[-1],
                )
            )
            for row in table
        ]
        return "\n".join([f"{self.workload}, on {self.device}", *body, *self.lines()])


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


def _in_turn(runs: list[list[Winner]]) -> list[list[Winner]]:
    """Runs of one backend each; where two take turns, as tiles fill and overflow, one for both."""
    shown: list[list[Winner]] = []
    while runs:
        turns = 1
        while (
            turns < len(runs)
            and runs[turns][0].backend == runs[turns % 2][0].backend
            and not any(winner.by_rule for winner in (*runs[0], *runs[turns]))
        ):
            turns += 1
        if turns > 3:
            second = runs[1][0]
            both = replace(second, backend=f"{second.backend} or {runs[0][0].backend}")
            shown += [runs[0], [both]]
        elif turns > 1:
            # The last of them may take turns with what follows.
            shown += runs[: turns - 1]
        else:
            shown.append(runs[0])
            runs = runs[1:]
            continue
        runs = runs[turns - 1 :]
    return shown


def _by_rules(run: Sequence[Winner]) -> str:
    """Where rules decide for a backend that is chosen by predictions at other lengths."""
    if all(winner.by_rule for winner in run):
        return " by a rule (not measured)"
    spans = []
    for winner, after in itertools.zip_longest(run, run[1:]):
        if not winner.by_rule:
            continue
        start = f"from {_start(winner, True)} " if winner is not run[0] else "up "
        spans.append(start + ("on" if after is None else f"to {_about(after.from_seq_len - 1)}"))
    return f" ({', '.join(spans)} by a rule, not measured)" if spans else ""


def _start(winner: Winner, some: bool) -> str:
    """Where a winner begins: by rules alone exactly.

    Among ``some`` predictions about: a rule begins where these end, at a multiple of some length
    that happened to be measured.
    """
    return _about(winner.from_seq_len) if some else f"{winner.from_seq_len:,}"


def _about(length: int) -> str:
    """A length to two digits, which is as much as is known of it."""
    if length < 100:
        return str(length)
    return f"about {float(f'{length:.2g}'):,.0f}"


# -- checking and printing -----------------------------------------------------------------------


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
        raise ValueError(f"padding is a share from 0 to below 1, given {workload.padding_share}")
    if workload.side == "packed" and not 1 <= workload.sequences <= workload.kv_len:
        raise ValueError(f"packed is 1 to seq_len sequences, given {workload.sequences}")
    if workload.window < 0:
        raise ValueError(f"window is at least 1, given {workload.window}")


def _beside(value: float | None, best: float | None, more: str, equal: str) -> str | None:
    """What is said of a figure beside the chosen one's; None where there is none."""
    if value is None or not best:
        return None
    ratio = value / best
    if 1 / (1 + TIE) <= ratio <= 1 + TIE:
        return f"{equal}, to within {TIE:.0%}"
    return more.format(f"{ratio:.2f}")


def _memory(option: Option) -> str:
    size = option.predicted_bytes
    return "-" if size is None else f"{size / 2**20:.1f} MiB"


def _error(option: Option) -> str:
    return "-" if option.expected_error is None else f"{option.expected_error:.2g}"


def _shown(path: Path) -> str:
    home = str(Path.home())
    text = str(path)
    return text.replace(home, "~", 1) if len(home) > 1 and text.startswith(home + "/") else text
