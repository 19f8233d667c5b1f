"""smartattn's Triton kernels in Triton's interpreter, which needs no GPU: ``make kernels``."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from smartattn import moves, tails
from smartattn.backends import triton_varlen
from smartattn.layouts import LONGEST_TILE

from .cases import Case, takes
from .test_backends_matrix import (
    CPU,
    TritonVarlenStandIn,
    _core,
    _cpu_cases,
    _cpu_shape_cases,
    check_nan_in_padding,
    run_case,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1, which `make kernels` sees to",
)
BACKEND = TritonVarlenStandIn()


@pytest.fixture(autouse=True)
def launched_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(triton_varlen, "_broken", lambda device: None)


@pytest.mark.parametrize("many", [512, 0])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id)
        for case in (*_cpu_cases(), *_cpu_shape_cases(BACKEND))
        # numpy, which interprets it, has no bfloat16.
        if takes(BACKEND, case) and case.dtype in (torch.float32, torch.float16)
    ],
)
def test_attention_matches_float64(case: Case, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # From how many keys per query on tiles are longer, which the cases are too small for.
    monkeypatch.setattr(triton_varlen, "_MANY", many)
    if many == 0 and case.head_dim > triton_varlen._SMALL_HEAD:
        pytest.skip("has one kind of tiles")
    run_case(BACKEND, case, CPU)


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
@pytest.mark.parametrize("name", ["causal-left", "causal-right", "bidirectional-both"])
def test_nan_in_padding_is_not_read(name: str, layout: str) -> None:
    case = Case(_core(name), 4, 2, 16, 16, layout, torch.float32, False)
    check_nan_in_padding(BACKEND, case, CPU)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 80), (20, 128), (4, 256)])
def test_tails_are_cleared_where_they_are_not_finite(
    heads: int, dim: int, heads_first: bool
) -> None:
    shape = (heads, 300, dim) if heads_first else (300, heads, dim)
    states = torch.randn(shape, dtype=torch.float16)
    values = states.transpose(0, 1) if heads_first else states
    values[::7] = torch.nan
    values[5::11, :, ::3] = torch.inf
    gaps = torch.tensor([[7, 9, 0, 0], [50, 50 + LONGEST_TILE, 0, 0]], dtype=torch.int32)
    expected = values.clone()
    for first, last in gaps[:, :2].tolist():
        expected[first:last] = expected[first:last].nan_to_num(0.0, 0.0, 0.0)
    tails._clear(gaps, values, None, 0)
    assert torch.equal(values.nan_to_num(-7.0), expected.nan_to_num(-7.0))
    assert not bool(torch.isnan(values[50 : 50 + LONGEST_TILE]).any())


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (3, 80), (20, 128), (4, 256)])
def test_outputs_of_padding_become_zeros_and_no_others(heads: int, dim: int) -> None:
    values = torch.full((40, 2, dim), torch.nan, dtype=torch.float16)
    output = torch.full((300, heads, dim), torch.nan, dtype=torch.float16)
    spans = [(0, 3), (10, 10), (11, 12), (100, 299)]
    gaps = torch.tensor([[5 * i, 5 * i + 2, *span] for i, span in enumerate(spans)])
    tails._clear(gaps.int(), values, output, 199)
    for first, last in spans:
        assert bool((output[first:last] == 0.0).all())
        output[first:last] = torch.nan
    assert bool(output.isnan().all())
    cleared = [i for i in range(40) if not bool(values[i].isnan().any())]
    assert cleared == [0, 1, 5, 6, 10, 11, 15, 16]


@pytest.mark.parametrize(
    ("heads", "dim", "rows"), [(1, 8, 4), (3, 80, 4), (8, 64, 7), (2, 264, 4), (1, 1024, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tokens_are_moved_there_and_back(
    heads: int, dim: int, rows: int, dtype: torch.dtype
) -> None:
    length = 21
    index = torch.randperm(rows * length)[:50].sort().values
    sources = moves.sources(index, rows * length)
    tokens = torch.randn(1, len(index), heads, dim).to(dtype)
    expected = torch.zeros(rows * length, heads, dim, dtype=dtype)
    expected[index] = tokens[0]
    expected = expected.view(rows, length, heads, dim)
    by_token = torch.full((rows, length, heads, dim), torch.nan, dtype=dtype)
    by_head = torch.full((rows, heads, length, dim), torch.nan, dtype=dtype).transpose(1, 2)
    for padded in (by_token, by_head):
        assert moves._move(tokens, sources, padded)
        assert torch.equal(padded, expected)
        packed = torch.full_like(tokens, torch.nan)
        assert moves._move(padded, index, packed)
        assert torch.equal(packed, tokens)


def test_what_cannot_be_moved_at_once_is_left_alone() -> None:
    index = torch.tensor([0, 1])
    target = torch.full((1, 2, 1, 8), 7.0)
    for states in (
        torch.randn(1, 2, 1, 16)[..., ::2],
        torch.randn(1, 2, 1, 9)[..., :8],
        torch.randn(17)[1:].view(1, 2, 1, 8),
    ):
        assert not moves._move(states, index, target)
    assert bool((target == 7.0).all())
    assert moves._move(torch.randn(1, 0, 1, 8), index * 0 - 1, target)
    assert not target.any()
