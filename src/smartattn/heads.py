"""Whether the code after a stack of layers uses what stands at padding positions.

A loss that counts the prediction made at a padding position, or a classifier that picks one, would
see zeros there instead of what the layers compute from padding. The question is about labels and
token ids on the device; its answer is copied while the mask is read, so that it costs no wait of
its own.
"""

from __future__ import annotations

from typing import Any

import torch

from .patterns import CACHE_NAMES
from .stacks import Head, Stack

#: The label that the losses of Transformers leave out.
IGNORED = -100
#: Arguments of a model that reach its layers or its loss in ways that are known.
_KNOWN = frozenset(
    [
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        *CACHE_NAMES,
        "labels",
        "shift_labels",
        "num_items_in_batch",
        "logits_to_keep",
        "cache_position",
    ]
)


class Guard:
    """A condition on the device that is read once the mask has been: then it has been copied.

    Args:
        wrong: boolean scalar, True where the forward must not be packed.
        reason: a sentence that says why.
    """

    def __init__(self, wrong: torch.Tensor, reason: str) -> None:
        self._reason = reason
        self._copied: torch.cuda.Event | None = None
        if wrong.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(wrong, non_blocking=True)
            self._copied = torch.cuda.current_stream(wrong.device).record_event()
        else:
            self._value = wrong

    def refusal(self) -> str | None:
        """The reason not to pack, or None."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._reason if bool(self._value) else None


def reads_last(values: dict[str, Any]) -> bool:
    """Whether the logits of the last position may be all that the caller is after.

    Generation asks for them alone, or at least hands over the cache that it will go on with.
    """
    keep = values.get("logits_to_keep", 0)
    if any(values.get(name) is not None for name in CACHE_NAMES):
        return True
    return isinstance(keep, torch.Tensor) or bool(keep)


def guard_for(stack: Stack, values: dict[str, Any]) -> tuple[Guard | None, str | None]:
    """What must hold for a forward to be packed, and why it cannot be at all.

    Args:
        values: the arguments of the model that was given, by name.
    """
    for name, value in values.items():
        if name not in _KNOWN and isinstance(value, torch.Tensor):
            return None, f"{name} is not known"
    mask = values.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        labelled = stack.head is not Head.NONE and values.get("labels") is not None
        picks = stack.head is Head.SEQUENCE
        return None, "the mask of padding is not (batch, length)" if labelled or picks else None
    if stack.head is Head.SEQUENCE:
        return _picked(stack, values, mask)
    labels, shift = values.get("labels"), stack.head is Head.NEXT_TOKEN
    if shift and values.get("shift_labels") is not None:
        labels, shift = values["shift_labels"], False
    if labels is None or stack.head is Head.NONE:
        return None, None
    if labels.shape != mask.shape:
        return None, f"labels of {tuple(labels.shape)} for a mask of {tuple(mask.shape)}"
    mask = mask.to(labels.device)
    if shift:
        labels, mask = labels[:, 1:], mask[:, :-1]
    wrong = ((labels != IGNORED) & (mask == 0)).any()
    return Guard(wrong, "the loss counts predictions at padding positions"), None


def _picked(
    stack: Stack, values: dict[str, Any], mask: torch.Tensor
) -> tuple[Guard | None, str | None]:
    """For classifiers of sequences: decoders pick the last token that is not the padding token."""
    padding_token = stack.root.config.get_text_config().pad_token_id
    ids = values.get("input_ids")
    if padding_token is None or ids is None:
        last = torch.full((mask.shape[0], 1), mask.shape[1] - 1, device=mask.device)
    else:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != padding_token) * places).argmax(dim=-1, keepdim=True).to(mask.device)
    wrong = (mask.gather(1, last) == 0).any()
    return Guard(wrong, "the classifier reads a padding position"), None
