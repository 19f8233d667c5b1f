"""What must be shown on a GPU: real models, device syncs, host overhead, tokens, memory, two GPUs.

The matrix of all backends is in ``test_backends_matrix.py``. Measurements go to
``tests.gpu_report``, which runs all tests marked ``gpu``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import smartattn
from smartattn import moves
from smartattn.backends import BACKENDS, NAMED, flash_attention_2
from smartattn.integration import smart_attention
from smartattn.workload import Spread, Workload

from . import gpu_results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)

if folder := os.environ.get("SMARTATTN_TEST_MODELS"):
    # The folders of the two model packages, copied to a machine without a network.
    sys.path.append(str(Path(folder).resolve()))

has_flash_attn = importlib.util.find_spec("flash_attn") is not None
IMPLEMENTATIONS = ("smart", "sdpa", *(("flash_attention_2",) if has_flash_attn else ()))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _lengths_mask(lengths: list[int], width: int, left: bool = False) -> torch.Tensor:
    """(batch, width) 1 at real tokens."""
    places = torch.arange(width)
    if left:
        places = places.flip(0)
    return (places < torch.tensor(lengths)[:, None]).long().to(CUDA)


def _largest_error(output: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest |difference|, the same divided by the largest |expected|)."""
    difference = (output.float() - expected.float()).abs().max().item()
    return difference, difference / expected.float().abs().max().item()


# -- real weights ----------------------------------------------------------------------------------


def _real_models() -> Any:
    """The loaders of ``tests.real_models``; skips where the models are not installed."""
    try:
        from . import real_models
    except ImportError as error:
        pytest.skip(f"the real models cannot be loaded: {error}")
    if reason := real_models.missing():
        pytest.skip(reason)
    return real_models


