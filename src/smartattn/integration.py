"""The two functions that Transformers calls, and nothing else that knows Transformers.

Once per forward and mask type Transformers calls :func:`smart_mask`, which measures the padding of
the batch and returns it as a plan that travels in the mask's place; once per layer it calls
:func:`smart_attention`, which sends the call to a backend.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as masks
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_tracing

from . import faults
from .backends import BACKENDS
from .call import Call, Runner
from .choose import Chooser, Decision, UnsupportedCallError
from .control import Settings, settings_for
from .mask import PlanMask
from .plan import BoolArray, Pattern, Plan
from .profile import profile_for

logger = logging.getLogger("smartattn")

#: The name under which both functions are registered.
NAME = "smart"


def register() -> None:
    """Makes ``attn_implementation="smart"`` known to Transformers; importing smartattn does it."""
    AttentionInterface.register(NAME, smart_attention)
    AttentionMaskInterface.register(NAME, smart_mask)


# -- once per forward and mask type ----------------------------------------------------------------


def smart_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masks.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function of ``"smart"``: measures the batch, with at most one copy to the host.

    Arguments are those of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        A :class:`~smartattn.mask.PlanMask`. While a graph is traced, what ``sdpa`` would get; where
        a compiled step follows (decoding with a static cache), and for models that never call the
        attention function, what eager attention would get.
    """
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    if is_tracing(attention_mask) or torch.device(device).type == "meta":
        # A graph of one model must not mix kinds of masks: here all are what sdpa gets.
        mask: torch.Tensor | None = masks.sdpa_mask(
            **arguments,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )
        return mask if _calls_attention_function(config) else _additive(mask, dtype)
    known = _recognise(mask_function, kv_length + kv_offset)
    # generate compiles the decode step of a static cache, but makes its mask outside of it.
    may_be_compiled = isinstance(q_offset, torch.Tensor) and q_length == 1
    flat = attention_mask is None or attention_mask.ndim == 2
    if may_be_compiled or not flat or not _calls_attention_function(config):
        mask = masks.eager_mask(
            **arguments, dtype=dtype, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
        return mask
    if known.pattern is Pattern.OTHER:
        mask = _dense_mask(arguments)
        plan = Plan(
            batch_size, q_length, kv_length, Pattern.OTHER, torch.device(device), dense=lambda: mask
        )
        plan.settings = settings_for(config)
        return PlanMask(plan, dtype)
    real = real_on_device = packed = None
    if attention_mask is not None:
        padded = masks.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padded is not None
        real_on_device = padded[:, kv_offset : kv_offset + kv_length]
    real, offset = _read(real_on_device, q_offset)
    # A static cache counts its own offset on, while layers may still need this mask.
    arguments["q_offset"] = offset
    if known.packed_ids is not None:
        packed = _to_host(known.packed_ids.diff(dim=-1, prepend=known.packed_ids[:, :1] - 1) != 0)
    elif attention_mask is None and offset == kv_offset and q_length == kv_length > 1:
        packed = _packed_despite_cache(batch_size, q_length)
    plan = Plan(
        batch_size,
        q_length,
        kv_length,
        known.pattern,
        torch.device(device),
        shift=offset - kv_offset,
        window=known.window,
        real=real,
        real_on_device=real_on_device,
        packed=packed,
        dense=(
            functools.partial(_dense_mask, arguments)
            if packed is None or known.packed_ids is not None
            else None
        ),
    )
    plan.settings = settings_for(config)
    return PlanMask(plan, dtype)


def _dense_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    mask: torch.Tensor | None = masks.sdpa_mask(
        **arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    return mask


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), _lowest(dtype))


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def _read(real: torch.Tensor | None, q_offset: int | torch.Tensor) -> tuple[BoolArray | None, int]:
    """The 2D mask and the offset of the first query on the host, with one copy for both."""
    if not isinstance(q_offset, torch.Tensor):
        return None if real is None else _to_host(real), q_offset
    if real is None:
        return None, int(q_offset)
    both = torch.cat((real.reshape(-1).to(torch.int32), q_offset.reshape(1).to(torch.int32)))
    values = both.cpu().numpy()
    return values[:-1].reshape(real.shape).astype(bool), int(values[-1])


