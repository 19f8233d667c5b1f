"""How the keys of a decoding step are shared among thread blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from smartattn.backends import NAMED, flash_attention_2, splitting
from smartattn.backends.splitting import Step, cudnn_parts, flash_2_parts
from smartattn.plan import Pattern, Plan
from smartattn.workload import Workload

#: Of an H200.
PROCESSORS = 132


def step(blocks: int, keys: int, head_dim: int = 128, *lengths: int) -> Step:
    """``blocks`` sequences of one key/value head each, or of the given lengths."""
    real = np.array(lengths) if lengths else np.full(blocks, keys)
    return Step(blocks, real, keys, head_dim)


# -- the rules of the kernels, against the grids that they were launched with on an H200 -----------


@pytest.mark.parametrize(
    ("blocks", "parts"),
    [(4, 64), (12, 19), (24, 10), (40, 6), (56, 4), (72, 7), (96, 5), (112, 2), (136, 5), (192, 4)],
)
def test_the_own_rule_of_flash_attention_2(blocks: int, parts: int) -> None:
    assert splitting._flash_parts(blocks, 2 * PROCESSORS, 16384 // 128, distinct=True) == parts


@pytest.mark.parametrize("blocks", [212, 216, 256, 272, 1024])
def test_flash_attention_2_does_not_cut_many_sequences_by_itself(blocks: int) -> None:
    assert splitting._flash_parts(blocks, 2 * PROCESSORS, 128, distinct=True) == 1


@pytest.mark.parametrize(
    ("blocks", "parts"), [(4, 29), (12, 10), (24, 5), (40, 3), (72, 5), (96, 4), (106, 1), (136, 1)]
)
def test_the_rule_of_flash_attention_3(blocks: int, parts: int) -> None:
    tiles = -(-16384 // 176)
    assert splitting._flash_parts(blocks, PROCESSORS, tiles, distinct=False) == parts


@pytest.mark.parametrize(
    ("blocks", "parts"),
    [(4, 64), (8, 32), (12, 16), (16, 16), (20, 8), (32, 8), (36, 4), (64, 4), (66, 2), (68, 1)],
)
def test_the_rule_of_cudnn(blocks: int, parts: int) -> None:
    for head_dim in (64, 80, 96, 128):
        assert cudnn_parts(step(blocks, 16384, head_dim), PROCESSORS) == parts


@pytest.mark.parametrize(
    ("blocks", "parts"), [(4, 128), (8, 64), (12, 32), (20, 16), (36, 8), (64, 8), (66, 4), (68, 1)]
)
def test_the_rule_of_cudnn_for_large_heads(blocks: int, parts: int) -> None:
    assert cudnn_parts(step(blocks, 8192, 256), PROCESSORS) == parts


def test_cudnn_makes_no_part_shorter_than_128_keys() -> None:
    assert cudnn_parts(step(4, 4096, 128), PROCESSORS) == 32
    assert cudnn_parts(step(4, 2048, 64), PROCESSORS) == 16
    assert cudnn_parts(step(4, 100, 64), PROCESSORS) == 1


# -- the busiest place -----------------------------------------------------------------------------


def test_evenly() -> None:
    # 8 blocks share what they have to read among 100 places.
    assert splitting.evenly(step(8, 1000), 100) == pytest.approx(80)
    # 100 blocks are one wave, 104 are two.
    assert splitting.evenly(step(100, 1000), 100) == pytest.approx(1000)
    assert splitting.evenly(step(104, 1000), 100) == pytest.approx(2000)
    # 84 blocks leave a few places empty rather than cut the keys.
    assert splitting.evenly(step(84, 1000), 100) == pytest.approx(1000)
    # No wave is shorter than its longest sequence.
    assert splitting.evenly(step(84, 1000, 64, 1000, *[10] * 83), 100) == pytest.approx(1000)


def test_cudnn_comes_in_waves_of_two_blocks_per_processor() -> None:
    def keys(blocks: int) -> float:
        return splitting.cudnn(step(blocks, 10_000), 100)

    assert keys(51) == keys(100) == pytest.approx(10_000)
    assert keys(101) == keys(199) == pytest.approx(15_000)
    assert keys(200) == pytest.approx(17_000)
    assert keys(201) == pytest.approx(27_000)
    # In four parts.
    assert keys(48) == pytest.approx(15_000 / 4)
    # Padding is read as well.
    padded = step(51, 10_000, 128, *[10] * 51)
    assert splitting.cudnn(padded, 100) == pytest.approx(10_000)


def test_flash_attention_3_comes_in_waves_of_one_block_per_processor() -> None:
    def keys(*given: Any) -> float:
        return splitting.flash_3(step(*given), 100)

    assert keys(100, 10_000) == pytest.approx(10_000)
    assert keys(101, 10_000) == pytest.approx(20_000)
    # Three parts of 20 tiles, in two waves, use the places better than two, in one.
    assert keys(60, 10_112) == pytest.approx(2 * 20 * 176)
    # Sequences of half the cache have nothing to do in the last part.
    assert keys(60, 10_112, 128, *[5_000] * 60) == pytest.approx(2 * 20 * 176)
    assert keys(60, 10_112, 128, *[3_000] * 60) == pytest.approx(3_000)
    # Four tiles and fewer are never cut; tiles are larger for smaller heads.
    assert keys(10, 4 * 176) == pytest.approx(4 * 176)
    assert keys(10, 5 * 176) == pytest.approx(176)
    assert keys(10, 5 * 192, 64) == pytest.approx(192)
    assert keys(10, 5 * 144, 96) == pytest.approx(144)
    assert keys(10, 4 * 80, 256) == pytest.approx(4 * 80)
    assert keys(10, 5 * 80, 256) == pytest.approx(80)


def test_flash_attention_2_reads_parts_in_waves() -> None:
    slots = 200
    # Two parts of 1,024 keys keep all places busy.
    whole = step(100, 2048)
    assert flash_2_parts(whole, slots) == 2
    assert splitting.flash_2(whole, slots) == pytest.approx(1024 + 256 + 2 * 16)
    # Its own rule, without parts: whole sequences take 1.9 times as long.
    short = step(200, 500)
    assert flash_2_parts(short, slots) == 0
    assert splitting.flash_2(short, slots) == pytest.approx(1.9 * 500)
    assert splitting.flash_2(step(200, 500, 256), slots) == pytest.approx(500)
    # A last wave of half of the places or less is shorter.
    assert splitting.flash_2(step(250, 500), slots) == pytest.approx(1.9 * 1.62 * 500)
    # With its own parts, sequences share the places.
    assert splitting.flash_2(step(20, 500), slots) == pytest.approx(128)
    assert splitting.flash_2(step(150, 500), slots) == pytest.approx(375)


# -- how many parts --------------------------------------------------------------------------------


def test_the_parts_of_padded_caches_are_of_the_keys_in_use() -> None:
    slots = 2 * PROCESSORS
    full = flash_2_parts(step(64, 16384), slots)
    half = flash_2_parts(step(64, 16384, 128, *[8192] * 64), slots)
    # Otherwise half of the places would have nothing to do.
    assert (full, half) == (4, 8)


def test_many_sequences_are_cut_too() -> None:
    slots = 2 * PROCESSORS
    for blocks in (216, 256, 400, 1024):
        assert flash_2_parts(step(blocks, 16384), slots) > 1
    # One long sequence among short ones would keep the others waiting.
    skewed = step(256, 16384, 128, 16384, *[500] * 255)
    assert flash_2_parts(skewed, slots) > flash_2_parts(step(256, 16384), slots)


def test_where_flash_attention_2_chooses_itself() -> None:
    slots = 2 * PROCESSORS
    assert flash_2_parts(step(256, 511), slots) == 0
    assert flash_2_parts(step(256, 512), slots) > 0
    assert flash_2_parts(step(256, 4096)._replace(windowed=True), slots) == 0
    assert flash_2_parts(step(0, 4096, 128, 1)._replace(lengths=np.zeros(0, int)), slots) == 0


def test_no_more_parts_than_tiles() -> None:
    # Two tiles of 256 keys.
    assert flash_2_parts(step(1, 512, 64), 2 * PROCESSORS) == 2


def test_parts_take_no_more_than_a_workspace() -> None:
    slots = 2 * PROCESSORS
    skewed = Step(2048, np.array([16384, *[200] * 255]), 16384, 128, heads=32)
    small = skewed._replace(heads=1)
    assert flash_2_parts(small, slots) > flash_2_parts(skewed, slots) > 1
    assert flash_2_parts(skewed, slots) * 256 * 32 * 129 * 4 <= 2**26
    # Not even two parts.
    assert flash_2_parts(skewed._replace(heads=32 * 64), slots) == 0


class _Extension:
    """The compiled functions of flash-attn, which tell how they are called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any, int | None]] = []

    def fwd(self, query: torch.Tensor, *given: Any) -> list[torch.Tensor]:
        self.calls.append(("fwd", None, None, None))
        return [query]

    def fwd_kvcache(self, query: torch.Tensor, *given: Any) -> list[torch.Tensor]:
        self.keys = given[0].shape[1]
        # The rest of the arguments end with the number of parts.
        self.calls.append(("fwd_kvcache", given[8], given[4], given[-1]))
        return [query]

    def public(self, query: torch.Tensor, key: torch.Tensor, *_: Any, **given: Any) -> torch.Tensor:
        self.keys = key.shape[1]
        bounds = given["cache_leftpad"], given["cache_seqlens"]
        self.calls.append(("public", *bounds, given["num_splits"]))
        return query


