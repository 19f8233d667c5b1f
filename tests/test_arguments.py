"""Shapes, dtypes and arguments: what a backend implements, what goes to the model's own code, what
is one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import LlamaAttention

import smartattn
from smartattn import integration, layer_call
from smartattn.arguments import as_under_autocast, is_self_attention
from smartattn.call import Call
from smartattn.integration import smart_attention
from smartattn.mask import PlanMask
from smartattn.masking import smart_mask
from smartattn.plan import Pattern, Plan

from .agreement import (
    CPU_BACKENDS,
    MASKS,
    WIDTH,
    assert_agree,
    assert_differ,
    output_of,
    relative_error,
    run,
    set_implementation,
)
from .tiny_models import tiny_model, token_ids

# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 8), (8, 4, 8), (6, 2, 8), (8, 1, 8), (4, 1, 80), (4, 2, 80), (2, 1, 320), (4, 2, 6)],
)
def test_grouped_heads_and_head_dims(
    heads: int, kv_heads: int, head_dim: int, padding: str | None
) -> None:
    model = tiny_model(
        "llama",
        hidden_size=48,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    expected = run(model, "eager", **inputs)
    choices: list[Any] = [None, "sdpa", ("sdpa_unpadded", "sdpa")]
    for backends in choices:
        assert_agree(run(model, "smart", backends, **inputs), expected, where=mask)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
) -> torch.Tensor:
    """softmax(q k) v; (batch, q_len, heads, value_head_dim)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def left_padded(dtype: torch.dtype = torch.float64) -> tuple[PlanMask, torch.Tensor]:
    """The mask of a causal left-padded batch, and where its tokens are real."""
    real = MASKS["left"].bool()
    plan = Plan(
        3, WIDTH, WIDTH, Pattern.CAUSAL, real.device, real=real.numpy(), real_on_device=real
    )
    return PlanMask(plan, dtype), real


def states(value_head_dim: int = 8, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (2, 8), (2, value_head_dim))
    return [
        torch.randn(3, heads, WIDTH, dim, generator=generator, dtype=torch.float64).to(dtype)
        for heads, dim in shapes
    ]


def some_layer() -> Any:
    return tiny_model("llama", "smart").model.layers[0].self_attn


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("value_head_dim", [8, 4, 24])
@pytest.mark.parametrize("scaling", [None, 1.0, 0.01, 3.0])
def test_scaling_and_value_head_dim(
    scaling: float | None, value_head_dim: int, backend: str
) -> None:
    mask, real = left_padded()
    query, key, value = states(value_head_dim)
    with smartattn.use(backends=backend):
        actual, weights = smart_attention(some_layer(), query, key, value, mask, scaling=scaling)
    assert weights is None
    assert actual.is_contiguous()
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    expected = reference(query, key, value, causal & real[:, None, None, :], scaling)
    assert_agree(actual, expected, where=real, tolerance=1e-12)


def test_strides_of_fused_projections() -> None:
    """Slices of one (batch, length, 3, heads, head_dim) tensor, as GPT-2 and ModernBERT give."""
    mask, real = left_padded()
    fused = torch.randn(3, WIDTH, 3, 4, 8, dtype=torch.float64)
    query, key, value = (fused[:, :, i].transpose(1, 2) for i in range(3))
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    expected = reference(query, key, value, causal & real[:, None, None, :])
    for backend in CPU_BACKENDS:
        with smartattn.use(backends=backend):
            actual, _ = smart_attention(some_layer(), query, key, value, mask)
        assert_agree(actual, expected, where=real, tolerance=1e-12)


def test_without_a_mask_only_the_call_can_be_causal() -> None:
    """To eager attention a None mask hides nothing, whatever a layer says of itself."""
    query, key, value = states()
    everything = torch.ones(WIDTH, WIDTH, dtype=torch.bool)
    layer = some_layer()
    assert layer.is_causal
    for is_causal in (None, True, False):
        actual, _ = smart_attention(layer, query, key, value, None, is_causal=is_causal)
        mask = everything.tril() if is_causal else everything
        assert_agree(actual, reference(query, key, value, mask), tolerance=1e-12)


# -- masks of the caller ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["boolean", "float", "broadcast", "per_head"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_a_callers_own_mask(name: str, kind: str) -> None:
    """Four dimensions arrive as they are: here every third earlier token is hidden."""
    query, key = torch.arange(WIDTH)[:, None], torch.arange(WIDTH)[None, :]
    allowed = ((key <= query) & ((query - key) % 3 != 1)).expand(3, 1, WIDTH, WIDTH)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = {
        "boolean": allowed,
        "float": additive,
        "broadcast": additive[:1],
        "per_head": additive.expand(3, 4, -1, -1),
    }[kind]
    model = tiny_model(name)
    ids = token_ids(3, WIDTH)
    given = {"full_attention": mask, "sliding_attention": mask} if name == "gemma3" else mask
    reference_mask = additive if name != "gemma3" else dict.fromkeys(given, additive)
    expected = run(model, "eager", input_ids=ids, attention_mask=reference_mask)
    assert_agree(run(model, "smart", input_ids=ids, attention_mask=given), expected)
    assert_differ(run(model, "eager", input_ids=ids), expected)


