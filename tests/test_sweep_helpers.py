"""The parts of the architecture sweep: it must be able to fail, and its models must be worth it."""

from __future__ import annotations

import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .sweep import report, tiny
from .sweep.architectures import all_architectures, choose
from .sweep.compare import Comparison, compare
from .sweep.examine import (
    AGREE,
    DISAGREE,
    ERROR,
    REJECTED,
    SKIP,
    Verdict,
    examine,
    run_scenario,
)
from .sweep.inputs import INPUT_KINDS
from .sweep.pool import run_jobs
from .sweep.scenarios import (
    SCENARIOS,
    NotApplicable,
    Scenario,
    Subject,
    own_mask_4d,
    restarting_positions,
)

check = functools.partial(compare, tolerance=1e-4)


# compare


def test_equal_results_agree():
    tensors = {"a": torch.randn(3, 4), "b": torch.zeros(2)}
    assert check(tensors, {name: t.clone() for name, t in tensors.items()}) == Comparison(True, 0.0)


@pytest.mark.parametrize(("error", "agrees"), [(5e-5, True), (2e-4, False), (-2e-4, False)])
def test_error_is_relative_to_the_largest_reference(error, agrees):
    reference = {"a": torch.tensor([100.0, 1.0])}
    comparison = check(reference, {"a": torch.tensor([100.0, 1.0 + 100 * error])})
    assert comparison.agrees is agrees
    assert comparison.figure == pytest.approx(abs(error), rel=1e-2)


def test_one_wrong_tensor_among_many_is_found():
    reference = {name: torch.ones(5) for name in "abc"}
    comparison = check(reference, reference | {"b": torch.tensor([1, 1, 1, 1, 1.1])})
    assert not comparison.agrees
    assert comparison.reason.startswith("b: 0.1")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_never_agree(bad):
    good, spoilt = {"a": torch.ones(2)}, {"a": torch.tensor([1.0, bad])}
    for reference, candidate in ((good, spoilt), (spoilt, good), (spoilt, spoilt)):
        comparison = compare(reference, candidate, tolerance=math.inf)
        assert not comparison.agrees
        assert "not finite" in comparison.reason


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ({"a": torch.ones(3)}, "a: shape"),
        ({"a": torch.ones(2, 1)}, "a: shape"),
        ({"b": torch.ones(2)}, "names differ: a, b"),
        ({}, "names differ: a"),
    ],
)
def test_other_shapes_and_names_disagree(candidate, reason):
    comparison = check({"a": torch.ones(2)}, candidate)
    assert not comparison.agrees
    assert comparison.reason.startswith(reason)


@pytest.mark.parametrize("nothing", [{}, {"a": torch.ones(0, 4)}])
def test_nothing_to_compare_is_no_agreement(nothing):
    assert not check(nothing, nothing).agrees


def test_anything_differs_from_a_zero_reference():
    assert not check({"a": torch.zeros(2)}, {"a": torch.full((2,), 1e-30)}).agrees


def test_common_scale_lets_noise_pass_and_nothing_else():
    reference = {"large": torch.ones(2), "noise": torch.full((2,), 1e-9)}
    noisy = reference | {"noise": torch.full((2,), -1e-9)}
    wrong = reference | {"noise": torch.full((2,), 1e-5)}
    assert not check(reference, noisy).agrees
    assert check(reference, noisy, common_scale=0.01).agrees
    assert not check(reference, wrong, common_scale=0.01).agrees


# tiny


def shrunk(name: str, **fields: Any) -> PreTrainedConfig:
    return tiny.shrink(getattr(transformers, name)(**fields))


def test_width_depth_and_groups():
    config = shrunk("LlamaConfig")
    assert (config.hidden_size, config.num_hidden_layers) == (tiny.HIDDEN, tiny.LAYERS)
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.head_dim * config.num_attention_heads == config.hidden_size


def test_unknown_fields_keep_their_values():
    assert shrunk("LlamaConfig", rms_norm_eps=0.25).rms_norm_eps == 0.25


def test_windows_are_shorter_than_the_sequence():
    assert shrunk("MistralConfig").sliding_window == tiny.WINDOW
    assert shrunk("Llama4TextConfig").attention_chunk_size == tiny.WINDOW


@pytest.mark.parametrize("name", ["Gemma3TextConfig", "Qwen3NextConfig", "GptOssConfig"])
def test_every_kind_of_layer_stays(name):
    before, after = getattr(transformers, name)(), shrunk(name)
    assert set(after.layer_types) == set(before.layer_types)
    assert len(after.layer_types) == after.num_hidden_layers <= tiny.MAX_LAYERS


