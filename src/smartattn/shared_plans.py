"""Plans of batches that have nothing of their own but their shape: forwards share them.

What is derived from such a plan and chosen under it is found again by the next forward of the same
shape, which the host of a launch-bound model feels. A forward that needs a dense mask, or has
something of its own after all, goes on with a copy: :meth:`smartattn.plan.Plan.own`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch

from .backends.base import changes
from .control import Settings
from .plan import Pattern, Plan
from .profiles import profile_for

#: Plans that are remembered. What they keep on the device is small: where sequences begin.
_MOST = 256
#: Elements of the largest mask whose plan is remembered: it keeps what is derived from the mask for
#: as long as that lives.
_MOST_KEPT = 1 << 22
#: The plans of masks by the ids of mask and configuration, what tells whether they still hold, and
#: the layers that had them. An attribute of a mask would be saved and copied with it.
_given: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], Hashable, Plan, Askers]] = {}
#: Says which kernels a user has put in the place of torch's own.
_kernels = getattr(torch.nn.attention, "current_flash_attention_impl", None)


def shared_plan(
    batch: int,
    q_len: int,
    kv_len: int,
    pattern: Pattern,
    device: torch.device,
    window: int | None = None,
    settings: Settings | None = None,
) -> Plan:
    """The plan of a batch without padding, query 0 at key 0, made once for the current stream.

    Args:
        settings: as :attr:`Plan.settings`.
    """
    stream = 0
    if device.type == "cuda":
        # What a plan has uploaded is there for those alone who come later on the same stream.
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
    # Another profile, quarantines and other kernels in torch bring other choices; and what has to
    # be built for a shape is built for a thread.
    kernels = None if _kernels is None else _kernels()
    profile = id(profile_for(device))
    stamp = (profile, changes(), kernels, threading.get_ident(), stream)
    return _plan(batch, q_len, kv_len, pattern, device, window, settings, stamp)


@functools.lru_cache(maxsize=_MOST)
def _plan(
    batch: int,
    q_len: int,
    kv_len: int,
    pattern: Pattern,
    device: torch.device,
    window: int | None,
    settings: Settings | None,
    stamp: Hashable,
) -> Plan:
    plan = Plan(batch, q_len, kv_len, pattern, device, window=window)
    plan.settings = settings
    plan.is_shared = True
    return plan


class Askers:
    """The layers that asked for something in one forward, which tell where the next one begins.

    What a forward was handed may have been filled anew for the next one without a trace in its
    version: by NumPy's and other libraries' views, by ``.data``, in inference mode.
    """

    __slots__ = ("_last", "_seen")

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._last = -1

    def add(self, module: torch.nn.Module) -> bool:
        """Takes down a layer; whether another forward than that of the others has begun with it."""
        if torch._C._current_graph_task_id() != -1:
            return False  # A checkpointed layer runs again, as it ran.
        place = getattr(module, "layer_idx", None)
        place = place if isinstance(place, int) else None
        begun = id(module) in self._seen or (place is not None and place <= self._last)
        if begun:
            self._seen.clear()
            self._last = -1
        self._seen.add(id(module))
        if place is not None:
            self._last = place
        return begun


def plan_of_given(
    module: torch.nn.Module, mask: torch.Tensor, batch: int, q_len: int, kv_len: int
) -> Plan:
    """The plan of a caller's own mask, made once for the layers of a forward.

    Args:
        module: the layer that asks, see :class:`Askers`.
    """
    # What is written into an inference tensor leaves no trace, and a bias that is learned gets its
    # gradient through the tensor itself.
    keeps = not (mask.is_inference() or mask.requires_grad) and mask.numel() <= _MOST_KEPT
    sizes = (batch, q_len, kv_len)
    chosen: dict[Any, Any] = {}
    if keeps:
        key = id(mask), id(getattr(module, "config", None))
        stamp = (mask._version, changes(), id(profile_for(mask.device)), sizes)
        kept = _given.get(key)
        if kept is not None and kept[0]() is mask and kept[1] == stamp:
            if not kept[3].add(module):
                return kept[2]
            # Such a call has one answer: what was chosen stays, bound to what is in the mask now.
            chosen = kept[2].decisions or kept[2].chosen
        # Another tensor of the same memory: the plan must not keep the mask.
        given = mask.detach()
    else:
        given = mask
    plan = Plan(*sizes, Pattern.OTHER, mask.device, given=given)
    if keeps:
        plan.chosen = {place: replace(choice, run=None) for place, choice in chosen.items()}
        reference = weakref.ref(mask, functools.partial(_forget, key))
        askers = Askers()
        askers.add(module)
        _given[key] = (reference, stamp, plan, askers)
    return plan


def _forget(key: tuple[int, int], reference: weakref.ref[torch.Tensor]) -> None:
    kept = _given.get(key)
    # Another mask may have come to its place meanwhile.
    if kept is not None and kept[0] is reference:
        _given.pop(key, None)


def capturing(states: torch.Tensor) -> bool:
    """Whether what is launched for a tensor now is recorded for a CUDA graph."""
    # Every layer asks, and the type of a device takes the host ten times as long.
    return states.is_cuda and torch.cuda.is_current_stream_capturing()


def capturing_on(device: torch.device) -> bool:
    """The same of a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, such as ``grad``: nothing can be read in it."""
    return torch._C._functorch.peek_interpreter_stack() is not None
