"""Kernels that fail at run time: what is repeated, what is raised, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import smartattn
from smartattn import faults
from smartattn.backends.sdpa import SdpaBackend
from smartattn.backends.sdpa_unpadded import SdpaUnpaddedBackend
from smartattn.call import Call, Runner
from smartattn.plan import Plan

from .agreement import MASKS, WIDTH, assert_agree, output_of, run
from .tiny_models import tiny_model, token_ids

INPUTS = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
#: What torch appends to every error that CUDA reports.
LATE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
NO_IMAGE = "CUDA error: no kernel image is available for execution on the device" + LATE


@pytest.fixture(autouse=True)
def _sound() -> Iterator[None]:
    smartattn.end_quarantine()
    yield
    smartattn.end_quarantine()


class Failing:
    """Makes a backend raise in the middle of a forward, and counts how often it was tried."""

    def __init__(self, backend: type, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried = 0
        failing = self

        def bind(self: Any, plan: Plan, call: Call) -> Runner:
            def run(q: Any, k: Any, v: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
                failing.tried += 1
                raise error

            return run

        monkeypatch.setattr(backend, "bind", bind)


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """A profile whose rule prefers sdpa_unpadded."""
    from smartattn import profile, profiles

    rule = profile.Rule(prefer=("sdpa_unpadded",), because="this test says so")
    profile.save(profile.Profile(name="test", rules=(rule,)), tmp_path / "p.json")
    profiles.set_profile(tmp_path / "p.json")
    yield
    profiles.set_profile(None)


UNSUPPORTED = [
    torch.AcceleratorError(NO_IMAGE),
    RuntimeError(NO_IMAGE),
    RuntimeError("CUDA error: invalid device function" + LATE),
    RuntimeError("FlashAttention only supports Ampere GPUs or newer."),
    RuntimeError("This flash attention build does not support headdim not being a multiple of 32."),
    NotImplementedError("varlen_attn"),
    RuntimeError("No available kernel. Aborting execution."),
]
OTHERS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    torch.AcceleratorError("CUDA error: device-side assert triggered" + LATE),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + LATE),
    RuntimeError("CUDA error: operation not supported on global/shared address space" + LATE),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    MemoryError("not supported"),
    ValueError("q must be on CUDA"),
    KeyError("unsupported"),
]


def names(errors: list[Exception]) -> list[str]:
    return [f"{type(error).__name__}-{str(error)[:24]}" for error in errors]


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("error", UNSUPPORTED, ids=names(UNSUPPORTED))
def test_the_call_is_repeated_on_the_next_backend(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    expected = run(model, "eager", **INPUTS)
    failing = Failing(SdpaUnpaddedBackend, error, monkeypatch)
    with caplog.at_level(logging.WARNING, "smartattn"):
        for _ in range(3):
            with smartattn.trace() as trace:
                actual = run(model, "smart", **INPUTS)
            assert_agree(actual, expected, where=MASKS["left"])
    assert failing.tried == 1, "not in the second layer, and not in the next forward"
    (row,) = trace.rows
    assert row.backend == "sdpa"
    assert "failed in this process" in row.refused["sdpa_unpadded"][0]
    (record,) = caplog.records
    assert "\n" not in record.message
    for part in ("sdpa_unpadded", "cpu", type(error).__name__, "3 x 12 queries", "left padding"):
        assert part in record.message
    smartattn.end_quarantine()
    run(model, "smart", **INPUTS)
    assert failing.tried == 2


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("error", OTHERS, ids=names(OTHERS))
def test_other_errors_are_raised_with_the_decision(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Failing(SdpaUnpaddedBackend, error, monkeypatch)
    with caplog.at_level(logging.WARNING, "smartattn"):
        for _ in range(2):
            with pytest.raises(type(error)) as raised:
                run(tiny_model("llama"), "smart", **INPUTS)
            assert raised.value is error
    assert not caplog.records
    said = "\n".join([*getattr(error, "__notes__", []), str(error)])
    assert said.count("smartattn ran sdpa_unpadded") == 1
    assert "this test says so" in said
    assert "left padding" in said
    del error.__notes__


@pytest.mark.usefixtures("preferred")
def test_a_failure_in_bind_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    error: Exception = NotImplementedError("no such kernel")

    def bind(self: Any, plan: Plan, call: Call) -> Runner:
        raise error

    monkeypatch.setattr(SdpaUnpaddedBackend, "bind", bind)
    model = tiny_model("llama")
    expected = run(model, "eager", **INPUTS)
    assert_agree(run(model, "smart", **INPUTS), expected, where=MASKS["left"])
    smartattn.end_quarantine()
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(model, "smart", **INPUTS)
    assert "smartattn ran sdpa_unpadded" in raised.value.__notes__[0]


def test_python_3_10_gets_the_note_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(RuntimeError):
        def __getattribute__(self, name: str) -> Any:
            if name == "add_note":
                raise AttributeError(name)
            return super().__getattribute__(name)

    error = Old("CUDA error: unspecified launch failure")
    Failing(SdpaBackend, error, monkeypatch)
    with pytest.raises(Old, match=r"(?s)launch failure.*smartattn ran sdpa"):
        run(tiny_model("llama"), "smart", **INPUTS)


def test_the_last_one_is_not_quarantined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(SdpaBackend, NotImplementedError("on this card"), monkeypatch)
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            run(tiny_model("llama"), "smart", **INPUTS)
    assert failing.tried == 2
    assert not caplog.records


def test_an_explicit_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(SdpaUnpaddedBackend, RuntimeError("head_dim 8 is not supported"), monkeypatch)
    for _ in range(2):
        with pytest.raises(smartattn.UnsupportedCallError, match="head_dim 8 is not supported"):
            run(tiny_model("llama"), "smart", backends="sdpa_unpadded", **INPUTS)


def test_a_backend_that_would_take_the_call_again_is_not_asked_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SdpaUnpaddedBackend, "refusals", lambda self, plan, call: [])
    failing = Failing(SdpaUnpaddedBackend, NotImplementedError("never"), monkeypatch)
    with pytest.raises(NotImplementedError):
        run(tiny_model("llama"), "smart", backends="sdpa_unpadded", **INPUTS)
    assert failing.tried == 1


@pytest.mark.usefixtures("preferred")
def test_one_warning_however_many_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", "smart")
    Failing(SdpaUnpaddedBackend, torch.AcceleratorError(NO_IMAGE), monkeypatch)

    def serve(_: int) -> torch.Tensor:
        with torch.no_grad():
            return output_of(model(**INPUTS))

    with caplog.at_level(logging.WARNING, "smartattn"), ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(serve, range(16)))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert len(caplog.records) == 1


def test_another_device_is_not_affected() -> None:
    from smartattn.backends.base import quarantine, quarantined

    quarantine("flash_attention_2", torch.device("cuda", 1), "failed")
    assert quarantined("flash_attention_2", torch.device("cuda", 1)) == "failed"
    assert quarantined("flash_attention_2", torch.device("cuda", 0)) is None


def test_gradients_flow_through_the_repeated_call(
    monkeypatch: pytest.MonkeyPatch, preferred: None
) -> None:
    model = tiny_model("llama", "smart")
    Failing(SdpaUnpaddedBackend, torch.AcceleratorError(NO_IMAGE), monkeypatch)
    output_of(model(**INPUTS)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert faults.is_unsupported(NotImplementedError())
