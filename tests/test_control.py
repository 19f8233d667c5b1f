"""Settings of the process, of a model and of a block, and what a trace of them says."""

from __future__ import annotations

import contextvars
import copy
import gc
import json
import logging
import pickle
import timeit
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

import smartattn
from smartattn import control, log
from smartattn.backends import NAMED
from smartattn.call import Call
from smartattn.choose import Decision, Verdict
from smartattn.integration import smart_attention
from smartattn.plan import Pattern, Plan
from smartattn.profile import Profile
from smartattn.record import Trace

from .agreement import MASKS, WIDTH
from .tiny_models import tiny_model, token_ids

INPUTS = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}


@pytest.fixture(autouse=True)
def _nothing_set() -> Iterator[None]:
    smartattn.configure()
    yield
    smartattn.configure()


def used(model: Any) -> set[str]:
    with torch.no_grad(), smartattn.trace() as trace:
        model(**INPUTS)
    return {row.backend for row in trace.rows}


def test_the_innermost_scope_counts() -> None:
    model, other = tiny_model("llama", "smart"), tiny_model("llama", "smart")
    assert used(model) == {"sdpa"}
    smartattn.configure(backends="sdpa_unpadded")
    assert used(model) == used(other) == {"sdpa_unpadded"}
    smartattn.configure(model=model, backends=["sdpa"])
    assert used(model) == {"sdpa"}
    assert used(other) == {"sdpa_unpadded"}
    with smartattn.use(backends="sdpa_unpadded"):
        assert used(model) == {"sdpa_unpadded"}
    assert used(model) == {"sdpa"}
    smartattn.configure(model=model)
    assert used(model) == {"sdpa_unpadded"}
    smartattn.configure()
    assert used(model) == {"sdpa"}


def test_each_setting_by_itself() -> None:
    """The process says which backends, the model what the padding positions hold."""
    model = tiny_model("llama", "smart")
    smartattn.configure(backends="sdpa_unpadded")
    smartattn.configure(model=model, pad_output="sdpa")
    with pytest.raises(smartattn.UnsupportedCallError, match="padding positions"):
        used(model)
    with smartattn.use(pad_output="zeros"):
        assert used(model) == {"sdpa_unpadded"}
    with smartattn.use(backends="sdpa"):
        assert used(model) == {"sdpa"}


def test_the_objective_of_a_model_is_plain_data() -> None:
    model = tiny_model("llama", "smart")
    smartattn.configure(model=model, objective="memory")
    assert model.config.smartattn == {"objective": "memory", "max_slowdown": 1.5}
    with torch.no_grad(), smartattn.trace() as trace:
        model(**INPUTS)
        with smartattn.use(objective="accuracy"):
            model(**INPUTS)
    assert [row.objective for row in trace.rows] == [
        "memory within 1.5 times the fastest",
        "accuracy",
    ]


def test_defaults_of_the_process_are_those_of_all_threads() -> None:
    model = tiny_model("llama", "smart")
    smartattn.configure(backends="sdpa_unpadded")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(used, model).result(timeout=60) == {"sdpa_unpadded"}


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "copy", "pickle"],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_copies_keep_what_was_set(duplicate: Any, name: str) -> None:
    model = tiny_model(name, "smart")
    smartattn.configure(model=model, backends="sdpa_unpadded")
    assert used(duplicate(model)) == {"sdpa_unpadded"}


def test_a_saved_model_keeps_what_was_set(tmp_path: Path) -> None:
    model = tiny_model("llama", "smart")
    smartattn.configure(model=model, backends="sdpa_unpadded", pad_output="zeros")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["smartattn"] == {"backends": ["sdpa_unpadded"], "pad_output": "zeros"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="smart")
    assert used(again) == {"sdpa_unpadded"}
    smartattn.configure(model=again)
    assert used(again) == {"sdpa"}
    again.save_pretrained(tmp_path)
    assert "smartattn" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", ["t5", "gemma3"])
