"""``smart_mask``: what Transformers calls once per forward and mask type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import masking_utils as masks
from transformers.utils.import_utils import is_tracing

from .control import DEFAULT, SETTINGS, settings_for
from .mask import PlanMask
from .modeling import calls_attention_function, made_for_sdpa
from .patterns import apart, packed_despite_cache, recognise
from .plan import BoolArray, Pattern, Plan
from .shared_plans import capturing_on, shared_plan, transformed

#: Tokens of a row up to which batches without padding share plans: forwards of longer ones do not
#: feel the host.
_SHARED_TOKENS = 1024
#: Attribute of a mask, see :func:`is_causal_of`.
_IS_CAUSAL = "_smartattn_is_causal"


def smart_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masks.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function of ``"smart"``: measures the batch, with at most one copy to the host.

    Arguments are those of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        A :class:`~smartattn.mask.PlanMask`. While a graph is traced, what ``sdpa`` would get; where
        a compiled step follows (decoding with a static cache), and for models that never call the
        attention function, what eager attention would get.
    """
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    where = torch.device(device)
    if is_tracing(attention_mask) or where.type == "meta" or transformed():
        # A graph of one model must not mix kinds of masks: here all are what sdpa gets, or what
        # eager attention gets, if the model's code does not know sdpa.
        if not made_for_sdpa(type(config)):
            mask: torch.Tensor | None = masks.eager_mask(
                **arguments, dtype=dtype, allow_is_bidirectional_skip=False
            )
            return mask
        skips = allow_is_causal_skip, allow_is_bidirectional_skip
        whole = _whole(arguments, *skips) if capturing_on(where) else None
        if capturing_on(where) and whole is None:
            # Transformers leaves out masks of functions that it does not look at.
            skips = False, False
        mask = masks.sdpa_mask(
            **arguments,
            allow_is_causal_skip=skips[0],
            allow_is_bidirectional_skip=skips[1],
        )
        if mask is not None and not calls_attention_function(config):
            return additive(mask, dtype)
        if mask is not None and whole is not None and not mask.is_inference():
            setattr(mask, _IS_CAUSAL, (mask._version, whole is Pattern.CAUSAL))
        return mask
    known = recognise(mask_function, kv_length + kv_offset)
    # generate compiles the decode step of a static cache, but makes its mask outside of it.
    may_be_compiled = isinstance(q_offset, torch.Tensor) and q_length == 1
    flat = attention_mask is None or attention_mask.ndim == 2
    if may_be_compiled or not flat or not calls_attention_function(config):
        mask = masks.eager_mask(
            **arguments, dtype=dtype, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
        return mask
    if known.pattern is Pattern.OTHER:
        starts = None
        if attention_mask is None and q_length == kv_length > 1 and int(q_offset) == kv_offset:
            starts = packed_despite_cache(batch_size, q_length)
        if starts is not None:
            arguments["mask_function"] = apart(mask_function, starts, where)
        mask = masks.sdpa_mask(
            **arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
        )
        plan = Plan(batch_size, q_length, kv_length, Pattern.OTHER, where, given=mask)
        plan.settings = settings_for(config)
        return PlanMask(plan, dtype)
    real = real_on_device = packed = None
    if attention_mask is not None:
        padded = masks.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padded is not None
        # Transformers' own functions hand over booleans, other callers what they have.
        real_on_device = padded[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    real, offset = _read(real_on_device, q_offset)
    if known.packed_ids is not None:
        packed = _to_host(known.packed_ids.diff(dim=-1, prepend=known.packed_ids[:, :1] - 1) != 0)
    elif attention_mask is None and offset == kv_offset and q_length == kv_length > 1:
        packed = packed_despite_cache(batch_size, q_length)
    settings = settings_for(config)
    if (
        packed is None
        and offset == kv_offset
        and 1 < q_length == kv_length <= _SHARED_TOKENS
        and not torch.is_grad_enabled()
        # What a block says is another object every time.
        and SETTINGS.get() is DEFAULT
        and (real is None or real.all())
    ):
        plan = shared_plan(
            batch_size, q_length, kv_length, known.pattern, where, known.window, settings
        )
        if not plan.was_left:
            return PlanMask(plan, dtype)
    plan = Plan(
        batch_size,
        q_length,
        kv_length,
        known.pattern,
        where,
        shift=offset - kv_offset,
        window=known.window,
        real=real,
        real_on_device=real_on_device,
        packed=packed,
    )
    plan.settings = settings
    return PlanMask(plan, dtype)


def is_causal_of(mask: torch.Tensor | None) -> bool | None:
    """What a mask that was made for a CUDA graph says in one word; None if it says more.

    Some versions of Transformers make every mask there, which keeps flash kernels out. Models that
    use it themselves need it; what they make of it is another tensor.
    """
    # What is written into an inference tensor leaves no trace.
    if mask is None or mask.is_inference():
        return None
    written, is_causal = getattr(mask, _IS_CAUSAL, (None, None))
    return is_causal if written == mask._version else None


def _whole(
    arguments: dict[str, Any], allow_is_causal_skip: bool, allow_is_bidirectional_skip: bool
) -> Pattern | None:
    """The pattern of a mask that says nothing more, for which no value has to be read."""
    length, offset = arguments["kv_length"], arguments["kv_offset"]
    known = recognise(arguments["mask_function"], length + offset)
    may_skip = {
        Pattern.CAUSAL: allow_is_causal_skip,
        Pattern.BIDIRECTIONAL: allow_is_bidirectional_skip,
        Pattern.OTHER: False,
    }
    is_whole = (
        may_skip[known.pattern]
        and arguments["attention_mask"] is None
        and known.packed_ids is None
        and (known.window is None or known.window >= length)
        and isinstance(first := arguments["q_offset"], int)
        # All tokens, or the last one alone.
        and (first - offset, arguments["q_length"]) in ((0, length), (length - 1, 1))
    )
    return known.pattern if is_whole else None


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as eager attention adds it; another one as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), lowest(dtype))


def lowest(dtype: torch.dtype) -> float:
    """What Transformers adds to the scores of hidden keys."""
    return torch.finfo(dtype).min


def _read(real: torch.Tensor | None, q_offset: int | torch.Tensor) -> tuple[BoolArray | None, int]:
    """The 2D mask and the offset of the first query on the host, with one copy for both."""
    if not isinstance(q_offset, torch.Tensor):
        return None if real is None else _to_host(real), q_offset
    if real is None:
        return None, int(q_offset)
    both = torch.cat((real.reshape(-1).to(torch.int32), q_offset.reshape(1).to(torch.int32)))
    values = both.cpu().numpy()
    return values[:-1].reshape(real.shape).astype(bool), int(values[-1])


def _to_host(flags: torch.Tensor) -> BoolArray:
    array: BoolArray = flags.cpu().numpy()
    return array
