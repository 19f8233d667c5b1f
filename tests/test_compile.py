"""torch.compile and torch.export: no graph breaks, one graph for all lengths, equal answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import (
    BloomConfig,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
    XGLMConfig,
)
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import smartattn
from smartattn.integration import smart_attention
from smartattn.modeling import made_for_sdpa

from .agreement import CACHE, MASKS, WIDTH, assert_agree, output_of, run, set_implementation, spans
from .tiny_models import PAD, from_config, tiny_model, token_ids


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph, and no memory of dynamic shapes, of an earlier test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


#: Decoders with one and with two kinds of layers, softcap and sinks; encoders; value head_dim.
FULL_GRAPH = ("llama", "gemma3", "gemma2", "gpt_oss", "bert", "modernbert", "deepseek_v3")


def small_model(name: str, implementation: str = "eager") -> PreTrainedModel:
    """One layer where all are alike: tracing takes seconds a layer."""
    mixed = name in ("gemma3", "gemma2", "gpt_oss", "modernbert")
    return tiny_model(name, implementation, **({} if mixed else {"num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("name", "padding"),
    [*((name, "holes") for name in FULL_GRAPH), *((name, None) for name in ("llama", "bert"))],
)
def test_a_forward_is_one_graph(name: str, padding: str | None) -> None:
    mask = None if padding is None else MASKS[padding]
    inputs: dict[str, Any] = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    if name not in ("bert", "modernbert"):
        inputs["use_cache"] = False
    model = small_model(name)
    expected = run(model, "eager", **inputs)
    set_implementation(model, "smart")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert_agree(output_of(compiled(**inputs)), expected, where=mask)
        assert_agree(output_of(compiled(**inputs)), expected, where=mask)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_graph_is_right_for_other_padding(name: str) -> None:
    """What was measured while tracing must not be baked in."""
    model = small_model(name, "smart")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids = token_ids(3, WIDTH)
    for padding, mask in MASKS.items():
        if padding == "empty_row":
            continue
        inputs = {"input_ids": ids, "attention_mask": mask}
        if name == "llama":
            inputs["use_cache"] = False
        with torch.no_grad():
            actual = output_of(compiled(**inputs))
        expected = run(small_model(name), "eager", **inputs)
        assert_agree(actual, expected, where=mask)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "masked"), [("llama", True), ("llama", False), ("mistral", True), ("bert", True)]
)
def test_dynamic_lengths_do_not_recompile(name: str, masked: bool) -> None:
    """One graph for the first length, at most one more for all others, and as many as for sdpa."""
    counts = {}
    for implementation in ("sdpa", "smart"):
        torch.compiler.reset()
        model = small_model(name, implementation)
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        for length in (9, 12, 17, 30):
            mask = spans((0, length), (length // 2, length), width=length) if masked else None
            inputs = {"input_ids": token_ids(2, length), "attention_mask": mask}
            if name != "bert":
                inputs["use_cache"] = False
            with torch.no_grad():
                actual = output_of(compiled(**inputs))
            if implementation == "smart":
                expected = run(small_model(name), "eager", **inputs)
                assert_agree(actual, expected, where=mask)
        counts[implementation] = counter.frame_count
    assert counts["smart"] <= max(counts["sdpa"], 1)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_training_compiles(name: str) -> None:
    """Forward and backward through AOT autograd."""
    mask = MASKS["left"]
    gradients = {}
    for implementation in ("eager", "smart"):
        model = small_model(name, implementation)
        called: Any = model
        if implementation == "smart":
            called = torch.compile(model, fullgraph=True, backend="aot_eager")
        inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
        if name == "llama":
            inputs["use_cache"] = False
        output_of(called(**inputs))[mask.bool()].square().mean().backward()
        gradients[implementation] = {n: p.grad for n, p in model.named_parameters()}
    scale = max(float(g.abs().max()) for g in gradients["eager"].values() if g is not None)
    for parameter, expected in gradients["eager"].items():
        if expected is not None:  # AOT autograd makes zeros of the unused ones.
            assert float((gradients["smart"][parameter] - expected).abs().max()) <= 1e-4 * scale


def test_softcap_without_eager_code_is_one_error() -> None:
    """The static choice refuses what no implementation can do, and names the argument."""

    class Layer(torch.nn.Module):
        is_causal = True

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            output, _ = smartattn.integration.smart_attention(
                self, states, states, states, None, softcap=30.0
            )
            return output

    compiled = torch.compile(Layer(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"(?s)softcap.*attn_implementation='eager'"):
        compiled(torch.randn(1, 2, 4, 8))


# -- caches ----------------------------------------------------------------------------------------


def static_decode(name: str, implementation: str) -> int:
    """Compiled steps against eager's answer; returns the number of graphs."""
    torch.compiler.reset()
    ids, mask = token_ids(3, WIDTH), MASKS["left"]
    model = small_model(name)
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    set_implementation(model, implementation)
    cache = StaticCache(config=model.config, max_cache_len=WIDTH + 4)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    positions = torch.arange(WIDTH).expand(3, -1)
    # A compiled step gets a mask of a fixed shape, as generate makes it.
    padded = torch.cat([mask, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(
            input_ids=ids[:, :8],
            attention_mask=padded,
            position_ids=positions[:, :8],
            **{CACHE: cache},
        )
        steps = []
        for at in range(8, WIDTH):
            step = compiled(
                input_ids=ids[:, at : at + 1],
                attention_mask=padded,
                position_ids=positions[:, at : at + 1],
                **{CACHE: cache},
            )
            steps.append(step.logits)
    assert_agree(torch.cat(steps, dim=1), expected[:, 8:], where=mask[:, 8:])
    return counter.frame_count


def test_decode_steps_with_a_static_cache_are_one_graph() -> None:
    assert static_decode("llama", "smart") == 1


@pytest.mark.slow
def test_decode_steps_with_a_sliding_static_cache_compile_as_often_as_sdpas() -> None:
    """Its layers count in Python, which makes a graph of every step."""
    assert static_decode("mistral", "smart") <= static_decode("mistral", "sdpa")


def compiling_on_cpu() -> CompileConfig:
    """What generate does by itself on a GPU."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_with_compiled_decode_steps(name: str, cache: str) -> None:
    model = small_model(name)
    ids, mask = token_ids(3, 7), spans((0, 7), (2, 7), (6, 7), width=7)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **settings).tolist()
    set_implementation(model, "smart")
    actual = model.generate(
        ids,
        attention_mask=mask,
        cache_implementation=cache,
        compile_config=compiling_on_cpu(),
        **settings,
    )
    assert actual.tolist() == expected


@pytest.mark.skipif(
    not getattr(StaticLayer, "is_croppable", False),
    reason="this Transformers cannot take candidates back out of a static cache",
)
def test_assisted_decoding_with_compiled_steps() -> None:
    """Candidates are checked by several queries in one compiled step."""
    ids = token_ids(1, 7).repeat(1, 2)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": PAD,
        "eos_token_id": None,
    }
    expected = tiny_model("gpt2").generate(ids, **settings).tolist()
    graphs = {}
    for implementation in ("sdpa", "smart"):
        torch.compiler.reset()
        counters.clear()
        model = tiny_model("gpt2", implementation)
        tokens = model.generate(
            ids,
            prompt_lookup_num_tokens=3,
            cache_implementation="static",
            compile_config=compiling_on_cpu(),
            **settings,
        )
        assert tokens.tolist() == expected
        graphs[implementation] = counters["stats"]["unique_graphs"]
    assert 0 < graphs["smart"] <= graphs["sdpa"]


@pytest.mark.slow
def test_a_growing_cache_compiles() -> None:
    """Steps with a dynamic cache: more than one graph is nobody's fault, a break would be."""
    ids, mask = token_ids(3, WIDTH), MASKS["left"]
    model = small_model("llama")
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    cache = DynamicCache(config=model.config)
    run(model, "smart", input_ids=ids[:, :8], attention_mask=mask[:, :8], **{CACHE: cache})
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for at in range(8, WIDTH):
        with torch.no_grad():
            step = compiled(
                input_ids=ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=torch.full((3, 1), at),
                **{CACHE: cache},
            )
        assert_agree(step.logits, expected[:, at : at + 1], where=mask[:, at : at + 1])


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_compiled_one_by_one(name: str, fullgraph: bool) -> None:
    """The mask is made outside of what is compiled, as by accelerate's regional compilation."""
    inputs: dict[str, Any] = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    model = small_model(name)
    if name == "llama":
        inputs["use_cache"] = False
    expected = run(model, "eager", **inputs)
    layers = model.model.layers if name == "llama" else model.encoder.layer
    for layer in layers:
        layer.compile(backend="eager", fullgraph=fullgraph)
    assert_agree(run(model, "smart", **inputs), expected, where=MASKS["left"])


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_export_of_an_encoder(name: str) -> None:
    """The exported program is right for padding it was not exported with, and other lengths."""
    model = small_model(name, "smart")
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    example = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["right"]}
    with torch.no_grad():
        program = torch.export.export(
            model, (), example, dynamic_shapes=shapes, strict=False
        ).module()
    for mask in (*MASKS.values(), spans((0, 20), (5, 20), (3, 9), width=20)):
        if not mask.any(1).all():
            continue
        inputs = {"input_ids": token_ids(*mask.shape), "attention_mask": mask}
        with torch.no_grad():
            actual = output_of(program(**inputs))
        assert_agree(actual, run(small_model(name), "eager", **inputs), where=mask)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.inductor
def test_the_default_compiler(name: str) -> None:
    """Inductor itself, once."""
    model = small_model(name)
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}
    expected = run(model, "eager", **inputs)
    set_implementation(model, "smart")
    with torch.no_grad():
        actual = output_of(torch.compile(model, fullgraph=True)(**inputs))
    assert_agree(actual, expected, where=MASKS["left"])


