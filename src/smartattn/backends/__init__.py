"""The backends in the order in which ties and rules prefer them."""

from __future__ import annotations

from .base import Backend, Support
from .eager import EagerBackend
from .flash_attention_2 import FlashAttention2Backend
from .flash_attention_3 import FlashAttention3Backend
from .flash_attention_4 import FlashAttention4Backend
from .sdpa import SdpaBackend
from .sdpa_unpadded import SdpaUnpaddedBackend
from .torch_varlen import TorchVarlenBackend
from .triton_varlen import TritonVarlenBackend

BACKENDS: tuple[Backend, ...] = (
    SdpaBackend(),
    FlashAttention2Backend(),
    FlashAttention3Backend(),
    FlashAttention4Backend(),
    TorchVarlenBackend(),
    TritonVarlenBackend(),
    SdpaUnpaddedBackend(),
    EagerBackend(),
)

#: The same by name.
NAMED: dict[str, Backend] = {backend.name: backend for backend in BACKENDS}

__all__ = ["BACKENDS", "NAMED", "Backend", "Support"]
