"""What each architecture is put through: masks, caches, packing, gradients.

A scenario runs one model and returns what is to be equal under every implementation: outputs at
real (non-padding) positions, or gradients. It raises `NotApplicable` where it has no meaning.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from ..agreement import CACHE
from .inputs import BATCH, LENGTH, InputKind, Inputs, parameters

PROMPT = 14
DECODE_STEPS = 3
CACHE_SLOTS = LENGTH + 4

Results = dict[str, Tensor]


class NotApplicable(Exception):
    """The architecture has no such thing as this scenario asks for."""


@dataclass(frozen=True)
class Subject:
    """An architecture that runs under eager, and the inputs with which it does."""

    kind: InputKind
    inputs: Inputs

    @property
    def is_seq2seq(self) -> bool:
        return "decoder_input_ids" in self.inputs

    @property
    def token_name(self) -> str:
        """The argument whose positions the outputs belong to."""
        return "decoder_input_ids" if self.is_seq2seq else "input_ids"

    @property
    def token_mask_name(self) -> str:
        return "decoder_attention_mask" if self.is_seq2seq else "attention_mask"

    @property
    def pads_encoder(self) -> bool:
        return self.is_seq2seq and "input_ids" in self.inputs


@dataclass(frozen=True)
class Scenario:
    """`reference` is what eager runs instead, where eager itself takes the input amiss.

    `tolerance` and `common_scale` are those of `compare`. fp32 noise stays below 2e-5 in forwards.
    """

    run: Callable[[Subject, PreTrainedModel], Results]
    reference: Callable[[Subject, PreTrainedModel], Results] | None = None
    tolerance: float = 1e-4
    common_scale: float = 0.0


# Masks. All are (BATCH, length) with 1 at real positions.


def full_mask(length: int) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.long)


def span_mask(length: int, spans: list[tuple[float, float]]) -> Tensor:
    """Row i is real from spans[i][0] up to spans[i][1], both given as fractions of the length."""
    mask = torch.zeros(BATCH, length, dtype=torch.long)
    for row, (start, stop) in zip(mask, spans, strict=True):
        row[round(start * length) : round(stop * length)] = 1
    return mask


def left_mask(length: int) -> Tensor:
    return span_mask(length, [(0, 1), (0.35, 1), (0.65, 1)])


def right_mask(length: int) -> Tensor:
    return span_mask(length, [(0, 1), (0, 0.65), (0, 0.35)])


def both_sides_mask(length: int) -> Tensor:
    """No row reaches either edge: the batch is padded wider than its longest sequence."""
    return span_mask(length, [(0.1, 0.9), (0.25, 0.75), (0.45, 0.8)])


def holes_mask(length: int) -> Tensor:
    mask = full_mask(length)
    mask[1, [length // 4, length // 4 + 1, length // 2]] = 0
    mask[2, [0, 1, length // 3, length // 2, length - 2, length - 1]] = 0
    return mask


def empty_row_mask(length: int) -> Tensor:
    return span_mask(length, [(0, 1), (0, 0), (0.35, 1)])


def own_mask_4d(mask: Tensor) -> Tensor:
    """A caller's own pattern, True where attention is allowed: (BATCH, 1, length, length).

    Causal, without padding, without every third earlier token; each token sees itself, so that no
    row is empty.
    """
    length = mask.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    pattern = (key <= query) & ((query - key) % 3 != 1)
    allowed = pattern[None] & mask.bool()[:, None, :]
    return (allowed | torch.eye(length, dtype=torch.bool))[:, None]


def additive(allowed: Tensor) -> Tensor:
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(allowed.shape).masked_fill(~allowed, lowest)


# Running a model and reading its outputs.


def require_tokens(subject: Subject) -> None:
    if not subject.kind.with_tokens:
        raise NotApplicable(f"{subject.kind.name} has no tokens")


def call(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """The model's answer; seeded, for the architectures that draw random numbers (LSH, BigBird).

    Tensors are copied: some models write into their inputs, which all implementations share.
    """
    torch.manual_seed(0)
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return model(**copies)


def cache_switch(model: PreTrainedModel, use_cache: bool) -> dict[str, bool]:
    """The argument `use_cache`, for a model that can have a cache; its forward may not name it."""
    can_have_one = not {CACHE, "use_cache"}.isdisjoint(parameters(model))
    return {"use_cache": use_cache} if can_have_one else {}


def answers(output: Any, subject: Subject, mask: Tensor | None) -> Results:
    """The outputs to compare: of the tokens under `mask`, or, without tokens, all of them."""
    if isinstance(output, Tensor):
        output = {"output": output}
    tensors = {
        name: value
        for name, value in output.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if mask is None or not subject.kind.with_tokens:
        return tensors
    per_token = {
        name: value
        for name, value in tensors.items()
        if value.ndim >= 2 and value.shape[:2] == mask.shape and not name.startswith("encoder_")
    }
    if not per_token:
        if not mask.all():
            raise NotApplicable("its outputs are not per token")
        return tensors
    return {name: value[mask.bool()] for name, value in per_token.items()}


def with_masks(subject: Subject, model: PreTrainedModel, make_mask: Callable) -> dict[str, Any]:
    """The inputs with a mask for each sequence of tokens in them.

    The rows of the encoder's mask are in reverse order, so that the two masks of an example differ.
    """
    require_tokens(subject)
    arguments: dict[str, Any] = dict(subject.inputs)
    if subject.token_mask_name not in parameters(model):
        raise NotApplicable(f"takes no {subject.token_mask_name}")
    arguments[subject.token_mask_name] = make_mask(LENGTH)
    if subject.pads_encoder:
        arguments["attention_mask"] = make_mask(subject.inputs["input_ids"].shape[1]).flip(0)
    return arguments


def masked(
    make_mask: Callable[[int], Tensor], shown: Callable[[int], Tensor] | None = None
) -> Callable[[Subject, PreTrainedModel], Results]:
    """One forward with a mask. `shown` is what the model gets to see in its place."""

    def run(subject: Subject, model: PreTrainedModel) -> Results:
        arguments = with_masks(subject, model, shown or make_mask)
        return answers(call(model, arguments), subject, make_mask(LENGTH))

    return run


def no_mask(subject: Subject, model: PreTrainedModel) -> Results:
    mask = full_mask(LENGTH) if subject.kind.with_tokens else None
    return answers(call(model, dict(subject.inputs)), subject, mask)


def captured(
    run: Callable[[Subject, PreTrainedModel], Results],
) -> Callable[[Subject, PreTrainedModel], Results]:
    """The same as if it were recorded for a CUDA graph, where no value of a mask can be read."""

    def run_captured(subject: Subject, model: PreTrainedModel) -> Results:
        asked = (
            "transformers.utils.import_utils.is_cuda_stream_capturing",
            "smartattn.masking.capturing_on",
            "smartattn.integration.capturing",
        )
        with contextlib.ExitStack() as stack:
            for name in asked:
                stack.enter_context(mock.patch(name, return_value=True))
            return run(subject, model)

    return run_captured


def fixed_cache(subject: Subject, model: PreTrainedModel) -> Any:
    """A static cache with more slots than will be filled."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE_SLOTS)
    return EncoderDecoderCache(cache, DynamicCache()) if subject.is_seq2seq else cache


