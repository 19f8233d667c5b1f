"""The benchmarks of whole models and of single calls: what they measure, leave out and write."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from benchmarks import (
    bounds,
    calls,
    choices,
    common,
    decode,
    models,
    models_page,
    padding_free,
    sdpa_forms,
    skipping,
)
from benchmarks.common import Budget, Run
from benchmarks.turns import Turn, Turns, by_forwards, twin

from smartattn.backends import BACKENDS

from .test_backends_matrix import stand_in_kernels  # noqa: F401, a fixture

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FA3 = {"device": "a GPU", "flash-attn": "2.8.3", "fa3-fwd": "0.0.3"}


def saved(path: Path, versions: dict[str, Any], times: dict[str, tuple[float, ...]]) -> Path:
    """A run as JSON, from (sdpa, FA2, smart) milliseconds by workload; 0 for one that failed."""
    results = [
        models.Result(
            name,
            first_ms=dict(zip(models.IMPLEMENTATIONS, (300.0, 200.0, 100.0), strict=True)),
            median_ms={
                one: ms for one, ms in zip(models.IMPLEMENTATIONS, given, strict=True) if ms
            },
            chosen="some_backend",
        )
        for name, given in times.items()
    ]
    common.save(path, Run(versions, results))
    return path


def every(*given: float) -> dict[str, tuple[float, ...]]:
    return {workload.name: given for workload in models.workloads()}


def verdicts(page: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(measured, verdict) by figure and run, from the table of a page."""
    table = page.read_text().split("## Wanted and measured")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.count("|") == 6]
    cells = [[cell.strip(" *") for cell in row] for row in rows[1:]]
    return {(row[0], row[1]): (row[3], row[4]) for row in cells if len(row) == 5}


def run_main(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


WORST = "every workload: smart / min(sdpa, FA2), the worst"
PADDED = "padded forwards of at least 8,000 tokens: min(sdpa, FA2) / smart, geometric mean"


def test_the_page_says_what_was_wanted_and_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = every(1.3, 1.31, 1.0)
    times["bert-large forward 1x128"] = (1.0, 1.2, 1.05)
    times["llama-1b generate 8x8192 pad50% left +64"] = (1.3, 1.39, 1.0)
    times["bert-large forward 32x128 pad25% right"] = (1.0, 3.0, 1.01)
    file = saved(tmp_path / "a.json", FA3, times)
    alone = saved(tmp_path / "b.json", {"flash-attn": "2"}, every(1.07, 1.07, 1.0))
    without = saved(tmp_path / "c.json", {"fa3-fwd": None}, every(1.09, 0.0, 1.0))
    page = tmp_path / "page.md"
    files = ("--from-json", file, alone, without)
    run_main(models.main, monkeypatch, *files, "--page", page)
    found = verdicts(page)
    fa3 = "with FlashAttention-3"
    worst = "1.050, bert-large forward 1x128; 1 of 61 above 1.03"
    assert found[WORST, fa3] == (worst, "missed")
    assert found[PADDED, fa3] == ("1.300, 21 workloads", "reached")
    assert found[PADDED, "flash-attn alone"] == ("1.070, 21 workloads", "reached")
    assert found[PADDED, "without flash-attn"] == ("1.090, 21 workloads", "missed")
    mean = (1.3**58 * 1.0 / 1.05 * 1.3 * 1 / 1.01) ** (1 / 61)
    assert found["all workloads: sdpa / smart, geometric mean", fa3] == (
        f"{mean:.3f}, 61 workloads",
        "reached",
    )
    named = "llama-1b generate {}: min(sdpa, FA2) / smart"
    assert found[named.format("8x8192 pad50% left +64"), fa3] == ("1.300", "missed")
    assert found[named.format("32x2048 pad50% left +64"), fa3] == ("1.300", "reached")
    bound = "bert-large forward 32x128, padded: smart / sdpa, the worst"
    assert found[bound, fa3] == ("1.010, bert-large forward 32x128 pad25% right", "missed")
    text = page.read_text()
    assert text.count("| bert-large forward 1x128 | 1.050 | - | some_backend |") == 1
    assert "fa3-fwd 0.0.3" in text
    # Without flash-attn there is nothing to compare with but sdpa.
    assert not any("FA2 / smart" in what for what, run in found if run == "without flash-attn"
                   and what not in (WORST, PADDED))  # fmt: skip


def test_a_figure_with_missing_workloads_is_never_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = every(1.4, 1.4, 1.0)
    left = "llama-1b prefill 8x4096 pad25% left"
    del times[left]
    failed = "bert-large forward 128x512 pad25% right"
    times[failed] = (1.4, 1.4, 0.0)
    run = Run(FA3, common.load([saved(tmp_path / "a.json", FA3, times)], models.Result)[0].results)
    run.not_run = [left]
    common.save(tmp_path / "a.json", run)
    page = tmp_path / "page.md"
    run_main(models.main, monkeypatch, "--from-json", tmp_path / "a.json", "--page", page)
    found = verdicts(page)
    label = "with FlashAttention-3"
    assert found[PADDED, label] == ("1.400, 19 workloads; 2 workloads not measured", "incomplete")
    assert found[WORST, label][1] == "incomplete"
    assert f"the time was over before 1 workload: {left}." in page.read_text()
    # With another part of the grid the same packages make one run again.
    rest = saved(tmp_path / "rest.json", FA3, {left: (1.4, 1.4, 1.0), failed: (1.4, 1.4, 1.0)})
    run_main(models.main, monkeypatch, "--from-json", tmp_path / "a.json", rest, "--page", page)
    assert {verdict for _, verdict in verdicts(page).values()} == {"reached"}
    assert "Not run" not in page.read_text()


def test_files_of_something_else_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"other\.json is not of this benchmark"):
        common.load([other], models.Result)