# -- models whose code does not know sdpa ----------------------------------------------------------


def without_sdpa(name: str) -> PreTrainedModel:
    """One that adds every mask it is given, and takes None for none at all."""
    small = {"vocab_size": 100, "pad_token_id": PAD}
    if name == "bloom":
        config = BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4)
        return from_config("BloomForCausalLM", config)
    sizes = {"d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4}
    return from_config("XGLMForCausalLM", XGLMConfig(**small, **sizes))


@pytest.mark.parametrize("padding", [None, "left", "holes"])
@pytest.mark.parametrize("name", ["bloom", "xglm"])
@torch.no_grad()
def test_models_without_sdpa_keep_their_masks_in_a_graph(name: str, padding: str | None) -> None:
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask, "use_cache": False}
    model = without_sdpa(name)
    expected = run(model, "eager", **inputs)
    set_implementation(model, "smart")
    compiled = torch.compile(model, backend="eager")
    assert_agree(output_of(compiled(**inputs)), expected, where=mask)


def test_which_code_knows_sdpa() -> None:
    known = small_model("llama").model.layers[0].self_attn
    assert made_for_sdpa(LlamaConfig)
    assert made_for_sdpa(type(known))
    # Of the code of these, which has to be there to be asked.
    layer = without_sdpa("xglm").model.layers[0].self_attn
    without_sdpa("bloom")
    assert not made_for_sdpa(BloomConfig)
    assert not made_for_sdpa(XGLMConfig)
    assert made_for_sdpa(dict)
    # A layer of a model without sdpa that has no mask hides nothing, whatever it says of itself.
    layer.is_causal = True
    states = [torch.randn(2, 4, 8, 8) for _ in range(3)]
    compiled = torch.compile(smart_attention, backend="eager")
    expected = sdpa_attention_forward(layer, *states, None, is_causal=False)[0]
    assert_agree(compiled(layer, *states, None)[0], expected)
    expected = sdpa_attention_forward(known, *states, None, is_causal=True)[0]
    assert_agree(compiled(known, *states, None)[0], expected)


# -- torch.jit.trace -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "xglm"])
@torch.no_grad()
def test_traced_models(name: str, masked: bool) -> None:
    model = without_sdpa(name) if name == "xglm" else small_model(name)
    ids, mask = token_ids(3, WIDTH), MASKS["left"]
    given = (ids, mask) if masked else (ids,)
    model.config.use_cache = False
    expected = run(model, "eager", input_ids=ids, attention_mask=mask if masked else None)
    set_implementation(model, "smart")
    traced = torch.jit.trace(_First(model), given, check_trace=False)
    assert_agree(traced(*given), expected, where=mask if masked else None)


class _First(torch.nn.Module):
    """A trace returns tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return output_of(self.model(*given))
