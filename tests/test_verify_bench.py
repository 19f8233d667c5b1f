"""``smartattn verify`` and ``smartattn bench`` on small models from disk."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

import smartattn
from smartattn import bench, cli, cli_models, models, verify
from smartattn.backends.sdpa import SdpaBackend
from smartattn.call import Call, Runner
from smartattn.plan import Plan

from . import real_models
from .tiny_models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def save(name: str) -> Path:
        path = tmp_path / name
        tiny_model(name).save_pretrained(path)
        return path

    return save


def wrong_at(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Smart gets another output from SDPA."""
    right = SdpaBackend.bind

    def bind(self: Any, plan: Plan, call: Call) -> Runner:
        run = right(self, plan, call)

        def altered(q: Any, k: Any, v: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
            return change(run(q, k, v, arguments), plan)

        return altered

    monkeypatch.setattr(SdpaBackend, "bind", bind)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma3"])
def test_verify_agrees_per_layer(name: str, folder: Any, capsys: Any) -> None:
    arguments = ["verify", str(folder(name)), "--batch", "3", "--seq-len", "20", "--per-layer"]
    assert cli.run([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "smart agrees with eager" in out
    assert "smart ran sdpa in " in out
    assert "layer 1" in out
    assert "flash_attention_2 did not run: runs on cuda, the model is on cpu" in out
    assert out.startswith("3 x 20: ")
    assert "(largest relative to the largest eager value at real positions)" in out
    assert cli.run([*arguments, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is True
    assert found["shapes"] == [[3, 20]]
    assert found["real_tokens"] + found["padding_tokens"] == 60
    assert found["padding_tokens"] > 0
    by_name = {entry["implementation"]: entry for entry in found["comparisons"]}
    # The embeddings, two layers, and the output.
    assert [layer["index"] for layer in by_name["smart"]["layers"]] == [0, 1, 2, None]
    assert by_name["smart"]["layers"][0]["real"]["largest"] == 0.0
    assert sum(by_name["smart"]["ran"].values()) >= 2
    assert by_name["sdpa"]["ran"] == {}
    assert by_name["smart"]["layers"][0]["real"]["scale"] > 0.0


def test_switching_reaches_copies_of_the_configuration() -> None:
    model = tiny_model("t5")
    model.encoder.config = copy.deepcopy(model.encoder.config)
    layer = model.encoder.block[0].layer[0].SelfAttention
    layer.config = model.encoder.config
    for name in ("eager", "smart"):
        # As Transformers 5.17 does with them.
        model.set_attn_implementation = lambda name: setattr(
            model.config, "_attn_implementation_internal", name
        )
        assert models.set_implementation(model, name) is None
        assert layer.config._attn_implementation == name
        assert model.decoder.config._attn_implementation == name


def test_verify_tells_real_from_padding(folder: Any) -> None:
    """Where tokens are packed the output at padding positions is another, and only there."""
    model = models.load(str(folder("bert")), None, CPU)
    batches = models.batches(model, models.Shape(3, 20, 0.5))
    with smartattn.use(backends="sdpa_unpadded"):
        found = verify.verify(model, batches)
    assert found.agrees
    assert found.comparisons[-1].ran == {"sdpa_unpadded": 2}
    smart = found.comparisons[-1].output
    assert smart is not None
    assert smart.padding is not None
    assert smart.real.relative < 1e-5
    assert smart.padding.relative > 1e-2
    assert 0 < smart.padding.mean < smart.padding.largest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda out, plan: out * 1.1, "differs by"),
        (lambda out, plan: out * float("nan"), "not finite"),
    ],
)
def test_verify_finds_a_wrong_backend(
    change: Any, says: str, folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wrong_at(monkeypatch, change)
    arguments = ["verify", str(folder("llama")), "--device", "cpu", "--seq-len", "16"]
    assert cli.run(arguments) == 1
    out = capsys.readouterr().out
    assert "does not agree" in out
    assert says in out


def test_verify_without_padding(folder: Any, capsys: Any) -> None:
    arguments = ["verify", str(folder("llama")), "--device", "cpu", "--padding", "0"]
    assert cli.run(arguments) == 0
    assert "no padding" in capsys.readouterr().out


def test_bench_times_all_and_says_what_was_chosen(folder: Any, capsys: Any) -> None:
    arguments = ["bench", str(folder("llama")), "--batch", "2", "--seq-len", "16", "--rounds", "3"]
    arguments += ["--device", "cpu"]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    for name in models.IMPLEMENTATIONS:
        assert name in out
    assert out.startswith("forward of the layers alone (no cache, no logits), 2 x 16: ")
    assert "smart ran sdpa in 2 calls" in out
    said = (
        "padding_free packed nothing: its row is smart's once more; "
        "each time it ran 1 forward padded: no"
    )
    assert said in out
    assert "part early" not in out
    assert "here" in out.splitlines()[-1]
    assert cli.run([*arguments, "--json", "--new-tokens", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 6
    assert found["shapes"] == [[2, 16]]
    rows = {row["implementation"]: row for row in found["rows"]}
    assert rows["smart"]["ran"] == {"sdpa": 6}
    assert rows["smart"]["equal_tokens"] == rows[bench.PADDING_FREE]["equal_tokens"] == 1.0
    assert len(rows["smart"]["seconds"]) == 3
    assert rows["smart"]["tokens_per_second"] == pytest.approx(6 / rows["smart"]["median"])


def test_bench_shows_a_difference(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(str(folder("llama")), None, CPU)
    batches = models.batches(model, models.Shape(2, 16))
    wrong_at(monkeypatch, lambda out, plan: out * 1.1)
    found = bench.bench(model, batches, rounds=1)
    difference = {row.implementation: row.difference for row in found.rows}
    assert difference["eager"] == 0.0
    assert difference["sdpa"] is not None
    assert difference["sdpa"] < 1e-5
    assert difference["smart"] is not None
    assert difference["smart"] > 1e-3


def test_bench_runs_padding_free_in_its_own_row_alone(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = functools.partial(bench.padding_free, always=True)
    monkeypatch.setattr(bench, "padding_free", always)
    model = models.load(str(folder("llama")), None, CPU)
    widths: list[tuple[int, ...]] = []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: widths.append(tuple(output.shape[:2]))
    )
    batches = models.batches(model, models.Shape(2, 16, 0.5))
    found = bench.bench(model, batches, rounds=1)
    rows = {row.implementation: row for row in found.rows}
    packed = (1, batches[0].tokens)
    # A first run and a round of eager, sdpa, smart, and the last of each packed.
    assert [width == packed for width in widths] == [False] * 3 + [True] + [False] * 3 + [True]
    assert rows[bench.PADDING_FREE].difference < 1e-5
    (stack,) = rows[bench.PADDING_FREE].stacks
    assert stack == "ran 1 forward packed: asked for whenever it is exact"
    assert rows[bench.PADDING_FREE].packed
    assert not rows["smart"].packed
    said = (
        " smart, and less than 3 rounds tell nothing; each time it ran 1 forward packed: asked for"
    )
    assert said in (found.padding_free or "")
    assert found.as_dict()["padding_free"] == found.padding_free
    assert not model.__dict__.get("_smartattn_padding_free")


def test_bench_says_why_a_model_cannot_be_padding_free(folder: Any) -> None:
    model = models.load(str(folder("llama")), None, CPU)
    model.config.chunk_size_feed_forward = 4
    found = bench.bench(model, models.batches(model, models.Shape(2, 16)), rounds=1)
    (row,) = [row for row in found.rows if row.implementation == bench.PADDING_FREE]
    assert "chunk_size_feed_forward" in (row.error or "")
    assert found.padding_free is None
    assert found.verdict


def made(**seconds: list[float]) -> bench.Benchmark:
    rows = tuple(
        bench.Row(name, times, packed=name == bench.PADDING_FREE) for name, times in seconds.items()
    )
    return bench.Benchmark(rows, "cpu", "float32", 10, 10, 0, 0)


def around(median: float, spread: float, rounds: int = 9) -> list[float]:
    """Rounds evenly apart whose interquartile range is a share of their median."""
    steps = [place / (rounds - 1) - 0.5 for place in range(rounds)]
    return [median * (1 + 2 * spread * step) for step in steps]


def packing(smart: list[float], free: list[float], sdpa: list[float]) -> bench.Benchmark:
    return made(**{"sdpa": sdpa, "smart": smart, bench.PADDING_FREE: free})


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (made(eager=[9.0] * 3, sdpa=[1.0] * 3, smart=[2.0] * 3), "does not pay"),
        (made(eager=[9.0] * 3, sdpa=[1.0] * 3, smart=[2.0] * 3), "attn_implementation='sdpa'"),
        (made(eager=[9.0] * 3, sdpa=[1.0] * 3, smart=[2.0] * 3), "takes 2.00 times as long as"),
        (made(eager=[9.0] * 3, sdpa=[1.0] * 3, smart=[0.5] * 3), "pays here: it is 2.00 times"),
        (made(sdpa=[1.0] * 3, smart=[1.01] * 3), "no difference here: it takes 1.01 times as long"),
        (made(sdpa=[1.0] * 3, smart=[1.001] * 3), "it is as fast as sdpa, and up to 2% is within"),
        # Within the spread of the rounds, which may be so large that nothing follows.
        (made(sdpa=around(1.0, 0.02), smart=around(0.98, 0.03)), "it is 1.02 times as fast as"),
        (made(sdpa=around(1.0, 0.02), smart=around(0.98, 0.03)), "no difference here"),
        (made(sdpa=[1.0, 1.05, 1.1], smart=[1.02, 1.04, 1.06]), "cannot be told"),
        (made(sdpa=[1.0, 1.4, 1.8], smart=[1.2, 1.3, 1.4]), "cannot be told: it is 1.08 times"),
        # What is printed counts: the same figure is not beyond itself.
        (made(sdpa=around(1.0204, 0.0), smart=around(1.0, 0.0)), "no difference"),
        (made(sdpa=around(1.0, 0.0), smart=around(1.0204, 0.0)), "no difference"),
        (made(sdpa=around(1.026, 0.0), smart=around(1.0, 0.0)), "pays here: it is 1.03 times"),
        # The same difference and spread in fewer rounds is less certain.
        (
            made(sdpa=around(1.0, 0.06), smart=around(1.08, 0.06)),
            "does not pay here: it takes 1.08",
        ),
        (made(sdpa=around(1.08, 0.06), smart=around(1.0, 0.06)), "smart pays here: it is 1.08"),
        (made(sdpa=around(1.08, 0.06, 5), smart=around(1.0, 0.06, 5)), "cannot be told"),
        (made(sdpa=around(1.0, 0.06, 5), smart=around(1.08, 0.06, 5)), "cannot be told"),
        (made(sdpa=[2.0] * 2, smart=[1.0] * 2), "cannot be told: it is 2.00 times as fast as sdpa"),
        (made(sdpa=[2.0] * 2, smart=[1.0] * 2), "less than 3 rounds tell nothing"),
        # On a busy machine the rounds have to lie apart as well.
        (made(sdpa=[1.0, 1.2, 3.0], smart=[2.0, 4.0, 4.1]), "cannot be told: it takes 3.33 times"),
        (made(sdpa=[1.0, 1.2, 3.0], smart=[2.0, 4.0, 4.1]), "sdpa, and their rounds overlap"),
        (made(sdpa=[2.0, 4.0, 4.1], smart=[1.0, 1.2, 3.0]), "cannot be told: it is 3.33 times"),
        (made(sdpa=[1.0, 1.2, 1.9], smart=[2.0, 4.0, 4.1]), "does not pay here: it takes 3.33"),
        (made(sdpa=[2.0, 4.0, 4.1], smart=[1.0, 1.2, 1.9]), "pays here: it is 3.33 times"),
        (made(sdpa=[1.0, 2.0, 9.0], smart=[2.0, 3.0, 4.1]), "and the rounds tell nothing"),
        # What pays is named first, whatever smart alone does.
        (
            packing([1.0] * 3, [0.5] * 3, [1.0] * 3),
            "smart with padding_free pays here: it is 2.00 times as fast as sdpa, the best of the "
            "others; smart alone makes no difference",
        ),
        (
            packing([1.25] * 3, [0.5] * 3, [1.0] * 3),
            "smart alone takes 1.25 times as long as sdpa",
        ),
        (packing([0.8] * 3, [0.5] * 3, [1.0] * 3), "smart alone is 1.25 times as fast as sdpa"),
        (packing([2.0] * 3, [1.5] * 3, [1.0] * 3), "does not pay"),
        # Better than both, but not by more than chance: the word is smart's.
        (packing([0.5] * 3, [0.495] * 3, [1.0] * 3), "smart pays here"),
        (
            packing(around(1.0, 0.02), around(0.93, 0.08), around(1.0, 0.02)),
            "smart makes no difference here",
        ),
        # Better than sdpa beyond chance where smart alone is not: padding_free is what pays.
        (
            packing(around(0.95, 0.06), around(0.9, 0.01), around(1.0, 0.01)),
            "smart with padding_free pays here: it is 1.11 times",
        ),
        # "No difference" is said of what leaves little open.
        (
            packing(around(0.95, 0.06), around(0.9, 0.01), around(1.0, 0.01)),
            "; whether smart alone pays cannot be told: up to 6% is within the scatter of the "
            "rounds",
        ),
        (made(smart=[1.0]), "only smart ran"),
        (made(**{"smart": [1.0], bench.PADDING_FREE: [0.5]}), "only smart ran"),
        (made(sdpa=[1.0]), "did not run"),
    ],
)
def test_the_verdict_is_plain(found: bench.Benchmark, says: str) -> None:
    assert says in found.verdict


def test_padding_free_that_packs_nothing_is_not_what_pays() -> None:
    rows = (bench.Row("sdpa", [1.0] * 3), bench.Row("smart", [1.0] * 3))
    padded = bench.Row(bench.PADDING_FREE, [0.5] * 3, stacks=["ran 1 forward padded: small"])
    found = bench.Benchmark((*rows, padded), "cpu", "float32", 10, 10, 0, 0)
    assert "smart makes no difference" in found.verdict
    said = (
        "padding_free packed nothing: its row is smart's once more; "
        "each time it ran 1 forward padded: small"
    )
    assert found.padding_free == said


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (0.5, "padding_free is 2.00 times as fast as smart; each time it "),
        (2.0, "padding_free takes 2.00 times as long as smart; each time it "),
        (0.98, "padding_free is 1.02 times as fast as smart, and up to 4% is within"),
    ],
)
def test_what_padding_free_changes_is_said(free: float, says: str) -> None:
    found = packing(around(1.0, 0.04), around(free, 0.04), around(1.0, 0.04))
    assert (found.padding_free or "").startswith(says)


@pytest.mark.parametrize("spread", [0.02, 0.1])
@pytest.mark.parametrize("rounds", [3, 5, 9])
def test_rows_that_differ_by_chance_are_seldom_told_apart(rounds: int, spread: float) -> None:
    """In both directions together, and those that do differ are told."""
    draw = random.Random(0)

    def row(median: float) -> list[float]:
        return [median * draw.gauss(1.0, spread) for _ in range(rounds)]

    def told(smart: float) -> int:
        found = [made(sdpa=row(1.0), smart=row(smart)).verdict for _ in range(300)]
        return sum(one.startswith(("smart pays", "smart does not pay")) for one in found)

    assert told(1.0) <= 300 * 0.11
    assert told(1.0 + 6 * spread) >= 300 * 0.9
    assert told(1 / (1.0 + 6 * spread)) >= 300 * 0.9


def test_half_precision_explains_tokens_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def generated(dtype: str, *equal: float) -> bench.Benchmark:
        names = ("eager", "sdpa", "smart")
        rows = [bench.Row(n, [1.0] * 3, equal_tokens=e) for n, e in zip(names, equal, strict=True)]
        return bench.Benchmark(tuple(rows), "cpu", dtype, 10, 10, 0, 5)

    parts = generated("bfloat16", 1.0, 0.7, 1.0)
    assert parts.remark is not None
    assert "greedy tokens part early in bfloat16" in parts.remark
    assert parts.as_dict()["remark"] == parts.remark
    assert generated("bfloat16", 1.0, 1.0, 1.0).remark is None
    assert generated("float32", 1.0, 0.7, 0.7).remark is None, "that would be a fault"
    assert made(sdpa=[1.0], smart=[1.0]).remark is None
    console = Console(record=True, width=200, file=io.StringIO())
    cli_models._print_benchmark(parts, console)
    assert parts.remark in console.export_text()


def test_an_implementation_that_fails_does_not_end_the_others(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(str(folder("llama")), None, CPU)
    batches = models.batches(model, models.Shape(2, 16))
    right = models.forward

    def fails(model: Any, batch: Any, **options: Any) -> Any:
        if model.config._attn_implementation == "sdpa":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return right(model, batch, **options)

    monkeypatch.setattr(bench, "forward", fails)
    monkeypatch.setattr(verify, "forward", fails)
    rows = {row.implementation: row for row in bench.bench(model, batches, rounds=1).rows}
    assert rows["sdpa"].error == "OutOfMemoryError: CUDA out of memory. Tried"
    assert rows["smart"].seconds
    found = verify.verify(model, batches)
    assert found.agrees
    assert found.comparisons[0].error == "OutOfMemoryError: CUDA out of memory. Tried"


def test_prompts_are_tokenized_and_padded(
    folder: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "b", "c"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    path = folder("llama")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(path)
    (tmp_path / "prompts").write_text("a b c a\n\nb\nc c\n")
    model = models.load(str(path), None, CPU)
    tokens = models.load_tokenizer(str(path), None, model)
    shape = models.Shape(batch=2, prompts=tmp_path / "prompts")
    first, second = models.batches(model, shape, tokens)
    assert first.real.tolist() == [[True] * 4, [False, False, False, True]], "padded on the left"
    assert second.inputs["input_ids"].tolist() == [[6, 6]]
    assert cli.run(["verify", str(path), "--prompts", str(tmp_path / "prompts")]) == 0
    assert "3 x 4: 7 real and 5 padding tokens" in capsys.readouterr().out
    arguments = ["--prompts", str(tmp_path / "prompts"), "--batch", "2"]
    assert cli.run(["verify", str(path), *arguments]) == 0
    said = "2 batches of 1 to 2 x 2 to 4: 7 real and 3 padding tokens"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "{tmp}/none"], "there is no folder"),
        (["verify", "{tmp}/none.gguf"], "there is no file"),
        (["verify", "{tmp}", "--gguf-file", "none"], "there is no file"),
        (["verify", "{tmp}"], "cannot be loaded"),
        (["verify", "{llama}", "--device", "mars"], "use 'cpu', 'cuda' or 'cuda:N'"),
        (["verify", "{llama}", "--dtype", "int8"], "bfloat16"),
        (["verify", "{llama}", "--padding", "1"], "padding"),
        (["verify", "{llama}", "--seq-len", "999"], "the model takes 128 tokens"),
        (["verify", "{llama}", "--prompts", "{tmp}/none"], "tokenizer"),
        (["bench", "{bert}", "--new-tokens", "3"], "does not generate"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, folder: Any, tmp_path: Path, capsys: Any
) -> None:
    paths = {name: str(folder(name)) for name in ("llama", "bert") if f"{{{name}}}" in arguments}
    given = [argument.format(tmp=tmp_path, **paths) for argument in arguments]
    assert cli.run(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.skipif(real_models.missing() is not None, reason=real_models.missing() or "")
def test_a_real_model_from_its_folder(capsys: Any) -> None:
    from local_models import find_minilm

    arguments = [str(find_minilm()), "--device", "cpu", "--batch", "3", "--seq-len", "24"]
    assert cli.run(["verify", *arguments]) == 0
    assert "smart agrees with eager" in capsys.readouterr().out
    assert cli.run(["bench", *arguments, "--rounds", "1"]) == 0
    assert "smart ran" in capsys.readouterr().out


def test_values_at_padding_positions_are_explained(folder: Any, capsys: Any) -> None:
    arguments = ["verify", str(folder("bert")), "--batch", "3", "--seq-len", "20", "--padding"]
    with smartattn.use(backends="sdpa_unpadded"):
        assert cli.run([*arguments, "0.5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "smart ran sdpa_unpadded in 2 calls" in out
    assert 'differ by design; to get sdpa\'s values there: pad_output="sdpa"' in out
    with smartattn.use(backends="sdpa"):
        assert cli.run([*arguments, "0.5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "differ by design" not in out
    assert cli.run([*arguments, "0", "--device", "cpu"]) == 0
    assert "differ by design" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_nothing_is_cut_off_in_a_narrow_terminal(
    command: str, folder: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.run([command, str(folder("llama")), "--device", "cpu", "--seq-len", "16"]) == 0
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2345, "1234.5"), (0.09876, "98.8"), (0.009996, "10.0"), (0.00456, "4.56"), (3e-4, "0.300")],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert cli_models._milliseconds(seconds) == text


def test_the_number_of_rounds_is_said(capsys: Any) -> None:
    for rounds, words in (
        (3, "medians of 3 interleaved rounds"),
        (1, "medians of 1 interleaved round"),
    ):
        found = made(sdpa=[1.0] * rounds, smart=[1.0] * rounds)
        assert found.rounds == rounds
        cli_models._print_benchmark(replace(found, shapes=((2, 5),)), Console(width=200))
        assert f"; {words}\n" in capsys.readouterr().out


def test_rounds_that_vary_put_the_times_in_doubt() -> None:
    steady = made(eager=[2.0] * 5, smart=[1.0, 1.01, 1.02, 1.03, 1.04])
    assert steady.doubt is None
    assert steady.as_dict()["doubt"] is None
    busy = made(eager=[2.0] * 5, smart=[1.0, 1.0, 2.0, 3.0, 3.0])
    assert (busy.doubt or "").startswith("the rounds of smart vary by 100%: ")
