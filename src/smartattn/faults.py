"""What happens when a kernel fails at run time.

- A configuration that the kernel does not support (a card that its build leaves out, a shape that
  it refuses by itself): the backend is not used again on that device in this process, one warning
  says so, and the call runs on the next backend.
- Out of memory, errors that CUDA reports late, and everything else: raised as they are, with a note
  that says what was running and why it was chosen.

A backward runs inside of torch's autograd, where no call can be repeated: its errors stay as they
are.
"""

from __future__ import annotations

import logging

import torch

from .backends.base import Backend, quarantine, quarantined
from .call import Call
from .choose import Decision, UnsupportedCallError
from .locks import ForkSafeLock
from .plan import Plan

logger = logging.getLogger("smartattn")

#: Parts of messages that say: not on this device, or not this call. In lower case.
_UNSUPPORTED = (
    "not supported",
    "unsupported",
    "not implemented",
    "only supports",
    "no available kernel",
    "does not support",
    "built without",
    "compiled without",
)
#: Of the errors that CUDA itself reports these alone come from a launch that was refused at once.
#: After any other one its state is unknown.
_REFUSED_LAUNCH = ("no kernel image is available", "invalid device function")

_lock = ForkSafeLock()


def may_repeat(error: Exception, backend: Backend, plan: Plan, call: Call) -> bool:
    """Whether a failed call should be chosen for again, without the backend that failed.

    If so the backend has been quarantined, with a warning.
    """
    if backend.indispensable or not is_unsupported(error):
        return False
    reason = f"failed in this process with {_one_line(error)}"
    with _lock:
        if quarantined(backend.name, call.device) is None:
            quarantine(backend.name, call.device, reason)
            logger.warning(
                "smartattn uses %s on %s no more: it %s; it ran %s",
                backend.name,
                call.device,
                reason,
                described(plan, call),
            )
    # A backend that would take the call again must not be asked for ever.
    return bool(backend.refusals(plan, call))


def is_unsupported(error: BaseException) -> bool:
    """Whether an error says that a kernel cannot run this call here, and nothing worse."""
    if isinstance(error, (UnsupportedCallError, torch.OutOfMemoryError, MemoryError)):
        return False
    if isinstance(error, NotImplementedError):
        return True
    # AcceleratorError, which torch raises for what CUDA reports, is a RuntimeError.
    if not isinstance(error, (RuntimeError, ValueError)):
        return False
    message = str(error).lower()
    if any(part in message for part in _REFUSED_LAUNCH):
        return True
    if "cuda error" in message or "out of memory" in message:
        return False
    return any(part in message for part in _UNSUPPORTED)


def annotate(error: BaseException, decision: Decision, plan: Plan, call: Call) -> None:
    """Adds to an error what was running and why; at most once."""
    note = f"smartattn ran {decision.backend.name} ({decision.reason}) for {described(plan, call)}."
    if call.device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
        note += " CUDA may report an error late: CUDA_LAUNCH_BLOCKING=1 shows where it happened."
    if getattr(error, _MARK, False):
        return
    try:
        setattr(error, _MARK, True)
        if hasattr(error, "add_note"):
            error.add_note(note)
        elif error.args and isinstance(error.args[0], str):
            # Python 3.10 knows no notes.
            error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
    except Exception:
        # An error that cannot be written to is still worth more than its note.
        logger.info(note)


_MARK = "_smartattn_noted"


def described(plan: Plan, call: Call) -> str:
    """A call in words."""
    share = f" {plan.padding_share:.0%}" if plan.padding_share else ""
    grad = " with gradient" if call.grad else ""
    return (
        f"{plan.pattern.value} attention, {call.batch} x {call.q_len} queries, {call.kv_len} keys, "
        f"{plan.padding.value} padding{share}, {call.heads}/{call.kv_heads} heads of "
        f"{call.head_dim}, {str(call.dtype).removeprefix('torch.')} on {call.device}{grad}"
    )


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
