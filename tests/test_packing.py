"""Padded to packed and back, in every memory layout, with gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartattn import layouts, moves
from smartattn.backends.flash import Route, route
from smartattn.call import Call
from smartattn.features import FEATURES, features
from smartattn.layouts import VarlenLayout
from smartattn.packing import (
    Told,
    _flattened,
    _in_a_row,
    bind_in_place,
    bind_packed,
    gather,
    packs_queries,
    scatter,
    varlen_refusals,
    where_keys_lie,
)
from smartattn.plan import Pattern, Plan

from .moving import moving

CPU = torch.device("cpu")
thorough = settings(max_examples=150, deadline=None, derandomize=True)
LAYOUTS = ("tokens first", "heads first", "fused", "expanded heads", "sliced")


def _states(layout: str, batch: int, heads: int, length: int, dim: int) -> torch.Tensor:
    """(batch, heads, length, dim) of distinct values."""
    values = torch.arange(batch * length * heads * dim, dtype=torch.float32)
    values = values.view(batch, length, heads, dim)
    if layout == "heads first":
        return values.transpose(1, 2).contiguous()
    if layout == "fused":
        return torch.cat([values, -values], dim=-1)[..., :dim].transpose(1, 2)
    if layout == "expanded heads":
        return values[:, :, :1].transpose(1, 2).expand(batch, heads, length, dim)
    if layout == "sliced":
        longer = torch.cat([values, -values], dim=1).transpose(1, 2).contiguous()
        return longer[:, :, :length]
    return values.transpose(1, 2)


@st.composite
def tokens(draw: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States and an index of some of their tokens, in order; None for all of them."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    layout = draw(st.sampled_from(LAYOUTS))
    states = _states(layout, batch, draw(st.integers(1, 3)), length, draw(st.integers(1, 4)))
    if draw(st.integers(0, 3)) == 0:
        return states, None
    chosen = draw(st.sets(st.integers(0, batch * length - 1)))
    return states, torch.tensor(sorted(chosen), dtype=torch.long)


@thorough
@given(tokens())
def test_gather_takes_tokens_by_their_place(given_: Any) -> None:
    states, index = given_
    batch, heads, length, dim = states.shape
    packed = gather(states, index)
    places = range(batch * length) if index is None else index.tolist()
    assert packed.shape == (len(places), heads, dim)
    for row, place in enumerate(places):
        assert torch.equal(packed[row], states[place // length, :, place % length])


@thorough
@given(tokens())
def test_scatter_puts_them_back_among_zeros(given_: Any) -> None:
    states, index = given_
    batch, heads, length, dim = states.shape
    padded = scatter(gather(states + 1, index), index, batch, length)
    assert padded.shape == (batch, length, heads, dim)
    kept = torch.ones(batch * length, dtype=torch.bool)
    if index is not None:
        kept[:] = False
        kept[index] = True
    kept = kept.view(batch, length)
    assert torch.equal(padded[kept], (states + 1).transpose(1, 2)[kept])
    assert not padded[~kept].any()


@thorough
@given(tokens())
def test_gradients_go_there_and_back(given_: Any) -> None:
    states, index = given_
    batch, heads, length, dim = states.shape
    leaf = states.clone().requires_grad_()
    view = leaf * 1.0
    packed = gather(view, index)
    weights = torch.randn(batch, length, heads, dim)
    (scatter(packed * 2, index, batch, length) * weights).sum().backward()
    kept = torch.ones(batch * length) if index is None else torch.zeros(batch * length)
    if index is not None:
        kept[index] = 1.0
    expected = 2 * weights * kept.view(batch, length, 1, 1)
    assert torch.allclose(leaf.grad, expected.transpose(1, 2))


@thorough
@given(tokens())
def test_the_places_of_tokens_are_turned_around(given_: Any) -> None:
    states, index = given_
    places = states.shape[0] * states.shape[2]
    if index is None:
        index = torch.arange(places)
    sources = moves.sources(index, places)
    assert sources.dtype == torch.int32
    assert torch.equal(sources[index].long(), torch.arange(len(index)))
    assert int((sources < 0).sum()) == places - len(index)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_moved_where_a_kernel_can(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = _states(layout, 3, 2, 5, 4)
    index = torch.tensor([0, 4, 5, 6, 11, 14])
    sources = moves.sources(index, 15)
    packed = gather(states, index)
    padded = scatter(packed, index, 3, 5)
    made = moving(monkeypatch)
    assert torch.equal(gather(states, index), packed)
    # What flattens needs no kernel of ours.
    assert len(made) == (layout not in ("tokens first",))
    assert torch.equal(scatter(packed, index, 3, 5, sources), padded)
    assert made[-1].shape == padded.shape
    count = len(made)
    leaf = packed.clone().requires_grad_()
    scatter(leaf * 2, index, 3, 5, sources).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))
    assert len(made) == count


def test_a_bound_runner_moves_outputs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.arange(5) < np.array([[5], [2], [3]])
    plan = Plan(3, 5, 5, Pattern.BIDIRECTIONAL, CPU, real=real)
    call = _call(plan, self_attention=True)
    states = [_states("tokens first", 3, 2, 5, 4) for _ in range(3)]

    def kernel(query: Any, key: Any, value: Any, layout: VarlenLayout) -> Any:
        return query + value

    expected = bind_packed(kernel, plan, call)(*states, {})
    made = moving(monkeypatch)
    assert torch.equal(bind_packed(kernel, plan, call)(*states, {}), expected)
    assert len(made) == 1
    bind_packed(kernel, plan, replace(call, grad=True))(*states, {})
    assert len(made) == 1


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        # (parts, width) are one run on both sides, on one side, or cannot be moved at once.
        (((960, 320, 80, 1), (3200, 320, 80, 1), 4, 80), (40, 2, 256)),
        (((960, 320, 80, 1), (3200, 80, 800, 1), 4, 80), (10, 1, 256)),
        (((64, 64, 64, 1), (640, 64, 64, 1), 1, 64), (8, 1, 64)),
        (((2048, 2048, 2048, 1), (20480, 2048, 2048, 1), 1, 2048), (256, 8, 256)),
        (((960, 320, 80, 2), (3200, 320, 80, 1), 4, 80), None),
        (((960, 320, 80, 1), (3200, 320, 80, 2), 4, 80), None),
        (((900, 300, 75, 1), (3000, 300, 75, 1), 4, 75), None),
        (((2**34, 320, 80, 1), (3200, 320, 80, 1), 4, 80), None),
        (((4, 320, 80, 1), (3200, 320, 80, 1), 4, 80), None),
    ],
)
def test_what_a_program_moves(strides: Any, expected: Any) -> None:
    launch = moves._launch_of(*strides)
    if expected is None:
        assert launch is None
        return
    eighths, blocks, elements = expected
    steps, width, per_part, shares, size = launch
    assert steps == tuple(stride // 8 for stride in (*strides[0][:3], *strides[1][:3]))
    assert (width, per_part, size) == (eighths, blocks, elements)
    parts = strides[2] * strides[3] // (8 * eighths)
    assert shares == parts * blocks


def test_nothing_is_copied_where_all_tokens_lie_in_order() -> None:
    states = _states("tokens first", 2, 3, 5, 4)
    assert gather(states, None).data_ptr() == states.data_ptr()
    packed = gather(states, None)
    assert scatter(packed, None, 2, 5).data_ptr() == states.data_ptr()


def _call(plan: Plan, **facts: Any) -> Call:
    facts = {"heads": 2, "kv_heads": 2, "head_dim": 4, "value_head_dim": 4, **facts}
    return Call(CPU, torch.float32, plan.batch, plan.q_len, plan.kv_len, **facts)


@pytest.mark.parametrize(
    ("pattern", "packed", "self_attention", "q_len", "expected"),
    [
        (Pattern.CAUSAL, False, False, 4, True),
        (Pattern.CAUSAL, False, True, 4, True),
        (Pattern.BIDIRECTIONAL, False, False, 4, False),
        (Pattern.BIDIRECTIONAL, False, True, 4, True),
        (Pattern.BIDIRECTIONAL, True, False, 4, True),
        (Pattern.CAUSAL, False, True, 1, False),
        (Pattern.BIDIRECTIONAL, False, False, 1, False),
        (Pattern.CAUSAL, True, False, 1, True),
    ],
)
def test_whose_queries_are_packed(
    pattern: Pattern, packed: bool, self_attention: bool, q_len: int, expected: bool
) -> None:
    starts = np.ones((2, q_len), dtype=bool) if packed else None
    plan = Plan(2, q_len, q_len, pattern, CPU, packed=starts)
    assert packs_queries(plan, _call(plan, self_attention=self_attention)) is expected


def test_the_kernel_gets_the_layout_and_the_tokens_of_the_plan() -> None:
    real = np.array([[False, True, True], [True, True, True], [False, False, True]])
    plan = Plan(3, 3, 3, Pattern.CAUSAL, CPU, real=real)
    call = _call(plan)
    seen: list[VarlenLayout] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VarlenLayout) -> Any:
        seen.append(layout)
        assert q[:, 0, 0].tolist() == k[:, 1, 0].tolist() == [1, 2, 3, 4, 5, 8]
        return v + q

    query = torch.arange(9.0).view(3, 1, 3, 1).expand(3, 2, 3, 4)
    run = bind_packed(kernel, plan, call)
    output = run(query, query, query * 10, {})
    expected = torch.tensor([[0, 11, 22], [33, 44, 55], [0, 0, 88.0]])
    assert torch.equal(output[:, :, 0, 0], expected)
    run(query, query, query, {})
    assert seen[0] is seen[1] is plan.varlen(True)
    assert seen[0].cu_seqlens_q.tolist() == [0, 2, 5, 6]


def test_refusals_come_all_at_once() -> None:
    real = np.array([[True, False, True, False]])
    plan = Plan(1, 4, 4, Pattern.CAUSAL, CPU, window=1, real=real)
    reasons = varlen_refusals(plan, _call(plan, keep_padding_output=True))
    assert reasons == [
        "padding positions of the output are to be kept",
        "a window cannot be packed across holes in the mask",
    ]
    assert varlen_refusals(plan, _call(plan)) == reasons[1:]


CACHED = {"side": "right", "width": 1024, "token_major_keys": False}


@pytest.mark.parametrize(
    ("facts", "grad", "expected"),
    [
        ({"real": None}, False, Route.DENSE),
        ({"side": "right"}, False, Route.DENSE),
        ({"side": "left"}, False, Route.KEY_BOUNDS),
        ({"side": "left"}, True, Route.PACKED),
        ({"side": "left", "width": 256}, True, Route.IN_PLACE),
        ({"side": "left", "width": 256, "token_major_keys": False}, True, Route.PACKED),
        ({"side": "both", "token_major_keys": False}, False, Route.IN_PLACE),
        ({"side": "holes"}, True, Route.PACKED),
        # Of the two rows one is padded: 192 tokens on average take 384 there.
        ({"side": "right", "width": 512, "padding": 384}, False, Route.IN_PLACE),
        ({"side": "right", "width": 512, "padding": 384}, True, Route.IN_PLACE),
        ({"side": "right", "width": 512, "padding": 383}, False, Route.DENSE),
        ({"side": "right", "width": 4096, "padding": 383}, True, Route.DENSE),
        # Of 255 tokens 254 are spared in a row: too short for a backward in place.
        ({"side": "right", "width": 255, "padding": 254, "other": 254}, True, Route.DENSE),
        ({"side": "right", "width": 255, "padding": 254, "other": 254}, False, Route.IN_PLACE),
        # Keys of a cache are read where they lie, but for a backward.
        ({**CACHED, "padding": 384}, False, Route.IN_PLACE),
        ({**CACHED, "padding": 384}, True, Route.DENSE),
        # Copies of keys take more padding to pay.
        ({**CACHED, "key_pitch": 0, "padding": 384}, False, Route.DENSE),
        ({**CACHED, "key_pitch": 0, "padding": 896, "kv_heads": 1}, False, Route.IN_PLACE),
        ({**CACHED, "key_pitch": 0, "padding": 896, "kv_heads": 1}, True, Route.DENSE),
        ({"side": "right", "width": 512, "padding": 40}, True, Route.DENSE),
        ({"side": "left", "window": 3}, False, Route.KEY_BOUNDS),
        ({"side": "right", "window": 3}, False, Route.DENSE),
        ({"side": "both", "window": 3}, False, Route.IN_PLACE),
        ({"side": "both"}, False, Route.IN_PLACE),
        ({"side": "holes"}, False, Route.PACKED),
        ({"side": "right", "causal": False}, False, Route.IN_PLACE),
        ({"side": "right", "causal": False}, True, Route.PACKED),
        ({"side": "right", "width": 256, "causal": False}, True, Route.IN_PLACE),
        ({"side": "both", "causal": False, "own": False}, False, Route.KEY_BOUNDS),
        ({"side": "both", "q_len": 1}, False, Route.KEY_BOUNDS),
        ({"side": "left", "q_len": 1, "window": 3}, False, Route.KEY_BOUNDS),
        ({"side": "left", "q_len": 4}, False, Route.KEY_BOUNDS),
    ],
)
def test_how_a_flash_kernel_reads_a_batch(
    facts: dict[str, Any], grad: bool, expected: Route
) -> None:
    width = facts.get("width", 8)
    q_len = facts.get("q_len", width)
    real = np.ones((2, width), dtype=bool)
    side = facts.get("side")
    if side in ("left", "both"):
        real[0, :3] = False
    if side in ("right", "both"):
        real[1, -facts.get("padding", width // 4) :] = False
        real[0, width - facts.get("other", 0) :] = False
    if side == "holes":
        real[0, 4] = False
    causal = facts.get("causal", True)
    plan = Plan(
        2,
        q_len,
        width,
        Pattern.CAUSAL if causal else Pattern.BIDIRECTIONAL,
        CPU,
        shift=width - q_len,
        window=facts.get("window"),
        real=real if side else None,
    )
    call = Call(
        CPU, torch.float32, 2, q_len, width, 4, facts.get("kv_heads", 4), 8, 8, grad=grad,
        self_attention=facts.get("own", True),
        token_major_keys=facts.get("token_major_keys", True), key_pitch=facts.get("key_pitch"),
    )  # fmt: skip
    assert varlen_refusals(plan, call) == []
    assert route(plan, call, key_bounds=True, in_place=True, used_keys=not grad) is expected
    assert route(plan, call, key_bounds=False, in_place=False) in (Route.DENSE, Route.PACKED)


@pytest.mark.parametrize("seed", range(6))
def test_padding_in_place_has_queries_without_keys_or_keys_without_queries(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, width = 5, 12
    start = rng.integers(0, 6, batch)
    length = rng.integers(0, 7, batch)
    places = np.arange(width)
    real = (places >= start[:, None]) & (places < (start + length)[:, None])
    plan = Plan(batch, width, width, Pattern.CAUSAL, CPU, real=real)
    layout = plan.in_place(True, False, width)
    assert layout.used_q is layout.used_k is layout.gaps is None
    q, k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    assert q[0] == k[0] == 0
    assert q[-1] == k[-1] == batch * width
    found = []
    for i in range(len(q) - 1):
        queries, keys = q[i + 1] - q[i], k[i + 1] - k[i]
        assert max(queries, keys) > 0, "an empty sequence costs a launch of its blocks"
        if queries and keys:
            assert (q[i], queries) == (k[i], keys)
            found.append((q[i], queries))
        span = np.zeros(batch * width, dtype=bool)
        span[q[i] : q[i + 1]] = span[k[i] : k[i + 1]] = True
        assert real.reshape(-1)[span].all() == bool(queries and keys)
    runs = [(row * width + s, n) for row, (s, n) in enumerate(zip(start, length, strict=True)) if n]
    assert found == runs
    assert layout.max_seqlen_q >= np.diff(q).max()
    assert layout.max_seqlen_k == np.diff(k).max()


@pytest.mark.parametrize(
    ("token_major", "expected"), [(True, Route.IN_PLACE), (False, Route.PACKED)]
)
def test_without_the_number_of_used_keys_no_cache_is_copied(
    token_major: bool, expected: Route
) -> None:
    real = np.arange(512)[::-1] < np.array([512, 100])[:, None]
    plan = Plan(2, 512, 512, Pattern.CAUSAL, CPU, real=real)
    call = Call(
        CPU, torch.float32, 2, 512, 512, 4, 4, 8, 8,
        self_attention=True, token_major_keys=token_major,
    )  # fmt: skip
    assert route(plan, call, key_bounds=False, in_place=True, dense=False) is expected
    assert route(plan, call, key_bounds=False, in_place=True, used_keys=True) is Route.IN_PLACE


@pytest.mark.parametrize(
    ("kv_len", "key_pitch", "expected"),
    [
        (1024, 0, Route.IN_PLACE),
        (8192, 0, Route.DENSE),
        (8192, 8 * 8192, Route.IN_PLACE),
    ],
)
def test_the_empty_part_of_a_static_cache_is_not_copied(
    kv_len: int, key_pitch: int, expected: Route
) -> None:
    real = np.arange(1024) < np.array([1024, 100, 100, 100])[:, None]
    keys = np.zeros((4, kv_len), dtype=bool)
    keys[:, :1024] = real
    plan = Plan(4, 1024, kv_len, Pattern.CAUSAL, CPU, real=keys)
    call = Call(
        CPU, torch.float32, 4, 1024, kv_len, 32, 8, 64, 64,
        self_attention=True, token_major_keys=False, key_pitch=key_pitch,
    )  # fmt: skip
    assert route(plan, call, key_bounds=True, in_place=True, used_keys=True) is expected


@pytest.mark.parametrize(
    ("padding", "token_major", "expected"),
    [(512, True, Route.IN_PLACE), (512, False, Route.DENSE), (1536, False, Route.IN_PLACE)],
)
def test_queries_that_are_copied_count(padding: int, token_major: bool, expected: Route) -> None:
    real = np.repeat(np.arange(2048)[None] < 2048 - padding, 4, axis=0)
    plan = Plan(4, 2048, 2048, Pattern.CAUSAL, CPU, real=real)
    call = Call(
        CPU, torch.float32, 4, 2048, 2048, 8, 8, 64, 64,
        self_attention=True, token_major_queries=token_major,
    )  # fmt: skip
    assert route(plan, call, key_bounds=True, in_place=True, used_keys=True) is expected


SHAPES = [(3, 2, 5, 4), (1, 2, 5, 4), (3, 2, 1, 4), (1, 1, 1, 4), (3, 1, 5, 4), (2, 3, 4, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_in_a_row_are_a_view_wherever_they_can_be(
    layout: str, shape: tuple[int, int, int, int]
) -> None:
    batch, heads, length, dim = shape
    states = _states(layout, batch, heads, length, dim)
    _, pitch = where_keys_lie(states, states)
    by_head = heads > 1 and layout in ("heads first", "sliced")
    if batch == 1 or length == 1:
        assert pitch == length
    elif layout == "sliced":
        assert pitch == 0, "a tile of a kernel would reach into what is not theirs"
    else:
        assert pitch == length * (heads if by_head else 1)
    # By its own figure it is a view, by that of others a copy.
    for given_ in {length, heads * length}:
        row = _in_a_row(states, given_)
        assert row.shape == ((batch - 1) * given_ + length, heads, dim)
        assert row.stride(2) == 1
        for i in range(batch):
            tokens_ = row[i * given_ : i * given_ + length]
            assert torch.equal(tokens_, states[i].transpose(0, 1))
        if given_ == pitch:
            assert row.data_ptr() == states.data_ptr()


@pytest.mark.parametrize("pitch", [1, 4])
def test_rows_that_share_their_memory_are_copied(pitch: int) -> None:
    states = torch.arange(8.0).view(1, 2, 1, 4).expand(3, 2, 1, 4)
    row = _in_a_row(states, pitch)
    assert torch.equal(row[::pitch], _flattened(states))
    row[0] = -1.0
    assert (states >= 0).all()
    longer = torch.arange(24.0).view(1, 2, 3, 4).expand(3, 2, 3, 4)
    assert where_keys_lie(longer, longer)[1] == 0
    assert torch.equal(_in_a_row(longer, 3), _flattened(longer))


def test_a_last_dimension_with_gaps_is_copied() -> None:
    states = torch.arange(240.0).view(2, 3, 5, 8)[..., ::2]
    row = _in_a_row(states, 15)
    assert row.stride(2) == 1
    assert torch.equal(row[15:20], states[1].transpose(0, 1))


def test_where_keys_lie() -> None:
    by_token = _states("tokens first", 2, 3, 5, 4)
    by_head = _states("heads first", 2, 3, 5, 4)
    assert where_keys_lie(by_token, by_token) == (True, 5)
    assert where_keys_lie(by_head, by_head) == (False, 15)
    # As in attention with latent keys, before they went through a cache.
    assert where_keys_lie(by_head, by_token) == (False, 0)
    assert where_keys_lie(by_head, _states("heads first", 2, 3, 5, 2)) == (False, 15)
    # What lies between these rows belongs to others.
    for part in (by_head[:, :1], by_head[:, :2], by_head[:, :, :3], by_head[:, ::2]):
        assert where_keys_lie(part, part) == (part.shape[1] == 1, 0)
    assert where_keys_lie(by_token[:, :2], by_token[:, :2]) == (True, 5)
    assert where_keys_lie(by_token[:, :, :3], by_token[:, :, :3]) == (True, 0)
    stacked = torch.zeros(2, 2, 3, 5, 4)
    assert where_keys_lie(*stacked.unbind(1)) == (False, 0)
    # Places of tokens are 32-bit integers to kernels.
    with torch.device("meta"):
        far = torch.empty(2, 2**15, 2**15, 1)
    assert where_keys_lie(far, far) == (False, 0)


@st.composite
def rows(draw: Any) -> tuple[np.ndarray[Any, Any], int, int]:
    """Real tokens of a few rows, one run in each or none; and heads."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    real = np.zeros((batch, width), dtype=bool)
    for row in real:
        first = draw(st.integers(0, width))
        row[first : draw(st.integers(first, width))] = True
    real[0, 0] |= not real.any()
    return real, draw(st.integers(1, 3))