def test_all_parts_of_a_model_get_it(name: str) -> None:
    model = tiny_model(name, "smart")
    smartattn.configure(model=model, backends="sdpa")
    inputs = {**INPUTS, **({"decoder_input_ids": token_ids(3, WIDTH)} if name == "t5" else {})}
    with torch.no_grad(), smartattn.trace() as trace:
        model(**inputs)
    assert {row.backend for row in trace.rows} == {"sdpa"}
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    assert all(config.smartattn == {"backends": ["sdpa"]} for config in configs.values())


@pytest.mark.parametrize(
    "given",
    ["sdpa", {"backends": ["nonsense"]}, {"pad_output": 3}, {"surplus": 1}, {"backends": 7}, []],
)
def test_what_a_foreign_configuration_says_wrong_is_ignored_once(
    given: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_complained", set())
    model = tiny_model("llama", "smart")
    model.config.smartattn = given
    with caplog.at_level("WARNING", "smartattn"):
        for backends in ("sdpa", "sdpa_unpadded"):
            with smartattn.use(backends=backends):
                assert used(model) == {backends}
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].message


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="unknown backends"):
        smartattn.configure(backends="nonsense")
    with pytest.raises(ValueError, match="backends names none"):
        smartattn.configure(backends=[])
    with pytest.raises(ValueError, match="pad_output"):
        smartattn.configure(pad_output="ones")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no configuration"):
        smartattn.configure(model=torch.nn.Linear(1, 1), backends="sdpa")


def test_equal_settings_are_one_object_and_keep_nothing_alive() -> None:
    """Choices are kept by the identity of the settings, so that it must not change per forward."""
    model = tiny_model("llama", "smart")
    smartattn.configure(model=model, backends="sdpa")
    with smartattn.trace() as trace:
        first = control.settings_for(model.config)
        assert control.settings_for(model.config) is first
        assert first.trace is trace
        assert first.backends == ("sdpa",)
    gone = weakref.ref(trace)
    del trace, first
    gc.collect()
    assert gone() is None


# -- logging -------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger as it is in a fresh process."""
    found = logging.getLogger("smartattn")
    before = found.level, found.handlers[:]
    found.setLevel(logging.NOTSET)
    found.handlers.clear()
    yield found
    found.setLevel(before[0])
    found.handlers[:] = before[1]


def test_the_verbosity_of_transformers_is_followed(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nobody has set logging up; pytest itself does.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    log.follow_transformers()
    log.follow_transformers()
    logger.info("chosen")
    assert capsys.readouterr().err == "chosen\n"
    # Whoever sets logging up gets the lines once, and in his own way.
    logging.getLogger().addHandler(logging.NullHandler())
    logger.info("chosen")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "level"), [("error", logging.ERROR), ("", logging.NOTSET), ("loud", logging.NOTSET)]
)
def test_a_level_of_ones_own_stays(
    value: str, level: int, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", value)
    log.follow_transformers()
    assert logger.level == level
    assert not logger.handlers
    logger.setLevel(logging.DEBUG)
    log.follow_transformers()
    assert logger.level == logging.DEBUG


# -- traces --------------------------------------------------------------------------------------


def test_forwards_and_calls_are_counted() -> None:
    model = tiny_model("llama", "smart")
    other = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["right"]}
    with torch.no_grad(), smartattn.trace() as trace:
        for inputs in (INPUTS, other, INPUTS, INPUTS):
            model(**inputs)
    found = [(row.facts["padding"], row.forwards, row.calls) for row in trace.rows]
    assert found == [("left", 3, 6), ("right", 1, 2)]
    assert trace.to_json() == json.dumps(trace.as_dicts(), indent=2)
    assert [row["forwards"] for row in json.loads(trace.to_json())] == [3, 1]


