"""Forwards whose layers see real tokens alone: hooks around a model's stack of layers.

The model itself embeds the padded batch, makes positions and masks as ever; before the first layer
the real tokens are gathered into one row, (1, total, hidden), and after the last one they are put
back. Nothing of Transformers is replaced: the hooks are those of :class:`torch.nn.Module`.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from operator import is_
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from .control import SETTINGS, Settings
from .heads import Guard, guard_for, reads_last
from .integration import NAME
from .locks import ForkSafeLock
from .mask import PlanMask
from .packed_stack import (
    Packing,
    UnpackableError,
    pack_argument,
    packed_plan,
    plan_refusal,
)
from .plan import Plan
from .stack_choice import Request, exactness_refusal, worth
from .stack_host import HostTimes, Watch
from .stacks import Stack, find_stack, parameter_names

logger = logging.getLogger("smartattn")

#: Where a model keeps its hooks while it is padding-free.
_ATTRIBUTE = "_smartattn_padding_free"
#: Outputs that a model collects from inside of its layers, and whose shapes packing would change.
_COLLECTED = ("output_attentions", "output_router_logits")


def padding_free(model: nn.Module, *, always: bool = False) -> Scope:
    """Makes a model's layers see real tokens alone, until :func:`padded` or the end of ``with``.

    The forward keeps its signature and the shapes of its outputs, which are zeros at padding
    positions; what a head makes of them is its own. A forward that cannot be packed exactly runs
    as before, and :func:`smartattn.trace` says why. Checkpointed layers run again in the backward,
    which therefore belongs into the block as well.

    Args:
        model: a model of Transformers under ``attn_implementation="smart"``.
        always: pack whenever it is exact, whether or not the profile says that it pays.

    Returns:
        A context manager that puts back what was before; it may be ignored.

    Raises:
        ValueError: padding can never be taken out of this model, or it runs another implementation.
    """
    stack = find_stack(model)
    implementation = stack.base.config._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f"{stack.name} runs attn_implementation={implementation!r}: padding_free needs {NAME!r}"
        )
    if getattr(stack.base.config, "chunk_size_feed_forward", 0):
        raise ValueError(f"{stack.name} has chunk_size_feed_forward, which needs padded lengths")
    before: _Hooks | None = model.__dict__.get(_ATTRIBUTE)
    if before is not None:
        before.remove()
    hooks = _Hooks(stack, always)
    hooks.install()
    return Scope(model, before)


def padded(model: nn.Module) -> None:
    """Undoes :func:`padding_free` without a trace; does nothing where there is nothing to undo."""
    hooks: _Hooks | None = model.__dict__.get(_ATTRIBUTE)
    if hooks is not None:
        hooks.remove()


class Scope:
    """The block within which a model is padding-free; at its end it is as it was before."""

    def __init__(self, model: nn.Module, before: _Hooks | None) -> None:
        self._model = model
        self._before = before

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        padded(self._model)
        if self._before is not None:
            self._before.install()


class _Frame:
    """What the hooks of one forward share; it ends with that forward.

    Layers that checkpointing runs again find no frame: they go by what is on their plan.
    """

    __slots__ = (
        "arguments", "asked", "decided", "given", "grad", "guard", "hooks", "opener", "outer",
        "packing", "reason", "token", "watched",
    )  # fmt: skip

    def __init__(self, hooks: _Hooks, opener: nn.Module) -> None:
        self.hooks = hooks
        #: The module whose end is the end of this forward.
        self.opener = opener
        self.guard: Guard | None = None
        #: The arguments of the root by name, and those that root and base got as keywords.
        self.given: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        #: Why this forward cannot be packed whatever the batch.
        self.reason: str | None = None
        self.decided = False
        self.packing: Packing | None = None
        #: What the layers are watched for, and since when; None once they are through.
        self.watched: tuple[Watch, float] | None = None
        self.grad = torch.is_grad_enabled()
        #: What the last layer of each state got, for the next one.
        self.arguments: dict[_State, _Arguments] = {}
        self.outer = _FRAME.get()
        self.token = _FRAME.set(self)


#: The innermost forward of this thread or asyncio task that runs under hooks.
_FRAME: ContextVar[_Frame | None] = ContextVar("smartattn_forward", default=None)


#: What the layers of each model take the host: it outlives the hooks, so that a ``with`` block
#: around every forward learns as well.
_HOSTS: weakref.WeakKeyDictionary[nn.Module, HostTimes] = weakref.WeakKeyDictionary()

#: Held while the hooks of later layers are registered; models with hooks can be copied.
_arming = ForkSafeLock()


class _Hooks:
    """The hooks on one model."""

    def __init__(self, stack: Stack, always: bool) -> None:
        self.stack = stack
        self.always = always
        self.host = _HOSTS.setdefault(stack.root, HostTimes())
        self._handles: list[Any] = []
        self._names = {type(layer): parameter_names(layer) for layer in stack.layers}
        self._mask_at = {kind: _position(names) for kind, names in self._names.items()}
        self._root_names = parameter_names(stack.root)
        #: All layers have their hook, not the first alone.
        self._armed = False
        self._installed = False

    def install(self) -> None:
        """Registers the hooks; those of the later layers once they are needed, see ``_arm``."""
        stack = self.stack
        handles = self._handles
        for model in dict.fromkeys((stack.root, stack.base)):
            handles.append(model.register_forward_pre_hook(self._open, with_kwargs=True))
        armed, self._armed = self._armed, False
        self._installed = True
        self._hook_layers(stack.layers[:1])
        if armed:
            self._arm()
        exits = (stack.norm, stack.module, stack.base)
        for module in dict.fromkeys(module for module in exits if module is not None):
            handles.append(module.register_forward_hook(self._put_back))
        for model in dict.fromkeys((stack.base, stack.root)):
            handles.append(model.register_forward_hook(self._close, always_call=True))
        stack.root.__dict__[_ATTRIBUTE] = self

    def _arm(self) -> bool:
        """Registers the hooks of the later layers, for good; False if all hooks are gone.

        The first layer alone decides. A batch that stays padded would pay for hooks on the others
        that have nothing to do; once one has been packed, its layers may run again in a backward.
        """
        if self._armed and self._installed:
            return True
        with _arming:
            # Another thread may have removed them while this forward ran.
            if self._installed and not self._armed:
                self._hook_layers(self.stack.layers[1:])
                self._armed = True
            return self._installed

    def _hook_layers(self, layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            handle = layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            self._handles.append(handle)

    def remove(self) -> None:
        """Removes all hooks."""
        with _arming:
            self._installed = False
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
        self.stack.root.__dict__.pop(_ATTRIBUTE, None)

    # -- once per forward --------------------------------------------------------------------------

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a forward, at the outermost of the models that have this hook."""
        if torch.compiler.is_compiling():
            return
        frame = self._frame()
        if frame is not None and frame.opener is module:
            # Ctrl-C ends a forward without its last hook.
            _FRAME.set(frame.outer)
            frame = self._frame()
        if frame is None:
            frame = _Frame(self, module)
            if module not in (self.stack.root, self.stack.base):
                # Nothing is known of what its arguments ask for.
                frame.reason = "a replica of the model"
            if module is self.stack.root:
                values = {**dict(zip(self._root_names, args, strict=False)), **kwargs}
                frame.guard, frame.reason = guard_for(self.stack, values)
                frame.given = values
        frame.asked.append(kwargs)

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        frame = self._frame()
        if frame is not None and frame.opener is module:
            _FRAME.reset(frame.token)
            if not frame.decided:
                # The first layer may have been skipped.
                self._arm()
                if (recorder := SETTINGS.get().trace) is not None:
                    reason = "no layer got a mask of smart"
                    recorder.record_stack(self.stack.name, None, False, reason)

    def _frame(self) -> _Frame | None:
        frame = _FRAME.get()
        while frame is not None and frame.hooks is not self:
            frame = frame.outer
        return frame

    def _put_back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output of the last norm, of the stack or of the model in the padded layout."""
        if torch.compiler.is_compiling():
            return None
        frame = self._frame()
        if frame is None or frame.packing is None:
            return None
        if frame.watched is not None:
            watch, started = frame.watched
            watch.took((time.perf_counter() - started) * 1e6)
            frame.watched = None
        packing = frame.packing
        output = _unpacked(output, packing)
        if module is not self.stack.base or module is self.stack.module:
            return output
        # A norm of the model itself, after the stack, has made something of the zeros.
        states = output if isinstance(output, torch.Tensor) else output[0]
        if packing.is_padded(states) and not packing.has_unpacked(states):
            zeroed = packing.unpack(packing.pack(states))
            if isinstance(output, ModelOutput):
                output[next(iter(output))] = zeroed
            else:
                output = (zeroed, *output[1:]) if isinstance(output, tuple) else zeroed
        return output

    # -- once per layer ----------------------------------------------------------------------------

    def _before_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hands a layer the real tokens in place of the padded batch."""
        # torch takes two steps to register a hook: another thread's forward may come between them,
        # and cannot have been packed then.
        if kwargs is None or torch.compiler.is_compiling():
            return None
        frame = self._frame()
        if frame is not None and frame.decided and frame.packing is None:
            return None
        mask = kwargs.get("attention_mask")
        if mask is None:
            at = self._mask_at[type(module)]
            mask = args[at] if at is not None and at < len(args) else None
        if not isinstance(mask, PlanMask) or (plan := mask.plan) is None:
            if frame is not None and not frame.decided:
                self._arm()
            return self._unplanned(module, args, kwargs)
        state: _State | None = plan.stack
        names = self._names[type(module)]
        if state is not None and state.hooks() is not self:
            state = None
        # A caller's mask may serve several forwards, and each decides for itself.
        if frame is not None and not (state and frame.decided and state.packing is frame.packing):
            values = {**dict(zip(names, args, strict=False)), **kwargs}
            state = plan.stack = self._state(frame, names, plan, values)
        if state is None or (packing := state.packing) is None:
            return None
        if state.plan is None:
            return _as_padded(packing, names, args, kwargs)
        try:
            known = frame.arguments if frame is not None else {}
            return state.packed(known, names, mask, args, kwargs)
        except UnpackableError:
            return _as_padded(packing, names, args, kwargs)

    def _unplanned(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A layer whose mask carries no plan sees the padded batch, whatever came before it."""
        frame = self._frame()
        if frame is None or frame.packing is None:
            return None
        return _as_padded(frame.packing, self._names[type(module)], args, kwargs)

    # -- once per forward and mask type ------------------------------------------------------------

    def _refusal(self, frame: _Frame) -> str | None:
        """Why a forward cannot be packed whatever the batch."""
        config = self.stack.base.config
        for name in _COLLECTED:
            default = getattr(config, name, False)
            if any(kwargs.get(name, default) for kwargs in frame.asked):
                return f"{name} is asked for"
        return frame.reason

    def _state(
        self, frame: _Frame, names: tuple[str, ...], plan: Plan, values: dict[str, Any]
    ) -> _State:
        """How layers under a plan run."""
        packed = None
        if not frame.decided:
            frame.decided = True
            settings = plan.settings or SETTINGS.get()
            packs, reason = False, plan_refusal(plan)
            if reason is None:
                states = values.pop(names[0])
                last = reads_last(frame.given)
                request = Request(self.stack, plan, states, values, settings, last, frame.grad)
                # The cheaper question first: small batches wait for the host.
                packs, reason, watch = worth(request, self.always, self.host)
                started = time.perf_counter()
            if packs:
                packing, packed = Packing(plan), packed_plan(plan)
                refusal = self._refusal(frame) or exactness_refusal(request, packing, packed)
                if refusal is None and frame.guard is not None:
                    refusal = frame.guard.refusal()
                if refusal is None and not self._arm():
                    refusal = "padding_free was undone during this forward"
                if refusal is None:
                    frame.packing = packing
                    frame.watched = None if watch is None else (watch, started)
                else:
                    packs, reason = False, refusal
            _record(self.stack.name, plan, packs, reason, settings)
        shared = frame.packing
        if shared is None:
            return _State(self, None, None)
        if packed is None:
            # Another mask type of the forward than the one that decided.
            if plan_refusal(plan) is not None or not shared.covers(plan):
                return _State(self, shared, None)
            packed = packed_plan(plan)
        return _State(self, shared, packed)


class _State:
    """How layers under one plan run: without padding and under another plan, or padded.

    Args:
        packing: None if the whole forward is padded.
        plan: that of the packed tokens; None if these layers alone are padded.
    """

    __slots__ = ("hooks", "packing", "plan")

    def __init__(self, hooks: _Hooks, packing: Packing | None, plan: Plan | None) -> None:
        # A caller's mask, which this hangs on, must not keep the model.
        self.hooks = weakref.ref(hooks)
        self.packing = packing
        self.plan = plan

    def packed(
        self,
        known: dict[_State, _Arguments],
        names: tuple[str, ...],
        mask: PlanMask,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer for the packed tokens.

        Args:
            known: those of the layer before it.

        Raises:
            UnpackableError: there is a tensor among them that nothing is known about.
        """
        packing = self.packing
        assert packing is not None
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop(names[0]),)
        states, *others = args
        if packing.is_padded(states):
            states = packing.pack(states)
        given = (names, *others, *kwargs, *kwargs.values())
        last = known.get(self)
        # Most models hand the same objects to all layers.
        if last is None or len(last.given) != len(given) or not all(map(is_, last.given, given)):
            by_position = zip(names[1:], others, strict=False)
            last = known[self] = _Arguments(
                given,
                tuple(self._value(mask, name, value) for name, value in by_position),
                {name: self._value(mask, name, value) for name, value in kwargs.items()},
            )
        return (states, *last.args), dict(last.kwargs)

    def _value(self, mask: PlanMask, name: str, value: Any) -> Any:
        assert self.packing is not None
        assert self.plan is not None
        if value is None or isinstance(value, bool | int | float):
            return value
        if value is mask:
            return self.packing.mask(self.plan, mask.dtype)
        return pack_argument(self.packing, name, value)