def encoded_once(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """What `generate` does: the encoder's answer, to be handed to every step."""
    encoder = model.get_encoder()
    accepted = set(inspect.signature(encoder.forward).parameters)
    return encoder(**{name: arguments[name] for name in accepted & set(arguments)})


def step_by_step(
    chunks: list[int],
    make_mask: Callable[[int], Tensor] | None = left_mask,
    make_cache: Callable[[Subject, PreTrainedModel], Any] | None = None,
) -> Callable[[Subject, PreTrainedModel], Results]:
    """Feeds the sequence in chunks of the given lengths through a cache.

    The tokens are given in advance, not picked from the answers: one flipped near-tie would
    otherwise look like a large disagreement.
    """

    def run(subject: Subject, model: PreTrainedModel) -> Results:
        require_tokens(subject)
        if CACHE not in parameters(model):
            raise NotApplicable(f"takes no {CACHE}")
        arguments: dict[str, Any] = dict(subject.inputs)
        if make_mask and subject.pads_encoder:
            encoder_length = subject.inputs["input_ids"].shape[1]
            arguments["attention_mask"] = make_mask(encoder_length).flip(0)
        if subject.is_seq2seq:
            arguments["encoder_outputs"] = encoded_once(model, arguments)
        if make_cache:
            arguments[CACHE] = make_cache(subject, model)
        tokens = subject.inputs[subject.token_name]
        mask = (make_mask or full_mask)(sum(chunks))
        results: Results = {}
        start = 0
        for chunk in chunks:
            stop = start + chunk
            arguments[subject.token_name] = tokens[:, start:stop]
            if make_mask:
                arguments[subject.token_mask_name] = mask[:, :stop]
            output = call(model, arguments | cache_switch(model, True))
            if getattr(output, CACHE, None) is None:
                raise NotApplicable(f"returns no {CACHE}")
            for name, value in answers(output, subject, mask[:, start:stop]).items():
                results[f"{name} {start}:{stop}"] = value
            arguments[CACHE] = output[CACHE]
            start = stop
        return results

    return run


def restarting_positions(lengths: list[list[int]]) -> Tensor:
    """Position ids of packed rows, each given by the lengths of its sequences."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def packed(
    lengths: list[list[int]], with_mask: bool = False
) -> Callable[[Subject, PreTrainedModel], Results]:
    """One forward of rows that hold several sequences each, without a cache.

    With a mask, even one of ones alone, Transformers does not look for packing.
    """

    def run(subject: Subject, model: PreTrainedModel) -> Results:
        require_tokens(subject)
        if subject.is_seq2seq or "position_ids" not in parameters(model):
            raise NotApplicable("takes no position_ids")
        positions = restarting_positions(lengths)
        rows = len(positions)
        arguments: dict[str, Any] = {name: value[:rows] for name, value in subject.inputs.items()}
        arguments["position_ids"] = positions
        if with_mask:
            arguments["attention_mask"] = full_mask(LENGTH)[:rows]
        arguments |= cache_switch(model, False)
        return answers(call(model, arguments), subject, full_mask(LENGTH)[:rows])

    return run


def own_mask(
    as_argument: Callable[[Tensor], Tensor],
) -> Callable[[Subject, PreTrainedModel], Results]:
    def run(subject: Subject, model: PreTrainedModel) -> Results:
        mask = left_mask(LENGTH)
        arguments = with_masks(subject, model, left_mask)
        arguments[subject.token_mask_name] = as_argument(own_mask_4d(mask))
        return answers(call(model, arguments), subject, mask)

    return run


def gradients(subject: Subject, model: PreTrainedModel) -> Results:
    """The gradient of every parameter under a loss over real positions, with right padding.

    Without padding where outputs are not per token. A parameter without a gradient counts as zero.
    """
    try:
        arguments, mask = with_masks(subject, model, right_mask), right_mask(LENGTH)
        loss = random_loss(subject, model, arguments, mask)
    except NotApplicable:
        loss = random_loss(subject, model, dict(subject.inputs), None)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def random_loss(
    subject: Subject, model: PreTrainedModel, arguments: dict[str, Any], mask: Tensor | None
) -> Tensor:
    """The sum over all outputs of their mean under fixed random weights."""
    arguments = arguments | cache_switch(model, False)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        outputs = answers(call(model, arguments), subject, mask).values()
        terms = [
            (value * torch.randn(value.shape, generator=generator)).mean()
            for value in outputs
            if value.requires_grad
        ]
        if not terms:
            raise NotApplicable("no output depends on a parameter")
        return torch.stack(terms).sum()


GENERATION = [PROMPT] + [1] * DECODE_STEPS
TWO_CHUNKS = [PROMPT // 2, PROMPT - PROMPT // 2, 1]

SCENARIOS: dict[str, Scenario] = {
    "no_mask": Scenario(no_mask),
    "all_ones": Scenario(masked(full_mask)),
    "left_padding": Scenario(masked(left_mask)),
    "right_padding": Scenario(masked(right_mask)),
    "both_sides": Scenario(masked(both_sides_mask)),
    "holes": Scenario(masked(holes_mask)),
    "empty_row": Scenario(masked(empty_row_mask)),
    "dynamic_cache": Scenario(step_by_step(GENERATION)),
    "static_cache": Scenario(step_by_step(GENERATION, make_cache=fixed_cache)),
    "static_cache_no_mask": Scenario(
        step_by_step(GENERATION, make_mask=None, make_cache=fixed_cache)
    ),
    "chunked_prefill": Scenario(step_by_step(TWO_CHUNKS)),
    "packed": Scenario(packed([[7, 5, 8]])),
    "packed_rows": Scenario(packed([[7, 5, 8], [12, 8], [20]])),
    "packed_all_ones": Scenario(packed([[7, 5, 8]], with_mask=True)),
    "mask_4d_float": Scenario(own_mask(additive)),
    # Eager adds a boolean mask to the scores, so the reference is the mask that it means.
    "mask_4d_bool": Scenario(own_mask(lambda allowed: allowed), reference=own_mask(additive)),
    "graph_no_mask": Scenario(captured(no_mask), reference=no_mask),
    "graph_left_padding": Scenario(captured(masked(left_mask)), reference=masked(left_mask)),
    "backward": Scenario(gradients, tolerance=1e-3, common_scale=0.01),
}
