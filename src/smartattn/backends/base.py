"""The contract of a backend: what it declares, what it refuses, how it runs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from ..call import Call, Runner
from ..machine import Versions
from ..plan import Plan
from . import splitting
from .splitting import Step

HALF_PRECISION = frozenset({torch.float16, torch.bfloat16})

#: Relative error that a backend may add to real tokens, per dtype: |out - reference| divided by
#: the largest |reference|, the reference in float64 on the same (rounded) inputs.
DEFAULT_TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


@dataclass(frozen=True, slots=True)
class Support:
    """What a backend takes. None means: anything."""

    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    #: Largest head_dim, and the number that head_dim must be a multiple of.
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    #: Value head_dim may differ from that of query and key.
    mixed_head_dims: bool = False
    #: Arguments that change the result and that the backend implements, see ``Call.features``.
    features: frozenset[str] = frozenset()
    backward: bool = True
    #: Lowest and highest CUDA compute capability.
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: DEFAULT_TOLERANCES)


#: Why backends are not used again in this process, by name and device; see ``faults``.
_quarantine: dict[tuple[str, torch.device], str] = {}


_changes = 0


def quarantine(name: str, device: torch.device, reason: str) -> None:
    """Makes a backend refuse every call on a device from now on, in this process."""
    global _changes
    _changes += 1
    _quarantine[name, device] = reason


def changes() -> int:
    """How often a quarantine began or ended: choices of before then may have to be made anew."""
    return _changes


def quarantined(name: str, device: torch.device) -> str | None:
    """Why a backend is not used again on a device, None if it may be."""
    return _quarantine.get((name, device))


def end_quarantine() -> None:
    """Lets all backends run again, for instance after a package was put right."""
    global _changes
    _changes += 1
    _quarantine.clear()


#: What a kernel goes through: the padded tensors; the real tokens of all sequences at once, or the
#: padded tensors where skipping does not pay; the real tokens, always; or one group of sequences
#: that lie alike after the other.
Walk = Literal["padded", "sequences", "tokens", "groups"]


class Backend(ABC):
    """One way to compute attention.

    A backend never reads a value from the device; what it needs of the mask is in the plan.
    """

    name: ClassVar[str]
    support: ClassVar[Support]
    #: What its time grows with, see :data:`Walk`.
    walks: ClassVar[Walk]
    #: Thread blocks of a decoding step that a multiprocessor of a GPU runs at once.
    blocks_per_processor: ClassVar[int] = 1
    #: Names in :class:`~smartattn.machine.Versions` of the packages one of which it needs.
    packages: ClassVar[tuple[str, ...]] = ()
    #: Considered only when every other backend refuses.
    last_resort: ClassVar[bool] = False
    #: Never quarantined: where it fails, nothing else is left to run.
    indispensable: ClassVar[bool] = False

    def unavailable(self) -> str | None:
        """Why this backend cannot run in this process at all, or None if it can."""
        return None

    def remedy(self) -> str | None:
        """A shell command that would end what :meth:`unavailable` says, None if there is none."""
        return None

    def handicap(self, device: torch.device) -> str | None:
        """What makes this backend slower on a device than it could be, None if nothing does."""
        return None

    def refusals(self, plan: Plan, call: Call) -> list[str]:
        """All reasons why this call cannot be run exactly; empty if it can."""
        reason = self.unavailable()
        reasons = [reason] if reason else []
        if _quarantine and (failed := quarantined(self.name, call.device)):
            reasons.append(failed)
        return reasons + declared_refusals(self.support, call) + self.further_refusals(plan, call)

    def refusals_elsewhere(
        self,
        plan: Plan,
        call: Call,
        capability: tuple[int, int] | None,
        packages: Versions | None = None,
    ) -> list[str]:
        """The same on another machine that has its package.

        Args:
            capability: of its GPU.
            packages: their versions there; None if they are not known.
        """
        declared = declared_refusals(self.support, call, capability)
        return declared + self.further_refusals(plan, call)

    def further_refusals(self, plan: Plan, call: Call) -> list[str]:
        """Reasons beyond what :class:`Support` can say."""
        return []

    def tile(self, plan: Plan, call: Call) -> tuple[int, int]:
        """(queries, keys) that a thread block of a GPU works at together.

        A sequence costs whole tiles, which for a short one is twice its share of the pairs or more.
        """
        return (128, 128)

    def busiest(self, plan: Plan, call: Call, slots: int) -> float:
        """Keys that the busiest of ``slots`` thread blocks walks in a decoding step on a GPU.

        ``slots`` are :attr:`blocks_per_processor` of each multiprocessor.
        """
        return splitting.evenly(Step.of(plan, call), slots)

    def uses_dense_mask(self, plan: Plan, call: Call) -> bool:
        """This call would need a (q_len, kv_len) mask in memory."""
        return False

    def set_aside(self, plan: Plan, call: Call) -> str | None:
        """Why this backend, which could run the call, is not considered beside others; or None."""
        if self.last_resort:
            return "only where all others refuse"
        # It may not fit in memory at all.
        if plan.is_packed and self.uses_dense_mask(plan, call):
            return f"would need a mask of {call.q_len:,} x {call.kv_len:,} for packed sequences"
        return None

    def built_for(self, plan: Plan, call: Call) -> Hashable | None:
        """What the kernels of a call are built for, where one build serves a whole process.

        Calls of which it is the same share their kernels, whatever their lengths and threads. None
        where every shape has its own, in every thread, or nothing is built. It asks no device.
        """
        return None

    @abstractmethod
    def bind(self, plan: Plan, call: Call) -> Runner:
        """Prepares what is the same for all layers that ask for ``call`` in this forward.

        The runner takes query (batch, heads, q_len, head_dim), key and value (batch, kv_heads,
        kv_len, ...) and the layer's further arguments, with the layer itself under ``module``; it
        returns (batch, q_len, heads, value_head_dim), finite at padding positions.
        """

    def run(
        self,
        plan: Plan,
        call: Call,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Binds and runs once."""
        return self.bind(plan, call)(query, key, value, arguments)


