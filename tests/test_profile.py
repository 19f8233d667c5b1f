"""Profiles: what is read, what is refused, in which order they are found, how they are saved."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smartattn import machine, profiles
from smartattn.backends import BACKENDS
from smartattn.call import Call
from smartattn.choose import choose
from smartattn.cost import MAX_EXTRAPOLATION
from smartattn.features import FEATURES, features, regime_of
from smartattn.plan import Pattern, Plan
from smartattn.profile import Profile, ProfileError, load, save
from smartattn.profiles import find, profile_for, set_profile

CPU = torch.device("cpu")
HERE = machine.identify(CPU)
assert HERE is not None


def padded_plan(batch: int = 4, length: int = 64, shortest: int = 16, side: str = "left") -> Plan:
    lengths = np.linspace(shortest, length, batch).astype(int)[:, None]
    keys = np.arange(length)[None, :]
    real = keys >= length - lengths if side == "left" else keys < lengths
    return Plan(batch, length, length, Pattern.CAUSAL, CPU, real=real)


def call_for(plan: Plan, device: str = "cpu", **changes: Any) -> Call:
    given: dict[str, Any] = {
        "device": torch.device(device),
        "dtype": torch.float32,
        "batch": plan.batch,
        "q_len": plan.q_len,
        "kv_len": plan.kv_len,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
        "value_head_dim": 64,
        "self_attention": True,
    }
    return Call(**{**given, **changes})


def cost(backend: str, device_us: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "backend": backend,
        "mode": "forward",
        "layout": "padded",
        "causal": True,
        "dtype": "float32",
        "head_dim": 64,
        "host_us": {},
        "device_us": device_us,
        "longest_kv_len": 512,
        "samples": 10,
        "median_error": 0.01,
        **changes,
    }


def content(**changes: Any) -> dict[str, Any]:
    assert HERE is not None
    return {
        "schema_version": "smartattn-profile/1",
        "name": "mine",
        "device": HERE.model_dump(exclude_none=True),
        "versions": machine.versions("cpu").model_dump(exclude_none=True),
        "date": "2026-01-01",
        "costs": [cost("sdpa", {"call": 10.0}), cost("sdpa_unpadded", {"call": 5.0})],
        **changes,
    }


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test has folders of its own and leaves no profile in force."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "user")
    monkeypatch.delenv(profiles.ENVIRONMENT, raising=False)
    set_profile(None)
    yield
    set_profile(None)


def own_path(tmp_path: Path) -> Path:
    assert HERE is not None
    return tmp_path / "user" / f"{HERE.slug}.json"


# -- what is refused -----------------------------------------------------------------------------

LARGE = 10**400
HOSTILE: dict[str, Any] = {
    "empty": "",
    "truncated": json.dumps(content())[:-40],
    "no JSON": "profile: yes",
    "a list": "[]",
    "null": "null",
    "wrong schema": content(schema_version="smartattn-profile/99"),
    "no schema": {k: v for k, v in content().items() if k != "schema_version"} | {"schema": 1},
    "unknown field": content(surprise=1),
    "field of another type": content(name=5),
    "string for a number": content(costs=[cost("sdpa", {"call": "1"})]),
    "NaN": json.dumps(content()).replace("10.0", "NaN"),
    "infinity": json.dumps(content()).replace("10.0", "Infinity"),
    "overflow to infinity": json.dumps(content()).replace("10.0", "1e999"),
    "negative": content(costs=[cost("sdpa", {"call": -1.0})]),
    "huge": content(costs=[cost("sdpa", {"call": 1e300})]),
    "huge integer": json.dumps(content(costs=[cost("sdpa", {"call": 1.0}, samples=7)])).replace(
        '"samples": 7', f'"samples": {LARGE}'
    ),
    "more digits than Python reads": f'{{"schema_version": {"9" * 5000}}}',
    "duplicate key": '{"name": "a", "name": "b", "schema_version": "smartattn-profile/1"}',
    "duplicate key deep inside": json.dumps(content()).replace(
        '"call": 10.0', '"call": 10.0, "call": 1.0'
    ),
    "deep nesting": "[" * 100_000,
    "deep nesting of objects": '{"a":' * 100_000,
    "unknown feature": content(costs=[cost("sdpa", {"moon": 1.0})]),
    "two costs for one regime": content(costs=[cost("sdpa", {"call": 1.0})] * 2),
    "cost without coefficients": content(costs=[cost("sdpa", {})]),
    "zero head_dim": content(costs=[cost("sdpa", {"call": 1.0}, head_dim=0)]),
    "backend name with a path": content(costs=[cost("../sdpa", {"call": 1.0})]),
    "name with control characters": content(name="a\nWARNING forged"),
    "too many rules": content(rules=[{"prefer": ["sdpa"], "because": "x"}] * 1001),
    "rule without backends": content(rules=[{"prefer": [], "because": "x"}]),
    "share above one": content(
        rules=[{"when": {"min_padding_share": 2.0}, "prefer": ["sdpa"], "because": "x"}]
    ),
    "lone surrogate": '{"name": "\\ud800"}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_content_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", HOSTILE[case])
    with pytest.raises(ProfileError) as caught:
        load(path)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_content_warns_once_and_the_next_source_serves(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.json", HOSTILE[case])
    write(own_path(tmp_path), content(name="next"))
    set_profile(path)
    with caplog.at_level(logging.INFO, "smartattn"):
        assert profile_for(CPU).name == "next"
        assert profile_for(CPU).name == "next"
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(path) in warnings[0].getMessage()
    assert "\n" not in warnings[0].getMessage()


def unusable_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    folder = tmp_path / "a folder"
    folder.mkdir()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        # Sparse: takes no room, but would if it were read.
        file.truncate(2**30)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b'{"name": "\xff\xfe"}')
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    return {
        "folder": (folder, "directory"),
        "fifo": (fifo, "regular file"),
        "large": (large, "larger than"),
        "not UTF-8": (binary, "UTF-8"),
        "missing": (tmp_path / "missing.json", "No such file"),
        "link to itself": (loop, "symbolic links"),
        "device": (Path("/dev/zero"), "regular file"),
    }


@pytest.mark.parametrize(
    "case", ["folder", "fifo", "large", "not UTF-8", "missing", "link to itself", "device"]
)
def test_what_is_no_file_is_passed_over(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, reason = unusable_files(tmp_path)[case]
    with pytest.raises(ProfileError, match=reason):
        load(path)
    set_profile(path)
    assert profile_for(CPU).name == "default"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_no_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.json", content())
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        real = os.open

        def refusing(file: Any, *arguments: Any) -> int:
            if Path(file) == path:
                raise PermissionError(13, "Permission denied", str(file))
            return real(file, *arguments)

        monkeypatch.setattr(os, "open", refusing)
    set_profile(path)
    assert profile_for(CPU).name == "default"
    assert "Permission denied" in caplog.text


def test_reading_leaks_no_descriptor(tmp_path: Path) -> None:
    paths = [path for path, _ in unusable_files(tmp_path).values()]
    paths.append(write(tmp_path / "good.json", content()))
    before = len(os.listdir("/proc/self/fd"))
    for path in paths * 3:
        with contextlib.suppress(ProfileError):
            load(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_profile_of_another_device_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = {"kind": "cuda", "name": "NVIDIA Imaginary 9000", "capability": "9.9"}
    set_profile(write(tmp_path / "p.json", content(device=foreign)))
    assert profile_for(CPU).name == "default"
    assert "NVIDIA Imaginary 9000" in caplog.text


def test_another_number_of_threads_is_another_device(tmp_path: Path) -> None:
    assert HERE is not None
    assert HERE.threads is not None
    other = HERE.model_copy(update={"threads": HERE.threads + 1})
    path = write(tmp_path / "p.json", content(device=other.model_dump(exclude_none=True)))
    assert find(HERE, path).profile.name == "default"
    assert find(other, path).profile.name == "mine"


def test_unknown_backends_of_a_good_profile_are_ignored(tmp_path: Path) -> None:
    costs = [*content()["costs"], cost("warp_drive", {"call": 0.001})]
    rules = [{"prefer": ["warp_drive", "sdpa"], "because": "it is the future"}]
    found = load(write(tmp_path / "p.json", content(costs=costs, rules=rules)))
    plan = padded_plan()
    decision = choose(plan, call_for(plan), found, BACKENDS)
    assert decision.backend.name == "sdpa_unpadded"
    assert found.predictor.predict("warp_drive", plan, call_for(plan)) is None


# -- order ---------------------------------------------------------------------------------------


def test_order_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HERE is not None
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(profiles, "shipped_profiles", lambda: shipped)
    argument = write(tmp_path / "argument.json", content(name="argument"))
    variable = write(tmp_path / "variable.json", content(name="variable"))
    own = write(own_path(tmp_path), content(name="own"))
    for_gpu = write(shipped / f"{HERE.slug}.json", content(name="shipped"))
    default = write(shipped / "default.json", {**content(name="default"), "device": None})
    monkeypatch.setenv(profiles.ENVIRONMENT, str(variable))
    steps = [
        (argument, "argument"),
        (variable, "variable"),
        (own, "own"),
        (for_gpu, "shipped"),
        (default, "default"),
    ]
    given: Path | None = argument
    for path, name in steps:
        found = find(HERE, given)
        assert found.profile.name == name
        assert found.path == path
        path.unlink()
        if path == argument:
            given = None
        if path == variable:
            monkeypatch.delenv(profiles.ENVIRONMENT)
    last = find(HERE, given)
    assert (last.profile.name, last.profile.costs, last.profile.rules) == ("empty", (), ())


def test_the_first_use_says_which_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = write(tmp_path / "bad.json", "{")
    monkeypatch.setenv(profiles.ENVIRONMENT, str(bad))
    own = write(own_path(tmp_path), content(name="own"))
    with caplog.at_level(logging.INFO, "smartattn"):
        for _ in range(3):
            profile_for(CPU)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(lines) == 1
    assert "profile own" in lines[0]
    assert str(own) in lines[0]
    assert str(bad) in lines[0]
    assert "not valid JSON" in lines[0]


def test_other_versions_are_used_with_one_line_of_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    versions = {**content()["versions"], "torch": "1.0.0"}
    write(own_path(tmp_path), content(versions=versions))
    with caplog.at_level(logging.INFO, "smartattn"):
        for _ in range(2):
            assert profile_for(CPU).name == "mine"
    advice = [r.getMessage() for r in caplog.records if "smartattn calibrate" in r.getMessage()]
    assert len(advice) == 1
    assert "torch 1.0.0 then" in advice[0]


def test_same_versions_need_no_advice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(own_path(tmp_path), content())
    with caplog.at_level(logging.INFO, "smartattn"):
        profile_for(CPU)
    assert "smartattn calibrate" not in caplog.text


def test_looked_up_once_per_device_by_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(own_path(tmp_path), content())
    calls = []
    real = profiles.find
    monkeypatch.setattr(profiles, "find", lambda *a: (calls.append(a), real(*a))[1])
    found = []
    start = threading.Barrier(8)

    def look() -> None:
        start.wait()
        found.append(profile_for(CPU))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({id(one) for one in found}) == 1


def test_each_device_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {
        torch.device("cuda", n): machine.Device(kind="cuda", name=f"GPU {n}", capability="9.0")
        for n in range(2)
    }
    monkeypatch.setattr(profiles, "identify", lambda device: gpus[device])
    monkeypatch.setattr(profiles, "versions", lambda kind: machine.Versions())
    for gpu in gpus.values():
        path = tmp_path / "user" / f"{gpu.slug}.json"
        write(path, content(name=gpu.name, device=gpu.model_dump(exclude_none=True)))
    assert [profile_for(device).name for device in gpus] == ["GPU 0", "GPU 1"]


def test_a_device_that_cannot_be_asked_gets_the_default() -> None:
    assert profile_for(torch.device("meta")).name == "default"
    assert profile_for(torch.device("cuda", 77)).name == "default"


def test_set_profile_takes_effect_at_once(tmp_path: Path) -> None:
    assert profile_for(CPU).name == "default"
    set_profile(write(tmp_path / "p.json", content(name="given")))
    assert profile_for(CPU).name == "given"
    set_profile(None)
    assert profile_for(CPU).name == "default"


# -- the shipped files ---------------------------------------------------------------------------


def test_shipped_profiles_are_found_and_valid() -> None:
    folder = profiles.shipped_profiles()
    assert (folder / "default.json").is_file()
    for path in folder.glob("*.json"):
        found = load(path)
        if path.name != "default.json":
            assert found.device is not None
            assert path.stem == found.device.slug


def test_default_rules() -> None:
    default = load(profiles.shipped_profiles() / "default.json")
    assert not default.costs

    def first(plan: Plan, device: str) -> str:
        rule = default.rule(plan, call_for(plan, device))
        assert rule is not None
        assert rule.because
        return rule.prefer[0]

    long, short = padded_plan(length=4096), padded_plan(length=512)
    dense = Plan(2, 4096, 4096, Pattern.CAUSAL, CPU)
    starts = np.zeros((1, 64), dtype=bool)
    starts[0, [0, 20]] = True
    packed = Plan(1, 64, 64, Pattern.CAUSAL, CPU, packed=starts)
    assert first(long, "cuda") == "flash_attention_2"
    assert first(short, "cuda") == "sdpa"
    assert first(dense, "cuda") == "sdpa"
    tiny = padded_plan(length=128)
    for device, about_gpus in (("cuda", True), ("cpu", False)):
        rule = default.rule(tiny, call_for(tiny, device))
        assert rule is not None
        assert ("36585" in rule.because) == about_gpus
    assert first(long, "cpu") == first(short, "cpu") == "sdpa_unpadded"
    assert first(padded_plan(length=4096, shortest=3500), "cpu") == "sdpa", "little padding"
    assert first(padded_plan(length=128), "cpu") == "sdpa"
    assert first(dense, "cpu") == "sdpa"
    keys = np.arange(4096)[None, :] >= np.array([[0], [3000]])
    step = Plan(2, 1, 4096, Pattern.CAUSAL, CPU, real=keys)
    assert step.padding_share > 0.25
    assert first(step, "cpu") == "sdpa", "in decoding a row alone keeps few cores busy"
    assert first(packed, "cuda") == "flash_attention_2"
    assert "sdpa_unpadded" in default.rules[0].prefer


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ({}, True),
        ({"device": "cpu"}, True),
        ({"device": "cuda"}, False),
        ({"padded": True}, True),
        ({"padded": False}, False),
        ({"packed": True}, False),
        ({"causal": True}, True),
        ({"causal": False}, False),
        ({"min_q_len": 64}, True),
        ({"min_q_len": 65}, False),
        ({"min_kv_len": 64}, True),
        ({"min_kv_len": 65}, False),
        ({"max_kv_len": 64}, True),
        ({"max_kv_len": 63}, False),
        ({"min_padding_share": 0.3}, True),
        ({"min_padding_share": 0.5}, False),
    ],
)
def test_each_condition_of_a_rule(when: dict[str, Any], holds: bool) -> None:
    plan = padded_plan()
    assert 0.3 < plan.padding_share < 0.5
    rule = {"when": when, "prefer": ["sdpa"], "because": "test"}
    found = Profile.model_validate_json(json.dumps(content(rules=[rule])))
    assert (found.rule(plan, call_for(plan)) is not None) == holds


# -- prediction ----------------------------------------------------------------------------------


def predicting(*costs: dict[str, Any]) -> Profile:
    return Profile.model_validate_json(json.dumps(content(costs=list(costs))))


def test_prediction_is_features_times_coefficients() -> None:
    plan = padded_plan()
    call = call_for(plan)
    amounts = dict(zip(FEATURES, features(plan, call), strict=True))
    found = predicting(cost("sdpa", {"call": 3.0, "dense_tiles": 100.0}, host_us={"call": 1.0}))
    assert amounts["dense_tiles"] == pytest.approx(4 * 64 * 64 * 8 / 1e6)
    expected = 3.0 + 100.0 * amounts["dense_tiles"]
    assert found.predict("sdpa", plan, call) == pytest.approx(expected)


def test_prediction_is_the_larger_of_host_and_device() -> None:
    plan = padded_plan()
    found = predicting(cost("sdpa", {"call": 3.0}, host_us={"call": 50.0}))
    assert found.predict("sdpa", plan, call_for(plan)) == pytest.approx(50.0)


def test_what_was_not_measured_is_not_predicted() -> None:
    plan = padded_plan()
    call = call_for(plan)
    found = predicting(cost("sdpa", {"call": 3.0}))
    assert found.predict("sdpa", plan, call) is not None
    assert found.predict("flash_attention_2", plan, call) is None
    assert found.predict("sdpa", plan, call_for(plan, dtype=torch.bfloat16)) is None
    assert found.predict("sdpa", plan, call_for(plan, grad=True)) is None
    right = padded_plan(side="right")
    assert regime_of(right, call) != regime_of(plan, call)
    assert found.predict("sdpa", right, call) is None
    dense = Plan(4, 64, 64, Pattern.OTHER, CPU)
    assert found.predict("sdpa", dense, call) is None


def test_extrapolation_has_bounds() -> None:
    found = predicting(cost("sdpa", {"call": 1.0, "dense_tiles": 1.0}, longest_kv_len=16))
    within = padded_plan(2, 16 * MAX_EXTRAPOLATION)
    beyond = padded_plan(2, 16 * MAX_EXTRAPOLATION + 1)
    assert found.predict("sdpa", within, call_for(within)) is not None
    assert found.predict("sdpa", beyond, call_for(beyond)) is None


def test_a_reason_says_where_predictions_end() -> None:
    costs = [cost("sdpa", {"call": 1.0}, longest_kv_len=32)]
    costs.append(cost("sdpa_unpadded", {"call": 2.0}, longest_kv_len=16))
    rules = [{"when": {"padded": True}, "prefer": ["sdpa_unpadded"], "because": "a rule"}]
    for given, says in ((rules, ": a rule"), ([], "; first in order")):
        found = Profile.model_validate_json(json.dumps(content(costs=costs, rules=given)))
        within, beyond = padded_plan(2, 16 * MAX_EXTRAPOLATION), padded_plan(2, 2000)
        assert "fastest" in choose(within, call_for(within), found, BACKENDS).reason
        reason = choose(beyond, call_for(beyond), found, BACKENDS).reason
        assert f"mine beyond 1,024 tokens, the longest that it predicts{says}" in reason
        # Nothing was measured of such calls at any length.
        half = choose(beyond, call_for(beyond, dtype=torch.bfloat16), found, BACKENDS).reason
        assert "beyond" not in half


def test_head_dims_between_and_above_the_measured_ones() -> None:
    plan = padded_plan()
    found = predicting(cost("sdpa", {"call": 10.0}), cost("sdpa", {"call": 30.0}, head_dim=128))

    def predicted(head_dim: int) -> float | None:
        return found.predict(
            "sdpa", plan, call_for(plan, head_dim=head_dim, value_head_dim=head_dim)
        )

    assert predicted(32) == predicted(64) == pytest.approx(10.0)
    assert predicted(80) == predicted(128) == pytest.approx(30.0)
    assert predicted(192) == pytest.approx(45.0)
    assert predicted(512) is None
    wide_values = call_for(plan, head_dim=64, value_head_dim=128)
    assert found.predict("sdpa", plan, wide_values) == pytest.approx(30.0)


def test_half_precision_types_stand_for_each_other_on_gpus_only() -> None:
    plan = padded_plan()
    found = predicting(cost("sdpa", {"call": 1.0}, dtype="bfloat16"))
    half = call_for(plan, "cuda", dtype=torch.float16)
    assert found.predict("sdpa", plan, half) == pytest.approx(1.0)
    assert found.predict("sdpa", plan, call_for(plan, dtype=torch.float16)) is None


def test_padding_stands_for_masks_that_were_not_measured() -> None:
    window = Plan(4, 64, 64, Pattern.CAUSAL, CPU, window=8)
    call = call_for(window)
    assert regime_of(window, call) == regime_of(padded_plan(), call)._replace(layout="masked")  # type: ignore[union-attr]
    plain = cost("sdpa", {"call": 7.0}, layout="plain")
    padded = cost("sdpa", {"call": 2.0})
    masked = cost("sdpa", {"call": 5.0}, layout="masked")
    assert predicting(plain).predict("sdpa", window, call) is None
    assert predicting(plain, padded).predict("sdpa", window, call) == pytest.approx(2.0)
    assert predicting(padded, masked).predict("sdpa", window, call) == pytest.approx(5.0)
    assert predicting(masked).predict("sdpa", padded_plan(), call) is None
    half = call_for(window, "cuda", dtype=torch.float16)
    twin = cost("sdpa", {"call": 3.0}, dtype="bfloat16")
    assert predicting(twin).predict("sdpa", window, half) == pytest.approx(3.0)


def test_predictions_decide() -> None:
    plan = padded_plan()
    call = call_for(plan)
    for sdpa, unpadded, winner in ((1.0, 2.0, "sdpa"), (2.0, 1.0, "sdpa_unpadded")):
        found = predicting(cost("sdpa", {"call": sdpa}), cost("sdpa_unpadded", {"call": unpadded}))
        decision = choose(plan, call, found, BACKENDS)
        assert decision.backend.name == winner
        assert decision.predicted_us == pytest.approx(1.0)


# -- saving --------------------------------------------------------------------------------------


def test_saved_profiles_read_back_equal_and_are_readable(tmp_path: Path) -> None:
    original = Profile.model_validate_json(json.dumps(content()))
    save(original, tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert load(tmp_path / "p.json") == original
    assert text.endswith("}\n")
    assert '\n  "name": "mine"' in text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["p.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Profile.model_validate_json(json.dumps(content()))
    save(original, tmp_path / "p.json")

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="No space left"):
        save(original.model_copy(update={"name": "new"}), tmp_path / "p.json")
    assert load(tmp_path / "p.json") == original
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["p.json"]


def test_readers_never_see_half_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    small = Profile.model_validate_json(json.dumps(content(name="small")))
    large = Profile.model_validate_json(json.dumps(content(name="large", notes="x" * 2000)))
    save(small, path)
    done = threading.Event()

    def write_on() -> None:
        for turn in range(60):
            save(large if turn % 2 else small, path)
        done.set()

    writer = threading.Thread(target=write_on)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(load(path).name)
    writer.join()
    assert seen <= {"small", "large"}


def test_a_saved_link_stays_a_link(tmp_path: Path) -> None:
    target = write(tmp_path / "elsewhere" / "p.json", "{}")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    save(Profile.model_validate_json(json.dumps(content())), link)
    assert link.is_symlink()
    assert load(target).name == "mine"


def test_saving_for_the_user_is_found_again(tmp_path: Path) -> None:
    path = profiles.save_for_user(Profile.model_validate_json(json.dumps(content())))
    assert path == own_path(tmp_path)
    assert profile_for(CPU).name == "mine"
    with pytest.raises(ValueError, match="device"):
        profiles.save_for_user(Profile(name="of nothing"))


# -- identity ------------------------------------------------------------------------------------


def test_slugs_are_file_names() -> None:
    device = machine.Device(kind="cuda", name="NVIDIA/../../etc (R) H200 ", capability="9.0")
    assert device.slug == "nvidia-etc-r-h200"
    assert machine.Device(kind="cuda", name="///").slug == "unknown"
    cpu = machine.Device(kind="cpu", name="AMD EPYC", threads=2)
    assert cpu.slug == "cpu-amd-epyc-2-threads"


def test_identity_of_this_machine() -> None:
    assert HERE is not None
    assert HERE.kind == "cpu"
    assert HERE.threads == torch.get_num_threads()
    assert machine.identify(torch.device("meta")) is None
    found = machine.versions("cpu")
    assert found.torch == str(torch.__version__)
    assert found.cuda is None


def test_differences_name_both_versions() -> None:
    then = machine.Versions(torch="1", flash_attn=None, smartattn="0.1")
    now = machine.Versions(torch="2", flash_attn="2.8", smartattn="0.2")
    assert then.differences(now) == ["torch 1 then, 2 now", "flash-attn absent then, 2.8 now"]
    assert now.differences(now) == []


def test_flash_attention_3_counts_where_it_was_recorded() -> None:
    then = machine.Versions(fa3_fwd="0.0.3", flash_attn_3="3.0.0b1")
    now = machine.Versions(fa3_fwd="0.0.4")
    assert then.differences(now) == [
        "fa3-fwd 0.0.3 then, 0.0.4 now",
        "flash-attn-3 3.0.0b1 then, absent now",
    ]
    assert machine.Versions(flash_attn_4="4.0.0b35").differences(now) == [
        "flash-attn-4 4.0.0b35 then, absent now"
    ]
    # Profiles of before used it and do not say so.
    assert machine.Versions().differences(now) == []
    assert machine.Versions().differences(machine.Versions(flash_attn_4="4.0.0b36")) == []


def test_the_versions_of_flash_attention_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "flash-attn": "2.8.3",
        "fa3-fwd": "0.0.3",
        "flash-attn-3": "3.0.0b1",
        "flash-attn-4": "4.0.0b36",
    }
    right = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: installed.get(name) or right(name)
    )
    found = machine.versions("cuda")
    told = (found.flash_attn, found.fa3_fwd, found.flash_attn_3, found.flash_attn_4)
    assert told == tuple(installed.values())
    assert machine.versions("cpu").fa3_fwd is None
