"""Several sequences in one row: each gets what it gets alone, and no dense mask is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening, DynamicCache, masking_utils

import smartattn
from smartattn.plan import Plan

from .agreement import CACHE, assert_agree, assert_differ, run
from .tiny_models import from_config, tiny_config, tiny_model, token_ids

#: Older versions of Transformers count chunks by the places of tokens in their row.
HAS_REMAPPING = hasattr(masking_utils, "remap_positions_for_packed_sequence")
LENGTHS = (5, 1, 3, 7)
TOTAL = sum(LENGTHS)

CAUSAL = ("llama", "mistral", "gemma3", "deepseek_v3")


def restarting(lengths: Sequence[int] = LENGTHS, start: int = 0) -> torch.Tensor:
    """(1, total) position ids that begin anew with every sequence."""
    return torch.cat([torch.arange(start, start + length) for length in lengths])[None]


def bounds(lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """What trainers' collators say of a packed batch beside its positions."""
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def alone(
    model: Any, ids: torch.Tensor, lengths: Sequence[int] = LENGTHS, start: int = 0
) -> torch.Tensor:
    """Every sequence of a (1, total) row by itself under eager, put together again."""
    parts = []
    for part in ids.split(tuple(lengths), dim=1):
        positions = torch.arange(start, start + part.shape[1])[None]
        parts.append(run(model, "eager", input_ids=part, position_ids=positions))
    return torch.cat(parts, dim=1)


