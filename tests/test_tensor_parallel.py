"""Two processes that share a model: every rank makes the same choices, and gets what one gets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from .agreement import MASKS, WIDTH
from .tiny_models import tiny_model, token_ids

#: Under a profile by which packing pays, and by which its layers would wait for any host.
_RANK = """
    import sys, torch, torch.distributed as dist
    from transformers import AutoModelForCausalLM
    import smartattn
    from smartattn import padding_free, stack_choice
    from smartattn.profile import Profile
    from smartattn.stack_host import LayerTimes
    from smartattn.stack_rule import StackRule, StackWhen

    folder, rank = sys.argv[1], int(sys.argv[2])
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rule = StackRule(when=StackWhen(), pack=True, because="a test")
    rates = LayerTimes(encoder=1e-6, decoder=1e-6)
    profile = Profile(name="made up", padding_free=(rule,), layers=rates)
    stack_choice.profile_for = lambda device: profile
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", attn_implementation="smart", dtype=torch.bfloat16
    ).eval()
    inputs = torch.load(f"{folder}/inputs.pt")
    found, packed = [], []
    with torch.no_grad(), padding_free(model):
        for _ in range(5):
            with smartattn.trace() as trace:
                logits = model(**inputs).logits
            found.append(logits.full_tensor() if hasattr(logits, "full_tensor") else logits)
            packed += [row.packed for row in trace.stacks]
    torch.save((found, packed), f"{folder}/found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_that_share_a_model_agree(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    mask = MASKS["left"]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = model(**inputs).logits.float()
    words = [sys.executable, "-c", textwrap.dedent(_RANK), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [*words, str(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    every: list[Any] = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for found, packed in every:
        assert packed == [True] * 5
        for logits in found:
            difference = (logits[mask.bool()].float() - expected[mask.bool()]).norm()
            assert difference <= 0.02 * expected[mask.bool()].norm()
