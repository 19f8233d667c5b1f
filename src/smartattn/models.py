"""A user's own model and batches for it: what ``smartattn verify`` and ``smartattn bench`` run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from .record import Trace
from .workload import Workload, as_padded

#: The implementations that are compared; the first one is what the others are held against.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "smart")
#: Bytes of the largest file of prompts.
MAX_PROMPTS = 4 * 1024 * 1024


class ModelError(ValueError):
    """Why a model or a batch cannot be used, in one line."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Batches to make. None stands for a default that suits the device or the model."""

    batch: int | None = None
    #: Tokens per row, padding included.
    seq_len: int | None = None
    #: Share of the tokens that are padding, 0 to below 1.
    padding: float = 0.3
    side: Literal["left", "right"] | None = None
    #: A text file with one prompt per line, instead of random tokens.
    prompts: Path | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward. ``real`` is (batch, length), True where a token is no padding."""

    inputs: dict[str, torch.Tensor]
    real: torch.Tensor

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.real.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens per row, padding included)."""
        rows, length = self.real.shape
        return rows, length


def shapes_in_words(shapes: Sequence[tuple[int, int]]) -> str:
    """The (rows, length) of batches, such as "8 x 1024" or "3 batches of 2 to 8 x 17 to 40"."""
    if not shapes:
        return "no batch"
    sizes = (
        f"{low}" if low == high else f"{low} to {high}"
        for low, high in ((min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True))
    )
    return f"{len(shapes)} batches of " * (len(shapes) > 1) + " x ".join(sizes)


def side_of(batches: Sequence[Batch]) -> str | None:
    """Where the padding of batches lies, "left" or "right"; None without any, or on both."""
    padded = [batch.real for batch in batches if not batch.real.all()]
    if not padded:
        return None
    if all(bool(real[:, -1].all()) for real in padded):
        return "left"
    return "right" if all(bool(real[:, 0].all()) for real in padded) else None


def load(
    name: str, gguf_file: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """A model in evaluation mode, under eager attention.

    Args:
        name: a folder, a .gguf file, or a name on the hub.
        gguf_file: a GGUF file in that folder.
        dtype: None is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ModelError: there is no such model, or it takes something else than token ids.
    """
    name, where = _located(name, gguf_file)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {**where, "dtype": dtype, "attn_implementation": "eager"}
    with _one_line(f"{name} cannot be loaded"):
        config = AutoConfig.from_pretrained(name, **where)
        architectures = getattr(config, "architectures", None) or [""]
        made_by: Any = getattr(transformers, architectures[0], None)
        if made_by is None:
            made_by = AutoModelForCausalLM if where else AutoModel
        model = made_by.from_pretrained(name, **options)
    if model.main_input_name != "input_ids":
        raise ModelError(f"{name} takes {model.main_input_name}; only token ids can be made here")
    return model.to(device).eval()


def load_tokenizer(name: str, gguf_file: str | None, model: Any) -> Any:
    """The tokenizer of a model, padding on the left where the model generates.

    Raises:
        ModelError: it has none.
    """
    name, where = _located(name, gguf_file)
    with _one_line(f"{name} has no tokenizer for --prompts"):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **where)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left" if _is_decoder(model) else "right"
    return tokenizer


def _located(name: str, gguf_file: str | None) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return str(path.parent), {"gguf_file": path.name}
    if gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        raise ModelError(f"there is no file {path / gguf_file}")
    if not path.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no folder {name}")
    return name, {} if gguf_file is None else {"gguf_file": gguf_file}