@pytest.fixture
def no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the (tokens, tokens) mask of a packed batch is built."""

    def refuse(plan: Plan) -> None:
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(Plan, "dense_mask", refuse)


@pytest.mark.parametrize("name", CAUSAL)
def test_sequences_would_see_each_other(name: str) -> None:
    """What every test here rules out is far from what it asks for."""
    model = tiny_model(name)
    ids = token_ids(1, TOTAL)
    together = run(model, "eager", input_ids=ids, attention_mask=torch.ones(1, 1, TOTAL, TOTAL))
    assert_differ(together, alone(model, ids))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("name", CAUSAL)
def test_restarting_positions(name: str, start: int, use_cache: bool, no_dense_mask: None) -> None:
    model = tiny_model(name)
    ids = token_ids(1, TOTAL)
    with smartattn.trace() as trace:
        actual = run(
            model,
            "smart",
            input_ids=ids,
            position_ids=restarting(start=start),
            use_cache=use_cache,
        )
    assert_agree(actual, alone(model, ids, start=start))
    for row in trace.rows:
        assert row.backend == "sdpa_unpadded"
        assert row.facts["pattern"] == "packed causal"
        assert row.facts["sequences"] == len(LENGTHS)


@pytest.mark.parametrize("positions", [(0, 1, 2, 0, 1), (3, 4, 5, 6, 3), (4, 5, 4, 5, 6)], ids=str)
def test_chunks_are_counted_by_positions(positions: tuple[int, ...]) -> None:
    """Five tokens fit into a chunk of five, but not where their positions cross a bound."""
    model = tiny_model("llama4")
    inputs = {
        "input_ids": token_ids(1, 5),
        "position_ids": torch.tensor([positions]),
        "use_cache": False,
    }
    assert_agree(run(model, "smart", **inputs), run(model, "eager", **inputs))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_chunked_layers_keep_sequences_apart_despite_a_cache(rows: int, start: int) -> None:
    """Chunked and full layers of one forward agree about what a sequence is."""
    model = tiny_model("llama4")
    lengths = [(7, 5), (4, 8)][:rows]
    ids = token_ids(rows, 12)
    positions = torch.cat([restarting(one, start) for one in lengths])
    actual = run(model, "smart", input_ids=ids, position_ids=positions)
    without_cache = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_agree(actual, run(model, "eager", **without_cache))
    if HAS_REMAPPING and start == 0:
        for row, one in enumerate(lengths):
            assert_agree(actual[row : row + 1], alone(model, ids[row : row + 1], one))
    plain = run(model, "smart", input_ids=ids)
    assert_differ(actual, plain)


@pytest.mark.parametrize("name", CAUSAL)
def test_restarting_positions_through_the_dense_mask(name: str) -> None:
    """Where no other backend may run, sdpa keeps the sequences apart as well."""
    model = tiny_model(name)
    ids = token_ids(1, TOTAL)
    for use_cache in (False, True):
        actual = run(
            model, "smart", "sdpa", input_ids=ids, position_ids=restarting(), use_cache=use_cache
        )
        assert_agree(actual, alone(model, ids))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_all_ones_mask_with_restarting_positions(name: str, use_cache: bool) -> None:
    """A mask of ones says that all is seen: like eager, unlike flash_attention_2."""
    model = tiny_model(name)
    ids = token_ids(1, TOTAL)
    inputs = {
        "input_ids": ids,
        "position_ids": restarting(),
        "attention_mask": torch.ones_like(ids),
        "use_cache": use_cache,
    }
    assert_agree(run(model, "smart", **inputs), run(model, "eager", **inputs))


@pytest.mark.parametrize("backends", [None, "sdpa"])
@pytest.mark.parametrize("name", CAUSAL)
def test_several_rows_packed_differently(name: str, backends: str | None) -> None:
    model = tiny_model(name)
    ids = token_ids(3, TOTAL)
    packings = [LENGTHS, (TOTAL,), (8, 8)]
    positions = torch.cat([restarting(lengths) for lengths in packings])
    actual = run(model, "smart", backends, input_ids=ids, position_ids=positions, use_cache=False)
    for row, lengths in enumerate(packings):
        assert_agree(actual[row : row + 1], alone(model, ids[row : row + 1], lengths))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_cumulative_lengths(name: str, with_positions: bool, use_cache: bool) -> None:
    """They say it without positions too; those then go on counting, as for eager below."""
    model = tiny_model(name)
    ids = token_ids(1, TOTAL)
    positions = restarting() if with_positions else torch.arange(TOTAL)[None]
    actual = run(
        model, "smart", input_ids=ids, position_ids=positions, use_cache=use_cache, **bounds()
    )
    parts = [
        run(model, "eager", input_ids=part, position_ids=at)
        for part, at in zip(ids.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    ]
    assert_agree(actual, torch.cat(parts, dim=1))


def test_cumulative_lengths_never_build_a_mask(no_dense_mask: None) -> None:
    model = tiny_model("llama")
    ids = token_ids(1, TOTAL)
    with smartattn.trace() as trace:
        actual = run(model, "smart", input_ids=ids, position_ids=restarting(), **bounds())
    assert_agree(actual, alone(model, ids))
    assert {row.backend for row in trace.rows} == {"sdpa_unpadded"}


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_cumulative_lengths_of_an_encoder(name: str) -> None:
    """The mask function of an encoder never sees positions: the layers' arguments alone tell."""
    model = tiny_model(name)
    ids = token_ids(1, TOTAL)
    start = 2 if name == "roberta" else 0
    positions = restarting(start=start)
    actual = run(model, "smart", input_ids=ids, position_ids=positions, **bounds())
    parts = [
        run(model, "eager", input_ids=part, position_ids=at)
        for part, at in zip(ids.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    ]
    assert_agree(actual, torch.cat(parts, dim=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"cu_seq_lens_q": torch.tensor([0, 5, 9], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([1, 5, TOTAL], dtype=torch.int32)},
        {"cu_seq_lens_k": torch.tensor([0, 4, TOTAL], dtype=torch.int32)},
    ],
    ids=["too_short", "starts_late", "keys_differ"],
)
def test_cumulative_lengths_that_cannot_be(wrong: dict[str, torch.Tensor]) -> None:
    given = {**bounds((5, TOTAL - 5)), **wrong}
    with pytest.raises(ValueError, match="cu_seq_lens"):
        run(tiny_model("llama"), "smart", input_ids=token_ids(1, TOTAL), **given)


@pytest.mark.parametrize("with_bounds", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_flattening_collator(name: str, with_bounds: bool) -> None:
    """The loss of a flattened batch is that of its sequences, token by token."""
    ids = token_ids(1, TOTAL)[0]
    features = [{"input_ids": part.tolist()} for part in ids.split(LENGTHS)]
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=with_bounds)(
        features
    )
    assert ("cu_seq_lens_q" in batch) == with_bounds
    losses = {}
    gradients = {}
    model = tiny_model(name, "smart").train()
    packed = model(**batch)
    packed.loss.backward()
    gradients["packed"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    losses["packed"] = packed.loss.detach()
    model.zero_grad()
    model.set_attn_implementation("eager")
    counted = sum(length - 1 for length in LENGTHS)
    summed = sum(
        model(input_ids=part[None], labels=part[None]).loss * (len(part) - 1)
        for part in ids.split(LENGTHS)
        if len(part) > 1
    )
    (summed / counted).backward()
    gradients["alone"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert_agree(losses["packed"], (summed / counted).detach())
    for actual, expected in zip(gradients["packed"], gradients["alone"], strict=True):
        assert_agree(actual, expected, tolerance=1e-3)


@pytest.mark.parametrize("pieces", [(TOTAL,), (1,) * TOTAL, (2, 14), (14, 2)])
def test_packings_at_the_edge(pieces: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    ids = token_ids(1, TOTAL)
    for use_cache in (False, True):
        actual = run(
            model, "smart", input_ids=ids, position_ids=restarting(pieces), use_cache=use_cache
        )
        assert_agree(actual, alone(model, ids, pieces))


@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_with_a_gap_are_what_eager_makes_of_them(use_cache: bool) -> None:
    """No sequence begins anew at position 9 after 3; without a cache Transformers says it does."""
    model = tiny_model("llama")
    positions = torch.tensor([[0, 1, 2, 3, 9, 10, 11, 12]])
    inputs = {"input_ids": token_ids(1, 8), "position_ids": positions, "use_cache": use_cache}
    assert_agree(run(model, "smart", **inputs), run(model, "eager", **inputs))


def test_decoding_after_a_prefill_is_not_packed() -> None:
    """Decode steps have one position each; those of a batch may all differ."""
    model = tiny_model("llama")
    ids = token_ids(2, 6)
    outputs = {}
    for implementation in ("eager", "smart"):
        cache = DynamicCache(config=model.config)
        run(model, implementation, input_ids=ids, **{CACHE: cache})
        outputs[implementation] = run(
            model,
            implementation,
            input_ids=token_ids(2, 3, seed=1),
            position_ids=torch.tensor([[6, 7, 8], [2, 3, 4]]),
            **{CACHE: cache},
        )
    assert_agree(outputs["smart"], outputs["eager"])


# -- positions of three dimensions -----------------------------------------------------------------


def qwen2_vl_text() -> Any:
    """A text model whose rotary positions have a time, a height and a width."""
    values = tiny_config("llama").to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = transformers.Qwen2VLTextConfig(
        **{name: values[name] for name in names},
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    )
    return from_config("Qwen2VLTextModel", config)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_three_dimensional_positions_are_not_a_packing(batch: int, use_cache: bool) -> None:
    """Rows of an image restart within one sequence; shape[1] of such ids is no length."""
    model = qwen2_vl_text()
    time = torch.tensor([0, 1, 2, 2, 2, 2, 4, 5])
    height = torch.tensor([0, 1, 2, 2, 3, 3, 4, 5])
    width = torch.tensor([0, 1, 2, 3, 2, 3, 4, 5])
    positions = torch.stack([time, height, width])[:, None].expand(3, batch, 8)
    inputs = {
        "input_ids": token_ids(batch, 8),
        "position_ids": positions,
        "use_cache": use_cache,
    }
    with smartattn.trace() as trace:
        actual = run(model, "smart", **inputs)
    assert_agree(actual, run(model, "eager", **inputs))
    assert {row.facts["pattern"] for row in trace.rows} == {"causal"}


@pytest.mark.parametrize("use_cache", [False, True])
def test_text_positions_before_three_dimensional_ones(use_cache: bool) -> None:
    """The first of four rows is for the mask, and may be packed."""
    model = qwen2_vl_text()
    ids = token_ids(1, TOTAL)
    positions = restarting().expand(4, 1, -1)
    actual = run(model, "smart", input_ids=ids, position_ids=positions, use_cache=use_cache)
    parts = [
        run(model, "eager", input_ids=part, position_ids=torch.arange(part.shape[1])[None])
        for part in ids.split(LENGTHS, 1)
    ]
    assert_agree(actual, torch.cat(parts, dim=1))


def test_empty_sequences_at_the_end_of_cumulative_lengths() -> None:
    """Collators that fill up to a fixed number of sequences."""
    model = tiny_model("llama")
    ids = token_ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    lengths = {"max_length_q": 5, "max_length_k": 5, "use_cache": False}
    outputs = []
    for bounds in ([0, 3, 8], [0, 3, 8, 8, 8]):
        cu = torch.tensor(bounds, dtype=torch.int32)
        kwargs = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, **lengths}
        outputs.append(run(model, "smart", input_ids=ids, position_ids=positions, **kwargs))
    assert_agree(outputs[1], outputs[0])
