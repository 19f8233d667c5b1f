"""The benchmark of embedding jobs: all ways embed the same, and those that cannot run say why."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from . import real_models

pytestmark = pytest.mark.skipif(
    real_models.missing() is not None, reason=real_models.missing() or "installed"
)

if real_models.missing() is None:
    from benchmarks import embeddings

CPU = torch.device("cpu")
OURS = ("sdpa", "smart", "smart + padding_free", "smart + padding_free, always")
needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers"
)


def test_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--tiny", "--rounds", "2", "--json", str(figures)]
    assert embeddings.main(arguments) == 0
    out = capsys.readouterr().out
    (result,) = json.loads(figures.read_text())["results"]
    assert result["sentences"] == 32
    assert 0.05 < result["padding"] < 0.9
    assert result["median_s"].keys() >= set(OURS)
    assert min(result["cosine"].values()) > 1 - 1e-6
    # Without a GPU neither of these can run, in a sentence each.
    for name in ("flash_attention_2", embeddings.UNPADDING):
        assert f"{name} did not run: {result['failed'][name]}" in out
    header, _, row = out[out.rindex("| encoder") :].splitlines()[:3]
    assert header.count("|") == row.count("|")
    assert "tiny-bert float32, batches of 8" in row


def test_the_sentences_are_those_of_the_issue() -> None:
    assert len(embeddings.sentences()) >= 2000


@needs_sentence_transformers
def test_the_unpadding_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with "smart" in the place of flash_attention_2: it takes cu_seq_lens_q as well."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    monkeypatch.setattr(Transformer, "_is_flash_attention_requested", lambda self: True)
    monkeypatch.setattr(
        transformers.modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda name: ((None, print, None, None), None),
    )
    monkeypatch.setitem(embeddings._IMPLEMENTATIONS, embeddings.UNPADDING, "smart")
    model = embeddings.build("tiny-bert", CPU, torch.float32)
    widths: list[int] = []
    model.encoder.register_forward_hook(
        lambda module, args, output: widths.append(output[0].shape[0] * output[0].shape[1])
    )
    texts = embeddings.sentences()[:20]
    result = embeddings.Result("tiny-bert", "float32", 8)
    embeddings.measure(result, model, texts, CPU, rounds=1, seconds=0.0)
    assert embeddings.UNPADDING not in result.failed
    assert result.cosine[embeddings.UNPADDING] > 1 - 1e-6
    assert result.over(embeddings.UNPADDING) is not None
    run, tokens = embeddings.unpadding(model, texts, 8, CPU)
    model.set_attn_implementation("smart")
    widths.clear()
    assert run().shape == (20, 64)
    assert sum(widths) == tokens == result.tokens


@needs_sentence_transformers
def test_unpadding_is_not_taken_for_granted() -> None:
    model = embeddings.build("tiny-bert", CPU, torch.float32)
    with pytest.raises(ValueError, match="does not unpad this model here"):
        embeddings.unpadding(model, ["a sentence"], 8, CPU)


def test_without_sentence_transformers_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "sentence_transformers" else find(name, *more),
    )
    model = embeddings.build("tiny-bert", CPU, torch.float32)
    result = embeddings.Result("tiny-bert", "float32", 8)
    monkeypatch.setitem(embeddings._IMPLEMENTATIONS, embeddings.UNPADDING, "sdpa")
    embeddings.measure(result, model, embeddings.sentences()[:8], CPU, rounds=1, seconds=0.0)
    assert "sentence-transformers is not installed" in result.failed[embeddings.UNPADDING]
    assert result.median_s.keys() == set(OURS)


def test_without_the_tokenizer_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert embeddings.main(["--tiny", "--device", "cpu"]) == 2
    assert "pip install" in capsys.readouterr().out
