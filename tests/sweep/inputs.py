"""Inputs for any architecture: which kind a model takes is found out by trying, under eager."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .tiny import FIRST_ORDINARY_TOKEN, FIRST_SPECIAL_TOKEN, IMAGE, MEL_BINS, PATCH

BATCH = 3
LENGTH = 20
ENCODER_LENGTH = 24  # not LENGTH, so that cross-attention has q_len != kv_len
SAMPLES = 4000
FRAMES = 128

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class InputKind:
    """One kind of input: the parameters of forward that it needs, and how they are filled.

    Scenarios pad and cut the inputs of a kind `with_tokens`; other inputs stay as they are.
    """

    name: str
    needs: frozenset[str]
    make: Callable[[PreTrainedModel], Inputs]
    with_tokens: bool = False

    def suits(self, model: PreTrainedModel) -> bool:
        return self.needs <= parameters(model)


def parameters(model: PreTrainedModel) -> frozenset[str]:
    """The named parameters of a model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def token_ids(length: int = LENGTH, batch: int = BATCH, seed: int = 0) -> Tensor:
    """Ordinary tokens, no special ones: (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, length)
    return torch.randint(FIRST_ORDINARY_TOKEN, FIRST_SPECIAL_TOKEN, size, generator=generator)


def noise(*shape: int) -> Tensor:
    """Standard normal values, the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def boxes(length: int = LENGTH) -> Tensor:
    """Valid bounding boxes (x0 < x1, y0 < y1), one per token: (batch, length, 4)."""
    corner = token_ids(length).remainder(16)
    return torch.stack([corner, corner + 1, corner + 8, corner + 9], dim=-1)


def _text(model: PreTrainedModel) -> Inputs:
    if "decoder_input_ids" in parameters(model):
        return {"input_ids": token_ids(ENCODER_LENGTH, seed=1), "decoder_input_ids": token_ids()}
    return {"input_ids": token_ids()}


def _layout(model: PreTrainedModel) -> Inputs:
    inputs = _text(model)
    return inputs | {"bbox": boxes(inputs["input_ids"].shape[1])}


def _image(model: PreTrainedModel) -> Inputs:
    return {"pixel_values": noise(BATCH, 3, IMAGE, IMAGE)}


def _video(model: PreTrainedModel) -> Inputs:
    return {"pixel_values": noise(BATCH, 2, 3, IMAGE, IMAGE)}


def _clip(model: PreTrainedModel) -> Inputs:
    name = "pixel_values_videos"
    return {name: noise(BATCH, 2, 3, IMAGE, IMAGE)}


def _flat_patches(model: PreTrainedModel) -> Inputs:
    """Patches of two images in one row, as the vision tower of Qwen2-VL and its heirs take them."""
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
    config = model.config
    frames = getattr(config, "temporal_patch_size", None) or 1
    patch = getattr(config, "patch_size", PATCH)
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    values = noise(int(grids.prod(dim=1).sum()), channels * frames * patch * patch)
    name = "hidden_states" if "hidden_states" in parameters(model) else "pixel_values"
    return {name: values, "grid_thw": grids}


def _ragged_patches(model: PreTrainedModel) -> Inputs:
    """Patches of images of unequal size, padded to one length, as SigLIP 2 takes them."""
    shapes = torch.tensor([[4, 4], [2, 4], [3, 3]])
    area = shapes.prod(dim=1)
    mask = (torch.arange(16) < area[:, None]).long()
    values = noise(BATCH, 16, 3 * PATCH * PATCH)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _sound(model: PreTrainedModel) -> Inputs:
    return {"input_values": noise(BATCH, SAMPLES)}


def _channel(model: PreTrainedModel) -> Inputs:
    return {"input_values": noise(BATCH, 1, SAMPLES)}


def _mel_first(model: PreTrainedModel) -> Inputs:
    return {"input_features": noise(BATCH, MEL_BINS, FRAMES)}


def _mel_last(model: PreTrainedModel) -> Inputs:
    return {"input_features": noise(BATCH, FRAMES, MEL_BINS)}


def _and_text(make: Callable[[PreTrainedModel], Inputs]) -> Callable[[PreTrainedModel], Inputs]:
    def both(model: PreTrainedModel) -> Inputs:
        return _text(model) | make(model)

    return both


def _and_decoder(make: Callable[[PreTrainedModel], Inputs]) -> Callable[[PreTrainedModel], Inputs]:
    def both(model: PreTrainedModel) -> Inputs:
        return make(model) | {"decoder_input_ids": token_ids()}

    return both


def _kind(
    name: str, needs: str, make: Callable[[PreTrainedModel], Inputs], with_tokens: bool = False
) -> InputKind:
    return InputKind(name, frozenset(needs.split()), make, with_tokens)


# In the order in which they are tried; the first one that the model runs with is its kind.
INPUT_KINDS: tuple[InputKind, ...] = (
    _kind("text", "input_ids", _text, with_tokens=True),
    _kind("text with boxes", "input_ids bbox", _layout, with_tokens=True),
    _kind("ragged patches", "pixel_attention_mask spatial_shapes", _ragged_patches),
    _kind("flat patches", "grid_thw", _flat_patches),
    _kind("image", "pixel_values", _image),
    _kind("video", "pixel_values", _video),
    _kind("video", "pixel_values_videos", _clip),
    _kind("mel to text", "input_features decoder_input_ids", _and_decoder(_mel_first), True),
    _kind("mel to text", "input_features decoder_input_ids", _and_decoder(_mel_last), True),
    _kind("sound to text", "input_values decoder_input_ids", _and_decoder(_sound), True),
    _kind("sound", "input_values", _sound),
    _kind("sound with a channel", "input_values", _channel),
    _kind("mel", "input_features", _mel_first),
    _kind("mel", "input_features", _mel_last),
    _kind("text and image", "input_ids pixel_values", _and_text(_image), with_tokens=True),
    _kind("text and video", "input_ids pixel_values", _and_text(_video), with_tokens=True),
    _kind("text and video", "input_ids pixel_values_videos", _and_text(_clip), with_tokens=True),
    _kind(
        "text and patches", "input_ids spatial_shapes", _and_text(_ragged_patches), with_tokens=True
    ),
    _kind("text and mel", "input_ids input_features", _and_text(_mel_first), with_tokens=True),
)
