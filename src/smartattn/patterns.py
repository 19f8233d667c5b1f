"""What Transformers' mask functions mean: which pattern, which window, which packed sequences.

Everything is recognised by the identity of Transformers' own functions; what is not known is not
guessed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils as masks

from .plan import BoolArray, Pattern


@dataclass(frozen=True, slots=True)
class Known:
    """What a mask function means; ``packed_ids`` (batch, length) number the sequences of a row."""

    pattern: Pattern
    window: int | None = None
    packed_ids: torch.Tensor | None = None


#: What Transformers calls the argument that holds a cache, the newest name first.
CACHE_NAMES = ("cache", "past_key_values")

_UNKNOWN = Known(Pattern.OTHER)


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


def recognise(mask_function: Callable[..., Any], last_position: int) -> Known:
    """The pattern of a mask function, by the identity of the functions it is made of.

    A conjunction is taken apart; one part that is not positively known makes the whole unknown.
    """
    base: Pattern | None = None
    window: int | None = None
    packed_ids: torch.Tensor | None = None
    symmetric = False
    # Whether positions are those in the position_ids, not the places of tokens.
    remapped = False
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
        elif code is _CHUNKED and not remapped and last_position <= _closure(part)["chunk_size"]:
            continue  # Everything lies in the first chunk.
        elif code is _PACKED and packed_ids is None:
            packed_ids = _closure(part)["packed_sequence_mask"]
        elif code is _REMAPPED:
            remapped = True
            parts.append(_closure(part)["mask_function"])
        else:
            return _UNKNOWN
    if base is None or not (window is None or (isinstance(window, int) and window > 0)):
        return _UNKNOWN
    if window is not None and symmetric is (base is Pattern.CAUSAL):
        return _UNKNOWN
    return Known(base, window, packed_ids)


def _closure(function: Any) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def counts_chunks(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function cuts a row into chunks, and is made of Transformers' own alone."""
    found = False
    parts = [mask_function]
    while parts:
        part = parts.pop()
        code = getattr(part, "__code__", None)
        if code is _AND:
            parts.extend(_closure(part)["mask_functions"])
        elif code is _CHUNKED:
            found = True
        elif part not in (_CAUSAL, _BIDIRECTIONAL):
            return False
    return found


def apart(
    mask_function: Callable[..., Any], starts: BoolArray, device: torch.device
) -> Callable[..., Any]:
    """A mask function whose sequences do not see each other, as Transformers makes it.

    To be called by what the maker of a mask calls.

    Args:
        starts: (batch, length), where sequences begin. Chunks are counted by the position_ids, if
            this version of Transformers does so.
    """
    ids = torch.from_numpy(starts).cumsum(-1).to(device)
    if _REMAPPED is not None and counts_chunks(mask_function):
        positions = sys._getframe(2).f_locals["position_ids"].to(device).expand(starts.shape)
        mask_function = masks.remap_positions_for_packed_sequence(mask_function, positions)
    return masks.and_masks(mask_function, masks.packed_sequence_mask_function(ids))


def packed_despite_cache(batch: int, length: int) -> BoolArray | None:
    """Where sequences begin, in a forward that fills an empty cache from several of them.

    Transformers looks for restarting position_ids only if there is no cache, and lets the
    sequences of a row see each other otherwise. The mask function is not handed the position_ids;
    they are parameters of the function that calls it. None if they show a single sequence.
    """
    caller = sys._getframe(2)
    if caller.f_code.co_filename != masks.__file__:
        return None
    given = caller.f_locals
    position_ids = given.get("position_ids")
    if all(given.get(name) is None for name in CACHE_NAMES):
        return None
    if not isinstance(position_ids, torch.Tensor):
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