def _packed_despite_cache(batch: int, length: int) -> BoolArray | None:
    """Where sequences begin, in a forward that fills an empty cache from several of them.

    Transformers looks for restarting position_ids only if there is no cache, and lets the
    sequences of a row see each other otherwise. The mask function is not handed the position_ids;
    they are parameters of the function that calls it. None if they show a single sequence.
    """
    caller = sys._getframe(2)
    if caller.f_code.co_filename != masks.__file__:
        return None
    position_ids = caller.f_locals.get("position_ids")
    if caller.f_locals.get("past_key_values") is None or not isinstance(position_ids, torch.Tensor):
        return None
    if position_ids.shape not in ((1, length), (batch, length)):
        return None
    positions = position_ids.cpu().expand(batch, length)
    starts = positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1
    # Every sequence begins as the row does; other jumps mean something else.
    first = positions[:, :1].expand(batch, length)
    if not bool(starts.any()) or bool((positions[starts] != first[starts]).any()):
        return None
    array: BoolArray = starts.numpy()
    return array


def _to_host(flags: torch.Tensor) -> BoolArray:
    array: BoolArray = flags.cpu().numpy()
    return array


def _calls_attention_function(config: Any) -> bool:
    """Whether the model of a configuration goes through the attention registry.

    Some architectures compute eager attention themselves and add the mask they are given; they
    need the additive mask. False only where the modeling code is known not to name the registry.
    """
    module = type(config).__module__
    if not module.startswith("transformers."):
        return True
    name = module.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(name)
    return modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


@dataclass(frozen=True, slots=True)
class _Known:
    pattern: Pattern
    window: int | None = None
    packed_ids: torch.Tensor | None = None


_UNKNOWN = _Known(Pattern.OTHER)


def _code_of(make: Callable[..., Any], *arguments: Any) -> Any:
    return make(*arguments).__code__


_CAUSAL = masks.causal_mask_function
_BIDIRECTIONAL = masks.bidirectional_mask_function
_AND = _code_of(masks.and_masks, _CAUSAL)
_WINDOW = _code_of(masks.sliding_window_overlay, 1)
_SYMMETRIC_WINDOW = _code_of(masks.sliding_window_bidirectional_overlay, 1)
_CHUNKED = _code_of(masks.chunked_overlay, 1, None)
_PACKED = _code_of(masks.packed_sequence_mask_function, None)
# Newer versions of Transformers count positions anew in each packed sequence.
_REMAPPED = (
    _code_of(masks.remap_positions_for_packed_sequence, _CAUSAL, None)
    if hasattr(masks, "remap_positions_for_packed_sequence")
    else None
)


def _recognise(mask_function: Callable[..., Any], last_position: int) -> _Known:
    """The pattern of a mask function, by the identity of the functions it is made of.

    A conjunction is taken apart; one part that is not positively known makes the whole unknown.
    """
    base: Pattern | None = None
    window: int | None = None
    packed_ids: torch.Tensor | None = None
    symmetric = False
    parts = [mask_function]
    while parts:
        part = parts.pop()
        code = getattr(part, "__code__", None)
        if part is _CAUSAL:
            base = Pattern.CAUSAL
        elif part is _BIDIRECTIONAL:
            base = Pattern.BIDIRECTIONAL if base is None else base
        elif code is None:
            return _UNKNOWN
        elif code is _AND:
            parts.extend(_closure(part)["mask_functions"])
        elif code in (_WINDOW, _SYMMETRIC_WINDOW) and window is None:
            window = _closure(part)["sliding_window"]
            symmetric = code is _SYMMETRIC_WINDOW
        elif code is _CHUNKED and last_position <= _closure(part)["chunk_size"]:
            continue  # Everything lies in the first chunk.
        elif code is _PACKED and packed_ids is None:
            packed_ids = _closure(part)["packed_sequence_mask"]
        elif code is _REMAPPED:
            parts.append(_closure(part)["mask_function"])
        else:
            return _UNKNOWN
    if base is None or not (window is None or (isinstance(window, int) and window > 0)):
        return _UNKNOWN
    if window is not None and symmetric is (base is Pattern.CAUSAL):
        return _UNKNOWN
    return _Known(base, window, packed_ids)


