"""The held-out evaluation: what it draws, what it keeps and what it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import regret

from smartattn import evaluate, grid, profile, profiles, samples

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
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "profiles")
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


def test_two_profiles_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = profiles.shipped_profiles() / "nvidia-h200.json"
    made = profile.load(own)
    # One that expects FlashAttention-2 to be four times as fast as it is.
    costs = [
        one.model_copy(update={"device_us": {k: v / 4 for k, v in one.device_us.items()}})
        if one.backend == "flash_attention_2"
        else one
        for one in made.costs
    ]
    other = tmp_path / "other.json"
    profile.save(made.model_copy(update={"costs": tuple(costs)}), other)
    found = []
    for against in (own, other):
        figures = tmp_path / "figures.json"
        paths = {"samples": SHIPPED, "profile": own, "against": against, "json": figures}
        regret.main([word for name, path in paths.items() for word in (f"--{name}", str(path))])
        found.append(json.loads(figures.read_text())["agreement"])
    same, unlike = found
    assert same.keys() == {"alone", "in a layer", "in the same layer"}
    assert all(
        one["same"] == one["close"] == 1.0 and one["mean_loss"] == 0 for one in same.values()
    )
    assert all(one["same"] < 0.9 and one["mean_loss"] > 0.05 for one in unlike.values())
    assert all(one["same"] <= one["close"] <= 1.0 for one in unlike.values())
    assert "100.0% the same" in capsys.readouterr().out


def test_agreement_is_counted() -> None:
    workload = next(iter(regret.calls(1, grid.limits("cuda", "default", 10**11), "bfloat16")))
    us = {"sdpa": 100.0, "torch_varlen": 104.0, "flash_attention_2": 150.0}
    chosen = [("sdpa", "sdpa"), ("sdpa", "torch_varlen"), ("flash_attention_2", "sdpa")] * 2
    one = [regret.Judged(workload, first, us) for first, _ in chosen]
    other = [regret.Judged(workload, second, us) for _, second in chosen]
    found = regret.Agreement.of(one, other)
    assert (found.calls, found.same, found.close) == (6, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found.mean_loss == pytest.approx((0.04 + 0.5) / 2)


def test_what_going_by_timings_of_another_time_loses() -> None:
    header, taken = samples.load(SHIPPED)
    device = torch.device(header.device.kind)
    with_flash = {
        one.workload for one in taken if one.backend == "flash_attention_2" and one.status == "ok"
    }
    taken = [one for one in taken if one.workload in with_flash]
    # As if FlashAttention-2 had been a hundred times as fast then.
    earlier = [
        replace(one, host_us=one.host_us / 100, device_us=one.device_us / 100, prepare_us=0.0)
        if one.backend == "flash_attention_2"
        else one
        for one in taken
    ]
    pick = regret.remembered(earlier[: len(earlier) // 2], device)
    judged = evaluate.judge(taken, pick, device)
    assert {one.chosen for one in judged} == {"flash_attention_2"}
    # Calls that were not timed then are not judged.
    assert 0 < len(judged) < len({one.workload for one in taken})
    same = evaluate.judge(taken, regret.remembered(taken, device), device)
    assert all(one.regret == 1.0 for one in same)
    (agreed,) = regret.agreements_of_timings(taken, taken, device, None).values()
    assert (agreed.calls, agreed.same, agreed.mean_loss) == (len(same), 1.0, 0.0)
    found = regret.agreements_of_timings(
        taken, earlier[: len(earlier) // 2], device, profiles.profile_for(device).surroundings
    )
    assert found["alone"].calls == len(judged)
    assert found["alone"].same < 0.9
    assert found["alone"].mean_loss > 0.0