def test_kinds_of_layers_are_combined_as_in_the_original():
    config = transformers.LlamaConfig(num_hidden_layers=6)
    config.layer_types = ["x", "x", "y", "x", "y", "x"]
    config.mlp_layer_types = ["p", "p", "p", "q", "q", "q"]
    names = ["num_hidden_layers", "layer_types", "mlp_layer_types"]
    assert tiny.representative_layers(config, names) == [0, 2, 3, 4]
    config.mlp_layer_types = config.layer_types = ["x"] * 6
    assert tiny.representative_layers(config, names) == [0, 1]


def test_layers_without_kinds_are_not_picked():
    config = transformers.BertConfig()
    assert tiny.representative_layers(config, tiny.constructor_fields(type(config))) is None


def test_latent_attention_is_not_grouped():
    config = shrunk("DeepseekV3Config")
    assert config.num_key_value_heads == config.num_attention_heads


def test_sections_of_multimodal_rope_fill_half_a_head():
    small = tiny.shrink_rope({"mrope_section": [16, 24, 24], "partial_rotary_factor": 0.5})
    assert sum(small["mrope_section"]) == tiny.HEAD_DIM // 4
    assert min(tiny.scale_sections([1, 1, 1000], 8)) == 1


def test_parts_of_a_composite_shrink_too_and_special_tokens_stay_apart():
    config = shrunk("LlavaConfig")
    assert config.text_config.hidden_size == tiny.HIDDEN
    assert config.vision_config.image_size == tiny.IMAGE
    assert tiny.FIRST_SPECIAL_TOKEN <= config.image_token_index < tiny.VOCAB


def test_no_randomness_and_no_timid_weights():
    config = shrunk("BertConfig")
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.0
    assert config.initializer_range == tiny.INITIAL_DEVIATION


# scenarios


def test_own_mask_leaves_no_row_empty_and_no_padding_visible():
    real = torch.tensor([[0, 0, 1, 1, 1, 1]])
    allowed = own_mask_4d(real)
    assert allowed.shape == (1, 1, 6, 6)
    assert allowed.any(dim=-1).all()
    assert not allowed[0, 0, 2:, :2].any()
    assert not allowed.triu(diagonal=1).any()


def test_restarting_positions():
    positions = restarting_positions([[2, 3], [5]])
    assert positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]


# architectures


def test_architectures_are_unique_and_many():
    architectures = all_architectures()
    names = [architecture.name for architecture in architectures]
    assert names == sorted(set(names))
    assert len(names) > 500
    assert {a.kind for a in architectures} == {"causal", "seq2seq", "masked", "base"}


def test_a_type_with_a_head_leaves_its_base_out():
    assert [a.name for a in choose(["llama"], None)] == ["LlamaForCausalLM"]


def test_choose_takes_both_kinds_of_name_and_refuses_others():
    assert len(choose(["LlamaForCausalLM", "vit"], None)) == 2
    with pytest.raises(ValueError, match="no such architecture: lama"):
        choose(["lama", "vit"], None)


def test_a_sample_is_spread_over_all_kinds():
    sample = choose([], 40)
    assert len({a.name for a in sample}) == 40
    assert {a.kind for a in sample} == {"causal", "seq2seq", "masked", "base"}


SUBJECT = Subject(INPUT_KINDS[0], {})


# examine: the whole way, with implementations that are wrong on purpose


@pytest.fixture
def registered() -> Iterator[Callable[[str, Callable, Callable], None]]:
    """Registers implementations for one test."""
    names = []

    def register(name: str, attention: Callable, mask: Callable) -> None:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
        names.append(name)

    yield register
    for name in names:
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def ignore_padding(**arguments: Any) -> torch.Tensor | None:
    return sdpa_mask(**arguments | {"attention_mask": None})


def scale_wrongly(module, query, *others, **arguments):
    return sdpa_attention_forward(module, query * 1.03, *others, **arguments)


def give_up(*others, **arguments):
    raise NotImplementedError("not today")


@pytest.mark.parametrize(
    ("attention", "mask", "verdicts"),
    [
        (sdpa_attention_forward, sdpa_mask, [AGREE, AGREE, AGREE]),
        (sdpa_attention_forward, ignore_padding, [AGREE, DISAGREE, AGREE]),
        (scale_wrongly, sdpa_mask, [DISAGREE, DISAGREE, DISAGREE]),
        (give_up, sdpa_mask, [ERROR, ERROR, ERROR]),
    ],
)
def test_wrong_implementations_are_found(registered, attention, mask, verdicts):
    registered("sweep_test", attention, mask)
    [architecture] = choose(["llama"], None)
    scenarios = ["no_mask", "left_padding", "backward"]
    result = examine(architecture, "sweep_test", scenarios)
    assert result["built"]
    assert result["interface_calls"] == tiny.LAYERS
    assert result["padding_matters"]
    found = [result["scenarios"][name]["sweep_test"]["verdict"] for name in scenarios]
    assert found == verdicts
    assert [result["scenarios"][name]["sdpa"]["verdict"] for name in scenarios] == [AGREE] * 3
    summary = report.summarize({architecture.name: result}, "sweep_test")
    assert bool(summary["beyond_baseline"]) is (set(verdicts) != {AGREE})