@thorough
@given(rows(), st.booleans(), st.integers(1, 6), st.booleans())
def test_sequences_are_found_where_they_lie(
    given_: Any, by_head: bool, tile: int, told: bool
) -> None:
    """Keys by token and by head: the same sequences, no copy, and no NaN within a tile of them."""
    real, heads = given_
    batch, width = real.shape
    values = torch.arange(1.0, batch * heads * width * 2 + 1)
    if by_head:
        keys = values.view(batch, heads, width, 2)
    else:
        keys = values.view(batch, width, heads, 2).transpose(1, 2)
    _, pitch = where_keys_lie(keys, keys)
    plan = Plan(batch, width, width, Pattern.BIDIRECTIONAL, CPU, real=real)
    with mock.patch.object(layouts, "LONGEST_TILE", tile):
        layout = plan.used(True, pitch) if told else plan.in_place(True, True, pitch)
    row = _in_a_row(keys, pitch)
    assert row.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert layout.total_k == len(row) == int(layout.cu_seqlens_k[-1])
    bounds, used = layout.cu_seqlens_k.tolist(), layout.used_k.tolist()
    if told:
        _check_used_queries(layout, real)
    else:
        assert used[::2] == [0] * len(used[::2])
        assert layout.used_q is None
    found = [row[bounds[i] : bounds[i] + used[i]] for i in range(len(used)) if used[i]]
    expected = [keys[i][:, torch.from_numpy(r)].transpose(0, 1) for i, r in enumerate(real)]
    assert len(found) == sum(len(e) > 0 for e in expected)
    assert all(map(torch.equal, found, [e for e in expected if len(e)]))

    # What a tile may reach of the padding is cleared, and nothing that is real.
    kept = keys.clone()
    keys.masked_fill_(torch.from_numpy(~real)[:, None, :, None], torch.nan)
    for first, last, *outputs in layout.gaps.tolist() if layout.gaps is not None else ():
        assert first < last <= first + tile or (told and first == last == 0)
        assert told or outputs == [0, 0]
        row[first:last] = 0.0
    for i, length in enumerate(used):
        if length:
            assert row[bounds[i] : bounds[i] + length + tile - 1].isfinite().all()
    assert torch.equal(
        keys.transpose(1, 2)[torch.from_numpy(real)], kept.transpose(1, 2)[torch.from_numpy(real)]
    )


