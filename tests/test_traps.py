"""One or more tests for every numbered trap of docs/traps.md; each test's name holds the number.

The traps are places where other attention plugins for Transformers have been wrong. References are
the model's own eager attention at real tokens.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

import smartattn
import smartattn.backends
from smartattn.backends import BACKENDS
from smartattn.backends.base import declared_refusals
from smartattn.call import Call
from smartattn.mask import PlanMask
from smartattn.plan import Padding, Pattern, Plan

from .agreement import (
    CACHE,
    CONTIGUOUS_MASKS,
    CPU_BACKENDS,
    MASKS,
    WIDTH,
    assert_agree,
    assert_differ,
    output_of,
    run,
    set_implementation,
    spans,
)
from .tiny_models import from_config, tiny_model, token_ids

#: Which keys a query sees, by architecture: causal, causal window, mixed, chunked, bidirectional,
#: symmetric window.
PATTERNS = ("llama", "mistral", "gemma3", "llama4", "bert", "modernbert")
#: Models that have both a decoder and an encoder kind of mask, for the more expensive tests.
CAUSAL_AND_NOT = ("llama", "mistral", "bert")


# -- 1: rows that see nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "empty_row", "both"])
@pytest.mark.parametrize("name", CAUSAL_AND_NOT)
def test_trap_01_fully_masked_rows_are_finite_forward_and_backward(name: str, padding: str) -> None:
    mask = MASKS[padding]
    model = tiny_model(name, "smart")
    embedded = model.get_input_embeddings()(token_ids(3, WIDTH)).detach().requires_grad_()
    with smartattn.trace() as trace:
        output = output_of(model(inputs_embeds=embedded, attention_mask=mask))
    output.square().mean().backward()
    assert trace.rows[0].grad
    assert torch.isfinite(output).all(), "padding positions too"
    assert torch.isfinite(embedded.grad).all()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("padding", sorted(CONTIGUOUS_MASKS.keys() - {"one_token"}))
@pytest.mark.parametrize("name", CAUSAL_AND_NOT)
def test_trap_01_poison_in_padding_stays_there(name: str, padding: str, poison: float) -> None:
    """NaN and inf times a weight of zero are NaN: only padding that is never read is safe."""
    mask = CONTIGUOUS_MASKS[padding]
    model = tiny_model(name)
    embedded = model.get_input_embeddings()(token_ids(3, WIDTH)).detach()
    clean = run(model, "eager", inputs_embeds=embedded, attention_mask=mask)
    poisoned = embedded.masked_fill(~mask.bool()[..., None], poison)
    output = run(
        model,
        "smart",
        "sdpa_unpadded",
        inputs_embeds=poisoned,
        attention_mask=mask,
        use_cache=False,
    )
    assert_agree(output, clean, where=mask)


# -- 2: where the padding lies ---------------------------------------------------------------------


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", PATTERNS)
def test_trap_02_padding_anywhere(name: str, padding: str) -> None:
    mask = MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    model = tiny_model(name)
    expected = run(model, "eager", **inputs)
    for backends in (None, "sdpa"):
        assert_agree(run(model, "smart", backends, **inputs), expected, where=mask)
    if padding in CONTIGUOUS_MASKS:
        # A chunked layer is a dense mask to smartattn: sdpa has to be there beside the other.
        forced = ("sdpa_unpadded", "sdpa") if name == "llama4" else ("sdpa_unpadded",)
        assert_agree(run(model, "smart", forced, **inputs), expected, where=mask)


def test_trap_02_the_layout_gathers_by_index_not_by_count() -> None:
    """A prefix of each row's length would be right for right padding alone."""
    for padding, mask in MASKS.items():
        real = mask.bool()
        plan = Plan(
            3,
            WIDTH,
            WIDTH,
            Pattern.BIDIRECTIONAL,
            real.device,
            real=real.numpy(),
            real_on_device=real,
        )
        layout = plan.varlen(pack_queries=True)
        index = torch.arange(3 * WIDTH) if layout.k_index is None else layout.k_index
        assert index.tolist() == real.flatten().nonzero().flatten().tolist(), padding
        assert layout.cu_seqlens_k.diff().tolist() == real.sum(1).tolist(), padding


