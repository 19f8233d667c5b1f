"""What the further arguments of an attention layer mean for the choice of a backend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .choose import UnsupportedCallError
from .masking import lowest
from .plan import Pattern, Plan
from .shared_plans import Askers

#: Arguments that do not change what attention computes, or that the mask already says.
NEUTRAL_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "cache",
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

#: Batches that one plan remembers by the tensor that shows their sequences.
_MOST_PACKINGS = 8
#: Parameters of an attention layer's forward under which query and key come from the same tokens.
_SELF_ATTENTION_PARAMETERS = frozenset(
    {
        "self",
        "attention_mask",
        "cache",
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


def as_under_autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in the dtype in which SDPA and matrix products compute them.

    Under autocast rotary positions make queries and keys float32, beside values of the lower
    precision.
    """
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (
        query.dtype,
        key.dtype,
        value.dtype,
    ):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def features_of(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
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


@functools.cache
def is_self_attention(module_class: Any) -> bool:
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


def packed_by_arguments(module: torch.nn.Module, plan: Plan, kwargs: Mapping[str, Any]) -> Plan:
    """The plan of a packed batch whose sequences the layer's arguments show."""
    if plan.is_packed or plan.pattern is Pattern.OTHER:
        return plan
    source = kwargs["cu_seq_lens_q"]
    written = 0 if source.is_inference() else source._version
    key = id(source), id(getattr(module, "config", None))
    known: _Packing | None = plan.packings.get(key)
    # The plan of a None mask outlives its forward. An entry holds its tensor, so that the id cannot
    # be another tensor's by now.
    anew = known is not None and plan.settings is None and known.askers.add(module)
    if known is None or known.written != written or anew:
        bounds = source.detach().to("cpu", copy=True)
        if known is not None and torch.equal(known.bounds, bounds):
            known.written = written
            return known.plan
        if len(plan.packings) >= _MOST_PACKINGS:
            plan.packings.clear()
        known = _Packing(source, written, bounds, _packed_plan(plan, bounds, kwargs))
        known.askers.add(module)
        plan.packings[key] = known
    return known.plan


@dataclass(slots=True)
class _Packing:
    """The plan of a packed batch, and what it was made from."""

    source: torch.Tensor
    written: int
    #: What was in it, on the host.
    bounds: torch.Tensor
    plan: Plan
    askers: Askers = field(default_factory=Askers)


def _packed_plan(plan: Plan, bounds: torch.Tensor, kwargs: Mapping[str, Any]) -> Plan:
    source, of_keys = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    total = plan.batch * plan.q_len
    if plan.q_len != plan.kv_len or plan.is_padded:
        raise ValueError(
            "cu_seq_lens_q describes a batch without padding and without earlier tokens, "
            f"given {plan.q_len} queries, {plan.kv_len} keys and {plan.padding.value} padding"
        )
    if of_keys is not None and of_keys is not source and not torch.equal(bounds, of_keys.cpu()):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k of self-attention must be equal")
    if bounds.ndim != 1 or int(bounds[0]) != 0 or int(bounds[-1]) != total:
        raise ValueError(
            f"cu_seq_lens_q must run from 0 to the {total} tokens of the batch, "
            f"given {bounds.tolist()[:8]}"
        )
    starts = torch.zeros(total, dtype=torch.bool)
    # Collators may fill up with empty sequences.
    starts[bounds[bounds < total].long()] = True
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


def narrowed(
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
        return mask.masked_fill(hidden, lowest(query.dtype))
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