# -- arguments that change the result --------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "ones", "left", "right", "holes"])
@pytest.mark.parametrize(("name", "feature"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_softcap_and_sinks_run_the_models_own_code(
    name: str, feature: str, padding: str | None
) -> None:
    model = tiny_model(name)
    if name == "gpt_oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    expected = run(model, "eager", **inputs)
    with smartattn.trace() as trace:
        actual = run(model, "smart", **inputs)
    assert_agree(actual, expected, where=mask)
    assert {row.backend for row in trace.rows} == {"eager"}
    for row in trace.rows:
        assert any(feature in reason for reason in row.refused["sdpa"])
    with pytest.raises(smartattn.UnsupportedCallError, match=feature):
        run(model, "smart", "sdpa", **inputs)


@pytest.mark.parametrize("padding", [None, "right", "left", "holes"])
def test_position_bias_of_t5(padding: str | None) -> None:
    inputs = {
        "input_ids": token_ids(3, WIDTH),
        "attention_mask": None if padding is None else MASKS[padding],
        "decoder_input_ids": token_ids(3, WIDTH, seed=1),
    }
    model = tiny_model("t5")
    for parameter_name, parameter in model.named_parameters():
        if "relative_attention_bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=3.0)
    expected = run(model, "eager", **inputs)
    with smartattn.trace() as trace:
        actual = run(model, "smart", **inputs)
    assert_agree(actual, expected)
    assert {row.backend for row in trace.rows} == {"sdpa"}
    with pytest.raises(smartattn.UnsupportedCallError, match="does not implement position_bias"):
        run(model, "smart", "sdpa_unpadded", **inputs)
    for parameter_name, parameter in model.named_parameters():
        if "relative_attention_bias" in parameter_name:
            torch.nn.init.zeros_(parameter)
    assert_differ(run(model, "eager", **inputs), expected)


@pytest.mark.parametrize(
    "argument",
    [torch.ones(1), [torch.ones(1)], (None, torch.ones(1)), {"inner": torch.ones(1)}],
    ids=["tensor", "list", "tuple", "dict"],
)
def test_an_unknown_tensor_goes_to_the_models_own_code(
    argument: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether it changes the result, so whoever wrote the model decides."""
    import transformers.models.llama.modeling_llama as modeling

    given: list[dict[str, Any]] = []
    original = modeling.eager_attention_forward

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(kwargs)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(modeling, "eager_attention_forward", recording)
    mask, real = left_padded()
    query, key, value = states()
    layer = some_layer()
    with smartattn.trace() as trace:
        actual, _ = smart_attention(
            layer, query, key, value, mask, scaling=8**-0.5, novelty=argument, sliding_window=3
        )
    assert [row.backend for row in trace.rows] == ["eager"]
    assert given[0]["novelty"] is argument
    assert given[0]["scaling"] == 8**-0.5
    assert {"module", "eager"}.isdisjoint(given[0])
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    expected = reference(query, key, value, causal & real[:, None, None, :])
    assert_agree(actual, expected, where=real)


@pytest.mark.parametrize("argument", [None, 3, "text", True, [1, 2], {"a": 1}])
def test_an_unknown_setting_changes_nothing(argument: Any) -> None:
    mask, _ = left_padded()
    with smartattn.trace() as trace:
        smart_attention(some_layer(), *states(), mask, novelty=argument)
    assert [row.backend for row in trace.rows] != ["eager"]


def test_a_cache_among_the_arguments_changes_nothing() -> None:
    """Layers that know no cache hand it on to attention, under the name that models know it by."""
    mask, real = left_padded()
    tensors = states()
    expected, _ = smart_attention(some_layer(), *tensors, mask)
    for name in ("cache", "past_key_values"):
        cache = {name: DynamicCache()}
        with smartattn.trace() as trace:
            actual, _ = smart_attention(some_layer(), *tensors, left_padded()[0], **cache)
        assert_agree(actual, expected, where=real)
        assert len(trace.rows) == 1
        assert trace.rows[0].backend != "eager"


@pytest.mark.parametrize(
    ("layer", "alone"),
    [
        (BertSelfAttention, True),
        (LlamaAttention, True),
        (BertCrossAttention, False),
        (BartAttention, False),
    ],
)
def test_layers_without_a_second_source_attend_to_themselves(layer: type, alone: bool) -> None:
    assert is_self_attention(layer) is alone


def test_the_same_layer_with_and_without_an_argument() -> None:
    """A choice made for one call is not reused for a call that asks for more.

    Outputs are compared, not traces: a trace of its own makes each choice anew.
    """
    layer, tensors = some_layer(), [4 * tensor for tensor in states()]
    shared, real = left_padded()

    def attend(mask: torch.Tensor, softcap: float | None) -> torch.Tensor:
        # Llama's eager function knows no softcap: Gemma 2's stands in for a model with one.
        output, _ = smart_attention(layer, *tensors, mask, scaling=8**-0.5, softcap=softcap)
        return output

    layer.__class__ = type("Capped", (type(layer),), {"__module__": Gemma2Attention.__module__})
    plain, capped = attend(left_padded()[0], None), attend(left_padded()[0], 0.5)
    assert_differ(capped[real], plain[real])
    for softcap in (None, 0.5, None, 0.5):
        expected = plain if softcap is None else capped
        assert_agree(attend(shared, softcap), expected, where=real)


class Attention(torch.nn.Module):
    """A layer whose module has no eager attention function."""

    is_causal = True


@pytest.mark.parametrize(
    ("extra", "feature"),
    [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.zeros(4)}, "s_aux"),
     ({"novelty": torch.ones(1)}, "novelty")],
)  # fmt: skip
def test_no_eager_function_is_one_clear_error(extra: dict[str, Any], feature: str) -> None:
    with pytest.raises(smartattn.UnsupportedCallError) as raised:
        smart_attention(Attention(), *states(), None, **extra)
    message = str(raised.value)
    assert f"sdpa: does not implement {feature}" in message
    assert "attn_implementation='eager'" in message
    assert "eager: the model's own module has no eager_attention_forward" in message


def test_a_forced_backend_runs_or_raises() -> None:
    model = tiny_model("llama")
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["holes"]}
    with pytest.raises(smartattn.UnsupportedCallError, match=r"sdpa_unpadded: .*holes") as raised:
        run(model, "smart", "sdpa_unpadded", **inputs)
    assert "sdpa:" not in str(raised.value), "only what was allowed is explained"
    with smartattn.trace() as trace:
        actual = run(model, "smart", "eager", **inputs)
    assert [row.backend for row in trace.rows] == ["eager"]
    assert_agree(actual, run(model, "eager", **inputs), where=MASKS["holes"])


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dtypes(name: str, dtype: torch.dtype, padding: str | None) -> None:
    """Half precision is held to twice eager's own error, against the same weights in float32.

    In float64 eager itself is NaN where a row is masked: its mask overflows a float32 softmax.
    """
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    model = tiny_model(name, dtype=dtype)
    real = slice(None) if mask is None else mask.bool()
    wide = run(tiny_model(name, dtype=dtype).float(), "eager", **inputs)[real]
    limit = 1e-5
    if dtype is not torch.float64:
        limit = 2 * relative_error(run(model, "eager", **inputs)[real], wide)
    for backends in (None, "sdpa", ("sdpa_unpadded", "sdpa")):
        actual = run(model, "smart", backends, **inputs)
        assert actual.dtype == dtype
        assert relative_error(actual[real], wide) <= limit


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3"])
def test_autocast(name: str) -> None:
    mask = MASKS["left"]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    model = tiny_model(name)
    real = mask.bool()
    wide = run(model, "eager", **inputs)[real]
    with torch.autocast("cpu", torch.bfloat16):
        own_error = relative_error(run(model, "eager", **inputs)[real], wide)
        for backends in (None, "sdpa", ("sdpa_unpadded", "sdpa")):
            actual = run(model, "smart", backends, **inputs)[real]
            assert relative_error(actual, wide) <= 2 * own_error


def test_calls_under_autocast_are_of_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA and matrix products compute in it whatever they are handed, so flash kernels may."""
    asked: list[Call] = []
    make = layer_call.call_of

    def note(*arguments: Any) -> Call:
        asked.append(make(*arguments))
        return asked[-1]

    monkeypatch.setattr(integration, "call_of", note)
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    half = torch.bfloat16
    for dtype, lower, expected in (
        (torch.float32, half, half),
        (torch.float32, torch.float16, torch.float16),
        (torch.float64, half, torch.float64),
        (torch.float32, None, torch.float32),
    ):
        model = tiny_model("llama", dtype=dtype)
        asked.clear()
        with torch.autocast("cpu", lower or half, enabled=lower is not None):
            model.set_attn_implementation("smart")
            if dtype is torch.float64:
                layer = model.model.layers[0].self_attn
                states = [torch.randn(2, n, 8, 8, dtype=dtype) for n in (4, 2, 2)]
                integration.smart_attention(layer, *states, None)
            else:
                model(**inputs)
        assert [call.dtype for call in asked] == [expected] * len(asked)
        assert asked
        assert not any("mixed dtypes" in call.features for call in asked)


def test_float64_is_not_rounded_under_autocast() -> None:
    """As autocast leaves it alone in every operation."""
    given = [torch.randn(2, 2, 4, 8), *(torch.randn(2, 2, 4, 8).double() for _ in range(2))]
    with torch.autocast("cpu", torch.bfloat16):
        found = as_under_autocast(*given)
    assert all(one is other for one, other in zip(found, given, strict=True))


def test_gradients_under_autocast_reach_what_was_handed_over() -> None:
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    given = [torch.randn(2, n, 8, 8, requires_grad=True) for n in (4, 2, 2)]
    grads = {}
    for name, attend in (("smart", integration.smart_attention), ("sdpa", sdpa_attention_forward)):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = attend(layer, *given, None, is_causal=True)
        assert output.dtype == torch.bfloat16
        grads[name] = torch.autograd.grad(output.float().square().sum(), given)
    for grad, other in zip(grads["smart"], grads["sdpa"], strict=True):
        assert grad.dtype == torch.float32
        assert_agree(grad, other, tolerance=2e-2)


@torch.no_grad()
def test_a_value_of_another_dtype_is_another_call() -> None:
    """Even under one mask, in layers that are alike otherwise."""
    layer = tiny_model("llama", "smart", dtype=torch.bfloat16).model.layers[0].self_attn
    mask = smart_mask(2, 8, 8)
    query, key, value = (torch.randn(2, n, 8, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    integration.smart_attention(layer, query, key, value, mask)
    with pytest.raises(RuntimeError, match="dtype"):
        integration.smart_attention(layer, query, key, value.float(), mask)
    assert len(mask.plan.decisions) == 2


@pytest.mark.parametrize("gradients", [False, True])
def test_peft_adapters_with_norms_in_float32(gradients: bool) -> None:
    """Query and key leave their norms in float32, the value leaves its projection in bfloat16."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model("qwen3", dtype=torch.bfloat16)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    mask = MASKS["left"]
    real = mask.bool()
    results = {}
    for implementation in ("eager", "sdpa", "smart"):
        set_implementation(base, implementation)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            output = output_of(model(input_ids=token_ids(3, WIDTH), attention_mask=mask))[real]
        results[implementation] = output.detach().float()
        if gradients:
            output.float().square().mean().backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results[implementation] = torch.cat(grads).float()
    wrong = relative_error(results["sdpa"], results["eager"])
    assert relative_error(results["smart"], results["eager"]) <= max(2 * wrong, 2e-2)


def test_peft_prefix_tuning() -> None:
    """An encoder with a cache: more keys than queries, and a mask as long as the keys."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    model = get_peft_model(
        tiny_model("llama"), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    ).eval()
    outputs = {}
    for implementation in ("eager", "smart"):
        set_implementation(model.base_model, implementation)
        with torch.no_grad():
            outputs[implementation] = output_of(
                model(input_ids=token_ids(3, WIDTH), attention_mask=MASKS["left"])
            )
    assert_agree(outputs["smart"], outputs["eager"], where=MASKS["left"])


def test_keys_of_one_row_for_all_queries_go_to_sdpa() -> None:
    """Kernels for caches take the batch of the query for that of the keys and read on."""
    query, key, value = states(dtype=torch.float32)
    output, _ = smart_attention(some_layer(), query, key[:1], value[:1], None)
    wide = [x[:1].expand(query.shape[0], -1, -1, -1).contiguous() for x in (key, value)]
    expected, _ = smart_attention(some_layer(), query, *wide, None)
    torch.testing.assert_close(output, expected)
    for backends in ("sdpa_unpadded", "flash_attention_2", "flash_attention_3", "torch_varlen"):
        with (
            pytest.raises(smartattn.UnsupportedCallError, match="broadcast batches"),
            smartattn.use(backends=backends),
        ):
            smart_attention(some_layer(), query, key[:1], value[:1], None)


def test_mixed_dtypes_fail_as_with_sdpa() -> None:
    """What Transformers' own sdpa cannot multiply is an error here too, never a silent cast."""
    mask, _ = left_padded(torch.float32)
    query, key, value = states(dtype=torch.float32)
    for backends in (None, "sdpa"):
        with pytest.raises(RuntimeError, match="dtype"), smartattn.use(backends=backends):
            smart_attention(some_layer(), query, key, value.bfloat16(), mask)
    with (
        pytest.raises(smartattn.UnsupportedCallError, match="mixed dtypes"),
        smartattn.use(backends="sdpa_unpadded"),
    ):
        smart_attention(some_layer(), query, key, value.bfloat16(), mask)