class _Arguments(NamedTuple):
    """Arguments of a layer beside its hidden states: as they were given, and packed."""

    given: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _as_padded(
    packing: Packing, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a layer with hidden states in the padded layout; None if they are."""
    states = args[0] if args else kwargs.get(names[0])
    if not isinstance(states, torch.Tensor) or not packing.is_packed(states):
        return None
    states = packing.unpack(states)
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, names[0]: states}


def _unpacked(output: Any, packing: Packing) -> Any:
    """An output of any structure with every packed tensor of (1, total, ...) in padded layout."""
    if isinstance(output, torch.Tensor):
        return packing.unpack(output) if packing.is_packed(output) else output
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _unpacked(value, packing)
        return output
    if isinstance(output, tuple | list):
        return type(output)(_unpacked(value, packing) for value in output)
    return output


def _position(names: tuple[str, ...]) -> int | None:
    return names.index("attention_mask") if "attention_mask" in names else None


@functools.lru_cache(maxsize=1024)
def _log_once(line: str) -> None:
    logger.info(line)


def _record(name: str, plan: Plan, packed: bool, reason: str, settings: Settings) -> None:
    if settings.trace is not None:
        settings.trace.record_stack(name, plan, packed, reason)
    if logger.isEnabledFor(logging.INFO):
        _log_once(f"{name} runs {'without' if packed else 'with'} its padding: {reason}")