# -- 3: cross-attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("target_length", [WIDTH, 7, 15, 1])
@pytest.mark.parametrize("padding", sorted(MASKS.keys() - {"empty_row"}))
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_trap_03_cross_attention_masks_keys_alone(
    name: str, padding: str, target_length: int
) -> None:
    """Queries of a padded encoder batch are all real, also when both sides are of one length."""
    inputs = {
        "input_ids": token_ids(3, WIDTH),
        "attention_mask": MASKS[padding],
        "decoder_input_ids": token_ids(3, target_length, seed=1),
    }
    model = tiny_model(name)
    expected = run(model, "eager", **inputs)
    for backends in (None, "sdpa", ("sdpa_unpadded", "sdpa")):
        assert_agree(run(model, "smart", backends, **inputs), expected)


@pytest.mark.parametrize("target_length", [WIDTH, 7])
def test_trap_03_cross_attention_is_unpadded_on_its_keys(target_length: int) -> None:
    model = tiny_model("bart")
    mask = CONTIGUOUS_MASKS["both"]
    encoded = model.get_encoder()(token_ids(3, WIDTH), attention_mask=mask)
    inputs = {
        "encoder_outputs": encoded,
        "attention_mask": mask,
        "decoder_input_ids": token_ids(3, target_length, seed=1),
        # Self-attention of the decoder has padding of its own, so that both can be unpadded.
        "decoder_attention_mask": spans(
            (0, target_length - 2), (0, target_length), (0, 3), width=target_length
        ),
    }
    expected = run(model, "eager", **inputs)
    with smartattn.trace() as trace:
        actual = run(model, "smart", "sdpa_unpadded", **inputs)
    assert_agree(actual, expected, where=inputs["decoder_attention_mask"])
    patterns = {(row.facts["pattern"], row.facts["q_len"]) for row in trace.rows}
    assert patterns == {("causal", target_length), ("bidirectional", target_length)}


@pytest.mark.parametrize("padding", ["right", "left", "both"])
def test_trap_03_decoder_with_padding_of_its_own(padding: str) -> None:
    inputs = {
        "input_ids": token_ids(3, WIDTH),
        "attention_mask": MASKS["both"],
        "decoder_input_ids": token_ids(3, WIDTH, seed=1),
        "decoder_attention_mask": MASKS[padding],
    }
    model = tiny_model("bart")
    expected = run(model, "eager", **inputs)
    for backends in (None, "sdpa_unpadded"):
        actual = run(model, "smart", backends, **inputs)
        assert_agree(actual, expected, where=MASKS[padding])


# -- 4: causal alignment with earlier tokens -------------------------------------------------------


@pytest.mark.parametrize("padding", ["ones", "left", "both", "holes", "empty_row"])
@pytest.mark.parametrize("cut", [4, 6, 11])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_trap_04_chunked_prefill_is_aligned_bottom_right(name: str, cut: int, padding: str) -> None:
    ids, mask = token_ids(3, WIDTH), MASKS[padding]
    model = tiny_model(name)
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    positions = torch.arange(WIDTH).expand(3, -1)
    for backends in (None, "sdpa", ("sdpa_unpadded", "sdpa")):
        cache = DynamicCache(config=model.config)
        chunks = [
            run(
                model,
                "smart",
                backends,
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                **{CACHE: cache},
            )
            for start, stop in ((0, cut), (cut, WIDTH))
        ]
        assert_agree(torch.cat(chunks, dim=1), expected, where=mask)


