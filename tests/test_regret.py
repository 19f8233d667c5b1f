"""The held-out evaluation: what it draws, what it keeps and what it prints."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import regret

from smartattn import grid, profile, samples

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "calibration" / "samples" / "nvidia-h200-default.safetensors"


def test_calls_are_of_all_kinds_and_on_no_grid() -> None:
    bounds = grid.limits("cuda", "default", 140 * 10**9)
    found = list(islice(regret.calls(1, bounds, "bfloat16"), 400))
    assert len(set(found)) == 400
    assert {w.mode for w in found} == {"forward", "train", "decode"}
    assert {w.side for w in found} == {"none", "left", "right", "packed"}
    assert {w.head_dim for w in found} == {64, 80, 96, 128, 256}
    assert {w.memory for w in found} == {"transposed", "concatenated"}
    assert any(w.window for w in found)
    shares = [w.mode for w in found]
    assert 0.3 < shares.count("forward") / 400 < 0.5
    assert all(w.flops <= bounds.max_flops and w.bytes <= bounds.max_bytes for w in found)
    assert all(w.heads % w.kv_heads == 0 for w in found)
    every = set(islice(grid.workloads(grid.families("cuda", "default"), bounds, 0), 3000))
    assert not every & set(found)
    assert list(islice(regret.calls(1, bounds, "bfloat16"), 20)) == found[:20]
    assert list(islice(regret.calls(2, bounds, "bfloat16"), 20)) != found[:20]


def test_it_measures_keeps_and_judges_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "user_profiles", lambda: tmp_path / "profiles")
    small = grid.Limits(64, 256, 1e7, 1e8, max_batch=4)
    monkeypatch.setattr(regret, "limits", lambda kind, mode, memory: small)
    monkeypatch.setattr(regret, "SECONDS", 0.01)
    kept, figures = tmp_path / "kept", tmp_path / "figures.json"
    run = ["--device", "cpu", "--calls", "4", "--keep", str(kept), "--json", str(figures)]
    assert regret.main(run) == 0
    first = capsys.readouterr().out
    header, taken = samples.load(kept)
    assert header.grid == "held-out"
    assert len({sample.workload for sample in taken if sample.status == "ok"}) >= 4
    rows = {(row["policy"], row["mode"]): row for row in json.loads(figures.read_text())["regret"]}
    assert rows["profile", "all"]["calls"] == 4
    assert rows["profile", "all"]["mean"] >= 1.0
    # Without a calibration the rules choose, and here they always choose sdpa.
    assert {**rows["profile", "all"], "policy": ""} == {**rows["always sdpa", "all"], "policy": ""}
    assert regret.main(["--samples", str(kept)]) == 0
    again = capsys.readouterr().out
    assert first.split("policy", 1)[1] == again.split("policy", 1)[1]


def test_another_profile_is_judged_without_the_device(
    capsys: pytest.CaptureFixture[str],
) -> None:
    default = ROOT / "calibration" / "profiles" / "default.json"
    assert regret.main(["--samples", str(SHIPPED), "--profile", str(default)]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out
    figures: dict[str, Any] = {}
    for line in out.splitlines():
        if " all " in line:
            name, rest = line.split("  ", 1)
            figures[name] = rest.split()
    assert figures["profile"] == figures["3000-token rule"]
    assert float(figures["always sdpa"][2]) > 1.5


def test_a_device_that_cannot_be_used() -> None:
    with pytest.raises(SystemExit, match="cannot be used"):
        regret.measured(torch.device("meta"), 1, 1.0, 0, print)
