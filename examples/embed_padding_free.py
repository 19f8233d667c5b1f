"""An embedding job: thousands of sentences through all-MiniLM-L6-v2, padding-free on and off.

The text is the reference manual of Python that CPython itself ships for ``help()``
(``pydoc_data.topics``). Sentences stay in the order of the text, so that batches mix short and long
ones. The embeddings in float32 must be within 1e-5 of each other; exits with 1 if not. A CPU gets a
part of the sentences unless ``--limit 0`` asks for all of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from pydoc_data.topics import topics
from typing import Any

import smartattn
import torch

from compare import console, interleaved, pick_device
from local_models import load_minilm

TOLERANCE = 1e-5
#: What is shorter is a heading, what is longer a piece of grammar or code.
WORDS = range(4, 80)
#: Sentences that a CPU embeds in half a minute.
CPU_LIMIT = 512
#: Ends of sentences: the next one begins with a capital letter.
BOUNDARY = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")


def sentences() -> list[str]:
    """The distinct sentences of the manual, in its order."""
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for sentence in BOUNDARY.split(" ".join(paragraph.split())):
                if sentence[:1].isupper() and len(sentence.split()) in WORDS:
                    found[sentence] = None
    return list(found)


def batches(tokenizer: Any, texts: list[str], size: int, device: torch.device) -> list[Any]:
    """Tokenized, right-padded batches."""
    return [
        tokenizer(
            texts[start : start + size], padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        for start in range(0, len(texts), size)
    ]


def mean_of_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, hidden) means in float32 of (batch, length, hidden) states where the mask is 1.

    One product reads the states once and adds up in float32. Weights of 0 and 1 are exact in any
    dtype, so that the division comes last.
    """
    if states.is_cuda and states.dtype is not torch.float32:
        weights = mask[:, None].to(states.dtype)
        totals = torch.bmm(weights, states, out_dtype=torch.float32)
    else:
        totals = torch.bmm(mask[:, None].float(), states.float())
    return totals[:, 0] / mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def embed(model: Any, inputs: list[Any]) -> torch.Tensor:
    """(sentences, hidden) mean over the real tokens, of length 1, in float32."""
    parts = [
        mean_of_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
        for batch in inputs
    ]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def embed_padding_free(model: Any, inputs: list[Any]) -> torch.Tensor:
    """The same, with the padding taken out around the layers."""
    with smartattn.padding_free(model):
        return embed(model, inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--limit", type=int, help=f"so many sentences, 0 for all (default: {CPU_LIMIT} on a CPU)"
    )
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 1 on a CPU, else 5)")
    arguments = parser.parse_args()
    device = pick_device()
    on_cpu = device.type == "cpu"
    rounds = arguments.rounds or (1 if on_cpu else 5)
    limit = arguments.limit if arguments.limit is not None else CPU_LIMIT * on_cpu
    model, tokenizer = load_minilm("smart", device=device)
    texts = sentences()[: limit or None]
    agrees = True
    for dtype in (torch.float32,) if on_cpu else (torch.float32, torch.bfloat16):
        model.to(dtype)
        inputs = batches(tokenizer, texts, arguments.batch_size, device)
        real = sum(int(batch["attention_mask"].sum()) for batch in inputs)
        padded = sum(batch["attention_mask"].numel() for batch in inputs)
        name = str(dtype).removeprefix("torch.")
        console.print(
            f"{len(texts)} sentences, {len(inputs)} batches of {arguments.batch_size}, {real} "
            f"tokens, {1 - real / padded:.0%} padding, {device.type}, {name}"
        )
        with smartattn.trace() as trace:
            free = embed_padding_free(model, inputs)
        for row in trace.stacks:
            how = "without padding" if row.packed else "padded"
            console.print(f"  {row.calls} batches {how}: {row.reason}", markup=False)
        if dtype is torch.float32:
            error = (free - embed(model, inputs)).abs().max().item()
            agrees = error <= TOLERANCE  # False for NaN.
            console.print(f"  embeddings {'within' if agrees else 'OFF BY'} {error:.0e}")
        seconds = interleaved(
            {
                "off": lambda inputs=inputs: embed(model, inputs),
                "on": lambda inputs=inputs: embed_padding_free(model, inputs),
            },
            device,
            rounds,
            warm_up=not on_cpu,
        )
        off, on = seconds["off"], seconds["on"]
        console.print(f"  padding-free off {off:.2f} s, on {on:.2f} s: {off / on:.2f} times faster")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
