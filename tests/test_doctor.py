"""``smartattn doctor``: it finds what is wrong, and says what to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from smartattn import cli, doctor, machine, profiles
from smartattn.backends import BACKENDS, flash_attention_2
from smartattn.backends.flash_attention_2 import FlashAttention2Backend
from smartattn.backends.sdpa import SdpaBackend
from smartattn.call import Call, Runner
from smartattn.plan import Plan


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "profiles")
    monkeypatch.delenv(profiles.ENVIRONMENT, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    profiles.set_profile(None)
    yield
    profiles.set_profile(None)


def altered(change: Callable[[torch.Tensor], torch.Tensor], alter: str = "altered") -> Any:
    class Altered(SdpaBackend):
        name = alter

        def bind(self, plan: Plan, call: Call) -> Runner:
            right = super().bind(plan, call)

            def run(q: Any, k: Any, v: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
                return change(right(q, k, v, arguments))

            return run

    return Altered()


def fails(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image\nis available")


def on_cpu(report: doctor.Report) -> dict[str, doctor.BackendReport]:
    return {backend.backend: backend for backend in report.devices[-1].backends}


def test_a_sound_machine() -> None:
    report = doctor.examine()
    assert report.healthy
    assert report.versions["torch"] == str(torch.__version__)
    found = on_cpu(report)
    assert found["sdpa"].health == "works"
    assert found["sdpa"].passed == found["sdpa"].tried == len(doctor.cases("cpu"))
    assert found["sdpa_unpadded"].health == "works"
    assert 0 < found["sdpa_unpadded"].tried < found["sdpa"].tried, "some have no padding to remove"
    assert 0 < found["sdpa"].worst <= 1
    for name in ("torch_varlen", "flash_attention_2", "flash_attention_3"):
        assert found[name].problems == ("runs on cuda only",), "no package helps here"
    assert found["torch_varlen"].fix is None, "no command turns a CPU into a GPU"
    assert found["eager"].health == "untested"


@pytest.mark.parametrize(
    ("change", "health", "says"),
    [
        (lambda out: out * 1.01, "wrong", "relative error 0.0"),
        (lambda out: out * float("nan"), "wrong", "relative error inf"),
        (lambda out: out.flip(1), "wrong", "wrong output"),
        (fails, "fails", "RuntimeError: no kernel image is available, for forward"),
    ],
)
def test_a_backend_that_is_not_right_is_named(change: Any, health: str, says: str) -> None:
    report = doctor.examine([*BACKENDS, altered(change)])
    assert not report.healthy
    found = on_cpu(report)["altered"]
    assert found.health == health
    assert says in found.problems[0]
    assert on_cpu(report)["sdpa"].health == "works"


def test_an_error_in_one_dtype_alone_is_found() -> None:
    def change(output: torch.Tensor) -> torch.Tensor:
        return output * 1.1 if output.dtype == torch.bfloat16 else output

    found = on_cpu(doctor.examine([altered(change)]))["altered"]
    assert found.health == "wrong"
    assert "bfloat16" in found.problems[0]
    assert 0 < found.passed < found.tried


def test_when_time_is_up_every_backend_has_had_a_turn() -> None:
    found = on_cpu(doctor.examine(seconds=0.0))
    assert found["sdpa"].tried == 1
    assert found["sdpa_unpadded"].tried == 1
    slow = altered(lambda out: (time.sleep(0.05), out)[1])
    found = on_cpu(doctor.examine([slow], seconds=0.1))
    assert 1 <= found["altered"].tried < len(doctor.cases("cpu"))


def test_what_builds_kernels_comes_last_and_trains_first() -> None:
    order: list[str] = []

    class Builds(SdpaBackend):
        name = "builds"

        def built_for(self, plan: Plan, call: Call) -> Any:
            return call.grad

        def bind(self, plan: Plan, call: Call) -> Runner:
            order.append("train" if call.grad else "forward")
            time.sleep(0.5)
            return super().bind(plan, call)

    usual = altered(lambda out: (order.append("usual"), out)[1])
    found = on_cpu(doctor.examine([Builds(), usual], seconds=0.3))
    # One call, however long it takes, and none less of the others for it.
    assert found["builds"].tried == found["builds"].passed == 1
    assert found["altered"].tried > 1
    assert order.index("train") == len(order) - 1


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        (
            "flash-attn cannot be imported: ModuleNotFoundError: No module named 'flash_attn'",
            "pip install --no-build-isolation 'flash-attn>=2.8,<3'",
        ),
        ("flash-attn 2 is needed, 1.0.9 is installed", "'flash-attn>=2.8,<3'"),
        (
            "flash-attn cannot be imported: ImportError: undefined symbol: _ZN3c104cuda9Set",
            "--force-reinstall --no-deps --no-cache-dir",
        ),
    ],
)
def test_what_is_missing_comes_with_a_command(
    reason: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attention_2, "_package", lambda: (None, reason))
    backend = FlashAttention2Backend()
    remedy = backend.remedy()
    assert remedy is not None
    assert fix in remedy
    verdict = doctor._verdict(backend, doctor._Tally(), torch.device("cuda"))
    assert verdict.health == "unusable"
    assert (verdict.problems, verdict.fix) == ((reason,), remedy)


def test_a_torch_without_cuda_beside_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    ((problem, fix),) = doctor._problems(0)
    assert "without CUDA" in problem
    assert fix == "pip install --force-reinstall torch"
    assert doctor._problems(1) == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    ((problem, _),) = doctor._problems(0)
    assert "finds no GPU" in problem


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "profile default, the built-in default" in out
    assert "sdpa_unpadded" in out
    assert "Every backend that was tested gives right answers" in out
    assert "; eager was not tested." in out
    assert "shipped for this device: none" in out
    identity = machine.identify(torch.device("cpu"))
    assert str(identity) in out

    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True

    broken = doctor.examine([altered(lambda out: -out)])
    monkeypatch.setattr(doctor, "examine", lambda seconds: broken)
    assert cli.run(["doctor"]) == 1
    assert "wrong output" in capsys.readouterr().out
    assert cli.run(["doctor", "--json"]) == 1


def test_profiles_that_are_passed_over_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setenv(profiles.ENVIRONMENT, str(tmp_path / "broken.json"))
    profiles.set_profile(None)
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "broken.json cannot be used: not valid JSON" in out


def test_what_slows_a_backend_down_is_told() -> None:
    class Hampered(SdpaBackend):
        name = "hampered"

        def handicap(self, device: torch.device) -> str | None:
            return f"no shortcut on {device}"

    report = doctor.examine((SdpaBackend(), Hampered())).devices[-1]
    assert "hampered: no shortcut on cpu" in report.remarks
    assert not any(remark.startswith("sdpa:") for remark in report.remarks)


def test_tests_that_time_was_too_short_for_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(doctor.cases("cpu"))
    report, whole = doctor.examine(seconds=0.0), doctor.examine(seconds=60.0)
    assert report.devices[-1].reached == 0
    assert report.devices[-1].cases == total
    monkeypatch.setattr(doctor, "examine", lambda seconds: report)
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f" s with 0 of {total} calls done, not tested: padded forwards, decoding" in out
    assert "in the calls that were tried" in out
    assert whole.devices[-1].reached == total
    monkeypatch.setattr(doctor, "examine", lambda seconds: whole)
    assert cli.run(["doctor"]) == 0
    assert "Stopped after" not in capsys.readouterr().out


def test_one_of_each_kind_of_call_comes_before_a_second_of_any() -> None:
    for kind, dtypes in (("cuda", 3), ("cpu", 2)):
        found = doctor.cases(kind)
        assert len(found) == len(set(found)) == 9 * dtypes
        words = [doctor._kind(case) for case in found]
        kinds = len(set(words))
        assert kinds == 7
        for number in range(dtypes):
            part = slice(number * kinds, (number + 1) * kinds)
            assert len(set(words[part])) == kinds
            assert len({case.dtype for case in found[part]}) == 1
        assert len({case.dtype for case in found[: dtypes * kinds]}) == dtypes


def test_what_was_not_reached_is_named_and_more_time_can_be_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor.cases("cpu")
    names = (
        *("decoding", "training", "packed sequences", "windows", "forwards without padding"),
        "forwards of encoders",
    )
    assert doctor._unreached(found, 1) == names
    assert doctor._unreached(found, 3) == names[2:]
    assert doctor._unreached(found, len(names) + 1) == ()
    asked: list[float] = []
    report = doctor.examine(seconds=0.0)

    def examine(seconds: float) -> doctor.Report:
        asked.append(seconds)
        return report

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli.run(["doctor"]) == 0
    assert (
        f", not tested: padded forwards, {', '.join(names)}; --seconds" in capsys.readouterr().out
    )
    assert cli.run(["doctor", "--seconds", "30"]) == 0
    assert asked == [doctor.SECONDS, 30.0]


def test_the_versions_of_all_flash_attentions_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = machine.Versions(
        flash_attn="2.8.3", fa3_fwd="0.0.3", flash_attn_3="3.0.0b1", flash_attn_4="4.0.0b36"
    )
    monkeypatch.setattr(doctor, "versions", lambda kind: found)
    assert cli.run(["doctor"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "flash-attn 2.8.3, fa3-fwd 0.0.3, flash-attn-3 3.0.0b1, flash-attn-4 4.0.0b36" in first
