"""The two functions that Transformers calls.

Once per forward and mask type Transformers calls :func:`smart_mask`, which measures the padding of
the batch and returns it as a plan that travels in the mask's place; once per layer it calls
:func:`smart_attention`, which sends the call to a backend.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from . import faults
from .arguments import (
    NEUTRAL_ARGUMENTS,
    as_under_autocast,
    features_of,
    narrowed,
    packed_by_arguments,
)
from .backends import BACKENDS
from .call import Call, Runner
from .choose import LATENCY, Chooser, Decision, UnsupportedCallError
from .control import Settings, settings_for
from .first_use import FirstUses
from .graphs import as_sdpa_mask, none_is_causal, paged_attention, static_attention
from .layer_call import call_of, eager_function, needs_grad
from .mask import PlanMask
from .masking import is_causal_of, smart_mask
from .plan import Pattern, Plan
from .profiles import profile_for
from .record import Trace
from .shared_plans import capturing, plan_of_given, shared_plan, transformed

logger = logging.getLogger("smartattn")

#: The name under which both functions are registered.
NAME = "smart"


def register() -> None:
    """Makes ``attn_implementation="smart"`` known to Transformers; importing smartattn does it."""
    AttentionInterface.register(NAME, smart_attention)
    AttentionMaskInterface.register(NAME, smart_mask)


# -- once per layer --------------------------------------------------------------------------------

_chooser = Chooser(BACKENDS)
_first_uses = FirstUses(BACKENDS)
#: Choices that one plan remembers; a forward makes one per distinct kind of layer.
_MAX_CHOICES = 64


@dataclass(frozen=True, slots=True)
class _Choice:
    decision: Decision
    call: Call
    run: Runner
    eager: Callable[..., Any] | None
    trace: Trace | None


#: What keeps nothing of a batch without padding on the device, and builds nothing; and with sdpa,
#: which may have been built.
_FLASH = ("flash_attention_3", "flash_attention_2")
_FOR_GRAPHS = (*_FLASH, "sdpa")


#: What a choice depends on beside the plan and arguments that are not plain; see ``_choice``.
_Signature: TypeAlias = tuple[Any, ...]
#: Arguments under which the signature says all.
_PLAIN_ARGUMENTS = NEUTRAL_ARGUMENTS - {
    "cache",
    "cu_seq_lens_q",
    "deterministic",
    "output_attentions",
}


def smart_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of ``"smart"``.

    Args:
        query: (batch, heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim or value_head_dim).
        attention_mask: what :func:`smart_mask` returned, a caller's own mask, or None.
        is_causal: what a None mask means. Without it None hides nothing, as in eager attention:
            :func:`smart_mask` never says causal by None, so that such a mask is a model's own.

    Returns:
        (batch, q_len, heads, value_head_dim) and None: attention weights are computed only with
        ``output_attentions`` and an argument that the model's own eager code alone knows.

    Raises:
        smartattn.UnsupportedCallError: no backend implements an argument that changes the result.
        NotImplementedError: likewise, where the choice is static.
    """
    if torch.compiler.is_compiling():
        return static_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    if capturing(query):
        return _captured_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    dtype, key_dtype, value_dtype = query.dtype, key.dtype, value.dtype
    if dtype is torch.float32 or dtype is not key_dtype or dtype is not value_dtype:
        query, key, value = as_under_autocast(query, key, value)
        dtype, key_dtype, value_dtype = query.dtype, key.dtype, value.dtype
    signature = (
        module.__class__,
        query.shape,
        key.shape,
        value.shape,
        dtype,
        key_dtype,
        value_dtype,
        query.device,
        dropout,
        scaling,
        needs_grad(query, key, value, dropout),
        torch.are_deterministic_algorithms_enabled(),
    )
    # All layers but a forward's first ones end their search here: launch-bound models feel each
    # microsecond of it.
    plan = attention_mask.plan if type(attention_mask) is PlanMask else None
    choice = None
    if plan is not None and _PLAIN_ARGUMENTS.issuperset(kwargs):
        choice = plan.decisions.get(signature)
    if choice is None:
        if isinstance(kwargs.get("cache"), PagedAttentionCache):
            return paged_attention(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
            )
        packed = kwargs.get("cu_seq_lens_q") is not None
        weights = bool(kwargs.get("output_attentions"))
        if (
            torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or transformed()
            or (weights and not packed)
        ):
            mask = as_sdpa_mask(attention_mask)
            return static_attention(
                module, query, key, value, mask, dropout, scaling, is_causal, kwargs
            )
        if packed and type(attention_mask) is PlanMask:
            attention_mask.own_plan()
        plan = _plan_of(module, query, key, attention_mask, is_causal)
        if packed:
            plan = packed_by_arguments(module, plan, kwargs)
            if weights:
                mask = plan.dense_mask()
                return static_attention(
                    module, query, key, value, mask, dropout, scaling, is_causal, kwargs
                )
        if "indices" in kwargs or "block_indices" in kwargs:
            plan = narrowed(module, query, key, plan, kwargs)
        choice = _choice(module, query, key, value, plan, signature, dropout, scaling, kwargs)
        if type(attention_mask) is PlanMask and plan.is_shared and _keeps_mask(plan, choice):
            plan = attention_mask.own_plan()
            assert plan is not None
            choice = _choice(module, query, key, value, plan, signature, dropout, scaling, kwargs)
    assert plan is not None
    while True:
        kwargs["module"] = module
        if choice.eager is not None:
            kwargs["eager"] = choice.eager
        if choice.trace is not None:
            choice.trace.record(plan, choice.call, choice.decision)
        try:
            return choice.run(query, key, value, kwargs), None
        except Exception as error:
            if not faults.may_repeat(error, choice.decision.backend, plan, choice.call):
                faults.annotate(error, choice.decision, plan, choice.call)
                raise
            plan.forget_choices()
            choice = _choice(module, query, key, value, plan, signature, dropout, scaling, kwargs)