@contextlib.contextmanager
def _own_model(load: Any, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """A model of its own on the GPU, made from the one that is loaded once per process."""
    import copy

    model, tokenizer = load()
    yield copy.deepcopy(model).to(CUDA, dtype).eval(), tokenizer


SENTENCES = [
    "The cat sat on the mat.",
    "Attention is all you need, but padding is what you get in every batch of unequal length.",
    "Yes.",
    "A model of the weather needs a great many numbers, and most of them describe the sea.",
    "How far is it from here to the sea?",
] * 4


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_padded_forward_of_a_real_model_equals_eager(name: str) -> None:
    """bf16: real tokens within 4e-2, absolute or relative, and finite at padding."""
    models = _real_models()
    with _own_model(getattr(models, name), torch.bfloat16) as (model, tokenizer):
        batch = tokenizer(SENTENCES, return_tensors="pt", padding=True).to(CUDA)
        real = batch["attention_mask"].bool()
        assert not real.all()
        results: dict[str, Any] = {"padding_share": round(1 - real.float().mean().item(), 3)}
        outputs: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for implementation in ("eager", *IMPLEMENTATIONS):
                model.set_attn_implementation(implementation)
                with smartattn.trace() as trace:
                    outputs[implementation] = model(
                        **batch, output_hidden_states=True
                    ).hidden_states[-1]
                if implementation == "smart":
                    results["backends"] = sorted({row.backend for row in trace.rows})
            # The profile decides what runs above; each backend that can must be right too.
            model.set_attn_implementation("smart")
            for backend in BACKENDS[:-1]:
                with (
                    contextlib.suppress(smartattn.UnsupportedCallError),
                    smartattn.use(backends=backend.name),
                ):
                    outputs[f"smart: {backend.name}"] = model(
                        **batch, output_hidden_states=True
                    ).hidden_states[-1]
        for implementation, output in outputs.items():
            if implementation == "eager":
                continue
            error = _largest_error(output[real], outputs["eager"][real])
            results[implementation] = {"absolute": error[0], "relative": error[1]}
        gpu_results.write(f"forward_{name}", results)
        for implementation, output in outputs.items():
            if implementation.startswith("smart"):
                assert bool(output.isfinite().all()), implementation
                assert min(results[implementation].values()) <= 4e-2, (implementation, results)


def _prompts(count: int) -> list[str]:
    """Prompts of unequal length."""
    subjects = ["cats", "the sea", "old books", "a good soup", "trains", "prime numbers", "snow"]
    return [
        f"{i}. Write about {subjects[i % 7]}"
        + " and what one should know about them" * (i % 5)
        + ", in plain words." * (i % 3)
        for i in range(count)
    ]


@torch.no_grad()
def _greedy(model: Any, batch: Any, implementation: str, tokens: int) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    output = model.generate(
        **batch,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    assert output.shape[1] == batch["input_ids"].shape[1] + tokens
    return output[:, -tokens:]


def test_smollm2_generates_the_tokens_of_eager() -> None:
    """64 prompts, 64 greedy tokens: fp32 all equal; bf16 stated beside sdpa and flash."""
    models = _real_models()
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        with _own_model(models.smollm2, dtype) as (model, tokenizer):
            batch = tokenizer(_prompts(64), return_tensors="pt", padding=True).to(CUDA)
            assert not batch["attention_mask"].bool().all()
            expected = _greedy(model, batch, "eager", 64)
            shares = results[str(dtype).removeprefix("torch.")] = {}
            for implementation in IMPLEMENTATIONS:
                if dtype == torch.float32 and implementation == "flash_attention_2":
                    continue
                tokens = _greedy(model, batch, implementation, 64)
                equal = tokens == expected
                shares[implementation] = {
                    "equal_tokens": round(equal.float().mean().item(), 4),
                    "equal_prompts": int(equal.all(1).sum()),
                }
    gpu_results.write("tokens", results)
    assert results["float32"]["smart"]["equal_tokens"] == 1.0
    # bf16 rounds differently in every kernel; smart must not be further off than the others.
    others = [v["equal_tokens"] for k, v in results["bfloat16"].items() if k != "smart"]
    assert results["bfloat16"]["smart"]["equal_tokens"] >= min(others) - 0.1


# -- device syncs ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted_syncs() -> Iterator[list[str]]:
    """The operations that waited for the device, by torch's own debug mode."""
    found: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{Path(warning.filename).name}:{warning.lineno}")


def test_the_count_of_syncs_counts() -> None:
    tensor = torch.ones(3, device=CUDA)
    with _counted_syncs() as syncs:
        tensor.sum().item()
        tensor.nonzero()
        tensor.cpu()
    assert len(syncs) == 3
    with _counted_syncs() as syncs:
        tensor + 1
    assert syncs == []


def _bert_large(**changes: Any) -> PreTrainedModel:
    shape = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    config = BertConfig(**{**shape, **changes})
    return BertModel(config, add_pooling_layer=False).to(CUDA, torch.bfloat16).eval()


@torch.no_grad()
def test_one_sync_per_forward() -> None:
    """BERT-large shape, padded on the right: one host read, whatever backend runs."""
    torch.manual_seed(0)
    model = _bert_large()
    ids = torch.randint(0, 1000, (16, 512), device=CUDA)
    # Rows of equal length that do not lie next to each other, too.
    mask = _lengths_mask([512 - 29 * (row % 9) for row in range(16)], 512)
    counts: dict[str, Any] = {}
    variants = [(name, None) for name in IMPLEMENTATIONS]
    variants += [("smart", b.name) for b in BACKENDS[:-1] if b.unavailable() is None]
    for implementation, backend in variants:
        model.set_attn_implementation(implementation)
        allowed = smartattn.use(backends=backend) if backend else contextlib.nullcontext()
        with allowed:
            model(input_ids=ids, attention_mask=mask)
            with _counted_syncs() as syncs:
                model(input_ids=ids, attention_mask=mask)
        name = f"{implementation}: {backend}" if backend else implementation
        counts[name] = {"syncs": len(syncs), "where": sorted(set(syncs))}
    gpu_results.write("syncs", counts)
    for name, found in counts.items():
        if name.startswith("smart"):
            assert found["syncs"] == 1, (name, found)


@torch.no_grad()
def test_no_sync_in_the_layers_of_a_decoder_either() -> None:
    """Left padding, a window, holes: as many host reads as kinds of mask."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(CUDA, torch.bfloat16).eval()
    model.set_attn_implementation("smart")
    ids = torch.randint(0, 1000, (8, 256), device=CUDA)
    left = _lengths_mask([256 - 17 * row for row in range(8)], 256, left=True)
    holes = left.clone()
    holes[:, 100:110] = 0
    counts = {}
    for name, mask in (("left", left), ("holes", holes)):
        for backend in ("torch_varlen", "flash_attention_2", "sdpa"):
            with contextlib.suppress(smartattn.UnsupportedCallError), smartattn.use(backend):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                with _counted_syncs() as syncs:
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
                counts[f"{name}, {backend}"] = len(syncs)
    gpu_results.write("syncs_decoder", counts)
    assert len(counts) >= 4
    assert set(counts.values()) == {1}


# -- host overhead ---------------------------------------------------------------------------------


@torch.no_grad()
def test_host_overhead_per_layer() -> None:
    """Microseconds that smart adds to a layer over Transformers' own sdpa function: under 10."""
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config, add_pooling_layer=False).to(CUDA, torch.bfloat16).eval()
    layer = model.encoder.layer[0].attention.self
    query, key, value = (
        torch.randn(2, 16, 4, 16, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    model.set_attn_implementation("smart")
    handed: dict[str, Any] = {}

    def catch(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        handed.update(kwargs, mask=mask)
        return smart_attention(module, q, k, v, mask, **kwargs)

    from transformers import AttentionInterface

    # The mask of an unpadded batch and the arguments, as a model hands them over.
    AttentionInterface.register("smart", catch)
    try:
        ids = torch.zeros(2, 16, dtype=torch.long, device=CUDA)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        smartattn.register()
    mask = handed.pop("mask")

    def smart() -> None:
        smart_attention(layer, query, key, value, mask, **handed)

    def plain() -> None:
        sdpa_attention_forward(layer, query, key, value, None, **handed)

    assert torch.equal(
        smart_attention(layer, query, key, value, mask, **handed)[0],
        sdpa_attention_forward(layer, query, key, value, None, **handed)[0],
    )
    samples: dict[Any, list[float]] = {smart: [], plain: []}
    for turn in range(300):
        for function in (smart, plain) if turn % 2 else (plain, smart):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(20):
                function()
            samples[function].append((time.perf_counter_ns() - start) / 20_000)
    torch.cuda.synchronize()
    smart_us, plain_us = (statistics.median(samples[function][20:]) for function in (smart, plain))
    differences = [a - b for a, b in zip(samples[smart][20:], samples[plain][20:], strict=True)]
    quartiles = statistics.quantiles(differences, n=4)
    gpu_results.write(
        "overhead",
        {
            "smart_us": round(smart_us, 2),
            "sdpa_us": round(plain_us, 2),
            "overhead_us": round(quartiles[1], 2),
            "quartiles_us": [round(quartiles[0], 2), round(quartiles[2], 2)],
        },
    )
    assert quartiles[1] < 10.0


# -- packed batches --------------------------------------------------------------------------------


def _packed_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(CUDA, torch.bfloat16).eval()


@torch.no_grad()
def test_memory_of_a_packed_batch() -> None:
    """32k tokens in 16 sequences: no allocation of (T, T), far less memory than sdpa."""
    total, sequences = 32768, 16
    model = _packed_model()
    weights = torch.arange(1, sequences + 1)
    lengths = (weights * (total - 100) // weights.sum()).tolist()
    lengths[-1] += total - sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(CUDA)
    ids = torch.randint(0, 128, (1, total), device=CUDA)
    results: dict[str, Any] = {"tokens": total, "sequences": sequences}
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        with smartattn.trace() as trace:
            model.model(input_ids=ids[:, :64], use_cache=False)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            output = model.model(input_ids=ids, position_ids=positions, use_cache=False)
        outputs[implementation] = output.last_hidden_state
        peak = torch.cuda.max_memory_allocated() - before
        results[implementation] = {"peak_mib": round(peak / 2**20, 1)}
        if implementation == "smart":
            results["backend"] = trace.rows[-1].backend
        del output
    gpu_results.write("packed_memory", results)
    # A boolean mask alone takes a byte per pair, which is 1 GiB.
    square_mib = total * total / 2**20
    assert results["sdpa"]["peak_mib"] > square_mib
    assert results["smart"]["peak_mib"] < square_mib / 2
    assert results["backend"] not in ("sdpa", "eager")
    assert _largest_error(outputs["smart"], outputs["sdpa"])[1] <= 4e-2


# -- two devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "torch_varlen", "flash_attention_2", "sdpa"])
@torch.no_grad()
def test_two_gpus_equal_one(backend: str | None) -> None:
    """A model whose layers lie on two devices; accelerate's hooks move the mask (trap 12)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if backend == "flash_attention_2" and not has_flash_attn:
        pytest.skip("flash-attn is not installed")
    from accelerate import dispatch_model

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(CUDA, torch.bfloat16).eval()
    model.set_attn_implementation("smart")
    ids = torch.randint(0, 512, (4, 128), device=CUDA)
    mask = _lengths_mask([128, 90, 60, 7], 128, left=True)
    with smartattn.use(backends=backend) if backend else contextlib.nullcontext():
        expected = model(input_ids=ids, attention_mask=mask).logits
        places = {f"model.layers.{i}": i // 2 for i in range(4)}
        places |= {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1, "model.rotary_emb": 0}
        spread = dispatch_model(model, places)
        with smartattn.trace() as trace:
            output = spread(input_ids=ids, attention_mask=mask).logits
    assert sum(row.calls for row in trace.rows) == 4
    assert bool(output.isfinite().all())
    real = mask.bool()
    error = _largest_error(output.to(CUDA)[real], expected[real])
    gpu_results.write(f"two_gpus_{backend or 'auto'}", {"absolute": error[0], "relative": error[1]})
    assert error[1] <= 1e-2


# -- choice ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_backend_gives_one_answer_in_a_model() -> None:
    """A tiny decoder and encoder in bf16, padded: each forced backend within sdpa's own error."""
    torch.manual_seed(0)
    encoder = _bert_large(num_hidden_layers=2, hidden_size=256, num_attention_heads=4)
    ids = torch.randint(0, 1000, (6, 200), device=CUDA)
    results: dict[str, Any] = {}
    for left in (False, True):
        mask = _lengths_mask([200, 150, 150, 64, 3, 1], 200, left=left)
        real = mask.bool()
        encoder.set_attn_implementation("eager")
        exact = encoder.double()(input_ids=ids, attention_mask=mask).last_hidden_state
        encoder.to(torch.bfloat16)
        for backend in BACKENDS[:-1]:
            if backend.unavailable() is not None:
                continue
            encoder.set_attn_implementation("smart")
            with smartattn.use(backends=backend.name):
                output = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            assert bool(output.isfinite().all())
            side = "left" if left else "right"
            results[f"{side}, {backend.name}"] = _largest_error(output[real], exact[real])[1]
        limit = 3 * results[f"{side}, sdpa"] + 1e-3
        assert max(v for k, v in results.items() if k.startswith(side)) <= limit
    gpu_results.write("one_answer", results)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("spread", [None, "same", "uniform", "skewed"])
def test_decoding_in_parts_equals_a_reference(spread: Spread | None, head_dim: int) -> None:
    """Steps whose keys FlashAttention-2 is told to cut, few sequences and many, in float64."""
    backend = NAMED["flash_attention_2"]
    if backend.unavailable() is not None:
        pytest.skip("needs flash-attn")
    extension = flash_attention_2._extension()
    assert extension is not None
    results = {}
    for batch, kv_len in ((1, 5000), (7, 1030), (60, 600), (64, 2048)):
        workload = Workload(
            "decode", True, "left" if spread else "none", "bfloat16", batch, 1, kv_len, 16, 4,
            head_dim, padding_share=0.5 if spread else 0.0, spread=spread or "uniform",
            memory="concatenated",
        )  # fmt: skip
        plan, call = workload.plan(CUDA), workload.call(CUDA)
        parts = flash_attention_2._parts(plan, call)
        query, key, value, *_ = workload.tensors(CUDA)
        counted: list[int] = []

        def counting(*given: Any, counted: list[int] = counted) -> Any:
            counted.append(given[-1])
            return extension.fwd_kvcache(*given)

        stand_in = SimpleNamespace(fwd_kvcache=counting)
        with mock.patch.object(flash_attention_2, "_extension", return_value=stand_in):
            run = backend.bind(plan, call)
        output = run(query, key, value, {}).double()
        mask = torch.from_numpy(workload.real_keys()).to(CUDA)[:, None, None]
        exact = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
        error = float((output - exact).abs().max() / exact.abs().max())
        results[f"{batch} x {kv_len}, {parts} parts"] = error
        assert counted == [parts]
        assert parts > 1
        assert error < 1e-2
    gpu_results.write(f"decode_parts_{spread}_{head_dim}", results)


@torch.no_grad()
def test_static_cache_generates_like_dynamic() -> None:
    """A static cache's compiled decode step takes the plain sdpa path and agrees."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(CUDA).eval()
    model.set_attn_implementation("smart")
    ids = torch.randint(3, 512, (3, 20), device=CUDA)
    mask = _lengths_mask([20, 13, 4], 20, left=True)
    arguments = {
        "attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    dynamic = model.generate(ids, **arguments)
    static = model.generate(ids, **arguments, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


# -- tokens that are moved -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "dim", "length"),
    [(1, 8, 40), (3, 80, 40), (8, 64, 300), (8, 128, 77), (2, 264, 40), (1, 2048, 130)],
)
def test_tokens_are_moved_there_and_back(
    heads: int, dim: int, length: int, dtype: torch.dtype
) -> None:
    batch = 5
    index = torch.randperm(batch * length)[: 2 * length].sort().values.to(CUDA)
    sources = moves.sources(index, batch * length)
    tokens = torch.randn(1, len(index), heads, dim, dtype=dtype, device=CUDA)
    expected = torch.zeros(batch * length, heads, dim, dtype=dtype, device=CUDA)
    expected = expected.index_copy(0, index, tokens[0]).view(batch, length, heads, dim)
    # Twice: what was built is launched in another way than what is being built.
    for _ in range(2):
        by_token = torch.full_like(expected, torch.nan)
        by_head = torch.full_like(expected.transpose(1, 2).contiguous(), torch.nan)
        for padded in (by_token, by_head.transpose(1, 2)):
            assert moves.moved(tokens, sources, padded)
            assert torch.equal(padded, expected)
            packed = torch.full_like(tokens, torch.nan)
            assert moves.moved(padded, index, packed)
            assert torch.equal(packed, tokens)


def test_tokens_are_moved_beyond_32_bits() -> None:
    length, width = 70_000, 32_768
    index = torch.tensor([0, 1, 65_535, 65_536, length - 1], device=CUDA)
    tokens = torch.randn(1, len(index), 1, width, dtype=torch.bfloat16, device=CUDA)
    padded = torch.full((1, length, 1, width), torch.nan, dtype=torch.bfloat16, device=CUDA)
    assert padded.numel() > 2**31
    assert moves.moved(tokens, moves.sources(index, length), padded)
    assert torch.equal(padded[:, index], tokens)
    assert int(torch.count_nonzero(padded)) == int(torch.count_nonzero(tokens))
    packed = torch.empty_like(tokens)
    assert moves.moved(padded, index, packed)
    assert torch.equal(packed, tokens)


def _small_llama(dtype: torch.dtype) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, vocab_size=500,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(CUDA, dtype).eval()


@torch.no_grad()
def test_a_padding_free_prefill_fills_the_cache() -> None:
    """In single precision, where packed and padded products of matrices are nearly the same."""
    model = _small_llama(torch.float32)
    mask = _lengths_mask([100, 37, 1, 64], 100, left=True)
    inputs = {"input_ids": torch.randint(0, 500, (4, 100), device=CUDA), "attention_mask": mask}
    caches = {}
    generated = {}
    for name in ("eager", "smart", "padding_free"):
        model.set_attn_implementation("eager" if name == "eager" else "smart")
        with contextlib.ExitStack() as stack:
            if name == "padding_free":
                stack.enter_context(smartattn.padding_free(model, always=True))
            trace = stack.enter_context(smartattn.trace())
            caches[name] = model.model(**inputs, use_cache=True).past_key_values
            generated[name] = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        assert any(row.packed for row in trace.stacks) == (name == "padding_free")
    for layer, expected in zip(caches["padding_free"].layers, caches["eager"].layers, strict=True):
        for states, others in ((layer.keys, expected.keys), (layer.values, expected.values)):
            real = mask[:, None, :, None]
            torch.testing.assert_close(states * real, others * real, rtol=1e-3, atol=1e-3)
            assert not (states * (1 - real)).any()
            assert states.is_contiguous()
    assert torch.equal(generated["padding_free"], generated["eager"])
    assert torch.equal(generated["smart"], generated["eager"])


# -- CUDA graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "warm_up",
    [
        pytest.param(
            "smart",
            marks=pytest.mark.skipif(
                not has_flash_attn, reason="SDPA may have to build: needs flash-attn"
            ),
        ),
        "sdpa",
    ],
)
@torch.no_grad()
def test_a_captured_forward_may_be_replayed(warm_up: str) -> None:
    """With other tokens, and after other forwards have come and gone."""
    model = _small_llama(torch.bfloat16)
    # What SDPA has to build for the shape is built before.
    model.set_attn_implementation(warm_up)
    given = torch.randint(0, 500, (2, 128), device=CUDA)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        # Without a cache sequences might restart, and all calls would have a mask.
        return model(input_ids=ids).logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward(given)
    torch.cuda.current_stream().wait_stream(side)
    model.set_attn_implementation("smart")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(given)
    for length in range(100, 140):
        forward(torch.randint(0, 500, (3, length), device=CUDA))
    for _ in range(3):
        ids = torch.randint(0, 500, (2, 128), device=CUDA)
        given.copy_(ids)
        graph.replay()
        expected = forward(ids)
        assert _largest_error(output, expected)[1] < 0.03