def _closure(function: Any) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


# -- once per layer --------------------------------------------------------------------------------

#: Arguments that do not change what attention computes, or that the mask already says.
NEUTRAL_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "head_mask",
        "input_ids",
        "inputs_embeds",
        "labels",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "past_key_values",
        "position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    }
)

#: Parameters of an attention layer's forward under which query and key come from the same tokens.
_SELF_ATTENTION_PARAMETERS = frozenset(
    {
        "self",
        "attention_mask",
        "cache_position",
        "head_mask",
        "hidden_states",
        "kwargs",
        "layer_past",
        "output_attentions",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)


_chooser = Chooser(BACKENDS)
#: Choices that one plan remembers; a forward makes one per distinct kind of layer.
_MAX_CHOICES = 64


@dataclass(frozen=True, slots=True)
class _Choice:
    decision: Decision
    call: Call
    run: Runner
    eager: Callable[..., Any] | None


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
        (batch, q_len, heads, value_head_dim) and None: attention weights are never computed.

    Raises:
        smartattn.UnsupportedCallError: no backend implements an argument that changes the result.
    """
    if torch.compiler.is_compiling():
        return _compiled_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    if kwargs.get("output_attentions") or kwargs.get("cache") is not None:
        # Transformers' own warning, and its own handling of paged caches.
        output, weights = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            _as_sdpa_mask(attention_mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return output, weights
    plan = _plan_of(query, key, attention_mask, is_causal)
    if kwargs.get("cu_seq_lens_q") is not None:
        plan = _packed_by_arguments(plan, kwargs)
    if "indices" in kwargs or "block_indices" in kwargs:
        plan = _narrowed(module, query, key, plan, kwargs)
    # Those in force when the forward began: checkpointed layers run again long after it.
    settings = plan.settings or settings_for(getattr(module, "config", None))
    features: tuple[str, ...] = ()
    if kwargs.keys() - NEUTRAL_ARGUMENTS:
        features = _features(kwargs)
    signature = (
        module.__class__,
        query.shape,
        key.shape,
        value.shape[-1],
        query.dtype,
        key.dtype,
        dropout,
        scaling,
        features,
        kwargs.get("softcap") if features else None,
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad),
        torch.are_deterministic_algorithms_enabled(),
        settings,
    )
    while True:
        choice = plan.decisions.get(signature)
        if choice is None:
            if len(plan.decisions) >= _MAX_CHOICES:
                # The plan of a None mask outlives its forward, and with it what callers have set.
                plan.decisions.clear()
            choice = plan.decisions[signature] = _choose(
                module, query, key, value, plan, dropout, scaling, features, kwargs, settings
            )
        kwargs["module"] = module
        if choice.eager is not None:
            kwargs["eager"] = choice.eager
        if settings.trace is not None:
            settings.trace.record(plan, choice.call, choice.decision)
        try:
            return choice.run(query, key, value, kwargs), None
        except Exception as error:
            if not faults.may_repeat(error, choice.decision.backend, plan, choice.call):
                faults.annotate(error, choice.decision, plan, choice.call)
                raise
            plan.decisions.pop(signature, None)


def _plan_of(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool | None
) -> Plan:
    """The plan that a mask carries, or one for a mask that carries none."""
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        device = query.device
        causal = bool(is_causal) and q_len > 1
        return _unmasked_plan(batch, q_len, kv_len, causal, device, id(profile_for(device)))
    if type(mask) is PlanMask:
        plan = mask.plan
        if plan is not None:
            if plan.device != query.device:
                plan = plan.on(query.device)
            if plan.q_len == q_len and plan.kv_len == kv_len:
                return plan
            given = plan.dense_mask()
            assert given is not None
            mask = given
        else:
            mask = mask.dense()
    if mask.device != query.device:
        mask = mask.to(query.device)
    return Plan(batch, q_len, kv_len, Pattern.OTHER, query.device, given=mask)


@functools.lru_cache(maxsize=256)
def _unmasked_plan(
    batch: int, q_len: int, kv_len: int, causal: bool, device: torch.device, profile: int
) -> Plan:
    """The plan of a None mask: shapes alone, nothing of a batch, so it may outlive the forward.

    ``profile`` is the identity of the profile in force: another one brings other choices.
    """
    pattern = Pattern.CAUSAL if causal else Pattern.BIDIRECTIONAL
    return Plan(batch, q_len, kv_len, pattern, device)


def _packed_by_arguments(plan: Plan, kwargs: Mapping[str, Any]) -> Plan:
    """The plan of a packed batch whose sequences the layer's arguments show."""
    if plan.is_packed or plan.pattern is Pattern.OTHER:
        return plan
    source = kwargs["cu_seq_lens_q"]
    known = plan.packings.get(id(source))
    # The entry holds its tensor, so the id cannot be another tensor's by now.
    if known is None:
        known = plan.packings[id(source)] = (source, _packed_plan(plan, kwargs))
    return known[1]


def _packed_plan(plan: Plan, kwargs: Mapping[str, Any]) -> Plan:
    source, of_keys = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    total = plan.batch * plan.q_len
    if plan.q_len != plan.kv_len or plan.is_padded:
        raise ValueError(
            "cu_seq_lens_q describes a batch without padding and without earlier tokens, "
            f"given {plan.q_len} queries, {plan.kv_len} keys and {plan.padding.value} padding"
        )
    bounds = source.cpu()
    if of_keys is not None and of_keys is not source and not torch.equal(bounds, of_keys.cpu()):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k of self-attention must be equal")
    if bounds.ndim != 1 or int(bounds[0]) != 0 or int(bounds[-1]) != total:
        raise ValueError(
            f"cu_seq_lens_q must run from 0 to the {total} tokens of the batch, "
            f"given {bounds.tolist()[:8]}"
        )
    starts = torch.zeros(total, dtype=torch.bool)
    starts[bounds[:-1].long()] = True
    packed = Plan(
        plan.batch,
        plan.q_len,
        plan.kv_len,
        plan.pattern,
        plan.device,
        window=plan.window,
        packed=starts.view(plan.batch, plan.q_len).numpy(),
    )
    packed.settings = plan.settings
    return packed


def _narrowed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    plan: Plan,
    kwargs: dict[str, Any],
) -> Plan:
    """The plan of sparse attention: the mask, narrowed to the keys that were selected.

    Models hand the selected keys (or blocks of keys) of every query over as an argument, unless the
    implementation is eager or sdpa: then they narrow the mask themselves.
    """
    indices, block_indices = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if indices is None and block_indices is None:
        return plan
    mask = plan.additive_mask(query.dtype)
    positions = kwargs.get("position_ids")
    mask = narrow(module, query, key, mask, positions, indices, block_indices)
    narrowed = Plan(plan.batch, plan.q_len, plan.kv_len, Pattern.OTHER, plan.device, given=mask)
    narrowed.settings = plan.settings
    return narrowed


