"""What one layer asks of its attention, as backends are asked about it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from .arguments import is_self_attention
from .call import Call
from .control import Settings
from .packing import lies_by_token, where_keys_lie


def call_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    features: tuple[str, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
) -> Call:
    """What backends are asked about."""
    wanted = set(features)
    if dropout:
        wanted.add("dropout")
    if not query.dtype == key.dtype == value.dtype:
        wanted.add("mixed dtypes")
    if not query.device == key.device == value.device:
        wanted.add("mixed devices")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        wanted.add("broadcast batches")
    token_major_keys, key_pitch = where_keys_lie(key, value)
    return Call(
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
        grad=needs_grad(query, key, value, dropout),
        deterministic=torch.are_deterministic_algorithms_enabled()
        or bool(kwargs.get("deterministic")),
        self_attention=is_self_attention(type(module))  # type: ignore[arg-type]
        and kwargs.get("encoder_hidden_states") is None,
        keep_padding_output=settings.pad_output == "sdpa",
        token_major_keys=token_major_keys,
        token_major_queries=lies_by_token(query),
        key_pitch=key_pitch,
        has_eager=eager_function(module) is not None,
        features=frozenset(wanted),
    )


def needs_grad(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether a backward may follow.

    Dropout says so too: a reentrant checkpoint runs its layers without gradients first, and must
    draw the same dropout when it runs them again. So does forward-mode differentiation.
    """
    if dropout > 0.0 or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )


def eager_function(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The ``eager_attention_forward`` beside the class of a layer; None if there is none."""
    source = sys.modules.get(type(module).__module__)
    function: Callable[..., Any] | None = getattr(source, "eager_attention_forward", None)
    return function