def test_trap_04_a_chunk_with_padding_runs_unpadded() -> None:
    """The second chunk's queries stand at the end of their row's keys, not at its start."""
    ids, mask = token_ids(3, WIDTH), CONTIGUOUS_MASKS["left"]
    model = tiny_model("llama")
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    cache = DynamicCache(config=model.config)
    run(model, "eager", input_ids=ids[:, :5], attention_mask=mask[:, :5], **{CACHE: cache})
    with smartattn.trace() as trace:
        actual = run(
            model,
            "smart",
            "sdpa_unpadded",
            input_ids=ids[:, 5:],
            attention_mask=mask,
            **{CACHE: cache},
        )
    assert_agree(actual, expected[:, 5:], where=mask[:, 5:])
    assert [(row.facts["q_len"], row.facts["kv_len"]) for row in trace.rows] == [(7, 12)]


# -- 5: windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["ones", "right", "left", "both", "holes"])
@pytest.mark.parametrize("window", [1, 2, WIDTH - 1, WIDTH, WIDTH + 1, 1000, None])
def test_trap_05_causal_windows(window: int | None, padding: str) -> None:
    mask = MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    model = tiny_model("mistral", sliding_window=window)
    expected = run(model, "eager", **inputs)
    choices = [None, "sdpa"] + (["sdpa_unpadded"] if padding in CONTIGUOUS_MASKS else [])
    for backends in choices:
        assert_agree(run(model, "smart", backends, **inputs), expected, where=mask)


@pytest.mark.parametrize("padding", ["ones", "right", "left", "both", "holes"])
@pytest.mark.parametrize("local_attention", [2, 4, 2 * WIDTH - 4, 2 * WIDTH - 2, 2 * WIDTH, 1000])
def test_trap_05_symmetric_windows(local_attention: int, padding: str) -> None:
    mask = MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    model = tiny_model("modernbert", local_attention=local_attention)
    expected = run(model, "eager", **inputs)
    choices = [None, "sdpa"] + (["sdpa_unpadded"] if padding in CONTIGUOUS_MASKS else [])
    for backends in choices:
        assert_agree(run(model, "smart", backends, **inputs), expected, where=mask)


def test_trap_05_a_window_one_off_would_be_seen() -> None:
    """The comparison above tells windows apart that differ by a single token."""
    ids = token_ids(1, WIDTH)
    for window in (1, 2, WIDTH - 1):
        narrow = run(tiny_model("mistral", sliding_window=window), "eager", input_ids=ids)
        wide = run(tiny_model("mistral", sliding_window=window + 1), "eager", input_ids=ids)
        assert_differ(narrow, wide)
    for local_attention in (2, 4, 2 * WIDTH - 4):
        narrow, wide = (
            run(tiny_model("modernbert", local_attention=size), "eager", input_ids=ids)
            for size in (local_attention, local_attention + 2)
        )
        assert_differ(narrow, wide)


@pytest.mark.parametrize("window", [0, -1])
def test_trap_05_windows_that_are_no_windows_answer_like_sdpa(window: int) -> None:
    """Such a mask hides everything; what remains is to be finite and what sdpa answers.

    Without a cache: with one, Transformers itself fails on them.
    """
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"], "use_cache": False}
    model = tiny_model("mistral", sliding_window=window)
    assert_agree(run(model, "smart", **inputs), run(model, "sdpa", **inputs))


