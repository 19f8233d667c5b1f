"""What ``make demo`` runs: both real models under "smart", checked against eager attention.

Exits with 1 if a token or an embedding differs. On CUDA the times are measured in bfloat16 too.
"""

from __future__ import annotations

import platform
import sys

import smartattn
import torch
import transformers
from smartattn.profiles import profile_for

import embed_minilm
import generate_smollm2
from compare import choices_table, console, parse_rounds, pick_device, results_table
from local_models import load_minilm, load_smollm2


def main() -> int:
    rounds, device = parse_rounds(), pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    console.print(
        f"smartattn {smartattn.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, python {platform.python_version()}\n"
        f"device: {device.type} ({name}), profile: {profile_for(device).name}",
        markup=False,
    )
    results = []
    for title, load, compare in (
        ("all-MiniLM-L6-v2", load_minilm, embed_minilm.compare),
        ("SmolLM2-135M-Instruct", load_smollm2, generate_smollm2.compare),
    ):
        console.print(f"\nloading {title} ...")
        model, tokenizer = load("smart", device=device)
        console.print("comparing and timing ...")
        result, output = compare(model, tokenizer, rounds)
        results.append(result)
        if isinstance(output, list):
            for prompt, text in zip(generate_smollm2.PROMPTS, output, strict=True):
                console.print(f"> {prompt}\n{text.strip()}", markup=False)
        if device.type == "cuda":
            results.append(compare(model.to(torch.bfloat16), tokenizer, rounds)[0])
    console.print()
    console.print(results_table(results))
    console.print(choices_table(results))
    disagree = [result.workload for result in results if not result.agrees]
    if disagree:
        console.print(f"NOT EQUAL to eager attention: {', '.join(disagree)}")
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())
