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
#: The plans of masks by their ids, what tells whether they still hold, and the layers that had
#: them. An attribute of a mask would be saved and copied with it.
_given: dict[int, tuple[weakref.ref[torch.Tensor], Hashable, Plan, set[int]]] = {}
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


def plan_of_given(
    module: torch.nn.Module, mask: torch.Tensor, batch: int, q_len: int, kv_len: int
) -> Plan:
    """The plan of a caller's own mask, made once for the layers of a forward.

    Args:
        module: the layer that asks. One that asks again belongs to the next forward, for which the
            mask may have been filled anew: NumPy's and other libraries' views, and ``.data``, leave
            no trace in a tensor's version.
    """
    # What is written into an inference tensor leaves no trace, and a bias that is learned gets its
    # gradient through the tensor itself.
    keeps = not (mask.is_inference() or mask.requires_grad) and mask.numel() <= _MOST_KEPT
    sizes = (batch, q_len, kv_len)
    if keeps:
        config = id(getattr(module, "config", None))
        stamp = (mask._version, changes(), id(profile_for(mask.device)), sizes, config)
        kept = _given.get(id(mask))
        if (
            kept is not None
            and kept[0]() is mask
            and kept[1] == stamp
            and id(module) not in kept[3]
        ):
            kept[3].add(id(module))
            return kept[2]
        # Another tensor of the same memory: the plan must not keep the mask.
        given = mask.detach()
    else:
        given = mask
    plan = Plan(*sizes, Pattern.OTHER, mask.device, given=given)
    if keeps:
        reference = weakref.ref(mask, functools.partial(_forget, id(mask)))
        _given[id(mask)] = (reference, stamp, plan, {id(module)})
    return plan


def _forget(place: int, reference: weakref.ref[torch.Tensor]) -> None:
    kept = _given.get(place)
    # Another mask may have come to its place meanwhile.
    if kept is not None and kept[0] is reference:
        _given.pop(place, None)


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