def narrow(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    indices: torch.Tensor | None,
    block_indices: torch.Tensor | None,
) -> torch.Tensor:
    """The additive mask of sparse attention.

    Args:
        mask: additive (batch, 1, q_len, kv_len) mask or None.
        indices: (batch, q_len, selected) keys of every query (DeepSeek's sparse attention).
        block_indices: blocks of keys, which the layer's own indexer turns into a mask (MiniMax M3).
    """
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    if indices is not None:
        hidden = torch.ones(batch, q_len, kv_len, dtype=torch.bool, device=query.device)
        hidden = hidden.scatter(-1, indices.long(), False).unsqueeze(1)
        if mask is None:
            mask = torch.zeros((), dtype=query.dtype, device=query.device)
        return mask.masked_fill(hidden, _lowest(query.dtype))
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise UnsupportedCallError(
            "block_indices: no backend implements this sparse attention; "
            "load the model with attn_implementation='eager' instead."
        )
    if position_ids is None:
        position_ids = torch.arange(kv_len - q_len, kv_len, device=query.device)
    position_ids = (position_ids if position_ids.ndim > 1 else position_ids[None]).expand(batch, -1)
    narrowed: torch.Tensor = build(
        block_indices, mask, kv_len, query.dtype, query.device, position_ids
    )
    return narrowed


