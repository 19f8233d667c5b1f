"""What smart and padding_free add to a forward that waits for the host, beside sdpa.

Run from the repository's root: ``python -m benchmarks.forwards``. A BERT of 24 narrow layers runs
in interleaved rounds; on a CPU its arithmetic is next to nothing, and one thread does it. The
batches without padding share their plan, the padded ones have one each.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections import defaultdict

import torch
from transformers import BertConfig, BertModel

import smartattn

from . import common

LAYERS, WIDTH, LENGTH, ROUNDS = 24, 32, 16, 300
WAYS = ("sdpa", "smart", "smart + padding_free")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        vocab_size=100,
    )
    model = BertModel(config).eval().to(device)
    ids = torch.randint(1, 100, (2, LENGTH), device=device)
    full = torch.ones_like(ids)
    padded = full.clone()
    padded[0, LENGTH // 2 :] = 0
    rows = []
    for name, mask in (("no padding", full), ("padded", padded)):

        def forward(mask: torch.Tensor = mask) -> None:
            model(input_ids=ids, attention_mask=mask)

        times: dict[str, list[float]] = defaultdict(list)
        with torch.no_grad():
            for _ in range(rounds):
                for way in WAYS:
                    model.set_attn_implementation("sdpa" if way == "sdpa" else "smart")
                    with contextlib.ExitStack() as stack:
                        if way == WAYS[-1]:
                            stack.enter_context(smartattn.padding_free(model))
                        forward()
                        times[way].append(common.timed(forward, device)[0])
        medians = {way: statistics.median(found) for way, found in times.items()}
        beyond = (1e3 * (medians[way] - medians["sdpa"]) for way in WAYS[1:])
        rows.append((name, f"{medians['sdpa']:.2f}", *(f"{us:+.0f}" for us in beyond)))
    header = ("batch", "sdpa, ms", *(f"{way}: µs more" for way in WAYS[1:]))
    print(f"{device.type}, {LAYERS} layers, {rounds} rounds\n")
    print(common.markdown(header, rows))


if __name__ == "__main__":
    main()