def test_the_steps_of_a_generation_share_a_line() -> None:
    model = tiny_model("llama", "smart")
    with torch.no_grad(), smartattn.trace() as trace:
        model.generate(**INPUTS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(trace.rows) == 6
    header, prefill, steps, dash = str(trace).splitlines()
    assert "forwards" in header
    assert dash.startswith('predicted "-": ')
    assert prefill.split()[0] == "1"
    assert steps.split()[0] == "5"
    assert f"{WIDTH + 1}-{WIDTH + 5}" in steps
    assert steps.split().count("10") == 1, "two layers, five steps"


@pytest.mark.parametrize(("bottleneck", "lines"), [(None, 2), ("host", 3), ("device", 3)])
def test_a_prediction_in_a_layer_that_waits_is_explained(
    bottleneck: Literal["host", "device"] | None, lines: int
) -> None:
    plan = Plan(2, 1, 64, Pattern.CAUSAL, torch.device("cpu"), shift=63)
    call = Call(torch.device("cpu"), torch.bfloat16, 2, 1, 64, 4, 4, 64, 64)
    sdpa = NAMED["sdpa"]
    verdicts = (Verdict("sdpa", (), 20.0, bottleneck=bottleneck, device_us=90.0),)
    trace = Trace()
    trace.record(plan, call, Decision(sdpa, "fastest", verdicts, Profile(name="made")))
    shown = str(trace).splitlines()
    assert len(shown) == lines
    if lines == 3:
        assert shown[-1].startswith("predicted: by how much one call lengthens its layer")


def test_an_empty_trace_says_what_may_be_missing() -> None:
    model = tiny_model("llama", "sdpa")
    with torch.no_grad(), smartattn.trace() as trace:
        model(input_ids=token_ids(2, 8))
    assert 'attn_implementation="smart"' in str(trace)
    assert "0 attention calls" in repr(trace)
    model.set_attn_implementation("smart")
    with torch.no_grad(), smartattn.trace() as trace:
        model(input_ids=token_ids(2, 8))
    assert str(trace).startswith("forwards")
    assert f"{model.config.num_hidden_layers} attention calls" in repr(trace)


def test_a_trace_keeps_no_plan_alive() -> None:
    model = tiny_model("llama", "smart")
    plans = []
    with torch.no_grad(), smartattn.trace() as trace:
        record = trace.record

        def spy(plan: Any, call: Any, decision: Any) -> None:
            plans.append(weakref.ref(plan))
            record(plan, call, decision)

        trace.record = spy  # type: ignore[method-assign]
        model(**INPUTS)
    gc.collect()
    assert plans
    assert all(plan() is None for plan in plans)
    assert [row.calls for row in trace.rows] == [2]


def test_threads_may_share_a_trace() -> None:
    model = tiny_model("llama", "smart")
    with torch.no_grad(), smartattn.trace() as trace:
        contexts = [contextvars.copy_context() for _ in range(8)]

        def serve(context: contextvars.Context) -> None:
            for _ in range(10):
                context.run(lambda: model(**INPUTS))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(serve, contexts))
    (row,) = trace.rows
    assert (row.forwards, row.calls) == (80, 160)


@pytest.mark.timing
def test_a_trace_that_is_off_costs_no_more_than_a_tenth_of_a_microsecond() -> None:
    """All that a layer does for it is to look at one attribute."""
    settings = control.Settings()
    number = 1_000_000
    statement, nothing = "if s.trace is not None: pass", "pass"
    times = {
        code: min(timeit.repeat(code, globals={"s": settings}, number=number, repeat=5)) / number
        for code in (statement, nothing)
    }
    assert times[statement] - times[nothing] < 0.1e-6


@pytest.mark.timing
def test_a_trace_that_is_on_costs_few_microseconds() -> None:
    layer = tiny_model("bert", "smart").encoder.layer[0].attention.self
    recorded = []
    with smartattn.trace() as trace:
        record = trace.record
        trace.record = lambda *given: recorded.append(given)  # type: ignore[method-assign]
        smart_attention(layer, *(torch.randn(1, 4, 6, 8) for _ in range(3)), None)
    ((plan, call, decision),) = recorded
    runs = timeit.repeat(lambda: record(plan, call, decision), number=10_000, repeat=7)
    assert min(runs) / 10_000 < 5e-6
