"""The command line: exit codes, one line per mistake, and what the commands print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from smartattn import (
    __version__,
    calibrate,
    cli,
    grid,
    machine,
    parallel,
    profile,
    profiles,
    samples,
)
from smartattn.calibrate import CalibrationError, Outcome, Progress, Request

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "data" / "profiles")
    monkeypatch.delenv(profiles.ENVIRONMENT, raising=False)
    # Tables are as wide as the terminal; nothing is to be cut off here.
    monkeypatch.setenv("COLUMNS", "200")
    profiles.set_profile(None)
    yield
    profiles.set_profile(None)


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    family = grid.Family("forward", False, ("left",), "float32", 64)
    monkeypatch.setattr(grid, "families", lambda kind, mode, varlen: [family])
    limits = grid.Limits(512, 4096, 1e8, 1e8, max_batch=16)
    monkeypatch.setattr(grid, "limits", lambda kind, mode, memory: limits)


QUICK = ["calibrate", "--device", "cpu", "--quick", "--budget"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "--device", "mars"], "cuda:N"),
        (["calibrate", "--device", "meta"], "cuda:N"),
        (["calibrate", "--device", "cpu", "--output", "{tmp}/no/p.json"], "make it first"),
        (["calibrate", "--device", "cpu", "--output", "{tmp}"], "name a file"),
        (["calibrate", "--device", "cpu", "--output", "/proc/p.json"], "--output"),
        (["calibrate", "--unknown"], "calibrate --help"),
        (["calibrate", "--budget", "soon"], "budget"),
        (["calibrate", "--budget", "-5"], "budget"),
        (["calibrate", "--budget", "nan"], "budget"),
        (["calibrate", "surplus"], "surplus"),
        (["unknown"], "--help"),
        (["--unknown"], "--help"),
        (["profiles", "unknown"], "--help"),
        (["fit"], "fit --help"),
        (["fit", "{tmp}/missing"], "No such file"),
        (["fit", "{tmp}"], "directory"),
        (["fit", "{tmp}/text"], "safetensors"),
        (["show", "--profile", "{tmp}/missing.json"], "No such file"),
        (["show", "--profile", "{tmp}/text"], "not valid JSON"),
        (["profiles", "show", "nothing"], "profiles list"),
        (["profiles", "show", "../nvidia-h200"], "profiles list"),
        (["profiles", "export", "nothing", "{tmp}/p.json"], "profiles list"),
        (["profiles", "export", "nvidia-h200"], "export --help"),
        (["profiles", "export", "nvidia-h200", "{tmp}/text"], "--force"),
        (["profiles", "export", "nvidia-h200", "/proc/p.json"], "cannot write"),
        (["profiles", "import", "{tmp}/missing.json"], "No such file"),
        (["profiles", "import", "{tmp}/text"], "not valid JSON"),
        (["profiles", "remove", "nothing"], "profiles list"),
        (["profiles", "remove", "nvidia-h200"], "your own"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("hello")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert cli.run(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("smartattn: ")
    assert says in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_missing_gpu_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["calibrate", "--device", name]) == 2
    assert "use --device cpu" in capsys.readouterr().err


def fake_gpus(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        machine,
        "identify",
        lambda device: machine.Device(kind="cuda", name=names[device.index], capability="9.0"),
    )


def test_each_distinct_gpu_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_gpus(monkeypatch, ["H200", "H200", "A100", "H200"])
    assert [str(device) for device in cli._devices(None)] == ["cuda:0", "cuda:2"]
    assert [str(device) for device in cli._devices("cuda")] == ["cuda:0", "cuda:2"]
    assert [str(device) for device in cli._devices("cuda:3")] == ["cuda:3"]
    assert [str(device) for device in cli._devices("cpu")] == ["cpu"]
    assert cli.run(["calibrate", "--device", "cuda:4"]) == 2
    assert "there is no 'cuda:4'; this machine has 'cuda:0' to 'cuda:3'" in capsys.readouterr().err
    assert cli.run(["calibrate", "--output", "p.json"]) == 2
    assert "--device cuda:N" in capsys.readouterr().err


def test_without_a_gpu_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli._devices(None) == [CPU]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"smartattn {__version__}\n"
    for arguments in (["--help"], ["calibrate", "--help"], ["profiles", "--help"]):
        assert cli.run(arguments) == 0
        assert "Usage" in capsys.readouterr().out


def test_the_module_is_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run(
        [sys.executable, "-m", "smartattn", "calibrate", "--device", "moon"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr == "smartattn: 'moon' is no device; use 'cpu', 'cuda' or 'cuda:N'\n"


def test_explain_imports_no_models() -> None:
    """Nothing but what registering "smart" takes: models and generation cost seconds."""
    program = (
        "import sys\n"
        "from smartattn import cli\n"
        "sizes = ['--heads', '8', '--head-dim', '64', '--seq-len', '128', '--padding', '0.5']\n"
        "assert cli.run(['explain', *sizes, '--device', 'nvidia-h200']) == 0\n"
        "heavy = ('sklearn', 'pandas', 'transformers.models.llama.modeling_llama',\n"
        "         'transformers.generation.candidate_generator')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr.splitlines()[-1] == "[]"


@pytest.mark.usefixtures("few_shapes")
def test_calibrate_show_fit_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*QUICK, "4"]) == 0
    out = capsys.readouterr().out
    identity = machine.identify(CPU)
    assert identity is not None
    assert "Measuring" in out
    assert "Thresholds" in out
    path = calibrate.default_path(identity)
    assert str(path) in out

    assert cli.run([*QUICK, "4"]) == 0
    assert "Nothing to do" in capsys.readouterr().out

    assert cli.run(["show"]) == 0
    out = capsys.readouterr().out
    assert "the user's own" in out
    assert "sdpa_unpadded" in out

    raw = calibrate.samples_path(identity, "quick")
    assert cli.run(["fit", str(raw), "--output", str(tmp_path / "again.json")]) == 0
    assert profile.load(tmp_path / "again.json").costs == profile.load(path).costs
    capsys.readouterr()

    assert cli.run(["show", "--profile", str(tmp_path / "again.json")]) == 0
    assert str(identity) in capsys.readouterr().out

    (path.parent / "broken.json").write_text("{")
    assert cli.run(["profiles", "list"]) == 0
    out = capsys.readouterr().out
    assert path.stem in out
    assert "default" in out
    assert "unusable" in out
    # The folders once, so that files fit a terminal.
    assert f"yours: {path.parent}\n" in out
    assert f"shipped: {profiles.shipped_profiles()}\n" in out
    assert out.count(str(path.parent)) == 1
    assert f"in force for cpu ({identity}): {path.stem}, the user's own\n" in out


def test_show_without_a_profile_shows_the_rules_of_the_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # No profile is shipped for it.
    monkeypatch.setattr(machine, "cpu_name", lambda: "Imaginary CPU")
    assert cli.run(["show"]) == 0
    out = capsys.readouterr().out
    assert "the built-in default" in out
    assert "shipped for this device: none" in out
    assert "padded, from 25% padding on, from 256 queries on" in out
    assert "cpu_padding_free.json" in out
    assert out.count("otherwise") == 2, "of both tables"
    for foreign in ("cuda", "36585", "h200", "flash_attention", "torch_varlen"):
        assert foreign not in out.lower()
    default = str(profiles.shipped_profiles() / "default.json")
    assert cli.run(["show", "--profile", default]) == 0
    every = capsys.readouterr().out
    for said in ("on cuda, padded, from 3,000 keys on", "on cpu, padded", "36585", "h200"):
        assert said in every


def test_a_profile_without_rules_for_padding_free_shows_those_in_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = profile.Profile(name="made", device=machine.Device(kind="cuda", name="NVIDIA Imaginary"))
    profile.save(made, tmp_path / "p.json")
    assert cli.run(["show", "--profile", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    assert "padding_free, by the built-in default" in out
    assert "h200_model_forwards.json" in out
    assert "cpu_padding_free.json" not in out


def test_ratios_that_say_nothing_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ratios = ((32, 1.3, 1.42), (1536, 1.0, 2.5), (4096, 1.01, 1.049), (8192, 1.2, None))
    winners = tuple(
        profile.Winner(from_kv_len=n, backend="sdpa", speedup=there, largest_speedup=most)
        for n, there, most in ratios
    )
    one = profile.Threshold(
        mode="decode", layout="padded", causal=False, dtype="float32", head_dim=64, batch=8,
        heads=16, kv_heads=16, padding_share=0.5, winners=winners, ratio_of="call",
    )  # fmt: skip
    cli.print_thresholds((one, one.model_copy(update={"alike": True})), Console())
    out = capsys.readouterr().out
    assert " 50% of each row " in out
    assert '"of each row": all rows have as much padding' in out
    assert "16/16 heads of 64, float32" in out.replace("\n", " ")
    assert "decode, one query per sequence, padding" in out
    assert "--all" not in out
    for one_line in (" 32: sdpa (1.42) ", " 1,536: sdpa (2.50) ", " 4,096: sdpa ", " 8,192: sdpa "):
        assert one_line in out
    assert "(1.25): how many times as fast as the next one, at most; none: less than 1.05" in out
    assert "asked at 32, 48, 64, 96, 128, ... tokens" in out.replace("\n", " ")
    causal = {"mode": "forward", "causal": True}
    for change, words in (
        (causal, "forward, causal, padding on the left "),
        ({**causal, "layout": "right"}, "forward, causal, padding on the right "),
        (
            {**causal, "layout": "masked"},
            "forward, causal, a window of a quarter of the length, no padding ",
        ),
        ({"mode": "train", "layout": "plain"}, "forward and backward, bidirectional, no padding "),
        (
            {"mode": "train", "layout": "packed"},
            "bidirectional, packed sequences of that mean length ",
        ),
    ):
        cli.print_thresholds((one.model_copy(update=change),), Console(width=300))
        out = capsys.readouterr().out
        assert words in out
        assert "of each row" not in out
    # Ratios of before are of what calls add to their layers, which says little of any time.
    cli.print_thresholds((one.model_copy(update={"ratio_of": None}),), Console())
    out = capsys.readouterr().out
    assert " 32: sdpa " in out
    assert "times as fast" not in out


def test_thresholds_of_the_usual_calls_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    winner = profile.Winner(from_kv_len=32, backend="sdpa", speedup=1.0)
    calls = [(64, "bfloat16"), (128, "bfloat16"), (128, "float32"), (64, "float32")]
    calls += [(80, "float32"), (128, "bfloat16")]
    thresholds = [
        profile.Threshold(
            mode="forward", layout="plain", causal=True, dtype=dtype, head_dim=size, batch=8,
            heads=16, kv_heads=16, padding_share=0.0, winners=(winner,),
        )
        for size, dtype in calls
    ]  # fmt: skip
    cli.print_thresholds(thresholds, Console(width=200))
    out = capsys.readouterr().out
    assert "heads of 128, bfloat16" in " ".join(out.split())
    assert "head dim" not in out
    assert out.count("32: sdpa") == 2
    assert "of heads of 64, 80 and of float32: smartattn show --all" in out
    cli.print_thresholds(thresholds, Console(width=200), everything=True)
    out = capsys.readouterr().out
    assert out.count("32: sdpa") == 6
    assert "head dim" in out
    assert "forward, causal, no padding, float32" in out
    assert "--all" not in out


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ({}, "otherwise"),
        ({"device": "cpu"}, "on cpu"),
        ({"padded": True, "packed": False, "causal": False}, "padded, not packed, not causal"),
        ({"min_padding_share": 0.25, "min_q_len": 2}, "from 25% padding on, from 2 queries on"),
        ({"min_kv_len": 3000, "max_kv_len": 9000}, "from 3,000 keys on, up to 9,000 keys"),
    ],
)
def test_conditions_are_words(when: dict[str, Any], words: str) -> None:
    assert str(profile.When(**when)) == words


def test_every_condition_has_words() -> None:
    examples = {"device": "cpu", "padded": True, "packed": True, "causal": True}
    for name in profile.When.model_fields:
        assert str(profile.When(**{name: examples.get(name, 1)})) != "otherwise", name


def test_show_says_why_a_profile_is_not_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = {
        "schema_version": "smartattn-profile/1",
        "name": "foreign",
        "device": {"kind": "cuda", "name": "NVIDIA Imaginary"},
    }
    (tmp_path / "p.json").write_text(json.dumps(foreign))
    monkeypatch.setenv(profiles.ENVIRONMENT, str(tmp_path / "p.json"))
    assert cli.run(["show"]) == 0
    assert "measured on NVIDIA Imaginary" in capsys.readouterr().out


def test_ctrl_c_is_said_and_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(request: Request, report: Any, waiting: Any) -> Outcome:
        report(Progress(1.0, 10.0, 4, "something"))
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate", interrupted)
    assert cli.run([*QUICK, "2"]) == 130
    assert "What was measured is kept" in capsys.readouterr().out


def test_what_went_wrong_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    excluded = {"torch_varlen": "wrong output: relative error 0.5"}
    made = profile.Profile(
        name="p",
        device=machine.identify(CPU),
        date="2026-01-01",
        run=profile.Run(mode="quick", seconds=1.0, samples=3, seed=0, excluded=excluded),
    )
    outcome = Outcome(made, tmp_path / "p.json", tmp_path / "raw", 3, 0, 2, spread=0.4)
    monkeypatch.setattr(calibrate, "calibrate", lambda request, report, waiting: outcome)
    assert cli.run([*QUICK, "2"]) == 0
    out = capsys.readouterr().out
    assert "torch_varlen is left out: wrong output: relative error 0.5" in out
    assert "2 runs did not fit in memory" in out
    assert "vary by 40%" in out


def test_calibration_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(request: Request, report: Any, waiting: Any) -> Outcome:
        raise CalibrationError("nothing could be measured")

    monkeypatch.setattr(calibrate, "calibrate", fails)
    assert cli.run([*QUICK, "2"]) == 2
    assert capsys.readouterr().err == "smartattn: nothing could be measured\n"


def test_too_few_samples_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = machine.identify(CPU)
    assert identity is not None
    header = samples.Header(
        device=identity,
        versions=machine.Versions(),
        date="2026-01-01",
        mode="quick",
        grid=grid.VERSION,
        seed=0,
    )
    samples.save(tmp_path / "raw", header, [])
    assert cli.run(["fit", str(tmp_path / "raw")]) == 2
    assert "too few samples" in capsys.readouterr().err


def test_several_gpus_are_reported_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_gpus(monkeypatch, ["H200", "A100", "L4"])
    made = profile.Profile(
        name="p",
        device=machine.Device(kind="cuda", name="H200", capability="9.0"),
        date="2026-01-01",
        run=profile.Run(mode="quick", seconds=1.0, samples=3, seed=0),
    )
    doubt = "the device's clock fell by 30%"
    good = Outcome(made, tmp_path / "p.json", tmp_path / "raw", 3, slow=2, complaints=(doubt,))
    seen: list[Request] = []

    def all_at_once(requests: list[Request], waiting: Any) -> Any:
        seen.extend(requests)
        yield requests[1], CalibrationError("no room")
        yield requests[0], good
        yield requests[2], good

    monkeypatch.setattr(parallel, "calibrate_all", all_at_once)
    assert cli.run(["calibrate", "--quick", "--cold"]) == 2
    captured = capsys.readouterr()
    assert [str(request.device) for request in seen] == ["cuda:0", "cuda:1", "cuda:2"]
    assert all(request.cold and request.mode == "quick" for request in seen)
    assert captured.out.count("3 samples") == 2
    assert "The device's clock fell by 30%." in captured.out
    assert "2 runs were left out" in captured.out
    assert captured.err == "smartattn: cuda:1: no room\n"


def test_a_profile_moves_from_machine_to_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = profile.load(profiles.shipped_profiles() / "nvidia-h200.json")
    sent = tmp_path / "sent"
    sent.mkdir()
    assert cli.run(["profiles", "export", "nvidia-h200", str(sent)]) == 0
    assert profile.load(sent / "nvidia-h200.json") == shipped
    mine = shipped.model_copy(update={"name": "mine"})
    profile.save(mine, sent / "mine.json")
    assert cli.run(["profiles", "import", str(sent / "mine.json")]) == 0
    out = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "no NVIDIA H200: the profile is kept, not used" in out
    # It is found for that device from now on, before the shipped one.
    assert shipped.device is not None
    assert profiles.find(shipped.device).profile == mine
    assert cli.run(["profiles", "import", str(sent / "mine.json")]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run(["profiles", "import", str(sent / "nvidia-h200.json"), "--force"]) == 0
    assert profiles.find(shipped.device).profile == shipped
    assert cli.run(["profiles", "show", "nvidia-h200", "--map"]) == 0
    assert "how many times as fast a whole layer runs as with the next one" in (
        capsys.readouterr().out
    )
    assert cli.run(["profiles", "remove", "nvidia-h200"]) == 0
    assert not list(profiles.user_profiles().glob("*.json"))
    assert profiles.find(shipped.device).profile == shipped


def test_a_profile_of_no_device_is_not_imported(capsys: pytest.CaptureFixture[str]) -> None:
    default = profiles.shipped_profiles() / "default.json"
    assert cli.run(["profiles", "import", str(default)]) == 2
    assert "names no device" in capsys.readouterr().err


def test_show_draws_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = str(profiles.shipped_profiles() / "nvidia-h200.json")
    assert cli.run(["show", "--profile", shipped, "--map"]) == 0
    out = capsys.readouterr().out
    assert "decode, one query per sequence; batch 16, 16 heads of " in out
    assert "as far as one backend was measured" in out
    assert cli.run(["show", "--plot", str(tmp_path / "map.png")]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert cli.run(["show", "--profile", shipped, "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert cli.run(["show", "--profile", shipped, "--plot", str(tmp_path / "no" / "map.png")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.timing
def test_quick_on_a_cpu_takes_at_most_a_minute(tmp_path: Path) -> None:
    """Imports, measuring, fit and all, with the threads that a user has."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "XDG_DATA_HOME": str(tmp_path / "xdg"),
    }
    command = [sys.executable, "-m", "smartattn", "calibrate", "--device", "cpu", "--quick"]
    output = tmp_path / "p.json"
    start = time.perf_counter()
    subprocess.run([*command, "--output", str(output)], env=environment, check=True, timeout=120)
    assert time.perf_counter() - start < 60
    found = profile.load(output)
    assert {cost.backend for cost in found.costs} == {"sdpa", "sdpa_unpadded"}
    assert {cost.mode for cost in found.costs} == {"forward", "train", "decode"}