def _check_used_queries(layout: VarlenLayout, real: np.ndarray[Any, Any]) -> None:
    """They are the real ones, and all others are cleared once."""
    assert layout.used_q is not None
    covered = np.zeros(real.size, dtype=int)
    starts, used = layout.cu_seqlens_q.tolist(), layout.used_q.tolist()
    assert starts[-1] == layout.total_q == real.size
    assert max(used) <= layout.max_seqlen_q
    for first, count in zip(starts, used, strict=False):
        covered[first : first + count] += 1
    assert np.array_equal(covered == 1, real.reshape(-1))
    gaps = [] if layout.gaps is None else layout.gaps.tolist()
    for *_, first, last in gaps:
        assert first <= last
        covered[first:last] += 1
    assert (covered == 1).all()
    assert layout.longest_gap == max((last - first for *_, first, last in gaps), default=0)


def test_all_queries_of_cross_attention_are_used() -> None:
    real = np.arange(6) < np.array([6, 2])[:, None]
    plan = Plan(2, 3, 6, Pattern.BIDIRECTIONAL, CPU, real=real)
    layout = plan.used(False, 6)
    facts = (layout.cu_seqlens_q, layout.used_q, layout.used_k, layout.gaps)
    found = [fact.tolist() for fact in facts if fact is not None]
    assert found == [[0, 3, 6], [3, 3], [6, 2], [[8, 12, 0, 0]]]
    assert layout.longest_gap == 0