def _keeps_mask(plan: Plan, choice: _Choice) -> bool:
    """Whether a choice is bound to a mask of all queries by all keys."""
    backend = choice.decision.backend
    return backend.last_resort or backend.uses_dense_mask(plan, choice.call)


def _choice(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    signature: _Signature,
    dropout: float,
    scaling: float | None,
    kwargs: Mapping[str, Any],
) -> _Choice:
    """The choice for a layer: the one that an earlier layer like it got, or a new one."""
    # Those in force when the forward began: checkpointed layers run again long after it.
    settings = plan.settings or settings_for(getattr(module, "config", None))
    features: tuple[str, ...] = ()
    if kwargs.keys() - NEUTRAL_ARGUMENTS:
        features = features_of(kwargs)
    deterministic = bool(kwargs.get("deterministic"))
    place: Hashable = signature
    if plan.settings is None or features or deterministic:
        softcap = kwargs.get("softcap") if features else None
        place = (signature, features, softcap, deterministic, settings)
    choice: _Choice | None = plan.decisions.get(place)
    if choice is None:
        if len(plan.decisions) >= _MAX_CHOICES:
            # The plan of a None mask outlives its forward, and with it what callers have set.
            plan.decisions.clear()
        choice = _bound_again(plan, place) or _choose(
            module, query, key, value, plan, dropout, scaling, features, kwargs, settings
        )
        plan.decisions[place] = choice
    return choice


def _bound_again(plan: Plan, place: Hashable) -> _Choice | None:
    """What was chosen for the mask's earlier contents, bound to the present ones."""
    chosen: _Choice | None = plan.chosen.get(place)
    if chosen is None:
        return None
    try:
        run = chosen.decision.backend.bind(plan, chosen.call)
    except Exception:
        return None  # It is chosen anew, where errors are seen to.
    return replace(chosen, run=run)


def _plan_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool | None,
) -> Plan:
    """The plan that a mask carries, or one for a mask that carries none."""
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    settings = None
    if type(mask) is PlanMask:
        plan = mask.plan
        if plan is not None:
            if plan.device != query.device:
                plan = plan.on(query.device)
            if plan.q_len == q_len and plan.kv_len == kv_len:
                return plan
            # Where it hides nothing, other implementations would have got None: any shape will do.
            mask, is_causal, settings = plan.dense_mask(), False, plan.settings
        else:
            mask = mask.dense()
    if mask is None:
        pattern = Pattern.CAUSAL if is_causal and q_len > 1 else Pattern.BIDIRECTIONAL
        return shared_plan(batch, q_len, kv_len, pattern, query.device)
    if mask.device != query.device:
        mask = mask.to(query.device)
    if settings is None:
        return plan_of_given(module, mask, batch, q_len, kv_len)
    other = Plan(batch, q_len, kv_len, Pattern.OTHER, query.device, given=mask)
    other.settings = settings
    return other


