"""The examples run, the drop-in is two lines, and what the README shows works."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

import smartattn
from smartattn import cli, packing
from smartattn.backends import base
from smartattn.call import Call
from smartattn.integration import smart_attention
from smartattn.plan import Pattern, Plan
from smartattn.profile import load
from smartattn.profiles import shipped_profiles

from . import real_models

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()

needs_models = pytest.mark.skipif(
    real_models.missing() is not None, reason=real_models.missing() or "installed"
)
#: The models that tests share are on the CPU.
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the demo covers CUDA")
#: Reading SmolLM2 and generating takes a minute on one core, more beside other tests.
slow_start = pytest.mark.timeout(900)
#: Only one worker reads it.
shares_smollm2 = pytest.mark.xdist_group("smollm2")


def run(*arguments: object) -> str:
    """Standard output of ``python arguments`` in the repo's root; it must succeed."""
    source = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "src")]))
    environment = os.environ | {"PYTHONPATH": source, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_main(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of the ``main`` of an example, on the models that tests share."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        for loader in ("minilm", "smollm2"):
            cached = getattr(real_models, loader)
            patch.setattr(module, f"load_{loader}", lambda *_, c=cached, **__: c(), raising=False)
        code: int = module.main()
    return code, capsys.readouterr().out


@needs_models
@slow_start
@pytest.mark.slow
def test_demo_agrees_with_eager_and_ends_with_the_choices() -> None:
    output = run(EXAMPLES / "demo.py", "--rounds", 1)
    assert "MiniLM embed" in output
    assert "tokens equal" in output
    assert "within" in output
    assert "Paris" in output
    assert "what smart chose" in output.split("smart against sdpa")[1]


@needs_models
@slow_start
@shares_smollm2
@on_cpu
def test_generation_compares_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_smollm2 = importlib.import_module("generate_smollm2")
    monkeypatch.setattr(generate_smollm2, "NEW_TOKENS", 3)
    code, output = run_main("generate_smollm2", capsys, "--rounds", "1")
    assert code == 0
    assert "tokens equal" in output
    assert "what smart chose" in output


@needs_models
@on_cpu
def test_embedding_job_is_the_same_without_padding(capsys: pytest.CaptureFixture[str]) -> None:
    embed_padding_free = importlib.import_module("embed_padding_free")
    assert len(set(embed_padding_free.sentences())) >= 2000
    real_models.minilm()[0].set_attn_implementation("smart")
    arguments = ("--limit", "24", "--batch-size", "8")
    code, output = run_main("embed_padding_free", capsys, *arguments)
    assert code == 0
    assert "24 sentences, 3 batches of 8" in output
    assert "3 batches without padding" in output
    assert "embeddings within" in output


@needs_models
@on_cpu
def test_an_embedding_job_that_differs_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_padding_free = importlib.import_module("embed_padding_free")
    real_models.minilm()[0].set_attn_implementation("smart")
    right = embed_padding_free.embed_padding_free
    monkeypatch.setattr(
        embed_padding_free, "embed_padding_free", lambda *inputs: right(*inputs) + 1e-4
    )
    code, output = run_main("embed_padding_free", capsys, "--limit", "8")
    assert code == 1
    assert "OFF BY" in output


@needs_models
@on_cpu
def test_embedding_ranks_alike_sentences_and_prints_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, output = run_main("embed_minilm", capsys, "--rounds", "1")
    assert code == 0
    cat, kitten, rates = (line.split()[:4] for line in output.splitlines()[:3])
    assert float(cat[1]) > 0.5 > float(cat[2])
    assert float(kitten[0]) > 0.5 > float(rates[0])
    assert "what smart chose" in output


@needs_models
@on_cpu
@pytest.mark.parametrize(
    ("name", "words"), [("embed_minilm", "OFF BY"), ("generate_smollm2", "TOKENS DIFFER")]
)
@slow_start
@shares_smollm2
def test_examples_fail_if_attention_is_wrong(
    name: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> Any:
        output, weights = smart_attention(*arguments, **keywords)
        return output.roll(1, dims=0), weights

    monkeypatch.setattr(importlib.import_module("generate_smollm2"), "NEW_TOKENS", 3)
    transformers.AttentionInterface.register("smart", wrong)
    try:
        code, output = run_main(name, capsys, "--rounds", "1")
    finally:
        smartattn.register()
    assert code == 1
    assert words in output


def test_drop_in_is_two_added_lines() -> None:
    before, after = (
        (EXAMPLES / "drop_in" / name).read_text().splitlines() for name in ("before.py", "after.py")
    )
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert changes == ["+ import smartattn", '+         attn_implementation="smart",']


@needs_models
@pytest.mark.slow
def test_drop_in_ranks_as_before() -> None:
    before, after = (
        run(EXAMPLES / "drop_in" / name).splitlines() for name in ("before.py", "after.py")
    )
    assert before[:-1] == after[:-1]
    assert "ferry" in after[0]


@needs_models
def test_drop_in_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "drop_in")
    code, output = run_main("side_by_side", capsys)
    assert code == 0
    assert '+        attn_implementation="smart",' in output
    assert re.search(r"before \(sdpa\): .* ms\nafter \(smart\): .* ms\n", output)
    assert "backend" in output


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_of_the_examples_cut_nothing_off(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = importlib.import_module("compare")
    facts = {"batch": 4, "q_len": 1, "pattern": "bidirectional", "padding": "right"}
    rows = [
        smartattn.TraceRow(
            facts={**facts, "kv_len": length, "padding_share": 0.3},
            heads=2,
            kv_heads=2,
            head_dim=64,
            dtype="bfloat16",
            grad=False,
            backend="flash_attention_2",
            reason="fastest by profile nvidia-h200: 31.6 us predicted",
            refused={},
            predicted_us={},
            calls=30,
        )
        for length in (71, 85)
    ]
    cpu, seconds = torch.device("cpu"), {"sdpa": 1.0, "smart": 1.0}
    result = compare.Result(
        "SmolLM2 generate", cpu, torch.bfloat16, "tokens equal", True, seconds,
        types.SimpleNamespace(rows=rows),
    )  # fmt: skip
    console = Console(width=width)
    monkeypatch.setattr(compare, "console", console)
    console.print(compare.results_table([result]))
    console.print(compare.choices_table([result]))
    output = capsys.readouterr().out
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= width
    if width >= 80:
        assert "flash_attention_2" in output
        assert "71-85" in output


# -- README ----------------------------------------------------------------------------------------


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


#: What the README's code takes for granted: a model's name and a tokenized batch.
PRELUDE = """
import sys

sys.path.insert(0, "examples")
from local_models import find_minilm
from transformers import AutoTokenizer

name = str(find_minilm())
texts = ["A short text.", "A text that is somewhat longer than the one before it."]
batch = AutoTokenizer.from_pretrained(name)(texts, padding=True, return_tensors="pt")
"""


def test_commands_in_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line.split("#")[0].split() for line in lines if line.split("#")[0].strip()]
    targets = {words[1] for words in commands if words[0] == "make"}
    assert targets >= {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    own = [words for words in commands if words[0] == "smartattn"]
    assert own
    for _, subcommand, *arguments in own:
        assert cli.run([subcommand, "--help"]) == 0
        described = capsys.readouterr().out
        for option in (word for word in arguments if word.startswith("--")):
            assert option in described


def test_the_recipe_for_a_backend_fits_the_contract() -> None:
    (code,) = blocks("py", (ROOT / "CONTRIBUTING.md").read_text())
    names = {**vars(base), "varlen_refusals": packing.varlen_refusals}
    exec("from __future__ import annotations\n" + code, names)
    backend = names["MyBackend"]()
    plan = Plan(2, 4, 4, Pattern.CAUSAL, torch.device("cpu"))
    call = Call(torch.device("cpu"), torch.float32, 2, 4, 4, 2, 2, 8, 8)
    assert len(backend.refusals(plan, call)) == 2  # The device and the dtype.
    assert callable(backend.bind(plan, call))


def test_figures_in_the_readme_are_those_of_the_reports() -> None:
    reports = ROOT / "docs/reports/h200"
    models = json.loads((reports / "models.json").read_text())["results"]
    names = ("sdpa", "flash_attention_2", "smart")
    measured = set()
    for one in models:
        cells = (f"{one['median_ms'][name]:.2f}" for name in names)
        measured.add(f"| {one['workload']} | {' | '.join(cells)} |")
    table = README.split("<!-- models-table -->")[1].split("<!-- /models-table -->")[0]
    lines = table.strip().splitlines()[2:]
    assert len(lines) >= 8
    assert set(lines) <= measured
    found = (reports / "gpu.md").read_text()
    smart, sdpa = re.search(
        r"smart ([\d.]+) us, Transformers' `sdpa_attention_forward` ([\d.]+) us", found
    ).groups()
    assert f"µs | {float(smart):.1f} | {float(sdpa):.1f} | - |" in README


def test_means_in_the_readme_are_those_of_the_reports() -> None:
    table = README.split("<!-- means-table -->")[1].split("<!-- /means-table -->")[0]
    lines = table.strip().splitlines()[2:]
    files = ("models", "models_flash_attn_alone", "models_without_flash_attn")
    assert len(lines) == len(files)
    for line, file in zip(lines, files, strict=True):
        results = json.loads((ROOT / f"docs/reports/h200/{file}.json").read_text())["results"]
        ratios = {}
        for one in results:
            others = [ms for name, ms in one["median_ms"].items() if name != "smart"]
            ratios[one["workload"]] = one["median_ms"]["smart"] / min(others)
        is_padded = {name: "pad" in name or "stream" in name for name in ratios}
        padded = [ratio for name, ratio in ratios.items() if is_padded[name]]
        unpadded = [ratio for name, ratio in ratios.items() if not is_padded[name]]
        worst = max(ratios, key=lambda name: ratios[name])
        means = [
            f"{statistics.geometric_mean(part):.2f}" if part else "-"
            for part in (list(ratios.values()), padded, unpadded)
        ]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:] == [str(len(ratios)), *means, f"{ratios[worst]:.2f}, {worst}"]
        said = re.search(r"No workload here takes more than ([\d.]+) times as long", README)
        assert said is not None
        assert ratios[worst] <= float(said[1])


def test_what_the_readme_says_of_padding_free_is_in_the_report() -> None:
    report = json.loads((ROOT / "docs/reports/h200/padding_free.json").read_text())["results"]
    found = {}
    for one in report:
        ms = one["median_ms"]
        better = min(ms["sdpa"], ms["flash_attention_2"])
        found[one["workload"]] = better / ms["smart + padding_free"]
    packed = [found[one["workload"]] for one in report if one["packed"]]
    said = re.search(r"are ([\d.]+) to ([\d.]+) times as\s+fast as the better", README)
    assert said is not None
    assert said.groups() == (f"{min(packed):.1f}", f"{max(packed):.1f}")
    (small,) = [one["median_ms"] for one in report if "8x128 pad" in one["workload"]]
    share = small["smart + padding_free"] / small["smart"]
    said = f"8 x 128 tokens took {share:.2f} of its time without them on an H200"
    minilm = seconds("embeddings", "minilm")
    said += f", MiniLM on 64 sentences {minilm['smart + padding_free'] / minilm['smart']:.2f},"
    assert said in " ".join(README.split())
    slow = seconds("embeddings_slow_host", "bert-large")
    said = f"BERT-large takes {slow['smart'] / slow['sdpa']:.2f} times as long on batches of 64"
    assert said in " ".join(README.split())


def seconds(report: str, encoder: str) -> dict[str, float]:
    """Of an encoder on batches of 64 sentences, by way."""
    results = json.loads((ROOT / f"docs/reports/h200/{report}.json").read_text())["results"]
    (found,) = (r for r in results if r["encoder"] == encoder and r["batch_size"] == 64)
    return found["median_s"]


def test_generations_that_were_timed_more_than_once_are_told_with_all() -> None:
    said = " ".join(README.split())
    turns = taken("models", "generate 8x512")
    assert f"`llama-1b generate 8x512` took {turns:.2f} in turns of one token" in said
    whole = taken("models_generations_again", "generate 8x512")
    assert f"[{whole:.2f}](docs/reports/h200/models_generations_again.json)" in said
    turns, whole = (
        taken(f"models{file}", "8x8192 pad50%") for file in ("", "_generations_earlier")
    )
    assert f"8x8192 took {turns:.2f} in turns" in said
    assert f"[{whole:.2f}](docs/reports/h200/models_generations_earlier.json)" in said


def taken(report: str, workload: str) -> float:
    """The time of ``smart`` over that of the better of the two others."""
    results = json.loads((ROOT / f"docs/reports/h200/{report}.json").read_text())["results"]
    (one,) = (r for r in results if workload in r["workload"])
    others = [ms for name, ms in one["median_ms"].items() if name != "smart"]
    return float(one["median_ms"]["smart"] / min(others))


def test_the_shipped_times_of_layers_are_those_of_the_report() -> None:
    layers = load(shipped_profiles() / "nvidia-h200.json").layers
    assert layers is not None
    report = json.loads((ROOT / "docs/reports/h200/padding_free.json").read_text())["results"]
    (ms,) = (r["median_ms"]["smart"] for r in report if "bert-large forward 128x" in r["workload"])
    us = layers.forward_us(False, 128, 512, 1024 * 24, 12.0 * 1024**2 * 24)
    assert us == pytest.approx(1e3 * ms, rel=0.15)


def test_files_named_in_the_documents_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"