def declared_refusals(
    support: Support, call: Call, capability: tuple[int, int] | None = None
) -> list[str]:
    """What the declarations of a backend say against a call.

    ``capability`` is that of a CUDA device which this machine need not have; None asks the call's.
    """
    reasons = []
    kind = call.device.type
    if support.devices is not None and kind not in support.devices:
        reasons.append(f"runs on {_names(support.devices)}, given {kind}")
    if support.dtypes is not None and call.dtype not in support.dtypes:
        names = {str(dtype).removeprefix("torch.") for dtype in support.dtypes}
        reasons.append(f"takes {_names(names)}, given {str(call.dtype).removeprefix('torch.')}")
    if support.max_head_dim is not None and call.head_dim > support.max_head_dim:
        reasons.append(f"takes head_dim up to {support.max_head_dim}, given {call.head_dim}")
    if call.head_dim % support.head_dim_multiple:
        reasons.append(
            f"takes head_dim in multiples of {support.head_dim_multiple}, given {call.head_dim}"
        )
    if call.value_head_dim != call.head_dim and not support.mixed_head_dims:
        reasons.append(
            f"needs one head_dim, given {call.head_dim} for query, {call.value_head_dim} for value"
        )
    for feature in sorted(call.features - support.features):
        reasons.append(f"does not implement {feature}")
    if call.grad and not support.backward:
        reasons.append("has no backward, and a gradient is needed")
    bounds = support.min_capability, support.max_capability
    if kind == "cuda" and bounds != (None, None):
        given = capability or _capability(call.device)
        lowest, highest = bounds
        for bound, missed, word in (
            (lowest, lowest is not None and given < lowest, ""),
            (highest, highest is not None and given > highest, "at most "),
        ):
            if bound is not None and missed:
                reasons.append(
                    f"needs compute capability {word}{bound[0]}.{bound[1]}, "
                    f"the device has {given[0]}.{given[1]}"
                )
    return reasons


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _names(items: frozenset[str] | set[str]) -> str:
    return " or ".join(sorted(items))