def _choose(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    dropout: float,
    scaling: float | None,
    features: tuple[str, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
) -> _Choice:
    call = call_of(module, query, key, value, dropout, scaling, features, kwargs, settings)
    profile = profile_for(query.device)
    objective = settings.objective or LATENCY
    decision = _chooser(plan, call, profile, settings.backends, objective)
    bind: Callable[[], Runner] = functools.partial(decision.backend.bind, plan, call)
    # What other forwards find must not change while checkpointed layers may run again.
    lasting = call.grad and plan.is_shared
    if settings.backends is None and objective.goal == "latency" and not lasting:
        decision, bind = _first_uses.settle(decision, plan, call)
    else:
        _first_uses.take(decision, plan, call)
    _log(plan, call, decision)
    try:
        run = bind()
    except Exception as error:
        if not faults.may_repeat(error, decision.backend, plan, call):
            faults.annotate(error, decision, plan, call)
            raise
        return _choose(
            module, query, key, value, plan, dropout, scaling, features, kwargs, settings
        )
    eager = eager_function(module) if decision.backend.name == "eager" else None
    return _Choice(decision, call, run, eager, settings.trace)


@functools.lru_cache(maxsize=1024)
def _log_once(line: str) -> None:
    logger.info(line)


def _log(plan: Plan, call: Call, decision: Decision) -> None:
    if logger.isEnabledFor(logging.INFO):
        _log_once(
            f"{decision.backend.name} for {plan.pattern.value} attention, {plan.padding.value} "
            f"padding, {call.heads}/{call.kv_heads} heads of {call.head_dim}, "
            f"{str(call.dtype).removeprefix('torch.')}: {decision.reason}"
        )


def _captured_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The choice while a CUDA graph is captured, whose replays find what it was captured with.

    Nothing of a plan may be in it, and nothing be built: without a mask a flash kernel may run;
    everything else is :func:`static_attention`'s.
    """
    query, key, value = as_under_autocast(query, key, value)
    if isinstance(mask, PlanMask):
        # A copy of the plan: what is derived now is the graph's.
        mask = mask.dense() if mask.plan is None else mask.plan.copy().dense_mask()
        is_causal = False
    causal = is_causal_of(mask)
    if mask is None:
        causal = none_is_causal(module) if is_causal is None else is_causal
    q_len, kv_len = query.shape[2], key.shape[2]
    settings = settings_for(getattr(module, "config", None))
    objective = settings.objective or LATENCY
    if (
        causal is not None
        and (q_len == kv_len or not causal)
        and settings.backends is None
        and objective.goal == "latency"
        and _PLAIN_ARGUMENTS.issuperset(kwargs)
    ):
        pattern = Pattern.CAUSAL if causal and q_len > 1 else Pattern.BIDIRECTIONAL
        plan = Plan(query.shape[0], q_len, kv_len, pattern, query.device)
        call = call_of(module, query, key, value, dropout, scaling, (), kwargs, settings)
        if not call.grad:
            profile = profile_for(query.device)
            decision = _chooser(plan, call, profile, _FOR_GRAPHS, objective)
            decision = _first_uses.ready(decision, plan, call)
            built = _first_uses.has_built(decision, plan, call)
            if decision.backend.indispensable and not built:
                # Nothing says that SDPA need not build, or in which form it was built.
                with contextlib.suppress(UnsupportedCallError):
                    decision = _chooser(plan, call, profile, _FLASH, objective)
            if built or not decision.backend.indispensable:
                _log(plan, call, decision)
                if settings.trace is not None:
                    settings.trace.record(plan, call, decision)
                run = decision.backend.bind(plan, call)
                return run(query, key, value, {**kwargs, "module": module}), None
        # The form in which it ran before, if Transformers' sdpa did.
        mask, is_causal = None, causal
    return static_attention(module, query, key, value, mask, dropout, scaling, is_causal, kwargs)
