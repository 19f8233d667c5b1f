"""What a caller may set: backends, padding output and tracing; for a block, a model or the process.

What is set for the innermost scope counts, each setting by itself: the ``with`` block of
:func:`use`, then the model (:func:`configure` with ``model=``), then the process
(:func:`configure`), then the default. A block around one call is the setting for that call.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

from .choose import Goal, Objective
from .locks import ForkSafeLock
from .record import Trace

logger = logging.getLogger("smartattn")

PadOutput = Literal["zeros", "sdpa"]

#: How much slower than the fastest a call may get for the sake of memory, if nobody says.
MEMORY_SLOWDOWN = 1.5

#: Attribute of a model's configuration that holds what was set for the model. It is plain data, so
#: that copies, pickles and saved configurations carry it.
ATTRIBUTE = "smartattn"


@dataclass(frozen=True, eq=False)
class Settings:
    """Choices in force, None for what nobody has set.

    Compared by identity, so that it can be part of a cheap key.
    """

    backends: tuple[str, ...] | None = None
    #: None stands for "zeros".
    pad_output: PadOutput | None = None
    #: None stands for the lowest latency.
    objective: Objective | None = None
    trace: Trace | None = None


#: Nobody has set anything.
DEFAULT = Settings()
#: What the blocks say; one value per thread and asyncio task.
SETTINGS: ContextVar[Settings] = ContextVar("smartattn_settings", default=DEFAULT)
#: What the process says.
_process = DEFAULT

_lock = ForkSafeLock()
# By what the block says, and then by what model and process say: equal settings are one object.
_merged: WeakKeyDictionary[Settings, dict[Any, Settings]] = WeakKeyDictionary()
_complained: set[str] = set()


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
            them (they are finite, and zeros where it did); ``"sdpa"`` keeps the values
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
    changes = checked(backends, pad_output, objective, max_slowdown)
    token = SETTINGS.set(replace(SETTINGS.get(), **changes))
    try:
        yield
    finally:
        SETTINGS.reset(token)


def configure(
    *,
    backends: Sequence[str] | str | None = None,
    pad_output: PadOutput | None = None,
    objective: Goal | None = None,
    max_slowdown: float | None = None,
    model: Any = None,
) -> None:
    """Sets the defaults of this process, or those of one model, in place of what was set before.

    What is not given goes back to the next outer scope: ``configure()`` undoes all.

    Args:
        backends, pad_output, objective, max_slowdown: as for :func:`use`, whose blocks come first.
        model: a model of Transformers. The setting is kept in its configuration, under
            ``smartattn``, and stays with copies, pickles and ``save_pretrained``.

    Raises:
        ValueError: as for :func:`use`.
        TypeError: ``model`` has no configuration.
    """
    changes = checked(backends, pad_output, objective, max_slowdown)
    if model is None:
        global _process
        _process = replace(DEFAULT, **changes) if changes else DEFAULT
        return
    configs = _configurations(model)
    if not configs:
        raise TypeError(f"{type(model).__name__} has no configuration; give a Transformers model")
    for config in configs:
        if changes:
            setattr(config, ATTRIBUTE, _plain(changes))
        elif ATTRIBUTE in vars(config):
            delattr(config, ATTRIBUTE)


def settings_for(config: Any) -> Settings:
    """The settings for a forward of a model with this configuration, in this thread and now."""
    block = SETTINGS.get()
    given = None
    if config is not None:
        # Configurations override attribute access, which costs more than all of this.
        try:
            given = object.__getattribute__(config, "__dict__").get(ATTRIBUTE)
        except AttributeError:
            given = None  # a module's own idea of a configuration, such as a dict
    if given is None and _process is DEFAULT:
        return block
    return _merge(block, given, _process)


def _merge(block: Settings, given: Any, process: Settings) -> Settings:
    key = (repr(given), process)
    with _lock:
        known = _merged.setdefault(block, {})
        settings = known.get(key)
        if settings is None:
            if len(known) > 64:
                known.clear()
            layers = (process, Settings(**_of_model(given)), block)
            values = {
                field.name: value
                for layer in layers
                for field in fields(Settings)
                if (value := getattr(layer, field.name)) is not None
            }
            settings = known[key] = Settings(**values)
    return settings


def _of_model(given: Any) -> dict[str, Any]:
    """What a configuration says, which may come from a file that anybody wrote."""
    if given is None:
        return {}
    try:
        if not isinstance(given, dict) or given.keys() - set(_NAMES):
            raise ValueError(f"takes {', '.join(_NAMES)}")
        return checked(*(given.get(name) for name in _NAMES))
    except (ValueError, TypeError) as error:
        line = " ".join(f"smartattn ignores {ATTRIBUTE!r} in a configuration: {error}".split())
        if line not in _complained:
            _complained.add(line)
            logger.warning(line[:300])
        return {}


_NAMES = ("backends", "pad_output", "objective", "max_slowdown")


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes as JSON holds them."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}
    objective = plain.get("objective")
    if isinstance(objective, Objective):
        plain["objective"] = objective.goal
        if objective.max_slowdown is not None:
            plain["max_slowdown"] = objective.max_slowdown
    return plain


def checked(backends: Any, pad_output: Any, objective: Any, max_slowdown: Any) -> dict[str, Any]:
    """Fields of :class:`Settings` for what a caller gave, see :func:`use`."""
    from .backends import BACKENDS

    changes: dict[str, Any] = {}
    if backends is not None:
        chosen = (backends,) if isinstance(backends, str) else tuple(backends)
        known = [backend.name for backend in BACKENDS]
        unknown = [name for name in chosen if name not in known]
        if not chosen:
            raise ValueError(f"backends names none; known are {known}")
        if unknown:
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
            given = "none is given" if objective is None else f"given {objective!r}"
            raise ValueError(f"max_slowdown needs objective 'memory' or 'accuracy', {given}")
        if not isinstance(max_slowdown, int | float) or not max_slowdown >= 1:
            raise ValueError(f"max_slowdown is at least 1, given {max_slowdown!r}")
    if objective is not None:
        changes["objective"] = Objective(objective, max_slowdown)
    return changes


def _configurations(model: Any) -> list[Any]:
    """Those of a model and of all of its parts, which may be copies."""
    modules = model.modules() if hasattr(model, "modules") else ()
    found = [getattr(module, "config", None) for module in (model, *modules)]
    found += [part for config in found for part in _parts(config)]
    return list({id(config): config for config in found if hasattr(config, "to_dict")}.values())


def _parts(config: Any) -> list[Any]:
    names = getattr(config, "sub_configs", None) or {}
    return [getattr(config, name, None) for name in names]


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