@contextmanager
def _one_line(complaint: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{complaint}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Kind and message of an error in one line of at most 200 characters."""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


# -- batches -------------------------------------------------------------------------------------


def batches(model: Any, shape: Shape, tokenizer: Any = None) -> list[Batch]:
    """What to run: tokenized prompts, or a single batch of random tokens.

    Raises:
        ModelError: sizes that cannot be, or a file of prompts that cannot be read.
    """
    if shape.prompts is not None:
        return list(_prompted(model, shape, tokenizer))
    return [_random(model, shape)]


def _prompted(model: Any, shape: Shape, tokenizer: Any) -> Iterator[Batch]:
    assert shape.prompts is not None
    with _one_line(f"{shape.prompts} cannot be read"):
        if shape.prompts.stat().st_size > MAX_PROMPTS:
            raise ModelError(f"{shape.prompts} is larger than {MAX_PROMPTS} bytes")
        text = shape.prompts.read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ModelError(f"{shape.prompts} holds no prompt; write one per line")
    longest = _limit(model, shape)
    size = shape.batch or min(len(lines), 32)
    for start in range(0, len(lines), size):
        encoded = tokenizer(
            lines[start : start + size],
            padding=True,
            truncation=longest is not None,
            max_length=longest,
            return_tensors="pt",
        )
        yield _batch(model, encoded["input_ids"], encoded["attention_mask"].bool())


def _limit(model: Any, shape: Shape) -> int | None:
    limit = _max_length(model)
    if shape.seq_len is None:
        return limit
    return shape.seq_len if limit is None else min(limit, shape.seq_len)


def _random(model: Any, shape: Shape) -> Batch:
    on_gpu = model.device.type == "cuda"
    limit = _max_length(model)
    rows = shape.batch or (8 if on_gpu else 4)
    length = shape.seq_len or min(1024 if on_gpu else 128, limit or 1 << 30)
    if rows < 1 or length < 1 or not 0 <= shape.padding < 1:
        raise ModelError(
            "batch and seq-len are at least 1, padding is a share from 0 to below 1, given "
            f"{rows}, {length} and {shape.padding}"
        )
    if limit is not None and length > limit:
        raise ModelError(f"the model takes {limit} tokens, given {length}")
    side = shape.side or ("left" if _is_decoder(model) else "right")
    workload = Workload(
        mode="forward",
        causal=True,
        side=side if shape.padding else "none",
        dtype="float32",
        batch=rows,
        q_len=length,
        kv_len=length,
        heads=1,
        kv_heads=1,
        head_dim=1,
        padding_share=shape.padding,
    )
    real = torch.from_numpy(as_padded(workload).real_keys().copy())
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    # Some models read the positions of the padding off the token ids.
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        ids = torch.where(real, torch.where(ids == pad, (ids + 1) % vocabulary, ids), pad)
    return _batch(model, ids, real)


def _batch(model: Any, ids: torch.Tensor, real: torch.Tensor) -> Batch:
    device = model.device
    ids, mask = ids.to(device), real.long().to(device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return Batch(inputs, real.to(device))


def _max_length(model: Any) -> int | None:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _is_decoder(model: Any) -> bool:
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


# -- running -------------------------------------------------------------------------------------


def set_implementation(model: Any, name: str) -> str | None:
    """Switches a model to an implementation; why that cannot be done, or None."""
    if name == "flash_attention_2" and model.device.type != "cuda":
        return f"runs on cuda, the model is on {model.device.type}"
    try:
        model.set_attn_implementation(name)
    except Exception as error:
        # ImportError, ValueError, or what an incompatible build raises.
        return one_line(error)
    given = getattr(model.config, "_attn_implementation", name)
    if given != name:
        return f"Transformers gave the model {given} instead"
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is model.config or not isinstance(config, PreTrainedConfig):
            continue
        # The stacks of T5 have copies, which Transformers 5.17 leaves as they were.
        if config.model_type == model.config.model_type:
            config._attn_implementation_internal = name
    return None


def forward(model: Any, batch: Batch, *, hidden_states: bool = False) -> Any:
    """One forward of the stack of layers, without the head and without a cache."""
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    if not model.config.is_encoder_decoder and _is_decoder(model):
        options["use_cache"] = False
    # The logits would be most of the memory and little of the time.
    with torch.no_grad():
        return model.base_model(**batch.inputs, **options)


def output_of(result: Any) -> torch.Tensor:
    """(batch, length, size) states of the last layer; logits of models that show no others."""
    output: torch.Tensor = (
        result.last_hidden_state if "last_hidden_state" in result else result.logits
    )
    return output


def generate(model: Any, batch: Batch, new_tokens: int) -> torch.Tensor:
    """(batch, new_tokens) token ids that a model adds, greedily and exactly that many."""
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    pad = model.generation_config.pad_token_id
    with torch.no_grad():
        tokens: torch.Tensor = model.generate(
            **inputs,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
        )
    return tokens[:, -new_tokens:]


def count_calls(recorded: Trace, counts: dict[str, int]) -> None:
    """Adds the calls of a trace to the calls by backend."""
    for row in recorded.rows:
        counts[row.backend] = counts.get(row.backend, 0) + row.calls


def relative(difference: float, scale: float) -> float:
    """A difference relative to the largest expected value; inf for NaN."""
    value = difference / max(scale, torch.finfo(torch.float32).tiny)
    return value if not math.isnan(value) else math.inf
