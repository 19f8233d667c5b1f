"""The record of what was measured and chosen, and how it prints."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from .call import Call
from .choose import Decision
from .plan import Plan
from .units import span_us


@dataclass(slots=True)
class TraceRow:
    """Layers that were asked for the same and got the same backend. Times in microseconds."""

    #: What was measured: lengths and pattern, see :meth:`smartattn.plan.Plan.describe`.
    facts: dict[str, Any]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    grad: bool
    backend: str
    reason: str
    refused: dict[str, tuple[str, ...]]
    #: What one call is predicted to add to its layer, by backend: in a layer that waits for host or
    #: device (``bottleneck``) less than its kernel takes. Empty where nothing was measured.
    predicted_us: dict[str, float]
    #: What the rest of the layer waits for, "host" or "device", if the profile tells.
    bottleneck: str | None = None
    #: What was to be small, e.g. "latency" or "memory within 1.5 times the fastest".
    objective: str = "latency"
    #: The backend that will run once this has come back so often that building its kernels pays.
    waiting_for: str | None = None
    calls: int = 0
    #: Masks measured for these calls: one per forward and kind of mask. 0 where a layer came with
    #: no mask, or with one that smartattn did not make.
    forwards: int = 0

    @property
    def predicted(self) -> float | None:
        """What one call of the chosen backend is predicted to add to its layer."""
        return self.predicted_us.get(self.backend)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class StackRow:
    """Forwards of a padding-free model that went the same way for the same reason."""

    model: str
    #: Facts about the last of these batches; None where no mask was measured.
    facts: dict[str, Any] | None
    packed: bool
    reason: str
    calls: int = 0


class Trace:
    """Choices in the order in which they were first made; see :func:`smartattn.trace`.

    Threads that run in the same context (``contextvars.copy_context``) may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stacks: dict[tuple[str, bool, str], StackRow] = {}
        self._rows: dict[Any, TraceRow] = {}
        # Rows by the ids of call and decision; the entry holds both, so that no other object can
        # have the id. It goes with its plan: a trace keeps no tensor alive.
        self._seen: WeakKeyDictionary[
            Plan, dict[tuple[int, int], tuple[Call, Decision, TraceRow]]
        ] = WeakKeyDictionary()

    @property
    def rows(self) -> list[TraceRow]:
        """One entry per distinct request and choice."""
        with self._lock:
            return list(self._rows.values())

    def record(self, plan: Plan, call: Call, decision: Decision) -> None:
        """Counts one attention call."""
        with self._lock:
            known = self._seen.get(plan)
            if known is None:
                known = self._seen[plan] = {}
            seen = known.get((id(call), id(decision)))
            if seen is None:
                row = self._row(plan, call, decision)
                # One forward may ask for the same in two ways, by layers of two classes.
                if plan.settings is not None and all(
                    row is not other[2] for other in known.values()
                ):
                    row.forwards += 1
                seen = known[id(call), id(decision)] = (call, decision, row)
            seen[2].calls += 1

    def _row(self, plan: Plan, call: Call, decision: Decision) -> TraceRow:
        facts = plan.describe()
        name = decision.backend.name
        key = (*facts.items(), call, name, decision.reason, decision.objective)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = _row(facts, call, decision)
        return row

    @property
    def stacks(self) -> list[StackRow]:
        """What became of the forwards of padding-free models; see ``smartattn.padding_free``."""
        return list(self._stacks.values())

    def record_stack(self, model: str, plan: Plan | None, packed: bool, reason: str) -> None:
        """Counts one forward of a padding-free model."""
        key = (model, packed, reason)
        row = self._stacks.get(key)
        if row is None:
            row = self._stacks[key] = StackRow(model, None, packed, reason)
        row.facts = None if plan is None else plan.describe()
        row.calls += 1

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain values, fit for JSON."""
        return [row.as_dict() for row in self.rows]

    def to_json(self) -> str:
        """The rows as JSON."""
        return json.dumps(self.as_dicts(), indent=2)

    def __repr__(self) -> str:
        calls = sum(row.calls for row in self.rows)
        return f"<smartattn.Trace of {calls} attention calls; print() shows them>"

    def __str__(self) -> str:
        rows = self.rows
        if not rows and not self._stacks:
            return _NOTHING
        lines = [_table(rows)]
        if any(row.predicted is not None and row.bottleneck for row in rows):
            lines.append(_ADDS)
        if any(row.predicted is None for row in rows):
            lines.append(_DASH)
        for stack in self.stacks:
            how = "packed" if stack.packed else "padded"
            forwards = f"{stack.calls} forward{'s' * (stack.calls != 1)}"
            lines.append(f"{stack.model}: {forwards} {how}, {brief(stack.reason)}")
        return "\n".join(lines)


def _row(facts: dict[str, Any], call: Call, decision: Decision) -> TraceRow:
    return TraceRow(
        facts=facts,
        heads=call.heads,
        kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        dtype=str(call.dtype).removeprefix("torch."),
        grad=call.grad,
        backend=decision.backend.name,
        reason=decision.reason,
        refused={v.backend: v.refusals for v in decision.verdicts if v.refusals},
        predicted_us={
            v.backend: round(v.predicted_us, 2)
            for v in decision.verdicts
            if v.predicted_us is not None
        },
        bottleneck=decision.verdict.bottleneck,
        objective=str(decision.objective),
        waiting_for=decision.waiting_for,
    )


# -- printing ------------------------------------------------------------------------------------


def brief(reason: str) -> str:
    """A reason for packing without its source or the models timed, in parentheses at its end."""
    return re.sub(r" \([^()]*\)$", "", reason)


#: What an empty trace says.
_NOTHING = (
    "no attention call went through smartattn in this thread; is the model loaded with "
    'attn_implementation="smart"?'
)
#: What is said below a table with predictions of calls in layers that wait.
_ADDS = (
    "predicted: by how much one call lengthens its layer, which may be less than its kernel takes"
)
#: What is said below a table with a line that has no prediction.
_DASH = 'predicted "-": nothing was measured, or there was nothing to choose'

_HEADER = (
    "forwards",
    "batch",
    "queries",
    "keys",
    "pattern",
    "padding",
    "heads",
    "dtype",
    "backend",
    "calls",
    "predicted",
    "why",
)


def _table(rows: Sequence[TraceRow]) -> str:
    """One line per layer group: the steps of a generation differ in their keys and share one."""
    groups: dict[Any, list[TraceRow]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    table = [_HEADER, *(_line(group) for group in groups.values())]
    widths = [max(len(line[i]) for line in table) for i in range(len(_HEADER) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
        for line in table
    )


def _group(row: TraceRow) -> Any:
    facts = row.facts
    steps = facts["q_len"] == 1
    sizes = () if steps else (facts["kv_len"], facts.get("padding_share"), row.reason)
    return (
        *(facts[name] for name in ("batch", "q_len", "pattern", "window", "padding")),
        *(row.heads, row.kv_heads, row.head_dim, row.dtype, row.grad, row.backend),
        *sizes,
        _why(row) if steps else "",
    )


def _line(group: Sequence[TraceRow]) -> tuple[str, ...]:
    row = group[0]
    facts = row.facts
    padding = facts["padding"]
    shares = [100 * r.facts["padding_share"] for r in group if r.facts.get("padding_share")]
    if shares:
        padding = f"{padding} {_span(shares)}%"
    pattern = facts["pattern"]
    if facts["window"] is not None:
        pattern = f"{pattern} window {facts['window']}"
    predicted = [r.predicted for r in group if r.predicted is not None]
    forwards = sum(r.forwards for r in group)
    return (
        str(forwards) if forwards else "-",
        str(facts["batch"]),
        str(facts["q_len"]),
        _span([r.facts["kv_len"] for r in group]),
        pattern,
        padding,
        f"{row.heads}/{row.kv_heads}x{row.head_dim}",
        f"{row.dtype} grad" if row.grad else row.dtype,
        row.backend,
        str(sum(r.calls for r in group)),
        span_us(predicted) if predicted else "-",
        row.reason if len(group) == 1 else _why(row),
    )


def _why(row: TraceRow) -> str:
    """The reason without what differs between calls of slightly other sizes."""
    return row.reason if row.predicted is None else row.reason.split(":")[0]


def _span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = f"{ordered[0]:.0f}", f"{ordered[-1]:.0f}"
    return low if low == high else f"{low}-{high}"
