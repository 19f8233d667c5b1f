"""Text generation from a left-padded batch of unequal prompts with SmolLM2-135M-Instruct.

Greedy tokens in float32 must be those of eager attention; exits with 1 if they are not.
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
from local_models import load_smollm2

PROMPTS = [
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Here is a note: the meeting moves from Monday to Thursday, the room stays the same, Ann "
    "brings the figures for the third quarter and Tom the plan for the next one. When is it?",
    "Write one sentence about the moon.",
]
NEW_TOKENS = 16


def prompts(tokenizer: Any, device: torch.device) -> Any:
    """The prompts as chats, padded on the left to one length."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return batch.to(device)


def generate(model: Any, batch: Any, attn_implementation: str) -> torch.Tensor:
    """(batch, NEW_TOKENS) greedy continuations."""
    model.set_attn_implementation(attn_implementation)
    tokens: torch.Tensor = model.generate(
        **batch, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
    )
    return tokens[:, batch["input_ids"].shape[1] :]


def compare(model: Any, tokenizer: Any, rounds: int | None = None) -> tuple[Result, list[str]]:
    """The comparison, and the continuations as text. Tokens are compared in float32 alone."""
    device, dtype = model.device, model.dtype
    batch = prompts(tokenizer, device)
    with smartattn.trace() as trace:
        tokens = generate(model, batch, "smart")
    agrees, agreement = True, ""
    if dtype is torch.float32:
        agrees = torch.equal(tokens, generate(model, batch, "eager"))
        agreement = "tokens equal" if agrees else "TOKENS DIFFER"
    seconds = interleaved(
        {name: lambda name=name: generate(model, batch, name) for name in ("sdpa", "smart")},
        device,
        rounds or 3,
    )
    result = Result("SmolLM2 generate", device, dtype, agreement, agrees, seconds, trace)
    return result, tokenizer.batch_decode(tokens, skip_special_tokens=True)


def main() -> int:
    rounds, device = parse_rounds(), pick_device()
    model, tokenizer = load_smollm2("smart", device=device)
    result, texts = compare(model, tokenizer, rounds)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        console.print(f"> {prompt}\n{text.strip()}\n", markup=False)
    results = [result]
    if device.type == "cuda":
        results.append(compare(model.to(torch.bfloat16), tokenizer, rounds)[0])
    console.print(results_table(results))
    console.print(choices_table(results))
    return 0 if all(result.agrees for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
