"""Sentence embeddings from a right-padded batch with all-MiniLM-L6-v2.

Embeddings in float32 must be within 1e-5 of those of eager attention; exits with 1 if not.
"""

from __future__ import annotations

import sys
from typing import Any

import smartattn
import torch

from compare import (
    Result,
    choices_table,
    console,
    interleaved,
    parse_rounds,
    pick_device,
    results_table,
)
from local_models import load_minilm

TOLERANCE = 1e-5
SHORT = [
    "The cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "Interest rates rose again in March.",
    "How do I reset my password?",
]
LONG = (
    "The committee met on Thursday to review the plan for the harbour. Members asked for a second "
    "estimate of the cost, for a survey of the sea bed, and for a report on what the work would "
    "mean for the fishing boats that use the eastern quay in winter. "
)
SENTENCES = [*SHORT * 2, *(LONG * times for times in (1, 2, 3))]


@torch.no_grad()
def embed(model: Any, batch: Any, attn_implementation: str) -> torch.Tensor:
    """(sentences, hidden) mean over the real tokens, of length 1."""
    model.set_attn_implementation(attn_implementation)
    states = model(**batch).last_hidden_state.float()
    # The mask is 0 at padding: what a model outputs there does not count.
    weights = batch["attention_mask"][:, :, None]
    mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


def compare(model: Any, tokenizer: Any, rounds: int | None = None) -> tuple[Result, torch.Tensor]:
    """The comparison, and the embeddings. They are compared in float32 alone."""
    device, dtype = model.device, model.dtype
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device)
    with smartattn.trace() as trace:
        embeddings = embed(model, batch, "smart")
    agrees, agreement = True, ""
    if dtype is torch.float32:
        error = (embeddings - embed(model, batch, "eager")).abs().max().item()
        agrees = error <= TOLERANCE  # False for NaN.
        agreement = f"within {error:.0e}" if agrees else f"OFF BY {error:.0e}"
    seconds = interleaved(
        {name: lambda name=name: embed(model, batch, name) for name in ("sdpa", "smart")},
        device,
        rounds or 5,
    )
    return Result("MiniLM embed", device, dtype, agreement, agrees, seconds, trace), embeddings


def main() -> int:
    rounds, device = parse_rounds(), pick_device()
    model, tokenizer = load_minilm("smart", device=device)
    result, embeddings = compare(model, tokenizer, rounds)
    similarity = embeddings[: len(SHORT)] @ embeddings[: len(SHORT)].T
    for sentence, row in zip(SHORT, similarity.tolist(), strict=True):
        console.print(f"{'  '.join(f'{value:5.2f}' for value in row)}  {sentence}", markup=False)
    results = [result]
    if device.type == "cuda":
        results.append(compare(model.to(torch.bfloat16), tokenizer, rounds)[0])
    console.print(results_table(results))
    console.print(choices_table(results))
    return 0 if all(result.agrees for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
