"""Heads of a group as queries of one head: the same answer, and only where a CPU gains by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from smartattn.backends import NAMED, sdpa
from smartattn.backends.base import DEFAULT_TOLERANCES
from smartattn.backends.sdpa import _folding_pays
from smartattn.call import Call
from smartattn.plan import Pattern, Plan

CPU = torch.device("cpu")
SDPA = NAMED["sdpa"]
KV_LEN, HEAD_DIM = 300, 32


def _call(dtype: torch.dtype, heads: int, kv_heads: int, q_len: int, **facts: Any) -> Call:
    sizes = {"batch": 2, "q_len": q_len, "kv_len": KV_LEN, "heads": heads, "kv_heads": kv_heads}
    dims = {"head_dim": HEAD_DIM, "value_head_dim": HEAD_DIM, "scaling": HEAD_DIM**-0.5}
    return Call(**{"device": CPU, "dtype": dtype, **sizes, **dims, **facts})


def _plan(q_len: int, kind: str) -> Plan:
    pattern = Pattern.BIDIRECTIONAL if kind == "cross" else Pattern.CAUSAL
    real = None
    if kind in ("left", "holes"):
        real = np.ones((2, KV_LEN), dtype=bool)
        real[1, :70] = False
        if kind == "holes":
            real[0, 90:120] = False
    shift = KV_LEN - q_len if pattern is Pattern.CAUSAL else 0
    window = 50 if kind == "window" else None
    return Plan(2, q_len, KV_LEN, pattern, CPU, shift=shift, window=window, real=real)


def _seen(q_len: int, kind: str) -> np.ndarray[Any, Any]:
    """(batch, q_len, kv_len) from the definition of each mask."""
    keys, queries = np.arange(KV_LEN), np.arange(q_len) + KV_LEN - q_len
    seen = np.ones((2, q_len, KV_LEN), dtype=bool)
    if kind != "cross":
        seen &= keys[None] <= queries[:, None]
    if kind == "window":
        seen &= keys[None] > queries[:, None] - 50
    if kind in ("left", "holes"):
        seen[1, :, :70] = False
    if kind == "holes":
        seen[0, :, 90:120] = False
    return seen


def _right(states: list[torch.Tensor], seen: np.ndarray[Any, Any]) -> torch.Tensor:
    query, key, value = (x.double() for x in states)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
    hidden = ~torch.from_numpy(seen)[:, None]
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def _states(call: Call) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(call.q_len, call.heads), (KV_LEN, call.kv_heads), (KV_LEN, call.kv_heads)]
    made = [torch.randn(2, length, n, HEAD_DIM, generator=generator) for length, n in shapes]
    # As layers hand them over: queries transposed, keys and values from a cache.
    return [made[0].transpose(1, 2), *(x.transpose(1, 2).contiguous() for x in made[1:])]


class Seen:
    """The shapes that SDPA is asked with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.facts: list[dict[str, Any]] = []
        right = torch.nn.functional.scaled_dot_product_attention

        def spy(query: torch.Tensor, *arguments: Any, **facts: Any) -> torch.Tensor:
            self.shapes.append(tuple(query.shape))
            self.facts.append(facts)
            return right(query, *arguments, **facts)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("kind", ["none", "cross", "left", "holes", "window"])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (7, 1), (4, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_folded_heads_match_float64(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    q_len: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, plan = _call(dtype, heads, kv_heads, q_len), _plan(q_len, kind)
    states = [x.to(dtype) for x in _states(call)]
    seen = Seen(monkeypatch)
    output = SDPA.run(plan, call, *states)
    group = heads // kv_heads
    half = dtype in (torch.float16, torch.bfloat16)
    folded = group >= 4 or (half and q_len == 1) or dtype is torch.float16
    assert seen.shapes == [
        (2, kv_heads, group * q_len, HEAD_DIM) if folded else (2, heads, q_len, HEAD_DIM)
    ]
    assert output.shape == (2, q_len, heads, HEAD_DIM)
    assert output.is_contiguous()
    right = _right(states, _seen(q_len, kind))
    error = float((output.double() - right).abs().max() / right.abs().max())
    assert error <= DEFAULT_TOLERANCES[dtype]


def test_gradients_pass_through_folded_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    call, plan = _call(torch.float64, 8, 2, 5, grad=True), _plan(5, "left")
    states = [x.double().requires_grad_() for x in _states(call)]
    weights = torch.randn(2, 5, 8, HEAD_DIM, generator=torch.Generator().manual_seed(1)).double()
    seen = Seen(monkeypatch)
    found = torch.autograd.grad((SDPA.run(plan, call, *states) * weights).sum(), states)
    assert seen.shapes == [(2, 2, 20, HEAD_DIM)]
    right = torch.autograd.grad((_right(states, _seen(5, "left")) * weights).sum(), states)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("shape", [(KV_LEN,), (1, KV_LEN), ("q", KV_LEN), (1, "q", KV_LEN),
                                   (1, 1, KV_LEN), (1, 1), (8, "q", KV_LEN)])  # fmt: skip
def test_a_callers_mask_of_fewer_dimensions_broadcasts(shape: tuple[Any, ...], q_len: int) -> None:
    call = _call(torch.float32, 8, 2, q_len)
    states = _states(call)
    sizes = tuple(q_len if size == "q" else size for size in shape)
    bias = torch.randn(sizes, generator=torch.Generator().manual_seed(3))
    output = sdpa.attend(*states, bias, False, call)
    query, key, value = (x.double() for x in states)
    key, value = key.repeat_interleave(4, 1), value.repeat_interleave(4, 1)
    scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5 + bias.double()
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value, atol=1e-5, rtol=1e-5)


def test_folded_heads_drop_what_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    call = _call(torch.float32, 8, 2, 1, dropout=0.25, features=frozenset({"dropout"}))
    seen = Seen(monkeypatch)
    SDPA.run(_plan(1, "none"), call, *_states(call))
    assert seen.shapes == [(2, 2, 4, HEAD_DIM)]
    assert seen.facts[0]["dropout_p"] == 0.25


def test_one_query_is_folded_where_no_kernel_takes_grouped_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Repeated keys would be copies."""
    monkeypatch.setattr(sdpa, "_folding_pays", lambda *_: False)
    monkeypatch.setattr(sdpa, "_takes_grouped_heads", lambda *_: False)
    for q_len, shape in ((1, (2, 2, 4, HEAD_DIM)), (2, (2, 8, 2, HEAD_DIM))):
        call = _call(torch.float32, 8, 2, q_len)
        states = _states(call)
        seen = Seen(monkeypatch)
        bias = torch.zeros(2, 1, q_len, KV_LEN)
        output = sdpa.attend(*states, bias, False, call)
        assert seen.shapes == [shape]
        everything = np.ones((2, q_len, KV_LEN), dtype=bool)
        right = _right(states, everything).transpose(1, 2)
        torch.testing.assert_close(output.double(), right, atol=1e-5, rtol=1e-5)


def test_a_bias_of_each_head_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    call = _call(torch.float32, 8, 2, 1, features=frozenset({"position_bias"}))
    states, bias = _states(call), torch.randn(1, 8, 1, KV_LEN)
    seen = Seen(monkeypatch)
    output = SDPA.run(_plan(1, "none"), call, *states, {"position_bias": bias})
    assert seen.shapes == [(2, 8, 1, HEAD_DIM)]
    query, key, value = (x.double() for x in states)
    key, value = key.repeat_interleave(4, 1), value.repeat_interleave(4, 1)
    scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5 + bias
    torch.testing.assert_close(output.double(), (scores.softmax(-1) @ value).transpose(1, 2),
                               atol=1e-5, rtol=1e-5)  # fmt: skip


def test_causal_queries_without_a_mask_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's own causal mask would take further heads for later queries."""
    call = _call(torch.float32, 8, 2, 5)
    seen = Seen(monkeypatch)
    sdpa.attend(*_states(call), None, True, call)
    assert seen.shapes == [(2, 8, 5, HEAD_DIM)]


@pytest.mark.parametrize(
    ("dtype", "heads", "batch", "q_len", "kv_len", "threads", "pays"),
    [
        (torch.float32, (32, 8), 1, 1, 128, 2, True),
        (torch.float32, (32, 8), 1, 1, 127, 2, False),
        # A group of three saves no more than it costs, in half precision it does.
        (torch.float32, (9, 3), 1, 1, 200, 2, False),
        (torch.float16, (9, 3), 1, 1, 100, 2, True),
        # Heads are what threads share.
        (torch.float32, (32, 8), 1, 1, 200, 32, False),
        (torch.float32, (32, 8), 8, 1, 200, 32, True),
        (torch.bfloat16, (32, 8), 1, 1, 100, 32, True),
        (torch.float16, (32, 8), 1, 1, 100, 32, False),
        (torch.float32, (32, 8), 1, 5, 1000, 2, True),
        (torch.bfloat16, (32, 8), 1, 5, 1000, 32, False),
        (torch.float32, (32, 8), 1, 5, 100, 2, False),
        (torch.float32, (32, 8), 1, 8, 1000, 2, True),
        (torch.float32, (32, 8), 1, 9, 1000, 2, False),
        (torch.float16, (16, 8), 1, 5, 300, 2, True),
        (torch.float16, (16, 8), 1, 5, 200, 2, False),
        (torch.bfloat16, (16, 8), 1, 5, 300, 2, False),
    ],
)
def test_where_folding_pays(
    dtype: torch.dtype,
    heads: tuple[int, int],
    batch: int,
    q_len: int,
    kv_len: int,
    threads: int,
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    call = _call(dtype, *heads, q_len)
    assert _folding_pays(call, batch, q_len, kv_len) == pays
    assert not _folding_pays(replace(call, device=torch.device("cuda")), batch, q_len, kv_len)


@pytest.mark.parametrize(
    ("dtype", "heads", "batch", "q_len", "grouped"),
    [
        (torch.float32, (32, 8), 1, 1024, False),
        (torch.float32, (9, 3), 1, 1024, False),
        (torch.float32, (9, 3), 1, 512, True),
        (torch.float32, (9, 3), 1, 1, True),
        (torch.float32, (9, 3), 32, 1, False),
        (torch.float64, (32, 8), 1, 1024, True),
        (torch.bfloat16, (32, 8), 1, 1024, True),
        (torch.float16, (32, 8), 64, 1, True),
    ],
)
def test_where_a_gpu_takes_grouped_heads_without_a_mask(
    dtype: torch.dtype,
    heads: tuple[int, int],
    batch: int,
    q_len: int,
    grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sdpa, "processors", lambda device: 132)
    call = replace(_call(dtype, *heads, q_len), batch=batch)
    assert sdpa._grouped_without_mask(call)
    call = replace(call, device=torch.device("cuda"))
    assert sdpa._grouped_without_mask(call) == grouped
    # Where it would hold many scores, whatever the dtype could do otherwise.
    many = sdpa._grouped_without_mask(replace(call, kv_len=2**30))
    assert many == (grouped and dtype is not torch.float32)
    assert not sdpa._grouped_without_mask(replace(call, head_dim=320, value_head_dim=320))