def _features(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of a layer that a backend has to implement."""
    return tuple(
        name
        for name, value in kwargs.items()
        if value is not None and name not in NEUTRAL_ARGUMENTS and _changes_result(name, value)
    )


def _changes_result(name: str, value: Any) -> bool:
    """Whether an argument that is not known to be neutral may change what attention computes."""
    if name == "softcap":
        return True
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return any(isinstance(item, torch.Tensor) for item in value)


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
    wanted = set(features)
    if dropout:
        wanted.add("dropout")
    if not query.dtype == key.dtype == value.dtype:
        wanted.add("mixed dtypes")
    eager = _eager_function(module)
    call = Call(
        device=query.device,
        dtype=query.dtype,
        batch=query.shape[0],
        q_len=query.shape[2],
        kv_len=key.shape[2],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        scaling=scaling,
        dropout=dropout,
        softcap=kwargs.get("softcap"),
        grad=torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad),
        deterministic=torch.are_deterministic_algorithms_enabled()
        or bool(kwargs.get("deterministic")),
        self_attention=_is_self_attention(type(module))  # type: ignore[arg-type]
        and kwargs.get("encoder_hidden_states") is None,
        keep_padding_output=settings.pad_output == "sdpa",
        has_eager=eager is not None,
        features=frozenset(wanted),
    )
    decision = _chooser(plan, call, profile_for(query.device), settings.backends)
    _log(plan, call, decision)
    try:
        run = decision.backend.bind(plan, call)
    except Exception as error:
        if not faults.may_repeat(error, decision.backend, plan, call):
            faults.annotate(error, decision, plan, call)
            raise
        return _choose(
            module, query, key, value, plan, dropout, scaling, features, kwargs, settings
        )
    return _Choice(decision, call, run, eager if decision.backend.name == "eager" else None)


def _eager_function(module: torch.nn.Module) -> Callable[..., Any] | None:
    source = sys.modules.get(type(module).__module__)
    function: Callable[..., Any] | None = getattr(source, "eager_attention_forward", None)
    return function


@functools.cache
def _is_self_attention(module_class: Any) -> bool:
    """Whether a layer can only attend from its own hidden states.

    Cross-attention is handed a mask that speaks of its keys alone, and nothing in the call says so
    when both sides happen to be of one length. A layer whose forward takes a single source of
    states cannot be one.
    """
    try:
        parameters = inspect.signature(module_class.forward).parameters
    except (TypeError, ValueError):
        return False
    return "hidden_states" in parameters and parameters.keys() <= _SELF_ATTENTION_PARAMETERS


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


def _as_sdpa_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    if not isinstance(mask, PlanMask):
        return mask
    plan = mask.plan
    return mask.dense() if plan is None else plan.dense_mask()


def _compiled_attention(
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
    """The static choice while a graph is traced: Transformers' sdpa, or the model's eager code."""
    indices, block_indices = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if indices is not None or block_indices is not None:
        mask = _additive(mask, query.dtype)
        positions = kwargs.get("position_ids")
        mask = narrow(module, query, key, mask, positions, indices, block_indices)
    beyond_sdpa = False
    for name in _features(kwargs):
        beyond_sdpa = beyond_sdpa or name != "position_bias"
    if not beyond_sdpa:
        output, weights = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return output, weights
    eager = _eager_function(module)
    if eager is None:
        raise NotImplementedError(
            f"{sorted(kwargs)}: sdpa does not implement one of these arguments; "
            "load the model with attn_implementation='eager' instead."
        )
    if mask is None and query.shape[2] > 1 and (is_causal or getattr(module, "is_causal", False)):
        q_len, kv_len = query.shape[2], key.shape[2]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    mask = _additive(mask, query.dtype)
    output, weights = eager(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output, weights
