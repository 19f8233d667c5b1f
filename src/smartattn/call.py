"""What one attention layer asks for: the facts of a call that decide which backend may take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

#: Attention over tensors: query, key, value and the layer's further arguments to the output; see
#: ``backends.base.Backend.bind``.
Runner: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class Call:
    """The request of one layer, without its tensors.

    Lengths are in tokens. ``query`` is (batch, heads, q_len, head_dim), ``key`` and ``value`` are
    (batch, kv_heads, kv_len, head_dim) and (batch, kv_heads, kv_len, value_head_dim), the shapes
    that Transformers hands to an attention function.

    ``self_attention`` is True only where query and key are known to come from the same tokens, so
    that a padded key is a padded query too. ``features`` names the arguments that change the result
    and that a backend therefore has to implement: ``softcap``, ``dropout``, ``position_bias``, ...
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    scaling: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    grad: bool = False
    deterministic: bool = False
    self_attention: bool = False
    keep_padding_output: bool = False
    #: Keys and values lie as (batch, kv_len, kv_heads, head_dim) in memory, so that the tokens of a
    #: sequence follow each other; False where a cache has concatenated them as (batch, kv_heads,
    #: kv_len, head_dim). It changes what a backend costs, never what it may run.
    token_major_keys: bool = True
    #: Queries lie as (batch, q_len, heads, head_dim) in memory; kernels for sequences need copies
    #: of others.
    token_major_queries: bool = True
    #: Tokens from a row of keys, and of values, to the next one, in steps from token to token:
    #: ``kv_len``, or ``kv_heads * kv_len`` where the heads of a cache lie in between. 0 where
    #: neither holds for both, so that kernels for sequences need copies; None for what
    #: ``token_major_keys`` says of tensors without gaps.
    key_pitch: int | None = None
    #: The layer's own module has an eager attention function.
    has_eager: bool = False
    features: frozenset[str] = frozenset()

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (1 for multi-head attention)."""
        return self.heads // self.kv_heads

    @property
    def copies_keys(self) -> bool:
        """Whether a kernel for sequences has to be handed copies of the keys, or of the values."""
        # A backward returns gradients of what it was given, which must not overlap.
        return self.key_pitch == 0 or (self.grad and not self.token_major_keys)
