"""What :func:`smartattn.explain` answers, and how that prints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .choose import LATENCY, TIE
from .control import PadOutput
from .cost import LAYERS
from .machine import changed_since
from .record import brief
from .stack_choice import Worth
from .units import format_us
from .workload import Workload

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
                f"that much of a call's {other} time adds nothing",
            ]
        elif self._apart:
            captions = ["predicted: the longer one of host and device, and what is shared"]
        else:
            captions = [f"predicted: the time of one call, and {share}"]
        if self._apart:
            captions.append("host, device: how long one call keeps each of them busy")
            captions.append(f"shared: {share}, included in the first figure")
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