def test_what_the_time_does_not_allow_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = common.selected(models.workloads(), ["llama-1b *"], ["*prefill*", "*8x512*"])
    assert len(chosen) == 7
    budget = Budget(1000.0)
    built: list[str] = []

    def measure(workload: models.Workload, model: str) -> models.Result:
        if workload == chosen[1]:
            budget.end = 0.0
        return models.Result(workload.name)

    file = tmp_path / "run.json"
    run = common.measured(
        chosen,
        built.append,
        measure,
        lambda result: result.workload,
        device=CPU,
        budget=budget,
        json_file=file,
    )
    assert built == ["llama-1b"]
    assert [result.workload for result in run.results] == [one.name for one in chosen[:2]]
    assert run.not_run == json.loads(file.read_text())["not_run"]
    assert run.not_run == [one.name for one in chosen[2:]]
    assert f"the time was over: {run.not_run[0]}, " in capsys.readouterr().out
    assert Budget(0.0).spent
    assert not Budget(None).spent


def test_a_hidden_package_is_imported_by_nobody(tmp_path: Path) -> None:
    """The backend of FlashAttention-3 asks for its module when a model runs, on a CPU too."""
    (tmp_path / "fa3_fwd_interface.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"
    )
    info = tmp_path / "fa3_fwd-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fa3-fwd\nVersion: 9.9\n")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "src", ROOT)))
    command = [sys.executable, "-m", "benchmarks.models", "--tiny", "--device", "cpu"]
    command += ["--only", "tiny-llama prefill*", "--rounds", "1", "--seconds", "0"]
    command += ["--json", str(tmp_path / "run.json")]
    for hidden in (["fa3_fwd_interface"], []):
        words = [word for name in hidden for word in ("--hide", name)]
        done = subprocess.run(
            [*command, *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stderr
        versions = json.loads((tmp_path / "run.json").read_text())["versions"]
        assert versions["hidden"] == hidden
        assert versions["fa3-fwd"] == (None if hidden else "9.9")
        assert (tmp_path / "imported").exists() is not bool(hidden)


def test_models_are_measured_and_compared() -> None:
    built = {}
    for workload in models.tiny_workloads():
        if workload.task not in ("forward", "generate", "stream"):
            continue
        model = built.setdefault(workload.model, models.build(workload.model, CPU, torch.float32))
        result = models.measure(workload, model, CPU, rounds=3, seconds=0.0)
        assert result.median_ms.keys() == result.first_ms.keys() == {"sdpa", "smart"}
        assert "flash_attention_2" in result.failed
        assert result.speedup == result.median_ms["sdpa"] / result.median_ms["smart"]
        assert result.rounds == 3
        if workload.task == "generate":
            assert result.equal_tokens == {"sdpa": 1.0, "smart": 1.0}
        else:
            assert result.difference["smart"] < 1e-5


def test_the_uncertainty_of_a_ratio_is_that_of_medians() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(400):
        medians, spreads = {}, {}
        for name, mean in (("sdpa", 12.0), ("flash_attention_2", 20.0), ("smart", 10.0)):
            times = rng.normal(mean, 0.05 * mean, 25)
            medians[name], spreads[name] = common.middle(times.tolist())
        ratios.append(models.Result("a", median_ms=medians, spread_ms=spreads, rounds=25))
    errors = np.std([math.log(result.speedup or 0.0) for result in ratios])
    stated = np.mean([result.uncertainty or 0.0 for result in ratios])
    assert stated == pytest.approx(errors, rel=0.15)
    ratios[0].rounds = 2
    assert ratios[0].uncertainty is None


def test_bounds_are_of_the_batch_without_its_attention() -> None:
    bounds.register()
    results = []
    for workload in bounds.tiny_workloads():
        model = models.build(workload.model, CPU, torch.float32)
        with mock.patch.object(bounds, "fastest", side_effect=bounds.fastest) as fastest:
            results.append(bounds.measure(workload, model, CPU, 3, 0.0))
        (lengths, causal, query, key), _ = fastest.call_args
        real = int(models.padded_batch(workload, 100, CPU)["attention_mask"].sum())
        assert lengths.sum() == real < workload.batch * workload.length
        assert causal == (workload.model == "tiny-llama")
        assert (query.shape[1], key.shape[1]) == (4, 2 if causal else 4)
        assert results[-1].median_ms.keys() == {"sdpa", "smart", "packed", "free"}
        # One kernel for all layers and rounds: what is timed is not its making.
        assert fastest.call_count == 1
        assert model.config._attn_implementation == "sdpa"
    results[0].median_ms = {"sdpa": 4.0, "flash_attention_2": 3.0, "smart": 2.0, "packed": 1.5}
    assert bounds.gains(results[0]) == {"smart": 1.5, "packed": 2.0}
    assert "better / smart 1.500 (sdpa / smart 2.000)" in bounds.table(results[:1])


def test_a_plot_needs_matplotlib_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = common.load([saved(tmp_path / "a.json", FA3, every(1.2, 1.1, 1.0))], models.Result)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit, match="needs matplotlib"):
            models_page.plot(tmp_path / "plot.png", runs)
    pytest.importorskip("matplotlib")
    models_page.plot(tmp_path / "plot.png", runs)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_padding_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, ideal = padding_free.PADDING_FREE, padding_free.IDEAL
    results = [
        padding_free.Result(
            workload.name,
            median_ms={"sdpa": 1.7, "flash_attention_2": 1.8, "smart": 1.0, ours: 1.0, ideal: 0.94},
            peak_mib={"sdpa": 100.0, ours: 110.0 if workload.task == "train" else 50.0},
        )
        for workload in padding_free.workloads()
    ]
    common.save(tmp_path / "a.json", Run(FA3, results))
    page = tmp_path / "page.md"
    run_main(padding_free.main, monkeypatch, "--from-json", tmp_path / "a.json", "--page", page)
    found = {what: row for (what, _), row in verdicts(page).items()}
    over = "over the better of sdpa and FA2"
    assert found[f"bert-large forward 128x512 pad50% right: {over}"] == ("1.700", "missed")
    assert found[f"llama-1b prefill 8x4096 pad25% left: {over}"] == ("1.700", "reached")
    shares = [row for what, row in found.items() if what.endswith("share of the ideal")]
    assert shares == [("0.940", "reached")] * 4
    assert found["llama-1b train 8x2048 pad50% right: peak memory / sdpa's"] == (
        "1.100, 110 of 100 MiB",
        "missed",
    )
    assert len(found) == 6 + 4 + 2 + 6


def test_calls_are_compared_with_packed_ones() -> None:
    """The ratio would mean nothing if the packed call computed something else."""
    for case in calls.tiny_cases():
        result = calls.measure(case, CPU, rounds=1, seconds=0.0)
        assert result.difference < 1e-5
        assert result.kernel == "sdpa_unpadded"
        assert result.warm == result.warm_us / result.packed_warm_us
    names = [case.name for case in calls.cases()]
    assert len(names) == len(set(names)) == 192


@pytest.mark.parametrize(("name", "kernels"), [("sdpa", 1), ("sdpa_unpadded", 2)])
def test_the_bare_kernel_is_what_a_backend_runs(name: str, kernels: int) -> None:
    workload = calls._small(calls.host_cases()["prefill, left"])
    backend = next(one for one in BACKENDS if one.name == name)
    before = torch.nn.functional.scaled_dot_product_attention
    with calls.recorded() as found:
        output = backend.run(workload.plan(CPU), workload.call(CPU), *workload.tensors(CPU)[:3])
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert len(found) == kernels
    # The second row is shorter than the first, or there would be one call.
    last = found[-1]().transpose(1, 2)
    rows = -len(last) if name == "sdpa_unpadded" else 0
    assert torch.equal(last, output[rows:, -last.shape[1] :])


def test_the_benchmark_of_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "calls.json", tmp_path / "page.md"
    arguments = ("--tiny", "--device", "cpu", "--seconds", "0", "--imports", "0", "--rounds", "1")
    run_main(calls.main, monkeypatch, *arguments, "--json", file, "--page", page)
    text = page.read_text()
    assert {row["case"] for row in json.loads(file.read_text())["extra"]["host"]} == set(
        calls.host_cases()
    )
    for title in ("## Device time", "## Host time of a layer", "## Once per forward"):
        assert title in text
    run_main(calls.main, monkeypatch, "--from-json", file, "--page", tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == text


def test_calls_are_judged() -> None:
    fields = {"chosen": "a", "kernel": "a", "peak_bytes": 0, "packed_peak_bytes": 0}
    fields |= {"output_bytes": 1, "packed_output_bytes": 1, "difference": 0.0}
    results = [
        calls.Result(name, "group", name, warm_us=110.0, cold_us=cold, packed_warm_us=100.0,
                     packed_cold_us=100.0, **fields)  # type: ignore[arg-type]
        for name, cold in (("one", 114.0), ("two", 120.0))
    ]  # fmt: skip
    host = [{"case": "a", "chosen": "sdpa", "beyond_us": us} for us in (4.0, 5.5)]
    run = Run(FA3, results, extra={"host": host})
    warm, cold, of_host = calls.wanted(run, 2)
    assert (warm.measured, warm.verdict) == ("1.100, one; 0 of 2 above", "reached")
    assert (cold.measured, cold.verdict) == ("1.200, two; 1 of 2 above", "missed")
    assert (of_host.measured, of_host.verdict) == ("5.500, a, sdpa", "missed")
    assert calls.wanted(run, 3)[0].verdict == "incomplete"


def test_choices_are_compared_with_every_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, figures = tmp_path / "choices.md", tmp_path / "choices.json"
    arguments = ("--tiny", "--device", "cpu", "--rounds", 3, "--seconds", 0.1)
    run_main(choices.main, monkeypatch, *arguments, "--json", figures, "--page", page)
    results = [choices.Result(**row) for row in json.loads(figures.read_text())["results"]]
    assert [r.workload for r in results] == [w.name for w in choices.tiny_workloads()]
    for result in results:
        assert {"smart", "sdpa", "sdpa_unpadded"} <= result.median_ms.keys()
        assert "flash_attention_2" in result.refused
        held = [ms for name, ms in result.median_ms.items() if name != "smart"]
        assert result.ratio == pytest.approx(result.median_ms["smart"] / min(held))
    assert "smart / best" in page.read_text()
    result = choices.Result("made up", {"smart": 10.4, "sdpa": 10.0, "torch_varlen": 12.0})
    assert (result.best, result.ratio) == ("sdpa", pytest.approx(1.04))
    assert "0 of 1" in choices.table([result])


def test_the_forms_of_sdpa_agree_and_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, figures = tmp_path / "forms.md", tmp_path / "forms.json"
    arguments = ("--tiny", "--device", "cpu", "--rounds", 1, "--seconds", 0)
    wanted = ("--only", "float32 *1x*/32 *", "--only", "bfloat16 8x5/512 32/8*")
    run_main(sdpa_forms.main, monkeypatch, *arguments, *wanted, "--json", figures, "--page", page)
    results = [sdpa_forms.Result(**row) for row in json.loads(figures.read_text())["results"]]
    assert len(results) > 4
    for result in results:
        assert ({"grouped", "folded"} <= result.us.keys()) == ("12/12" not in result.workload)
        assert {"smart", "repeated"} <= result.us.keys()
    assert all(result.workload in page.read_text() for result in results)


@pytest.mark.usefixtures("stand_in_kernels")
def test_both_ways_past_right_padding_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, figures = tmp_path / "skipping.md", tmp_path / "skipping.json"
    arguments = ("--tiny", "--device", "cpu", "--rounds", 1, "--seconds", 0)
    run_main(skipping.main, monkeypatch, *arguments, "--json", figures, "--page", page)
    results = [skipping.Result(**row) for row in json.loads(figures.read_text())["results"]]
    assert [r.workload for r in results] == [w.name for w in skipping.tiny_workloads()]
    for result in results:
        assert ("own blocks" in result.us) == ("flash_attention_3" in result.workload)
        assert {"dense", "in place"} <= result.us.keys()
        assert 0 < result.spared < 24
        assert result.chosen == "dense"
    assert all(result.workload in page.read_text() for result in results)


@pytest.mark.usefixtures("stand_in_kernels")
def test_a_way_past_padding_with_another_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = skipping.tiny_workloads()[0]
    bound = skipping._bound
    ones = torch.ones(3, 24, 4, 16)

    def wrong(backend: Any, plan: Any, call: Any, needed: float) -> Any:
        return (lambda *_: ones) if needed < 0 else bound(backend, plan, call, needed)

    monkeypatch.setattr(skipping, "_bound", wrong)
    with pytest.raises(AssertionError, match="in place differs by"):
        skipping.measure(workload, None, torch.device("cpu"), 1, 0.0, math.inf)


def test_a_form_with_another_answer_is_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = next(w for w in sdpa_forms.tiny_workloads() if w.heads > w.kv_heads)
    monkeypatch.setattr(sdpa_forms, "repeated", lambda x, n: x.repeat(1, n, 1, 1))
    with pytest.raises(AssertionError, match="differs by"):
        sdpa_forms.measure(workload, None, torch.device("cpu"), 1, 0.0, math.inf)


# -- first uses ------------------------------------------------------------------------------------


def test_models_are_timed_once_nothing_is_left_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = ["sdpa", "sdpa", None]

    class Trace:
        def __enter__(self) -> Trace:
            self.rows: list[Any] = []
            return self

        def __exit__(self, *_: object) -> None:
            left = waiting.pop(0)
            backend = "flash_attention_2" if left else "sdpa"
            self.rows = [mock.Mock(backend=backend, waiting_for=left)]

    monkeypatch.setattr(models.smartattn, "trace", Trace)
    assert models._settle(lambda _: None, CPU, ms=1.0) == ("sdpa", "")
    assert not waiting
    # Not for ever, and calls that take long on their own once.
    waiting += ["sdpa"] * 2
    assert models._settle(lambda _: None, CPU, ms=models.LONG) == ("flash_attention_2", "sdpa")
    monkeypatch.setattr(models, "SETTLING", -1.0)
    assert models._settle(lambda _: None, CPU, ms=1.0) == ("flash_attention_2", "sdpa")
    result = models.Result("a", chosen="flash_attention_2", waiting_for="sdpa")
    assert models.row(result)[-1] == "flash_attention_2, waiting for sdpa"


# -- decoding --------------------------------------------------------------------------------------


def test_decoding_by_blocks_and_by_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "decode.md"
    run_main(decode.main, monkeypatch, "--tiny", "--device", "cpu", "--page", page)
    assert "| 4 | " in page.read_text()
    cut = decode.Result(
        "a step", "a kind", 64, 1e9, parts={"0": 100.0, "4": 60.0, "8": 50.0}, chosen="4"
    )
    shown = decode.table([cut])
    assert "| 64 | 100.0 | 60.0 | 50.0 | 4 | 8 | 0.60 | 1.20 |" in shown
    assert shown.endswith("geometric mean 0.600, 0.60 to 0.60; chosen / best: 1.200, worst 1.20.")
    assert {one.shape.kv_len for one in decode.part_workloads()} >= {1000, 4000, 16384}
    assert len({one.name for one in decode.part_workloads()}) == len(decode.part_workloads())
    assert len({one.name for one in decode.workloads()}) == len(decode.workloads())
    for option in ("--parts", "--grids"):
        with pytest.raises(SystemExit):
            run_main(decode.main, monkeypatch, "--tiny", "--device", "cpu", option)
    assert "needs flash-attn" in (said := capsys.readouterr().err)
    assert "needs a GPU" in said


# -- turns -----------------------------------------------------------------------------------------


def test_calls_take_turns_and_each_one_has_its_own_time() -> None:
    said: list[str] = []

    def call(name: str, parts: int, seconds: float) -> Any:
        def run(turn: Turn) -> str:
            for part in range(parts):
                if part:
                    turn()
                said.append(f"{name}{part}")
                time.sleep(seconds)
            return name

        return run

    with Turns({"a": call("a", 3, 0.02), "b": call("b", 2, 0.0)}, CPU) as turns:
        assert turns.alone("b") == "b"
        said.clear()
        ms = turns.round(["b", "a"])
        assert said == ["b0", "a0", "b1", "a1", "a2"]
        # The other one's waiting is not its own time.
        assert 60.0 <= ms["a"] < 200.0
        assert ms["b"] < 20.0
        said.clear()
        turns.round(["a", "b"])
        assert said == ["a0", "b0", "a1", "b1", "a2"]


def test_an_error_in_a_turn_is_raised() -> None:
    def wrong(turn: Turn) -> None:
        turn()
        raise ValueError("in the second turn")

    with (
        Turns({"wrong": wrong, "right": lambda turn: None}, CPU) as turns,
        pytest.raises(ValueError, match="second turn"),
    ):
        turns.round(["right", "wrong"])


def test_a_device_that_fails_or_a_round_that_is_broken_off_hangs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def twice(turn: Turn) -> None:
        turn()

    def fails(device: torch.device) -> None:
        raise RuntimeError("the device is gone")

    with Turns({"a": twice, "b": twice}, CPU) as turns:
        with monkeypatch.context() as patch:
            patch.setattr("benchmarks.turns.synchronize", fails)
            with pytest.raises(RuntimeError, match="device is gone"):
                turns.round(["a", "b"])
        waiting = turns._players["a"].begin()
    # Its turn never came.
    assert "broken off" in str(waiting.exception(timeout=10))


def test_twins_share_weights_and_nothing_else() -> None:
    model = models.build("tiny-llama", CPU, torch.float32)
    other = twin(model)
    other.set_attn_implementation("smart")
    assert model.config._attn_implementation != "smart"
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert mine is its
    begun = []
    ids = torch.ones(1, 4, dtype=torch.long)
    call = by_forwards(
        other, lambda: other.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
    )
    assert call(lambda: begun.append(1)).shape == (1, 7)
    assert len(begun) == 2
    assert not other._forward_pre_hooks