def test_layers_whose_keys_lie_otherwise_share_a_runner() -> None:
    """A choice is that of the first layer of its kind."""
    real = np.arange(5) < np.array([5, 2, 3])[:, None]
    plan = Plan(3, 5, 5, Pattern.CAUSAL, CPU, real=real)
    query = _states("tokens first", 3, 2, 5, 4)
    kept = torch.from_numpy(real)

    def kernel(q: Any, k: Any, v: Any, layout: VarlenLayout) -> torch.Tensor:
        bounds, used = layout.cu_seqlens_k.tolist(), layout.used_k.tolist()
        found = [k[bounds[i] : bounds[i] + used[i]] for i in range(len(used))]
        assert torch.equal(torch.cat(found), query.transpose(1, 2)[kept])
        assert torch.equal(k + 1, v)
        return q

    for first in LAYOUTS[:3]:
        lies, pitch = where_keys_lie(*[_states(first, 3, 2, 5, 4)] * 2)
        call = _call(plan, self_attention=True, token_major_keys=lies, key_pitch=pitch)
        run = bind_in_place(kernel, plan, call, Told.KEYS)
        for later in (*LAYOUTS[:3], "sliced"):
            key = _states(later, 3, 2, 5, 4)
            run(query, key, key + 1, {})


@pytest.mark.parametrize("layout", ["tokens first", "heads first", "fused"])
def test_kernels_for_sequences_get_the_keys_themselves(layout: str) -> None:
    real = np.arange(5) < np.array([5, 2, 3])[:, None]
    plan = Plan(3, 5, 5, Pattern.CAUSAL, CPU, real=real)
    key, value = _states(layout, 3, 2, 5, 4), _states(layout, 3, 2, 5, 4)
    query = _states("tokens first", 3, 2, 5, 4)
    token_major, pitch = where_keys_lie(key, value)
    seen = []

    def kernel(q: Any, k: Any, v: Any, layout: VarlenLayout) -> torch.Tensor:
        seen.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return q

    call = _call(plan, self_attention=True, token_major_keys=token_major, key_pitch=pitch)
    bind_in_place(kernel, plan, call, Told.KEYS)(query, key, value, {})
    bind_in_place(kernel, plan, call, Told.KEYS_AND_QUERIES)(query, key, value, {})
    assert seen == 2 * [(query.data_ptr(), key.data_ptr(), value.data_ptr())]


def test_features_and_route_agree_on_what_is_skipped() -> None:
    names = list(FEATURES)
    for width, grad in itertools.product((128, 255, 256, 512), (False, True)):
        real = np.arange(width)[None] < np.array([[width], [width // 8]])
        plan = Plan(16, width, width, Pattern.CAUSAL, CPU, real=np.repeat(real, [1, 15], axis=0))
        call = Call(CPU, torch.bfloat16, 16, width, width, 4, 4, 64, 64, grad=grad)
        amounts = dict(zip(names, features(plan, call), strict=True))
        how = route(plan, call, key_bounds=False, in_place=True, used_keys=not grad)
        skipped = amounts["sequence_tiles"] == amounts["real_tiles"]
        assert skipped == (how is Route.IN_PLACE) == bool(amounts["sequenced"])
