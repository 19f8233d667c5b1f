"""Every cache of Transformers, with padding, in prefill, chunks and decode steps, against eager."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    masking_utils,
)
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import smartattn
from smartattn.integration import smart_attention

from . import real_models
from .agreement import CACHE, MASKS, WIDTH, assert_agree, output_of, run, set_implementation, spans
from .tiny_models import BOS, PAD, VOCABULARY, tiny_model, token_ids

#: Full layers, windowed layers, both, chunked and full, value head_dim of its own, sinks, softcap.
DECODERS = ("llama", "mistral", "gemma3", "llama4", "deepseek_v3", "gpt_oss", "gemma2", "gpt2")
PROMPT = spans((0, 7), (2, 7), (6, 7), width=7)


def generated(
    model: Any, implementation: str, ids: torch.Tensor, mask: torch.Tensor | None, **settings: Any
) -> list[list[int]]:
    """Tokens of a greedy continuation."""
    set_implementation(model, implementation)
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD, **settings}
    # Nothing ends early, so that every step is compared.
    settings.setdefault("eos_token_id", None)
    return model.generate(ids, attention_mask=mask, **settings).tolist()


# -- generate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "dynamic", "static", "no"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_equal_eagers(name: str, cache: str | None) -> None:
    """Nine tokens past a window of five, from left-padded prompts."""
    chunked = inspect.signature(masking_utils.create_chunked_causal_mask).parameters
    if name == "llama4" and cache == "static" and "block_sequence_ids" not in chunked:
        pytest.skip("this Transformers cannot generate so under any implementation")
    settings: dict[str, Any] = {"use_cache": cache != "no"}
    if cache in ("dynamic", "static"):
        settings |= {"cache_implementation": cache, "disable_compile": True}
    model = tiny_model(name)
    ids = token_ids(3, 7)
    expected = generated(model, "eager", ids, PROMPT, **settings)
    assert generated(model, "smart", ids, PROMPT, **settings) == expected
    assert len({tuple(tokens[7:]) for tokens in expected}) == 3


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_greedy_tokens_depend_on_the_padding(name: str) -> None:
    """Attending to padding would change the tokens that are compared above."""
    model, ids = tiny_model(name), token_ids(3, 7)
    unmasked = generated(model, "eager", ids, torch.ones_like(PROMPT))
    assert unmasked != generated(model, "eager", ids, PROMPT)


@pytest.mark.parametrize("backends", ["sdpa", ("sdpa_unpadded", "sdpa")])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_greedy_tokens_of_each_backend(name: str, backends: Any) -> None:
    model, ids = tiny_model(name), token_ids(3, 7)
    expected = generated(model, "eager", ids, PROMPT)
    with smartattn.use(backends=backends), smartattn.trace() as trace:
        assert generated(model, "smart", ids, PROMPT) == expected
    assert {row.facts["q_len"] for row in trace.rows} == {7, 1}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_prefill_in_chunks(name: str) -> None:
    model, ids = tiny_model(name), token_ids(3, 7)
    expected = generated(model, "eager", ids, PROMPT)
    assert generated(model, "smart", ids, PROMPT, prefill_chunk_size=3) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_assisted_decoding(name: str) -> None:
    """The candidates of the small model are checked by several queries at once."""
    model = tiny_model(name)
    # Nearly the same model, so that some candidates are taken and some are not.
    assistant = tiny_model(name)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    ids = token_ids(1, 7)
    mask = torch.ones_like(ids)
    expected = generated(model, "eager", ids, mask, max_new_tokens=16)
    set_implementation(assistant, "smart")
    with smartattn.trace() as trace:
        tokens = generated(model, "smart", ids, mask, max_new_tokens=16, assistant_model=assistant)
    assert tokens == expected
    assert any(1 < row.facts["q_len"] < row.facts["kv_len"] for row in trace.rows)


@pytest.mark.parametrize("name", ["llama", "mistral", "bart", "t5"])
def test_beam_search(name: str) -> None:
    """Beams are reordered in the cache, and their masks with them."""
    model, ids = tiny_model(name), token_ids(3, 7)
    mask = PROMPT if name in ("llama", "mistral") else spans((0, 7), (0, 5), (0, 2), width=7)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    expected = generated(model, "eager", ids, mask, **settings)
    assert generated(model, "smart", ids, mask, **settings) == expected


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_caches(name: str, cache: str | None) -> None:
    model, ids = tiny_model(name), token_ids(3, WIDTH)
    settings: dict[str, Any] = {}
    if cache is not None:
        settings = {"cache_implementation": cache, "disable_compile": True}
    for padding in ("right", "left", "holes"):
        expected = generated(model, "eager", ids, MASKS[padding], **settings)
        assert generated(model, "smart", ids, MASKS[padding], **settings) == expected


# -- caches by hand --------------------------------------------------------------------------------


def stepwise(
    model: Any,
    implementation: str,
    cache: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    cuts: tuple[int, ...],
    backends: Any = None,
) -> torch.Tensor:
    """The logits of all tokens, computed in pieces that end at ``cuts``."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    pieces = []
    for start, stop in zip((0, *cuts[:-1]), cuts, strict=True):
        pieces.append(
            run(
                model,
                implementation,
                backends,
                input_ids=ids[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=positions[:, start:stop],
                **{CACHE: cache},
            )
        )
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("padding", [None, "ones", "left", "both", "holes", "empty_row"])
@pytest.mark.parametrize("cuts", [(12,), (5, 12), (1, 2, 12), (4, 5, 6, 12), (11, 12)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_pieces_equal_the_whole(
    name: str, kind: str, cuts: tuple[int, ...], padding: str | None
) -> None:
    ids = token_ids(3, WIDTH)
    mask = None if padding is None else MASKS[padding]
    model = tiny_model(name)
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    for backends in (None, ("sdpa_unpadded", "sdpa")):
        if kind == "dynamic":
            cache: Any = DynamicCache(config=model.config)
        else:
            cache = StaticCache(config=model.config, max_cache_len=WIDTH + 4)
        actual = stepwise(model, "smart", cache, ids, mask, cuts, backends)
        assert_agree(actual, expected, where=mask)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_new_turn_with_padding_of_its_own(name: str) -> None:
    """Turns of unequal length, padded on the left each: the second one's padding is a hole."""
    first = spans((0, 6), (2, 6), (5, 6), width=6)
    second = spans((2, 5), (0, 5), (4, 5), width=5)
    mask = torch.cat([first, second], dim=1)
    ids = token_ids(3, 11)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model = tiny_model(name)
    outputs = {}
    for implementation in ("eager", "smart"):
        cache = DynamicCache(config=model.config)
        pieces = [
            run(
                model,
                implementation,
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                **{CACHE: cache},
            )
            for start, stop in ((0, 6), (6, 11))
        ]
        outputs[implementation] = torch.cat(pieces, dim=1)
    assert_agree(outputs["smart"], outputs["eager"], where=mask)


def test_a_new_turn_equals_the_conversation_alone() -> None:
    """The same, against every row by itself without any padding."""
    mask = torch.cat(
        [spans((0, 6), (2, 6), (5, 6), width=6), spans((2, 5), (0, 5), (4, 5), width=5)], dim=1
    )
    ids = token_ids(3, 11)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    pieces = [
        run(
            model,
            "smart",
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            **{CACHE: cache},
        )
        for start, stop in ((0, 6), (6, 11))
    ]
    actual = torch.cat(pieces, dim=1)
    for row in range(3):
        real = mask[row].bool()
        expected = run(model, "eager", input_ids=ids[row][real][None])
        assert_agree(actual[row][real][None], expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_goes_on_with_a_cache(name: str) -> None:
    """A second call of generate with the cache of the first, as chat loops do."""
    model = tiny_model(name)
    tokens = {}
    for implementation in ("eager", "smart"):
        set_implementation(model, implementation)
        cache = DynamicCache(config=model.config)
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        first = model.generate(token_ids(3, 7), attention_mask=PROMPT, **{CACHE: cache}, **settings)
        turn = torch.cat([first, token_ids(3, 3, seed=1)], dim=1)
        mask = torch.cat([PROMPT, torch.ones(3, 4 + 3, dtype=torch.long)], dim=1)
        second = model.generate(turn, attention_mask=mask, **{CACHE: cache}, **settings)
        tokens[implementation] = second.tolist()
    assert tokens["smart"] == tokens["eager"]


def test_cropping_a_cache() -> None:
    """What assisted decoding does to rejected candidates."""
    model, ids = tiny_model("llama"), token_ids(3, WIDTH)
    mask = MASKS["left"]
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    cache = DynamicCache(config=model.config)
    first = stepwise(model, "smart", cache, ids[:, :8], mask[:, :8], (8,))
    run(
        model,
        "smart",
        input_ids=torch.full((3, 3), BOS),
        attention_mask=torch.cat([mask[:, :8], torch.ones(3, 3, dtype=torch.long)], dim=1),
        **{CACHE: cache},
    )
    cache.crop(-3)
    rest = run(
        model,
        "smart",
        input_ids=ids[:, 8:],
        attention_mask=mask,
        position_ids=torch.arange(8, WIDTH).expand(3, -1),
        **{CACHE: cache},
    )
    assert_agree(torch.cat([first, rest], dim=1), expected, where=mask)


# -- continuous batching ---------------------------------------------------------------------------


PROMPTS = [token_ids(1, length, seed=length)[0].tolist() for length in (7, 5, 3)]


def batched_continuously(model: Any) -> list[list[int]]:
    """Greedy continuations of prompts that share one paged cache."""
    config = GenerationConfig(
        max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=VOCABULARY
    )
    # By itself it takes most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    answers = model.generate_batch(
        inputs=PROMPTS, generation_config=config, continuous_batching_config=small
    )
    assert all(answer.error is None for answer in answers.values())
    return [answers[name].generated_tokens for name in sorted(answers)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be there")
def test_continuous_batching_is_refused_or_runs_another_implementation() -> None:
    """Transformers takes its own implementations alone: flash attention if there is one."""
    model = tiny_model("llama", "sdpa")
    assert len(batched_continuously(model)) == len(PROMPTS)
    set_implementation(model, "smart")
    with pytest.raises(ValueError, match=r"smart.*not supported"):
        batched_continuously(model)
    # The model is as it was.
    mask = MASKS["left"]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    expected = run(tiny_model("llama"), "eager", **inputs)
    assert model.config._attn_implementation == "smart"
    with torch.no_grad():
        assert_agree(output_of(model(**inputs)), expected, where=mask)


def test_paged_caches_of_a_model_of_which_a_part_is_smart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for the implementation of the whole model alone."""
    model = tiny_model("llama", "sdpa")
    expected = batched_continuously(model)
    mapping = AttentionInterface._global_mapping
    if "paged|sdpa" in mapping:
        pytest.skip("this Transformers has an implementation of its own for paged caches")
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return smart_attention(*args, **kwargs)

    monkeypatch.setitem(mapping, "sdpa", counted)
    assert batched_continuously(model) == expected
    assert calls


def test_paged_caches_leave_no_argument_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 5.23 sdpa gets the cache, and knows nothing of sinks."""
    layer = tiny_model("gpt_oss", "smart").model.layers[0].self_attn
    states = [torch.randn(1, heads, 4, 8) for heads in (4, 2, 2)]
    cache = object.__new__(PagedAttentionCache)
    with pytest.raises(smartattn.UnsupportedCallError, match=r"s_aux.*paged\|eager"):
        smart_attention(layer, *states, None, cache=cache, s_aux=layer.sinks)
    seen = {}

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return states[0], None

    monkeypatch.setattr("smartattn.graphs.sdpa_attention_forward", sdpa)
    # Lists of tensors are what places in the cache are said by.
    smart_attention(layer, *states, None, cache=cache, read_index=[torch.arange(4)])
    assert seen["cache"] is cache
    assert len(seen["read_index"]) == 1


# -- a real model ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(real_models.missing() is not None, reason=str(real_models.missing()))
@pytest.mark.parametrize("backends", [None, "sdpa", ("sdpa_unpadded", "sdpa")])
def test_smollm2_generates_eagers_tokens(backends: Any) -> None:
    """Prompts of unequal length in one left-padded batch, float32."""
    model, tokenizer = real_models.smollm2()
    prompts = ["The capital of France is", "Once upon a time there was a small fox who", "Two"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    set_implementation(model, "eager")
    expected = model.generate(**batch, **settings).tolist()
    set_implementation(model, "smart")
    with smartattn.use(backends=backends):
        assert model.generate(**batch, **settings).tolist() == expected