@pytest.mark.parametrize("padding", ["ones", "left", "holes"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_trap_05_sliding_cache_shorter_than_the_mask(name: str, padding: str) -> None:
    """Layers of window 5 keep 4 tokens, while the 2D mask speaks of up to 12."""
    ids, mask = token_ids(3, WIDTH), MASKS[padding]
    model = tiny_model(name)
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    positions = torch.arange(WIDTH).expand(3, -1)
    for backends in (None, ("sdpa_unpadded", "sdpa")):
        cache = DynamicCache(config=model.config)
        outputs = []
        for start, stop in ((0, 7), (7, 8), (8, 10), (10, 11), (11, 12)):
            outputs.append(
                run(
                    model,
                    "smart",
                    backends,
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    **{CACHE: cache},
                )
            )
        assert cache.layers[0].keys.shape[2] < WIDTH
        assert_agree(torch.cat(outputs, dim=1), expected, where=mask)


# -- 6: packed batches, see also test_packed.py ----------------------------------------------------

PACKED = (5, 3, 4)


def packed_positions(start: int = 0) -> torch.Tensor:
    """(1, WIDTH) positions of three sequences in a row."""
    return torch.cat([torch.arange(length) + start for length in PACKED])[None]


def alone(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Each sequence of a packed row by itself under eager, put together again."""
    parts = [
        run(model, "eager", input_ids=part, position_ids=at)
        for part, at in zip(ids.split(PACKED, 1), positions.split(PACKED, 1), strict=True)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_trap_06_restarting_positions(start: int, use_cache: bool) -> None:
    model = tiny_model("llama")
    ids, positions = token_ids(1, WIDTH), packed_positions(start)
    actual = run(model, "smart", input_ids=ids, position_ids=positions, use_cache=use_cache)
    assert_agree(actual, alone(model, ids, positions))


@pytest.mark.parametrize("use_cache", [False, True])
def test_trap_06_all_ones_mask_with_restarting_positions(use_cache: bool) -> None:
    """A mask of ones says that all is seen: like eager, unlike flash_attention_2."""
    model = tiny_model("llama")
    ids, positions = token_ids(1, WIDTH), packed_positions()
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.ones_like(ids),
        "use_cache": use_cache,
    }
    actual = run(model, "smart", **inputs)
    assert_agree(actual, run(model, "eager", **inputs))
    assert_differ(actual, alone(model, ids, positions))


@pytest.mark.parametrize("use_cache", [False, True])
def test_trap_06_positions_that_start_late_are_one_sequence(use_cache: bool) -> None:
    model = tiny_model("llama")
    inputs = {
        "input_ids": token_ids(1, WIDTH),
        "position_ids": torch.arange(7, 7 + WIDTH)[None],
        "use_cache": use_cache,
    }
    with smartattn.trace() as trace:
        actual = run(model, "smart", **inputs)
    assert_agree(actual, run(model, "eager", **inputs))
    assert [row.facts["pattern"] for row in trace.rows] == ["causal"]


@pytest.mark.parametrize("use_cache", [False, True])
def test_trap_06_one_row_of_positions_for_a_larger_batch(use_cache: bool) -> None:
    model = tiny_model("llama")
    inputs = {
        "input_ids": token_ids(3, WIDTH),
        "position_ids": torch.arange(WIDTH)[None],
        "use_cache": use_cache,
    }
    assert_agree(run(model, "smart", **inputs), run(model, "eager", **inputs))


def test_trap_06_one_packed_row_of_positions_for_a_larger_batch() -> None:
    model = tiny_model("llama")
    ids, positions = token_ids(3, WIDTH), packed_positions()
    actual = run(model, "smart", input_ids=ids, position_ids=positions, use_cache=False)
    assert_agree(actual, alone(model, ids, positions.expand(3, -1)))


# -- 7: static cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefill", [1, 2, 7])
def test_trap_07_empty_slots_of_a_static_cache_are_not_seen(prefill: int, masked: bool) -> None:
    ids = token_ids(3, WIDTH)
    model = tiny_model("llama")
    expected = run(model, "eager", input_ids=ids)
    for backends in (None, "sdpa"):
        cache = StaticCache(config=model.config, max_cache_len=WIDTH + 9)
        outputs = []
        for start, stop in ((0, prefill), (prefill, prefill + 1), (prefill + 1, WIDTH)):
            mask = torch.ones(3, stop, dtype=torch.long) if masked else None
            outputs.append(
                run(
                    model,
                    "smart",
                    backends,
                    input_ids=ids[:, start:stop],
                    attention_mask=mask,
                    **{CACHE: cache},
                )
            )
            # What lies in the empty slots is not zero in a cache that was used before.
            for layer in cache.layers:
                layer.keys[:, :, stop:] = 3.0
                layer.values[:, :, stop:] = 5.0
        assert_agree(torch.cat(outputs, dim=1), expected)


def test_trap_07_a_causal_none_mask_with_more_keys_is_an_empty_static_cache() -> None:
    """What sdpa_attention_forward slices away, handed to the layer directly."""
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    query = torch.randn(2, 4, 5, 8)
    key, value = torch.randn(2, 2, 2, 9, 8)
    with torch.no_grad():
        whole, _ = smartattn.integration.smart_attention(
            layer, query, key, value, None, is_causal=True
        )
        short, _ = smartattn.integration.smart_attention(
            layer, query, key[:, :, :5], value[:, :, :5], None, is_causal=True
        )
    assert_agree(whole, short)


# -- 8: float32 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_08_no_half_precision_kernel_takes_float32(dtype: torch.dtype) -> None:
    half = {torch.float16, torch.bfloat16}
    call = Call(torch.device("cpu"), dtype, 1, 8, 8, 4, 4, 64, 64)
    for backend in BACKENDS:
        takes = backend.support.dtypes
        if takes is not None and takes <= half:
            name = str(dtype).removeprefix("torch.")
            assert f"takes bfloat16 or float16, given {name}" in declared_refusals(
                backend.support, call
            )
    assert {b.name for b in BACKENDS if b.support.dtypes == half} >= {
        "flash_attention_2",
        "torch_varlen",
    }


def test_trap_08_layers_that_cast_their_states_to_float32() -> None:
    """PEFT trains norms in float32: query and key come out of one wider than the value."""
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    attended = smartattn.integration.smart_attention
    with torch.no_grad():
        expected, _ = attended(layer, query, key, value, None)
        # Eager and sdpa fail here too; a kernel that rounds query and key would not.
        with pytest.raises(RuntimeError, match="dtype"):
            attended(layer, query, key, value.bfloat16(), None)
        with smartattn.trace() as trace, torch.autocast("cpu", torch.bfloat16):
            actual, _ = attended(layer, query, key, value.bfloat16(), None)
    assert_agree(actual.float(), expected, tolerance=2e-2)
    assert [row.backend for row in trace.rows] == ["sdpa"]


# -- 9: what falls to the math kernel --------------------------------------------------------------


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch's function is handed, call by call."""
    calls: list[dict[str, Any]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        calls.append({"query": query, "key": key, "value": value, **kwargs})
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    return calls


#: Kernels that do not hold all the scores in memory.
FUSED = [
    backend for backend in SDPBackend.__members__.values() if backend.name.endswith("ATTENTION")
]


@pytest.mark.parametrize("padding", ["ones", "left"])
@pytest.mark.parametrize("head_dim", [64, 320])
def test_trap_09_grouped_heads_stay_off_the_math_kernel(
    sdpa_calls: list[dict[str, Any]], head_dim: int, padding: str
) -> None:
    """Keys are repeated wherever torch has no fused kernel for grouped heads."""
    mask = spans((0, 33), (0 if padding == "ones" else 4, 33), width=33)
    model = tiny_model("llama", head_dim=head_dim)
    inputs = {"input_ids": token_ids(2, 33), "attention_mask": mask}
    expected = run(model, "eager", **inputs)
    for backends in (None, "sdpa"):
        assert_agree(run(model, "smart", backends, **inputs), expected, where=mask)
    assert sdpa_calls
    for call in sdpa_calls:
        grouped = call.get("enable_gqa", False)
        if grouped:
            # Raises if none of them takes the call.
            with sdpa_kernel(FUSED):
                torch._C._nn.scaled_dot_product_attention(**call)
        assert grouped or call["key"].shape[1] == call["query"].shape[1]
        for name in ("key", "value"):
            states = call[name]
            expanded = [s for s, n in zip(states.stride(), states.shape, strict=True) if n > 1]
            assert 0 not in expanded, f"{name} is expanded, not copied: wrong in torch's kernel"


def test_trap_09_one_query_needs_no_copy_of_the_cache(sdpa_calls: list[dict[str, Any]]) -> None:
    model = tiny_model("llama", head_dim=320)
    cache = DynamicCache(config=model.config)
    ids, mask = token_ids(2, 34), spans((0, 34), (4, 34), width=34)
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)[:, -1:]
    run(model, "eager", input_ids=ids[:, :33], attention_mask=mask[:, :33], **{CACHE: cache})
    actual = run(
        model,
        "smart",
        "sdpa",
        input_ids=ids[:, 33:],
        attention_mask=mask,
        position_ids=torch.full((2, 1), 33),
        **{CACHE: cache},
    )
    assert_agree(actual, expected)
    assert all(call["key"].shape[1] == 2 for call in sdpa_calls)


# -- 10: value head_dim ----------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["ones", "right", "left", "holes"])
def test_trap_10_value_head_dim_of_its_own(padding: str) -> None:
    mask = MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    model = tiny_model("deepseek_v3")
    attention = model.model.layers[0].self_attn
    assert attention.qk_head_dim != attention.v_head_dim
    expected = run(model, "eager", **inputs)
    choices = [None, "sdpa"] + (["sdpa_unpadded"] if padding in ("right", "left") else [])
    for backends in choices:
        assert_agree(run(model, "smart", backends, **inputs), expected, where=mask)


# -- 11: outputs at padding ------------------------------------------------------------------------


@pytest.mark.parametrize("padding", sorted(MASKS.keys() - {"empty_row"}))
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_trap_11_padding_outputs_can_be_kept(name: str, padding: str) -> None:
    """Late interaction reads them; rows of keys without any real one are nobody's."""
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS[padding]}
    model = tiny_model(name)
    expected = run(model, "sdpa", **inputs)
    with smartattn.use(pad_output="sdpa"):
        actual = run(model, "smart", **inputs)
    assert_agree(actual, expected)


def test_trap_11_padding_outputs_are_not_kept_by_default() -> None:
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["right"]}
    model = tiny_model("bert")
    expected = run(model, "sdpa", **inputs)
    actual = run(model, "smart", "sdpa_unpadded", **inputs)
    assert torch.isfinite(actual).all()
    assert_differ(actual, expected)
    with smartattn.use(pad_output="sdpa"), pytest.raises(smartattn.UnsupportedCallError):
        run(model, "smart", "sdpa_unpadded", **inputs)


# -- 12: two devices -------------------------------------------------------------------------------


def test_trap_12_a_plan_has_its_tensors_on_every_device() -> None:
    """The meta device stands for a second accelerator."""
    real = CONTIGUOUS_MASKS["left"].bool()
    first, second = torch.device("cpu"), torch.device("meta")
    plan = Plan(3, WIDTH, WIDTH, Pattern.CAUSAL, first, real=real.numpy(), real_on_device=real)
    layout = plan.varlen(pack_queries=True)
    plan.decisions["layer"] = "a choice made for the first device"
    moved = PlanMask(plan, torch.float32).to(second)
    assert isinstance(moved, PlanMask)
    twin = moved.plan
    assert twin is not None
    assert twin is not plan
    assert twin.device == second
    assert twin.decisions == {}
    assert twin is plan.on(second), "made once for each device"
    assert twin.on(first) is plan
    assert twin.varlen(pack_queries=True).cu_seqlens_q.device == second
    assert twin.dense_mask().device == second
    assert plan.varlen(pack_queries=True) is layout
    assert layout.cu_seqlens_q.device == first
    assert plan.dense_mask().device == first


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_trap_12_layers_on_two_devices() -> None:
    from accelerate import dispatch_model

    mask = CONTIGUOUS_MASKS["left"]
    ids = token_ids(3, WIDTH)
    model = tiny_model("llama")
    expected = run(model, "eager", input_ids=ids, attention_mask=mask)
    set_implementation(model, "smart")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    places |= {"model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    model = dispatch_model(model, device_map=places)
    with torch.no_grad():
        actual = model(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits
    assert_agree(actual.cpu(), expected, where=mask)


# -- 13: process-wide state ------------------------------------------------------------------------


def test_trap_13_no_process_wide_kernel_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while a kernel runs nor afterwards, forward or backward."""

    def switches() -> dict[str, bool]:
        cuda = torch.backends.cuda
        names = ("flash", "mem_efficient", "math", "cudnn")
        return {name: getattr(cuda, f"{name}_sdp_enabled")() for name in names}

    before = switches()
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(switches())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    for name in CAUSAL_AND_NOT:
        model = tiny_model(name, "smart")
        output = model(token_ids(3, WIDTH), attention_mask=MASKS["left"])
        output_of(output).mean().backward()
    assert seen
    assert all(state == before for state in seen)
    assert switches() == before


def test_trap_13_no_code_forces_a_kernel() -> None:
    package = Path(inspect.getfile(smartattn)).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", None) or getattr(node, "id", None) or ""
            assert not name.startswith(("sdpa_kernel", "enable_flash_sdp", "enable_cudnn_sdp")), (
                path
            )


# -- 14: batches at the edge -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "mask",
    [
        spans((0, 8), (0, 8), (0, 8)),
        spans((4, 12), (4, 12), (4, 12)),
        spans((0, 5)),
        spans((5, 12)),
        spans((0, 1), width=1),
        spans((0, 12), (0, 0), (3, 12)),
    ],
    ids=["equal_right", "equal_left", "one_right", "one_left", "one_token", "empty_row"],
)
def test_trap_14_batches_at_the_edge(name: str, mask: torch.Tensor) -> None:
    inputs = {"input_ids": token_ids(*mask.shape), "attention_mask": mask}
    model = tiny_model(name)
    expected = run(model, "eager", **inputs)
    for backends in (None, "sdpa", ("sdpa_unpadded", "sdpa")):
        actual = run(model, "smart", backends, **inputs)
        assert torch.isfinite(actual).all()
        assert_agree(actual, expected, where=mask)


@pytest.mark.parametrize("name", PATTERNS)
def test_trap_14_no_real_token_at_all(name: str) -> None:
    mask = torch.zeros(2, WIDTH, dtype=torch.long)
    model = tiny_model(name)
    output = run(model, "smart", input_ids=token_ids(2, WIDTH), attention_mask=mask)
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no_sequence", "no_query"])
def test_trap_14_empty_tensors(shape: tuple[int, int]) -> None:
    layer = tiny_model("llama", "smart").model.layers[0].self_attn
    batch, length = shape
    query, key, value = (torch.randn(batch, heads, length, 8) for heads in (4, 2, 2))
    plan = Plan(batch, length, length, Pattern.CAUSAL, query.device)
    for mask in (None, PlanMask(plan, query.dtype)):
        output, _ = smartattn.integration.smart_attention(layer, query, key, value, mask)
        assert output.shape == (batch, length, 4, 8)


# -- 15: architectures that never call the attention function --------------------------------------

HARD_CODED = ("bloom", "mpt", "roformer", "mpnet", "convbert", "xglm")


@pytest.mark.parametrize("padding", [None, *MASKS])
@pytest.mark.parametrize("name", HARD_CODED)
def test_trap_15_hard_coded_eager_attention_gets_its_mask(name: str, padding: str | None) -> None:
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    with torch.no_grad(), smartattn.trace() as trace:
        expected = output_of(tiny_model(name, "eager")(**inputs))
        actual = output_of(tiny_model(name, "smart")(**inputs))
    assert not trace.rows, f"{name} calls the attention function by now: choose another example"
    assert_agree(actual, expected, where=mask)


@pytest.mark.parametrize("name", ["bloom", "xglm"])
def test_trap_15_hard_coded_eager_attention_generates(name: str) -> None:
    ids, mask = token_ids(3, 6), spans((0, 6), (2, 6), (4, 6), width=6)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = [
        tiny_model(name, implementation).generate(ids, attention_mask=mask, **settings)
        for implementation in ("eager", "smart")
    ]
    assert tokens[0].tolist() == tokens[1].tolist()


def test_trap_15_custom_code_that_adds_the_mask() -> None:
    """Of a model outside of Transformers nothing is known; its mask is still one to add."""
    plan = Plan(2, 4, 4, Pattern.CAUSAL, torch.device("cpu"))
    scores = torch.zeros(2, 3, 4, 4)
    weights = (scores + PlanMask(plan, torch.float32)).softmax(-1)
    expected = torch.ones(4, 4).tril() / torch.arange(1.0, 5.0)[:, None]
    assert torch.equal(weights, expected.expand(2, 3, 4, 4))


# -- 16: what a None mask means --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["splinter", "bert", "llama", "bart"])
def test_trap_16_no_mask_is_not_always_causal(name: str) -> None:
    model = tiny_model(name)
    inputs = {"input_ids": token_ids(2, WIDTH)}
    if name == "bart":
        inputs["decoder_input_ids"] = token_ids(2, WIDTH, seed=1)
    expected = run(model, "eager", **inputs)
    for backends in (None, "sdpa"):
        assert_agree(run(model, "smart", backends, **inputs), expected)


def test_trap_16_text_tower_of_aimv2() -> None:
    """Its layers say is_causal=False, and plain sdpa believes them."""
    from transformers import Aimv2TextConfig

    config = Aimv2TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        eos_token_id=63,
    )
    ids = token_ids(2, WIDTH).clamp(max=62)
    ids[:, -1] = 63
    model = from_config("Aimv2TextModel", config)
    expected = run(model, "eager", input_ids=ids)
    assert_agree(run(model, "smart", input_ids=ids), expected)
    for backends in ("sdpa",):
        assert_agree(run(model, "smart", backends, input_ids=ids), expected)


@pytest.mark.parametrize("with_types", [False, True])
def test_trap_16_paligemma_without_token_types(with_types: bool) -> None:
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    text = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=63,
        projection_dim=32,
        hidden_size=32,
    )
    model = from_config("PaliGemmaForConditionalGeneration", config)
    ids = token_ids(2, WIDTH).clamp(max=62)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_types:
        types = torch.zeros_like(ids)
        types[:, 6:] = 1
        inputs["token_type_ids"] = types
    expected = run(model, "eager", **inputs)
    assert_agree(run(model, "smart", **inputs), expected)


# -- 17: softcap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "ones", "left", "holes"])
def test_trap_17_softcap_goes_to_the_models_own_code(padding: str | None) -> None:
    model = tiny_model("gemma2")
    mask = None if padding is None else MASKS[padding]
    inputs = {"input_ids": token_ids(3, WIDTH), "attention_mask": mask}
    expected = run(model, "eager", **inputs)
    with smartattn.trace() as trace:
        actual = run(model, "smart", **inputs)
    assert_agree(actual, expected, where=mask)
    assert {row.backend for row in trace.rows} == {"eager"}
    assert all("does not implement softcap" in row.refused["sdpa"] for row in trace.rows)
    uncapped = run(tiny_model("gemma2", attn_logit_softcapping=None), "eager", **inputs)
    assert_differ(uncapped, expected)


# -- all of them -----------------------------------------------------------------------------------


def test_every_trap_has_a_test() -> None:
    numbers = {int(name.split("_")[2]) for name in globals() if name.startswith("test_trap_")}
    assert numbers == set(range(1, 18))


def test_every_backend_is_reached_by_these_tests() -> None:
    """A backend added to the package has to be added to what is forced here, or need a GPU."""
    modules = {m.name for m in pkgutil.iter_modules(smartattn.backends.__path__)} - {"base"}
    assert all(import_module(f"smartattn.backends.{name}") for name in modules)
    anywhere = {b.name for b in BACKENDS if b.support.devices is None and not b.last_resort}
    assert anywhere == set(CPU_BACKENDS)
    assert Padding.UNKNOWN not in {Padding.LEFT}