@pytest.mark.parametrize(
    ("changes", "called", "bounded", "cut"),
    [
        ({}, "fwd_kvcache", False, True),
        ({"side": "left", "padding_share": 0.5}, "fwd_kvcache", True, True),
        ({"side": "left", "padding_share": 0.5, "kv_len": 300}, "fwd_kvcache", True, False),
        ({"kv_len": 300}, "fwd", False, None),
        ({"mode": "forward", "q_len": 2048}, "fwd", False, None),
        ({"mode": "forward", "q_len": 4}, "fwd", False, None),
        ({"window": 700}, "fwd", False, None),
    ],
)
def test_the_kernel_for_caches_is_told_how_many_parts(
    changes: dict[str, Any], called: str, bounded: bool, cut: bool | None
) -> None:
    given = {
        "mode": "decode", "causal": True, "side": "none", "dtype": "bfloat16", "batch": 4,
        "q_len": 1, "kv_len": 2048, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "memory": "concatenated",
    } | changes  # fmt: skip
    workload = Workload(**given)
    device = torch.device("cpu")
    plan, call = workload.plan(device), workload.call(device)
    extension = _Extension()
    with (
        mock.patch.object(flash_attention_2, "_extension", return_value=extension),
        mock.patch.object(flash_attention_2, "processors", return_value=PROCESSORS),
    ):
        run = NAMED["flash_attention_2"].bind(plan, call)
    query, key, value, *_ = workload.tensors(device)
    run(query, key, value, {})
    ((name, start, end, parts),) = extension.calls
    assert name == called
    assert (start is not None) is (end is not None) is bounded
    if cut is None:
        assert parts is None
    else:
        wanted = flash_2_parts(Step.of(plan, call), 2 * PROCESSORS) if cut else 0
        assert parts == wanted
        assert (wanted > 1) is cut


