"""Whether a model computes the same under every implementation: differences from eager attention,
at real positions and, apart from these, at padding positions.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .control import trace
from .models import (
    IMPLEMENTATIONS,
    Batch,
    count_calls,
    forward,
    one_line,
    output_of,
    relative,
    set_implementation,
    side_of,
)

#: Largest |difference| / largest |eager| at real positions that rounding may explain, over all the
#: layers of a model. Twice what sdpa has is allowed as well.
TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """From eager attention. ``largest`` and ``mean`` are absolute; NaN counts as infinite."""

    largest: float
    mean: float
    #: Largest |eager| value at real positions, to compare the others with.
    scale: float

    @property
    def relative(self) -> float:
        """``largest`` / ``scale``."""
        return relative(self.largest, self.scale)


@dataclass(frozen=True, slots=True)
class Layer:
    """The hidden states after one layer; 0 are the embeddings, None is the model's output."""

    index: int | None
    real: Difference
    #: None for a batch without padding.
    padding: Difference | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One implementation held against eager."""

    implementation: str
    #: The last entry is the output; before it the layers, where these were asked for.
    layers: tuple[Layer, ...]
    #: The output is finite at all positions; None if it did not run.
    finite: bool | None
    #: Backends that ran, with the number of calls: of smart alone.
    ran: dict[str, int] = field(default_factory=dict)
    #: Why it did not run; there are no layers then.
    error: str | None = None

    @property
    def output(self) -> Layer | None:
        """The model's output."""
        return self.layers[-1] if self.layers else None


@dataclass(frozen=True, slots=True)
class Verification:
    """All implementations on the same batches."""

    comparisons: tuple[Comparison, ...]
    dtype: str
    real_tokens: int
    padding_tokens: int
    #: Largest relative difference that was allowed for smart, and what is wrong with it if it is.
    allowed: float
    problem: str | None
    #: (rows, tokens per row, padding included) of each batch.
    shapes: tuple[tuple[int, int], ...] = ()
    #: Where their padding lies, "left" or "right"; None without any, or on both sides.
    padding_side: str | None = None

    @property
    def agrees(self) -> bool:
        """Smart computes what eager computes, within rounding."""
        return self.problem is None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def verify(
    model: Any,
    batches: Sequence[Batch],
    *,
    per_layer: bool = False,
    report: Report = lambda _: None,
) -> Verification:
    """Runs a model under every implementation and compares it with eager attention.

    Args:
        report: called with the name of each implementation before it runs.

    Raises:
        RuntimeError: the model does not run under eager attention.
    """
    names = IMPLEMENTATIONS[1:]
    tallies: dict[str, _Tally] = {name: _Tally() for name in names}
    for batch in batches:
        report("eager")
        reason = set_implementation(model, "eager")
        if reason is not None:
            raise RuntimeError(f"the model has no eager attention to compare with: {reason}")
        expected = _states(model, batch, per_layer)
        for name, tally in tallies.items():
            if tally.error is None:
                report(name)
                _compare(model, name, batch, per_layer, expected, tally)
        del expected
    comparisons = tuple(tally.comparison(name) for name, tally in tallies.items())
    dtype = model.dtype
    sdpa, smart = (next(c for c in comparisons if c.implementation == n) for n in ("sdpa", "smart"))
    allowed = TOLERANCES.get(dtype, 0.1)
    if sdpa.output is not None and math.isfinite(sdpa.output.real.relative):
        allowed = max(allowed, 2 * sdpa.output.real.relative)
    return Verification(
        comparisons=comparisons,
        dtype=str(dtype).removeprefix("torch."),
        real_tokens=sum(batch.tokens for batch in batches),
        padding_tokens=sum(batch.real.numel() - batch.tokens for batch in batches),
        allowed=allowed,
        problem=_problem(smart, allowed),
        shapes=tuple(batch.shape for batch in batches),
        padding_side=side_of(batches),
    )


def _problem(smart: Comparison, allowed: float) -> str | None:
    if smart.error is not None or smart.output is None:
        return f"it did not run: {smart.error}"
    if not smart.finite:
        return "its output is not finite"
    difference = smart.output.real.relative
    if difference > allowed:
        return f"its output differs by {difference:.3g} at real positions, allowed is {allowed:.3g}"
    return None


def _states(model: Any, batch: Batch, per_layer: bool) -> list[torch.Tensor]:
    """The output, after the states between the layers if these are wanted."""
    result = forward(model, batch, hidden_states=per_layer)
    states: list[torch.Tensor] = []
    if per_layer:
        hidden = result.get("hidden_states") or result.get("decoder_hidden_states") or ()
        states += hidden
    return [*states, output_of(result)]


def _compare(
    model: Any,
    name: str,
    batch: Batch,
    per_layer: bool,
    expected: list[torch.Tensor],
    tally: _Tally,
) -> None:
    tally.error = set_implementation(model, name)
    if tally.error is not None:
        return
    try:
        with trace() as recorded:
            states = _states(model, batch, per_layer)
    except Exception as error:
        # The others are still to be compared, whatever this one raises.
        tally.error = one_line(error)
        gc.collect()
        return
    count_calls(recorded, tally.ran)
    tally.finite = tally.finite and bool(torch.isfinite(states[-1]).all())
    if not tally.sums:
        tally.sums = [(_Sum(), _Sum()) for _ in states]
    for given, right, (real, padding) in zip(states, expected, tally.sums, strict=True):
        scale = float(right[batch.real].abs().max())
        real.add(given[batch.real], right[batch.real], scale)
        padding.add(given[~batch.real], right[~batch.real], scale)


class _Sum:
    def __init__(self) -> None:
        self.largest = self.total = self.scale = 0.0
        self.count = 0

    def add(self, given: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        self.scale = max(self.scale, scale)
        if given.numel():
            difference = (given.float() - right.float()).abs().nan_to_num(math.inf, math.inf)
            self.largest = max(self.largest, float(difference.max()))
            self.total += float(difference.sum())
            self.count += difference.numel()

    def difference(self) -> Difference | None:
        if not self.count:
            return None
        return Difference(self.largest, self.total / self.count, self.scale)


class _Tally:
    def __init__(self) -> None:
        self.sums: list[tuple[_Sum, _Sum]] = []
        self.finite = True
        self.ran: dict[str, int] = {}
        self.error: str | None = None

    def comparison(self, name: str) -> Comparison:
        if self.error is not None:
            return Comparison(name, (), finite=None, error=self.error)
        layers = []
        for index, (real, padding) in enumerate(self.sums):
            found = real.difference()
            assert found is not None
            last = index == len(self.sums) - 1
            layers.append(Layer(None if last else index, found, padding.difference()))
        return Comparison(name, tuple(layers), self.finite, self.ran)
