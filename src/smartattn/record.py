"""The record of what was measured and chosen, and how it prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .call import Call
from .choose import Decision
from .plan import Plan


@dataclass(slots=True)
class TraceRow:
    """Layers that were asked for the same and got the same backend."""

    facts: dict[str, Any]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    grad: bool
    backend: str
    reason: str
    refused: dict[str, tuple[str, ...]]
    predicted_us: dict[str, float]
    calls: int = 0

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
    """Choices in the order in which they were first made; see :func:`smartattn.trace`."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[str, bool, str], StackRow] = {}
        self._rows: dict[Any, TraceRow] = {}
        self._seen: dict[int, tuple[Plan, Decision, TraceRow]] = {}

    @property
    def rows(self) -> list[TraceRow]:
        """One entry per distinct request and choice."""
        return list(self._rows.values())

    def record(self, plan: Plan, call: Call, decision: Decision) -> None:
        """Counts one attention call."""
        # The entry keeps its objects alive, so an id cannot come back as another's.
        seen = self._seen.get(id(decision))
        if seen is None or seen[0] is not plan:
            facts = plan.describe()
            key = (*facts.items(), call, decision.backend.name, decision.reason)
            row = self._rows.get(key)
            if row is None:
                row = self._rows[key] = _row(facts, call, decision)
            seen = self._seen[id(decision)] = (plan, decision, row)
        seen[2].calls += 1

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

    def __str__(self) -> str:
        header = ("batch", "queries", "keys", "pattern", "padding", "heads", "dtype", "backend")
        table = [(*header, "calls", "why")]
        for row in self.rows:
            facts = row.facts
            padding = facts["padding"]
            if facts.get("padding_share"):
                padding = f"{padding} {facts['padding_share']:.0%}"
            pattern = facts["pattern"]
            if facts["window"] is not None:
                pattern = f"{pattern} window {facts['window']}"
            heads = f"{row.heads}/{row.kv_heads}x{row.head_dim}"
            table.append(
                (
                    str(facts["batch"]),
                    str(facts["q_len"]),
                    str(facts["kv_len"]),
                    pattern,
                    padding,
                    heads,
                    row.dtype,
                    row.backend,
                    str(row.calls),
                    row.reason,
                )
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
            for line in table
        ]
        for stack in self.stacks:
            how = "without padding" if stack.packed else "padded"
            lines.append(f"{stack.model}: {stack.calls} forwards {how}, {stack.reason}")
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
    )
