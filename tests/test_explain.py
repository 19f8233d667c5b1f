"""``smartattn.explain`` and the command: what it says is what a model gets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import smartattn
from smartattn import cli, machine, profile, profiles, workload
from smartattn.explaining import explain
from smartattn.explanation import Winner
from smartattn.stack_rule import StackRule, StackWhen
from smartattn.units import format_us, span_us

from .agreement import MASKS, WIDTH, run
from .tiny_models import from_config, tiny_config, tiny_model, token_ids

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128}
COMMAND = ["explain", "--heads", "32", "--kv-heads", "8", "--head-dim", "128", "--causal"]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "profiles")
    monkeypatch.delenv(profiles.ENVIRONMENT, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    profiles.set_profile(None)
    yield
    profiles.set_profile(None)


def cost(backend: str, **coefficients: float) -> dict[str, Any]:
    return {
        "backend": backend,
        "mode": "forward",
        "layout": "padded",
        "causal": True,
        "dtype": "float32",
        "head_dim": 64,
        "host_us": {},
        "device_us": coefficients,
        "longest_kv_len": 4096,
        "samples": 10,
        "median_error": 0.1,
    }


@pytest.fixture
def crossing(tmp_path: Path) -> profile.Profile:
    """A profile of this CPU: sdpa costs pairs, sdpa_unpadded 1,000 us whatever the length."""
    identity = machine.identify(CPU)
    assert identity is not None
    made = profile.Profile.model_validate_json(
        json.dumps(
            {
                "name": "crossing",
                "device": identity.model_dump(),
                "costs": [
                    cost("sdpa", dense_tiles=1.0, call=10.0) | {"peak_bytes": {"call": 3 * 2**20}},
                    cost("sdpa_unpadded", call=1000.0) | {"error": 2.5e-7},
                    *(
                        cost(backend, call=us) | {"causal": False, "longest_kv_len": 1000}
                        for backend, us in (("sdpa", 2000.0), ("sdpa_unpadded", 1000.0))
                    ),
                ],
            }
        )
    )
    profile.save(made, tmp_path / "crossing.json")
    profiles.set_profile(tmp_path / "crossing.json")
    return made


PADDED = {"batch": 1, "heads": 1, "head_dim": 64, "causal": True, "padding": 0.5, "side": "left"}


@pytest.mark.usefixtures("crossing")
def test_the_fastest_prediction_comes_first_and_the_crossover_is_found() -> None:
    short = explain(seq_len=100, device="cpu", **PADDED)  # type: ignore[arg-type]
    assert short.backend == "sdpa"
    assert [(o.backend, o.status, o.predicted_us) for o in short.options[:2]] == [
        ("sdpa", "chosen", pytest.approx(10 + 0.01)),
        ("sdpa_unpadded", "slower", pytest.approx(1000.0)),
    ]
    long = explain(seq_len=40_000, device="cpu", **PADDED)  # type: ignore[arg-type]
    assert [o.backend for o in long.options[:2]] == ["sdpa_unpadded", "sdpa"]
    # 10 + length² / 10⁶ is 1000 and the 3% that do not count at 31,937 tokens; a change is found
    # to within a 64th.
    for answer in (short, long):
        first, second = answer.winners
        assert (first.backend, first.from_seq_len) == ("sdpa", 0)
        assert second.backend == "sdpa_unpadded"
        assert second.from_seq_len == pytest.approx(31_937, rel=1 / 64)
    assert "crossing" in short.reason
    assert short.assumption is None


@pytest.mark.usefixtures("crossing")
def test_what_is_small_has_a_column() -> None:
    request: dict[str, Any] = {"seq_len": 100, "device": "cpu", **PADDED}
    time = explain(**request)
    assert time.header == ("backend", "predicted", "remark")
    assert not any(line.startswith("objective: ") for line in time.lines())
    assert time.lines()[0].startswith("predicted: the time of one call, and 1/24 of")
    assert time.waits_for is None
    assert time.as_dict()["options"][0]["device_us"] is None, "one and the same on a CPU"
    assert any(line.startswith('"-": not measured') for line in time.lines())
    memory = explain(**request, objective="memory")
    assert memory.header == ("backend", "predicted", "peak memory", "remark")
    assert [row[:3] for row in memory.rows()[:2]] == [
        ("sdpa", "10.0 us", "3.0 MiB"),
        ("sdpa_unpadded", "1.00 ms", "-"),
    ]
    assert "objective: memory within 1.5 times the fastest" in memory.lines()
    error = explain(**request, objective="accuracy")
    assert error.header == ("backend", "predicted", "expected error", "remark")
    assert error.rows()[0][:3] == ("sdpa", "10.0 us", "-")
    assert error.rows()[1][:3] == ("sdpa_unpadded", "1.00 ms", "2.5e-07")
    for answer in (time, memory, error):
        table = str(answer).splitlines()[1 : 2 + len(answer.options)]
        assert table[0].split() == " ".join(answer.header).split()
        assert all(len(row) == len(answer.header) for row in answer.rows())


@pytest.mark.parametrize(
    ("objective", "column", "unit"),
    [("memory", "peak memory", " MiB"), ("accuracy", "expected error", " 0.00")],
)
def test_the_command_prints_what_is_small(
    objective: str, column: str, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMAND, "--batch", "8", "--seq-len", "2048", "--padding", "0.4"]
    arguments += ["--device", "nvidia-h200", "--objective", objective]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert column in out
    (chosen,) = [line for line in out.splitlines() if " chosen " in line]
    assert unit in chosen
    assert cli.run([*arguments, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["options"][0]
    assert first["predicted_bytes"] > 0
    assert first["expected_error"] > 0


@pytest.mark.usefixtures("crossing")
def test_a_rule_beyond_what_is_predicted_is_told() -> None:
    """Measured up to 1,000 tokens, so predicted up to 64,000."""
    request: dict[str, Any] = {"device": "cpu", **PADDED, "side": "right", "causal": False}
    within = explain(seq_len=60_000, **request)
    assert within.unmeasured is None
    assert not any(line.startswith("not measured") for line in within.lines())
    first, second = within.winners
    assert (first.backend, first.by_rule, second.by_rule) == ("sdpa_unpadded", False, True)
    assert second.from_seq_len == pytest.approx(64_000, rel=1 / 32)
    assert within.crossovers.endswith(f"tokens {second.backend} by a rule (not measured)")
    assert "from about 6" in within.crossovers, "64 times what happened to be measured"
    assert "extrapolated: beyond the 1,000 tokens of a row measured" in within.lines()
    assert "extrapolated" not in str(explain(seq_len=1000, **request))
    beyond = explain(seq_len=100_000, **request)
    assert beyond.options[0].predicted_us is None
    assert beyond.rows()[0][-1] == "chosen; not measured"
    assert beyond.unmeasured is not None
    assert "64 times the longest length measured; a rule decides" in beyond.unmeasured
    assert f"not measured: {beyond.unmeasured}" in beyond.lines()
    # Of this kind nothing was measured at any length.
    never = explain(seq_len=100, dtype="bfloat16", **request)
    assert "predicts fewer than two backends" in (never.unmeasured or "")
    assert not any("by a rule" in line for line in never.lines() if line.startswith("by length"))


@pytest.mark.parametrize(
    ("winners", "says"),
    [
        (((0, "a", False),), "a at every length"),
        (
            ((0, "a", False), (9, "b", False), (20, "a", False)),
            "a, from 9 tokens b, from 20 tokens a",
        ),
        (
            ((0, "a", False), (9, "b", False), (20, "a", False), (40, "b", False)),
            "a, from 9 tokens b or a, from 40 tokens b",
        ),
        (
            (
                *((0, "a", False), (204, "b", False), (257, "a", False), (355, "b", False)),
                *((385, "a", False), (484, "c", False), (900, "d", False), (950, "c", False)),
            ),
            "a, from about 200 tokens b or a, from about 380 tokens a, from about 480 tokens c, "
            "from about 900 tokens d, from about 950 tokens c",
        ),
        (
            ((0, "a", False), (9, "b", False), (20, "a", True), (40, "b", False)),
            "a, from 9 tokens b, from 20 tokens a by a rule (not measured), from 40 tokens b",
        ),
        (((0, "a", True),), "a at every length"),
        ((), "none at every length"),
        (((0, "a", False), (9, "b", False)), "a, from 9 tokens b"),
        (((0, "a", True), (9, "b", True)), "a, from 9 tokens b"),
        (((0, "a", True), (257, "b", True)), "a, from 257 tokens b"),
        (
            ((0, "a", False), (58253, "b", True)),
            "a, from about 58,000 tokens b by a rule (not measured)",
        ),
        (
            ((0, "a", False), (9, "b", False), (4000, "b", True)),
            "a, from 9 tokens b (from about 4,000 on by a rule, not measured)",
        ),
        (
            ((0, "a", False), (9, "a", True)),
            "a at every length (from 9 on by a rule, not measured)",
        ),
        (
            ((0, "a", True), (9, "a", False), (4000, "b", True)),
            "a (up to 8 by a rule, not measured), "
            "from about 4,000 tokens b by a rule (not measured)",
        ),
        (
            ((0, "a", False), (9, "a", True), (20, "a", False), (40, "b", False)),
            "a (from 9 to 19 by a rule, not measured), from 40 tokens b",
        ),
    ],
)
def test_no_switch_to_the_same_backend_is_printed(winners: Any, says: str) -> None:
    made = tuple(Winner(*winner) for winner in winners)
    assert replace(explain(seq_len=64, device="cpu", **SIZES), winners=made).crossovers == says


def test_what_a_call_adds_to_its_layer_is_not_taken_for_the_time_of_a_kernel() -> None:
    """A decoding step waits for the host: its kernel runs while the host goes on."""
    shape: dict[str, Any] = {**SIZES, "batch": 32, "padding": 0.4, "device": "nvidia-h200"}
    step = explain(**shape, seq_len=4096, decode=True)
    chosen = step.options[0]
    assert step.waits_for == "host"
    assert chosen.predicted_us is not None
    assert chosen.device_us is not None
    assert chosen.host_us is not None
    assert chosen.host_us < chosen.predicted_us < chosen.device_us
    assert step.header == ("backend", "adds to layer", "host", "device", "shared", "remark")
    row = step.rows()[0]
    figures = (chosen.predicted_us, chosen.host_us, chosen.device_us, chosen.shared_us)
    assert row[1:5] == tuple(map(format_us, figures))
    text = str(step)
    assert step.idle_us is not None
    idle = format_us(step.idle_us)
    assert f"leaves the device idle for {idle}: that much of a call's device time adds" in text
    # What is prepared once per forward comes on top.
    assert chosen.predicted_us >= max(chosen.host_us, chosen.device_us - step.idle_us)
    assert f"predicted to add {row[1]} to a layer that waits for the host" in step.reason
    assert json.loads(step.to_json())["captions"] == step.captions()
    prefill = explain(**shape, seq_len=2048, causal=True)
    assert prefill.waits_for == "device"
    chosen = prefill.options[0]
    assert (chosen.predicted_us or 0) >= (chosen.device_us or 0) > (chosen.host_us or 0)
    assert "the rest of the layer leaves the host idle for " in str(prefill)


def test_calls_on_their_own_take_the_longer_of_host_and_device(tmp_path: Path) -> None:
    shipped = profile.load(profiles.shipped_profiles() / "nvidia-h200.json")
    (tmp_path / "profiles").mkdir()
    alone = shipped.model_copy(update={"surroundings": None})
    profile.save(alone, tmp_path / "profiles" / "nvidia-h200.json")
    answer = explain(**SIZES, batch=4, seq_len=256, causal=True, device="nvidia-h200")
    assert answer.waits_for is None
    assert answer.header == ("backend", "predicted", "host", "device", "shared", "remark")
    assert answer.captions()[0].startswith("predicted: the longer one of host and device")
    assert "in a layer" not in answer.reason
    for option in answer.options:
        if option.predicted_us is not None:
            assert option.predicted_us >= max(option.host_us or 0, option.device_us or 0) > 0


def test_a_ratio_that_says_nothing_is_not_printed() -> None:
    shape: dict[str, Any] = {**SIZES, "batch": 1, "packed": 16, "causal": True, "grad": True}
    answer = explain(**shape, seq_len=32768, objective="memory", device="nvidia-h200")
    assert answer.reason.endswith(" MiB predicted, also the fastest")
    first, second, *others = answer.options
    us = first.predicted_us
    assert us is not None
    size = first.predicted_bytes
    assert size is not None
    for factor, says in (
        (1.004, "as fast, to within 1%"),
        (0.996, "as fast, to within 1%"),
        (1.02, "adds 1.02 times as much"),
        (0.9, "adds 0.90 times as much"),
    ):
        row = replace(second, predicted_us=us * factor, predicted_bytes=size * 1.5)
        found = replace(answer, options=(first, row, *others))
        # What is to be small comes first.
        assert found.rows()[1][-1] == f"1.50 times the memory, {says}"
        assert replace(found, objective="latency").rows()[1][-1] == says
        alone = replace(found, objective="latency", waits_for=None)
        assert alone.rows()[1][-1] == says.replace("adds", "").replace("much", "long").strip()


def test_a_profile_of_rules_alone_does_not_apologise() -> None:
    answer = explain(seq_len=64, padding=0.5, device="cpu", causal=True, **SIZES)
    assert answer.profile == "default"
    assert answer.unmeasured is None
    assert "not measured:" not in str(answer)
    # One backend alone: there is nothing that a rule could decide.
    packed = explain(seq_len=4096, packed=16, device="cpu", causal=True, **SIZES)
    assert not any(winner.by_rule for winner in packed.winners)


def test_refusals_are_all_there() -> None:
    answer = explain(seq_len=64, device="cpu", dtype="float32", causal=True, **SIZES)
    refused = {o.backend: o.reasons for o in answer.options if o.status == "refuses"}
    assert "runs on cuda, given cpu" in refused["torch_varlen"]
    assert "takes bfloat16 or float16, given float32" in refused["torch_varlen"]
    assert "no padding to remove" in refused["sdpa_unpadded"]
    (eager,) = [o for o in answer.options if o.backend == "eager"]
    assert eager.status == "set aside"


def test_a_rule_is_quoted() -> None:
    answer = explain(seq_len=64, padding=0.5, device="cpu", causal=True, **SIZES)
    assert answer.reason.startswith("rule of profile default: SDPA takes every call")
    assert "36585" not in answer.reason, "that is about GPUs"
    assert answer.options[0].predicted_us is None


def test_packed_sequences_set_the_dense_mask_aside() -> None:
    answer = explain(seq_len=4096, packed=16, device="cpu", causal=True, **SIZES)
    assert answer.backend == "sdpa_unpadded"
    (sdpa,) = [o for o in answer.options if o.backend == "sdpa"]
    assert sdpa.status == "set aside"
    assert "4,096 x 4,096" in sdpa.reasons[0]


def test_rows_one_after_the_other_are_set_aside_on_a_gpu() -> None:
    answer = explain(
        batch=8, seq_len=2048, padding=0.4, causal=True, device="NVIDIA H200", dtype="float32",
        **SIZES,
    )  # fmt: skip
    assert answer.backend == "sdpa"
    (other,) = [o for o in answer.options if o.backend == "sdpa_unpadded"]
    assert other.status == "set aside"
    # A time would look like a reason to choose it.
    assert other.predicted_us is None
    assert other.reasons == ("rows of several lengths would run one after the other",)


@pytest.mark.parametrize(
    ("change", "missing"), [({"window": 512}, "windows"), ({"dtype": "float16"}, "float16")]
)
def test_what_the_measured_build_lacks_is_refused_elsewhere(
    change: dict[str, Any], missing: str
) -> None:
    """The profile says that fa3-fwd was there, which has neither."""
    shape: dict[str, Any] = {**SIZES, "batch": 8, "seq_len": 4096, "causal": True}
    plain = explain(**shape, device="nvidia-h200")
    assert plain.backend == "flash_attention_3"
    answer = explain(**shape, **change, device="nvidia-h200")
    (option,) = [one for one in answer.options if one.backend == "flash_attention_3"]
    assert option.reasons == (f"the build of fa3-fwd has no {missing}",)
    assert answer.backend != "flash_attention_3"


def test_what_is_shared_is_in_the_first_figure() -> None:
    shape: dict[str, Any] = {**SIZES, "batch": 8, "seq_len": 512, "padding": 0.4, "causal": True}
    answer = explain(**shape, device="nvidia-h200")
    assert answer.header[2:5] == ("host", "device", "shared")
    assert answer.idle_us is not None
    for option in answer.options:
        if option.predicted_us is not None:
            own = {"host": option.host_us, "device": option.device_us}
            other = "device" if answer.waits_for == "host" else "host"
            own[other] = max(0.0, own[other] - answer.idle_us)
            assert option.predicted_us == pytest.approx(max(own.values()) + option.shared_us)


@pytest.mark.parametrize(
    ("objective", "slowdown", "ranks"),
    [
        ("latency", None, "adds to layer: by how much one call lengthens its layer; this ranks"),
        (
            "memory",
            1.5,
            "above its inputs; this ranks the backends within 1.5 times the fastest\n",
        ),
        ("accuracy", None, "against float64; this ranks the backends\n"),
    ],
)
def test_the_figure_that_ranks_is_named(objective: Any, slowdown: Any, ranks: str) -> None:
    shape: dict[str, Any] = {**SIZES, "batch": 8, "seq_len": 512, "padding": 0.4, "causal": True}
    with smartattn.use(objective=objective, max_slowdown=slowdown):
        said = str(explain(**shape, device="nvidia-h200"))
    assert ranks in said
    assert said.count("ranks the backends") == 1


@pytest.mark.parametrize("name", ["NVIDIA H200", "nvidia-h200", "nvidia h200"])
def test_a_gpu_that_is_not_here(name: str) -> None:
    answer = explain(batch=8, seq_len=2048, padding=0.4, causal=True, device=name, **SIZES)
    assert answer.workload.dtype == "bfloat16"
    assert answer.profile == "nvidia-h200"
    assert answer.assumption is not None
    status = {o.backend: o.status for o in answer.options}
    assert status["flash_attention_2"] in ("chosen", "slower")
    assert status["torch_varlen"] in ("chosen", "slower")
    timed = [o.predicted_us for o in answer.options if o.status in ("chosen", "slower")]
    assert timed == sorted(timed, key=lambda us: us or 0)
    # float32 is refused there too: what is assumed is the machine, not what kernels take.
    exact = explain(seq_len=64, padding=0.4, dtype="fp32", device=name, **SIZES)
    refused = {o.backend: o.reasons for o in exact.options if o.status == "refuses"}
    assert refused["flash_attention_2"] == ("takes bfloat16 or float16, given float32",)


def test_packages_that_a_profile_does_not_name_are_not_taken_to_be_there(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"seq_len": 64, "device": "nvidia-h200", **SIZES}
    answer = explain(**sizes)
    refused = {o.backend: o.reasons for o in answer.options if o.status == "refuses"}
    assert refused["flash_attention_4"] == ("the profile names no version of flash-attn-4",)
    assert "flash_attention_3" not in refused
    assert "and no others" in (answer.assumption or "")
    # One of before may have measured a FlashAttention-3 that it does not name.
    shipped = profile.load(profiles.shipped_profiles() / "nvidia-h200.json")
    assert shipped.versions is not None
    before = shipped.versions.model_copy(update={"fa3_fwd": None})
    (tmp_path / "profiles").mkdir()
    path = tmp_path / "profiles" / "nvidia-h200.json"
    profile.save(shipped.model_copy(update={"versions": before}), path)
    answer = explain(**sizes)
    assert "flash_attention_3" not in {o.backend for o in answer.options if o.status == "refuses"}


def test_an_old_gpu_refuses_by_its_own_capability(tmp_path: Path) -> None:
    old = {"name": "old", "device": {"kind": "cuda", "name": "NVIDIA T4", "capability": "7.5"}}
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "nvidia-t4.json").write_text(json.dumps(old))
    answer = explain(seq_len=64, padding=0.4, device="NVIDIA T4", **SIZES)
    refused = {o.backend: o.reasons for o in answer.options if o.status == "refuses"}
    assert refused["torch_varlen"] == ("needs compute capability 8.0, the device has 7.5",)
    assert answer.profile == "old"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_it_says_what_a_model_gets(padding: str) -> None:
    """The same reason as in a trace of a real forward of those sizes."""
    model = tiny_model("llama")
    with smartattn.trace() as trace:
        run(model, "smart", input_ids=token_ids(3, WIDTH), attention_mask=MASKS[padding])
    (row,) = trace.rows
    answer = explain(
        batch=3,
        seq_len=WIDTH,
        heads=row.heads,
        kv_heads=row.kv_heads,
        head_dim=row.head_dim,
        causal=True,
        padding=row.facts["padding_share"],
        side=padding,  # type: ignore[arg-type]
        dtype=row.dtype,
        device="cpu",
    )
    assert (answer.backend, answer.reason) == (row.backend, row.reason)
    refused = {o.backend: o.reasons for o in answer.options if o.status == "refuses"}
    # Llama's own code has an eager function, tiny or not.
    assert refused == row.refused


def test_the_block_around_it_counts() -> None:
    request = {"seq_len": 64, "padding": 0.5, "causal": True, "device": "cpu", **SIZES}
    with smartattn.use(backends="sdpa_unpadded"):
        assert explain(**request).backend == "sdpa_unpadded"
        with smartattn.use(pad_output="sdpa"):
            nothing = explain(**request)
    assert nothing.backend is None
    assert "padding positions of the output are to be kept" in nothing.reason
    assert nothing.winners == ()
    assert explain(**request, pad_output="sdpa").backend == "sdpa"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"padding": 1.0}, "share"),
        ({"padding": -0.1}, "share"),
        ({"padding": float("nan")}, "share"),
        ({"kv_heads": 5}, "multiple"),
        ({"batch": 0}, "batch"),
        ({"batch": 1 << 20, "seq_len": 1 << 20}, "tokens"),
        ({"dtype": "int3"}, "bfloat16"),
        ({"device": "mars"}, "'mars' is no device .*: 'AMD EPYC, 2 threads', 'NVIDIA H200'$"),
        ({"device": "meta"}, "device 'meta' is not covered; use 'cpu', 'cuda' or 'cuda:N'"),
        ({"grad": True, "decode": True}, "exclude"),
        ({"packed": 2, "padding": 0.2}, "packed"),
        ({"packed": 99}, "packed"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], says: str) -> None:
    request = {"seq_len": 64, "device": "cpu", **SIZES, **change}
    with pytest.raises(ValueError, match=says):
        explain(**request)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_those_measured_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*COMMAND, "--seq-len", "64", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "NVIDIA H200" in error


@pytest.mark.parametrize("more", [[], ["--decode"], ["--grad"], ["--window", "32"]])
def test_the_command_prints_a_table_or_json(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMAND, "--batch", "8", "--seq-len", "2048", "--padding", "0.4", *more]
    arguments += ["--device", "nvidia-h200"]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert cli.run([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for option in answer["options"]:
        assert option["backend"] in out
    assert answer["backend"] == answer["options"][0]["backend"]
    assert f"chosen:  {answer['backend']}" in out
    assert "shipped" in out
    assert answer["workload"]["mode"] == {"--decode": "decode", "--grad": "train"}.get(
        "".join(more), "forward"
    )


def test_changed_versions_are_told_in_the_same_words_everywhere(
    crossing: profile.Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    made = crossing.model_copy(update={"versions": machine.Versions(torch="1.0")})
    profiles.save_for_user(made)
    profiles.set_profile(None)
    now = machine.versions("cpu")
    sentence = machine.changed_since(machine.Versions(torch="1.0").differences(now))
    assert f"measured: torch 1.0 then, {now.torch} now, " in sentence
    assert sentence in explain(seq_len=64, device="cpu", **SIZES).lines()
    for command in ("show", "doctor"):
        assert cli.run([command]) == 0
        assert sentence in capsys.readouterr().out


def test_a_device_of_this_machine_by_its_name(crossing: profile.Profile) -> None:
    profiles.save_for_user(crossing)
    answer = explain(seq_len=64, device=str(crossing.device), **SIZES)
    assert answer.assumption is None
    # Its own backends are asked: no flash-attn for a CPU.
    assert {o.status for o in answer.options if o.backend == "torch_varlen"} == {"refuses"}


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.5, 0.8])
def test_the_padding_is_what_was_asked_for(batch: int, share: float) -> None:
    made = workload.as_padded(
        workload.Workload(
            "forward", True, "left", "float32", batch, 512, 512, 4, 4, 64, padding_share=share
        )
    )
    # A row is always full, and two rows of one length are not both.
    possible = min(share, (batch - 1) / batch) if batch > 1 else share
    assert made.plan(CPU).padding_share == pytest.approx(possible, abs=0.04)


@pytest.mark.parametrize(
    ("us", "text"),
    [
        *[(None, "-"), (3.14159, "3.14 us"), (474.2, "474 us"), (13847.0, "13.8 ms")],
        *[(2.5e6, "2.50 s"), (9.999, "10.0 us"), (99.97, "100 us"), (999.7, "1.00 ms")],
        (999_700.0, "1.00 s"),
    ],
)
def test_times_have_three_digits(us: float | None, text: str) -> None:
    assert format_us(us) == text


def test_it_prints_as_text() -> None:
    text = str(explain(seq_len=64, device="cpu", **SIZES))
    assert "sdpa" in text
    assert "profile: default" in text


# -- padding_free ----------------------------------------------------------------------------------


@pytest.fixture
def packing(tmp_path: Path) -> None:
    """A profile of this CPU that packs from 1e6 units of spared work on."""
    identity = machine.identify(CPU)
    assert identity is not None
    rules = (
        StackRule(when=StackWhen(min_spared_work=1e6), pack=True, because="it was faster"),
        StackRule(pack=False, because="it was slower"),
    )
    made = profile.Profile(name="packing", device=identity, padding_free=rules)
    profile.save(made, tmp_path / "packing.json")
    profiles.set_profile(tmp_path / "packing.json")


#: 200 tokens, 100 of them padding.
HALF = {"batch": 10, "seq_len": 20, "heads": 4, "head_dim": 20, "padding": 0.5, "device": "cpu"}


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize(
    ("change", "packs", "because"),
    [
        ({}, False, "rule of profile packing, below all bounds: it was slower"),
        (
            {"heads": 6},
            True,
            "rule of profile packing, padding tokens x hidden^2 at least 1e+06: it was faster",
        ),
        ({"hidden": 120}, True, "it was faster"),
        ({"heads": 6, "hidden": 80}, False, "it was slower"),
        ({"heads": 6, "grad": True, "causal": True}, True, "it was faster"),
        ({"heads": 6, "decode": True}, False, "a single token per sequence"),
        ({"heads": 6, "batch": 2}, False, "it was slower"),
        ({"heads": 6, "pad_output": "sdpa"}, False, "to be kept"),
        ({"heads": 6, "backends": ["sdpa"]}, False, "a mask of all tokens by all tokens"),
    ],
)
def test_whether_padding_free_packs(change: dict[str, Any], packs: bool, because: str) -> None:
    answer = explain(**{**HALF, **change})
    assert answer.packs == packs
    assert because in (answer.packs_because or "")
    (line,) = [line for line in answer.lines() if line.startswith("padding_free ")]
    shown, asked = re.subn(r"\n  this batch: .* hidden\^2 are [0-9.e+]+", "", line)
    assert asked == ("it was" in because)
    if asked:
        because = because.replace(", ", ": ", 1)
    assert because in shown.replace("\n ", ":")
    assert ("packs this batch" in line) == packs


def test_without_padding_nothing_is_said_of_padding_free() -> None:
    for request in ({"padding": 0.0}, {"padding": 0.0, "batch": 1, "packed": 4}):
        answer = explain(**{**HALF, **request})
        assert answer.packs is None
        assert "padding_free" not in str(answer)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("heads", [4, 6])
def test_padding_free_does_what_explain_says(heads: int) -> None:
    config = tiny_config("bert", hidden_size=heads * 20, num_attention_heads=heads)
    model = from_config("BertModel", config, "smart")
    lengths = torch.tensor([20, 2, 3, 4, 15, 16, 10, 10, 10, 10])
    mask = (torch.arange(20) < lengths[:, None]).long()
    with torch.no_grad(), smartattn.padding_free(model), smartattn.trace() as trace:
        model(input_ids=token_ids(10, 20), attention_mask=mask)
    (row,) = trace.stacks
    answer = explain(**{**HALF, "heads": heads})
    assert (row.packed, row.reason) == (answer.packs, answer.packs_because)


@pytest.mark.usefixtures("packing")
def test_the_command_takes_a_hidden_size(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--batch", "10", "--seq-len", "20", "--heads", "4", "--head-dim", "20"]
    arguments += ["--padding", "0.5", "--device", "cpu"]
    for more, says in (([], "runs this batch padded"), (["--hidden", "120"], "packs this batch")):
        assert cli.run([*arguments, *more]) == 0
        assert f"padding_free {says}" in capsys.readouterr().out
    assert cli.run([*arguments, "--hidden", str(1 << 30)]) == 2
    assert "hidden is 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("seq_len", [128, 512, 2048, 8192])
@pytest.mark.parametrize("causal", [True, False])
def test_options_come_best_first(seq_len: int, causal: bool) -> None:
    sizes = {**SIZES, "batch": 8, "seq_len": seq_len, "padding": 0.4, "causal": causal}
    answer = explain(**sizes, device="nvidia-h200")
    slower = [o.predicted_us for o in answer.options if o.status == "slower"]
    assert len(slower) >= 3
    assert slower == sorted(slower)


def test_the_order_of_options_is_not_that_of_the_backends() -> None:
    """Or the test above would say nothing."""
    orders = {
        tuple(o.backend for o in explain(
            **SIZES, batch=8, seq_len=length, padding=0.4, causal=True, device="nvidia-h200"
        ).options if o.predicted_us is not None)
        for length in (128, 512, 2048, 8192)
    }  # fmt: skip
    assert len(orders) > 1


def test_what_is_said_of_padding_free_fits_a_terminal() -> None:
    answer = explain(**SIZES, batch=8, seq_len=2048, padding=0.4, causal=True, device="nvidia-h200")
    assert "BERT-like" in (answer.packs_because or ""), "the models that were timed"
    (line,) = [line for line in answer.lines() if line.startswith("padding_free ")]
    assert "BERT-like" not in line
    assert all(len(part) <= 100 for part in line.splitlines())


@pytest.mark.parametrize("width", [40, 80])
def test_nothing_is_cut_off_in_a_narrow_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    arguments = ["--batch", "8", "--seq-len", "2048", "--padding", "0.4", "--device", "nvidia-h200"]
    assert cli.run([*COMMAND, *arguments]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.splitlines()[0].endswith("on NVIDIA H200"), "one line, however long"


def test_a_sentence_has_the_time_of_the_table() -> None:
    answer = explain(
        **SIZES, batch=1, seq_len=32768, packed=16, causal=True, grad=True, device="nvidia-h200"
    )
    predicted = answer.rows()[0][1]
    assert predicted.endswith(" ms")
    assert f"predicted to add {predicted} to a layer that waits for the device" in answer.reason


def test_spans_of_times() -> None:
    assert span_us([31.62, 31.58]) == "31.6 us"
    assert span_us([1200.0, 31.6]) == "31.6 us to 1.20 ms"


def test_a_window_and_the_number_of_sequences_are_said() -> None:
    shape = {"heads": 4, "head_dim": 64, "seq_len": 512, "causal": True, "device": "nvidia-h200"}
    assert "window 128, 4 x 512" in str(smartattn.explain(batch=4, window=128, **shape))
    packed = smartattn.explain(packed=16, **shape)
    assert "packed of 16 sequences, 1 x 512" in str(packed)
    lengths = packed.workload.lengths
    assert f"shortest sequence has {min(lengths)} tokens, the longest {max(lengths)}" in str(packed)
