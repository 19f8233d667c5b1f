"""What a caller may set for the code inside a ``with`` block: backends, padding output, tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

from .record import Trace

PadOutput = Literal["zeros", "sdpa"]


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """Choices in force; compared by identity, so that it can be part of a cheap key."""

    backends: tuple[str, ...] | None = None
    pad_output: PadOutput = "zeros"
    trace: Trace | None = None


_DEFAULT = Settings()
#: One value per thread and asyncio task.
SETTINGS: ContextVar[Settings] = ContextVar("smartattn_settings", default=_DEFAULT)


@contextlib.contextmanager
def use(
    backends: Sequence[str] | str | None = None, pad_output: PadOutput | None = None
) -> Iterator[None]:
    """Restricts how attention runs inside the block, for this thread.

    Args:
        backends: names of the backends that may run. A call that all of them refuse raises
            :class:`~smartattn.UnsupportedCallError`.
        pad_output: what the output holds at padding positions: ``"zeros"`` lets a backend skip
            them (they are finite, and zeros where tokens were packed); ``"sdpa"`` keeps the values
            that SDPA computes there, for models that use them.

    Raises:
        ValueError: an unknown backend or an unknown ``pad_output``.
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
