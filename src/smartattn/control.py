"""What a caller may set for the code inside a ``with`` block: backends, padding output, tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal, get_args

from .choose import LATENCY, Goal, Objective
from .record import Trace

PadOutput = Literal["zeros", "sdpa"]

#: How much slower than the fastest a call may get for the sake of memory, if nobody says.
MEMORY_SLOWDOWN = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """Choices in force; compared by identity, so that it can be part of a cheap key."""

    backends: tuple[str, ...] | None = None
    pad_output: PadOutput = "zeros"
    objective: Objective = LATENCY
    trace: Trace | None = None


_DEFAULT = Settings()
#: One value per thread and asyncio task.
SETTINGS: ContextVar[Settings] = ContextVar("smartattn_settings", default=_DEFAULT)


@contextlib.contextmanager
def use(
    backends: Sequence[str] | str | None = None,
    pad_output: PadOutput | None = None,
    objective: Goal | None = None,
    max_slowdown: float | None = None,
) -> Iterator[None]:
    """Restricts how attention runs inside the block, for this thread.

    Args:
        backends: names of the backends that may run. A call that all of them refuse raises
            :class:`~smartattn.UnsupportedCallError`.
        pad_output: what the output holds at padding positions: ``"zeros"`` lets a backend skip
            them (they are finite, and zeros where tokens were packed); ``"sdpa"`` keeps the values
            that SDPA computes there, for models that use them.
        objective: what to choose the backend by: ``"latency"`` takes the fastest, ``"memory"`` the
            one with the lowest peak memory, ``"accuracy"`` the one with the smallest measured error
            against float64. Without such measurements the fastest runs, and the trace says so.
        max_slowdown: how many times slower than the fastest the chosen one may be, by prediction;
            at least 1. ``MEMORY_SLOWDOWN`` if not given for memory, without a bound for accuracy.

    Raises:
        ValueError: an unknown backend, ``pad_output`` or ``objective``, or a ``max_slowdown`` below
            1 or without an objective that it bounds.
    """
    from .backends import BACKENDS

    changes: dict[str, object] = {}
    if backends is not None:
        chosen = (backends,) if isinstance(backends, str) else tuple(backends)
        known = [backend.name for backend in BACKENDS]
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise ValueError(f"unknown backends {unknown}; known are {known}")
        changes["backends"] = chosen
    if pad_output is not None:
        if pad_output not in ("zeros", "sdpa"):
            raise ValueError(f"pad_output is 'zeros' or 'sdpa', given {pad_output!r}")
        changes["pad_output"] = pad_output
    if objective is not None:
        if objective not in get_args(Goal):
            raise ValueError(f"objective is one of {get_args(Goal)}, given {objective!r}")
        if objective == "memory" and max_slowdown is None:
            max_slowdown = MEMORY_SLOWDOWN
    if max_slowdown is not None:
        if objective not in ("memory", "accuracy"):
            raise ValueError("max_slowdown bounds the objectives 'memory' and 'accuracy'")
        if not max_slowdown >= 1:
            raise ValueError(f"max_slowdown is at least 1, given {max_slowdown!r}")
    if objective is not None:
        changes["objective"] = Objective(objective, max_slowdown)
    token = SETTINGS.set(replace(SETTINGS.get(), **changes))  # type: ignore[arg-type]
    try:
        yield
    finally:
        SETTINGS.reset(token)


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Records what was measured and chosen inside the block, for this thread.

    >>> with smartattn.trace() as t:        # doctest: +SKIP
    ...     model(**batch)
    >>> print(t)                            # doctest: +SKIP
    """
    recorder = Trace()
    token = SETTINGS.set(replace(SETTINGS.get(), trace=recorder))
    try:
        yield recorder
    finally:
        SETTINGS.reset(token)