def test_models_that_refuse_any_name_are_told_from_faults(registered):
    registered("sweep_test", sdpa_attention_forward, sdpa_mask)
    [falcon] = choose(["falcon"], None)
    result = examine(falcon, "sweep_test", ["no_mask"])
    assert result["scenarios"]["no_mask"]["sweep_test"]["verdict"] == REJECTED


def test_scenarios_without_meaning_are_skipped_with_a_reason():
    [vit] = choose(["vit"], None)
    result = examine(vit, "sdpa", list(SCENARIOS))
    verdicts = {name: found["sdpa"] for name, found in result["scenarios"].items()}
    for name in ("no_mask", "graph_no_mask", "backward"):
        assert verdicts.pop(name)["verdict"] == AGREE
    assert {v["verdict"] for v in verdicts.values()} == {SKIP}
    assert {v["reason"] for v in verdicts.values()} == {"image has no tokens"}


def fails_with(error: Exception) -> Callable[[Any, Any], Any]:
    def run(subject, model):
        raise error

    return run


def gives(value: float) -> Callable[[Any, Any], Any]:
    return lambda subject, model: {"a": torch.tensor([value])}


def gives_what_the_model_is(subject, model):
    return {"a": torch.tensor([float(model)])}


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        (Scenario(fails_with(NotApplicable("has none"))), "has none"),
        (Scenario(fails_with(ZeroDivisionError("1 / 0"))), "eager: ZeroDivisionError: 1 / 0"),
        (Scenario(gives(math.nan)), "eager gives NaN or infinity"),
        (Scenario(lambda subject, model: {"a": torch.rand(2)}), "eager does not agree with itself"),
    ],
)
def test_where_eager_is_no_judge_all_are_skipped(scenario, reason):
    verdicts = run_scenario(scenario, SUBJECT, 0, {"sdpa": 0, "tested": 0})
    assert {verdict.verdict for verdict in verdicts.values()} == {SKIP}
    assert all(verdict.reason.startswith(reason) for verdict in verdicts.values())


def test_scenario_with_a_reference_of_its_own():
    """Eager itself is wrong here, so it counts only where the model knows another."""
    scenario = Scenario(gives_what_the_model_is, reference=gives(1.0))
    wrong, right = 0, 1
    verdicts = run_scenario(scenario, SUBJECT, wrong, {"sdpa": right, "tested": wrong})
    assert [verdicts["sdpa"].verdict, verdicts["tested"].verdict] == [AGREE, DISAGREE]
    only_eager = {"sdpa": Verdict(REJECTED), "tested": wrong}
    assert run_scenario(scenario, SUBJECT, wrong, only_eager)["tested"].verdict == SKIP
    assert run_scenario(scenario, SUBJECT, right, only_eager)["tested"].verdict == DISAGREE


# report


@pytest.mark.parametrize(
    ("baseline", "tested", "beyond", "better"),
    [
        (AGREE, AGREE, False, False),
        (AGREE, DISAGREE, True, False),
        (AGREE, ERROR, True, False),
        (REJECTED, AGREE, False, False),
        (REJECTED, DISAGREE, True, False),
        (REJECTED, ERROR, True, False),
        (DISAGREE, DISAGREE, False, False),
        (DISAGREE, ERROR, False, False),
        (DISAGREE, AGREE, False, True),
        (ERROR, ERROR, False, False),
        (ERROR, DISAGREE, True, False),
        (ERROR, AGREE, False, True),
        (AGREE, REJECTED, False, False),
        (SKIP, SKIP, False, False),
    ],
)
def test_what_counts_as_beyond_sdpa(baseline, tested, beyond, better):
    cell = report.Cell("model", "scenario", {"verdict": baseline}, {"verdict": tested})
    assert cell.beyond_baseline is beyond
    assert cell.better_than_baseline is better


# pool


def run(work: Callable[[Any], Any], jobs: list[Any]) -> dict[Any, tuple[Any, str]]:
    answers = run_jobs(jobs, work, prepare=gc.collect, workers=2, timeout=1.0, startup=20.0)
    return {job: (answer, failure) for job, answer, failure in answers}


def test_every_job_is_answered_once():
    assert run(math.sqrt, [1.0, 4.0, 9.0]) == {1.0: (1, ""), 4.0: (2, ""), 9.0: (3, "")}


def test_a_dead_worker_costs_one_job():
    failures = run(os._exit, [3, 4, 5])
    assert failures == {n: (None, f"the worker died with exit code {n}") for n in (3, 4, 5)}


def test_a_hanging_worker_costs_one_job():
    answers = run_jobs(
        [0.0, 60.0, 0.01], time.sleep, prepare=gc.collect, workers=1, timeout=1.0, startup=3.0
    )
    assert [failure for _, _, failure in answers] == ["", "no answer within 1 s", ""]