@pytest.mark.parametrize("thin", [True, False])
def test_parts_are_of_the_filled_part_of_a_static_cache(thin: bool) -> None:
    """The kernel cuts what it is handed, which is not to be the rest of the cache as well."""
    device = torch.device("cpu")
    workload = Workload(
        "decode", True, "left", "bfloat16", 2, 1, 700, 4, 2, 64, padding_share=0.3,
        memory="concatenated",
    )  # fmt: skip
    real = workload.real_keys()
    plan = Plan(2, 1, 4096, Pattern.CAUSAL, device, shift=699, real=real)
    call = replace(workload.call(device), kv_len=4096)
    assert (plan.visible, plan.kv_len) == (700, 4096)
    extension = _Extension()
    package = mock.Mock(flash_attn_with_kvcache=extension.public)
    with (
        mock.patch.object(
            flash_attention_2, "_extension", return_value=extension if thin else None
        ),
        mock.patch.object(flash_attention_2, "_package", return_value=(package, None)),
        mock.patch.object(flash_attention_2, "processors", return_value=PROCESSORS),
    ):
        run = NAMED["flash_attention_2"].bind(plan, call)
    query, *_ = workload.tensors(device)
    cache = torch.randn(2, 2, 4096, 64, dtype=torch.bfloat16)
    run(query, cache, cache, {})
    ((_, _, _, parts),) = extension.calls
    assert extension.keys == 700
    filled = Step.of(workload.plan(device), workload.call(device))
    assert parts == flash_2_parts(filled, 2 * PROCESSORS) > 1


def test_no_parts_are_asked_for_without_a_gpu() -> None:
    workload = Workload("decode", True, "none", "bfloat16", 4, 1, 2048, 4, 2, 64)
    plan, call = workload.plan(torch.device("cpu")), workload.call(torch.device("cpu"))
    assert flash_attention_2._parts(plan, call) == 0
