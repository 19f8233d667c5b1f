"""What a plan says of a batch, against Transformers' own masks and against counting by hand."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, StaticCache, masking_utils

from smartattn.call import Call
from smartattn.dense import local_mask
from smartattn.integration import smart_mask
from smartattn.mask import PlanMask
from smartattn.packing import packs_queries, varlen_refusals
from smartattn.plan import Padding, Pattern, Plan, _bounds, count_tiled_pairs

from .agreement import CACHE

CPU = torch.device("cpu")
thorough = settings(max_examples=150, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Batch:
    """Arguments of a mask function, lengths in tokens."""

    batch: int
    q_len: int
    kv_len: int
    causal: bool
    #: Key slot of the first query, and position of the first key slot (a sliding cache drops some).
    shift: int
    kv_offset: int
    window: int | None
    chunk: int | None
    #: (batch, any width) the caller's 2D mask.
    mask: tuple[tuple[bool, ...], ...] | None
    packed: tuple[tuple[int, ...], ...] | None

    @property
    def arguments(self) -> dict[str, Any]:
        m = masking_utils
        base = m.causal_mask_function if self.causal else m.bidirectional_mask_function
        function, local_size = base, None
        if self.window is not None:
            local_size = self.window
            window = (
                m.sliding_window_causal_mask_function
                if self.causal
                else m.sliding_window_bidirectional_mask_function
            )
            function = window(self.window)
        if self.chunk is not None:
            local_size = self.chunk
            function = m.chunked_causal_mask_function(self.chunk, self.left_padding)
        if self.packed is not None:
            ids = np.array([np.repeat(range(len(row)), row) for row in self.packed])
            packed = m.packed_sequence_mask_function(torch.from_numpy(ids))
            function = m.and_masks(function, packed)
        return {
            "batch_size": self.batch,
            "q_length": self.q_len,
            "kv_length": self.kv_len,
            "q_offset": self.shift + self.kv_offset,
            "kv_offset": self.kv_offset,
            "mask_function": function,
            "attention_mask": None if self.mask is None else torch.tensor(self.mask),
            "local_size": local_size,
        }

    @property
    def left_padding(self) -> torch.Tensor:
        if self.mask is None:
            return torch.zeros(self.batch, dtype=torch.long)
        return torch.tensor(self.mask).int().argmax(-1)

    @property
    def plan(self) -> Plan:
        mask = smart_mask(**self.arguments)
        assert isinstance(mask, PlanMask)
        assert mask.plan is not None
        return mask.plan

    @property
    def seen(self) -> np.ndarray[Any, Any]:
        """(batch, q_len, kv_len) by Transformers' own mask function."""
        mask = masking_utils.sdpa_mask(**self.arguments, allow_is_causal_skip=False)
        return mask[:, 0].numpy()

    @property
    def real(self) -> np.ndarray[Any, Any]:
        """(batch, kv_len) True at key slots that hold a real token, or that nobody says do not."""
        real = np.ones((self.batch, self.kv_len), dtype=bool)
        if self.mask is not None:
            given = np.array(self.mask)[:, self.kv_offset : self.kv_offset + self.kv_len]
            real[:] = False
            real[:, : given.shape[1]] = given
        return real

    @property
    def visible(self) -> int:
        return min(self.kv_len, self.q_len + self.shift) if self.causal else self.kv_len

    @property
    def real_queries(self) -> np.ndarray[Any, Any]:
        """(batch, q_len) True where a query is a real token, as far as the mask says so."""
        if not self.causal and self.q_len != self.kv_len:
            return np.ones((self.batch, self.q_len), dtype=bool)
        slots = np.arange(self.q_len) + self.shift
        return self.real[:, slots]

    @property
    def is_contiguous(self) -> bool:
        jumps = np.diff(self.real[:, : self.visible].astype(int), prepend=0, axis=1)
        return bool(((jumps == 1).sum(1) <= 1).all())


@st.composite
def padding_masks(draw: Any, batch: int, width: int) -> tuple[tuple[bool, ...], ...]:
    kind = draw(st.sampled_from(["right", "left", "both", "holes", "equal", "ones"]))
    rows = []
    equal = draw(st.integers(0, width))
    for _ in range(batch):
        if kind == "holes":
            rows.append(tuple(draw(st.lists(st.booleans(), min_size=width, max_size=width))))
            continue
        start, stop = sorted(draw(st.tuples(*[st.integers(0, width)] * 2)))
        if kind == "right":
            start = 0
        elif kind == "left":
            stop = width
        elif kind == "equal":
            start, stop = 0, equal
        elif kind == "ones":
            start, stop = 0, width
        rows.append(tuple(start <= place < stop for place in range(width)))
    return tuple(rows)


@st.composite
def batches(draw: Any, recognised: bool = True) -> Batch:
    batch, q_len = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    causal = draw(st.booleans())
    shift = kv_offset = 0
    chunk = packed = mask = None
    windows = st.none() | st.integers(1, 12)
    if draw(st.booleans()) and draw(st.booleans()):
        kv_len = q_len
        window = draw(windows)
        rows = []
        for _ in range(batch):
            cuts = draw(st.sets(st.integers(1, q_len - 1))) if q_len > 1 else set()
            bounds = [0, *sorted(cuts), q_len]
            rows.append(tuple(np.diff(bounds).tolist()))
        packed = tuple(rows)
    elif causal:
        shift = draw(st.integers(0, 8))
        window = draw(windows)
        # A static cache has room to spare, a sliding one has dropped its first slots.
        kv_len = q_len + shift + draw(st.sampled_from([0, 0, 1, 5]))
        kv_offset = draw(st.sampled_from([0, 0, 0, 3]))
    else:
        kv_len = q_len if draw(st.booleans()) else draw(st.integers(1, 10))
        # Symmetric windows belong to self-attention.
        window = draw(windows) if kv_len == q_len else None
    if packed is None and draw(st.booleans()):
        visible = q_len + shift if causal else kv_len
        # The 2D mask of a static cache is shorter than the cache, or as long.
        width = kv_offset + draw(st.sampled_from([visible, kv_len]))
        mask = draw(padding_masks(batch, width))
    if not recognised and causal and draw(st.booleans()):
        chunk, window = draw(st.integers(1, 12)), None
    return Batch(batch, q_len, kv_len, causal, shift, kv_offset, window, chunk, mask, packed)


def _ones(*shape: int) -> tuple[tuple[bool, ...], ...]:
    return tuple((True,) * shape[1] for _ in range(shape[0]))


# -- facts -----------------------------------------------------------------------------------------


@thorough
@given(batches())
@example(Batch(2, 4, 4, True, 0, 0, None, None, ((True,) * 3 + (False,),) * 2, None))
@example(Batch(1, 3, 9, True, 2, 0, 2, None, _ones(1, 5), None))
def test_facts_against_counting(batch: Batch) -> None:
    plan = batch.plan
    real = batch.real[:, : batch.visible]
    assert plan.pattern is (Pattern.CAUSAL if batch.causal else Pattern.BIDIRECTIONAL)
    assert plan.visible == batch.visible
    assert plan.shift == batch.shift
    assert plan.is_packed == (batch.packed is not None)
    assert plan.is_padded == (not real.all())
    assert plan.real_k == real.sum()
    assert plan.padding_share == pytest.approx(1 - real.mean())
    queries = np.arange(batch.q_len)[:, None] + batch.shift
    keys = np.arange(batch.kv_len)
    diagonal = batch.q_len == batch.visible and bool(
        (np.arange(batch.q_len) + batch.shift == keys[: batch.q_len]).all()
    )
    assert plan.is_aligned == diagonal
    distance = queries - keys[None, : batch.visible]
    inside = distance >= 0 if batch.causal else np.ones_like(distance, dtype=bool)
    if batch.window is not None:
        outside = distance >= batch.window if batch.causal else abs(distance) > batch.window
        assert plan.window_matters == bool((outside & inside).any())
    else:
        assert not plan.window_matters
    json.dumps(plan.describe())


def dense_of(plan: Plan) -> Any:
    """(batch, q_len, kv_len) booleans of a plan's dense mask; its bias has to say the same."""
    shape = (plan.batch, 1, plan.q_len, plan.kv_len)
    mask, bias = plan.dense_mask(), plan.bias(torch.bfloat16)
    if mask is None:
        assert bias is None
        return np.ones((plan.batch, plan.q_len, plan.kv_len), dtype=bool)
    assert mask.dtype == torch.bool
    assert mask.shape == shape
    assert bias is not None
    assert bias is plan.bias(torch.bfloat16)
    assert not bool(bias.isnan().any())
    assert torch.equal(bias.expand(shape) == 0, mask)
    assert bool((bias.expand(shape)[~mask] < -1e4).all())
    # What the memory-efficient kernel would otherwise copy in every layer.
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    return mask[:, 0].numpy()


@thorough
@given(batches())
def test_an_offset_on_the_device_says_the_same(batch: Batch) -> None:
    """Static caches count their tokens in a tensor."""
    arguments = batch.arguments
    offset = torch.tensor([arguments["q_offset"]])
    mask = smart_mask(**{**arguments, "q_offset": offset})
    if batch.q_len == 1:
        # A decode step may be compiled, and its mask is made outside of it.
        assert type(mask) is torch.Tensor
        assert torch.equal(mask, masking_utils.eager_mask(**arguments))
        return
    assert isinstance(mask, PlanMask)
    assert mask.plan is not None
    assert mask.plan.describe() == batch.plan.describe()
    assert mask.plan.shift == batch.shift
    assert np.array_equal(dense_of(mask.plan), batch.seen)


@thorough
@given(st.data())
def test_bounds_of_rows_against_counting(data: st.DataObject) -> None:
    """Rows padded on one side are read by a shorter way than others, full and empty ones too."""
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    kind = data.draw(st.sampled_from(["right", "left", "both", "holes"]))
    real = np.zeros((rows, width), dtype=bool)
    for row in real:
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
        row[0 if kind == "right" else start : width if kind == "left" else end] = True
        if kind == "holes":
            row[data.draw(st.integers(0, width - 1))] ^= True
    start, end, length = _bounds(real)
    for row, first, behind, count in zip(real, start, end, length, strict=True):
        places = row.nonzero()[0]
        expected = (places[0], places[-1] + 1) if len(places) else (0, 0)
        assert (first, behind, count) == (*expected, len(places))


@thorough
@given(batches())
def test_kind_of_padding(batch: Batch) -> None:
    real = batch.real[:, : batch.visible]
    rows = [row for row in real if row.any()]
    if real.all():
        expected = {Padding.NONE}
    elif not batch.is_contiguous:
        expected = {Padding.HOLES}
    elif not rows:
        expected = {Padding.RIGHT, Padding.LEFT}
    elif all(row[0] for row in rows):
        expected = {Padding.RIGHT}
    elif all(row[-1] for row in rows):
        expected = {Padding.LEFT}
    else:
        expected = {Padding.BOTH}
    assert batch.plan.padding in expected


@thorough
@given(batches())
def test_rows_that_lie_alike(batch: Batch) -> None:
    keys, queries = batch.real[:, : batch.visible], batch.real_queries
    alike = bool((keys == keys[0]).all() and (queries == queries[0]).all())
    expected = alike and batch.is_contiguous and batch.packed is None
    assert batch.plan.is_uniform == expected


@pytest.mark.parametrize(
    ("rows", "alike"),
    [
        (("0110", "0110"), True),
        (("0110", "1100"), False),
        (("0110", "0111"), False),
        (("1010", "1010"), False),
    ],
)
def test_rows_as_long_as_each_other_may_lie_elsewhere(rows: tuple[str, ...], alike: bool) -> None:
    real = np.array([[mark == "1" for mark in row] for row in rows])
    assert Plan(2, 4, 4, Pattern.CAUSAL, CPU, real=real).is_uniform == alike


@thorough
@given(batches())
def test_sequences_own_the_real_tokens(batch: Batch) -> None:
    plan = batch.plan
    sequences = plan.sequences
    assert sequences is not None
    keys = batch.real[:, : batch.visible]
    queries = batch.real_queries
    assert plan.real_q == (queries.sum() if plan.is_padded else batch.batch * batch.q_len)
    if not batch.is_contiguous:
        assert not sequences.contiguous
        assert sequences.k_length.tolist() == keys.sum(1).tolist()
        if batch.causal or batch.q_len == batch.kv_len:
            assert sequences.q_length.tolist() == queries.sum(1).tolist()
        return
    assert sequences.contiguous
    owned_q = np.zeros((batch.batch, batch.q_len), dtype=int)
    owned_k = np.zeros((batch.batch, batch.kv_len), dtype=int)
    for i in range(len(sequences)):
        row = sequences.row[i]
        q0, k0 = sequences.q_start[i], sequences.k_start[i]
        if sequences.q_length[i]:
            owned_q[row, q0 : q0 + sequences.q_length[i]] += 1
        owned_k[row, k0 : k0 + sequences.k_length[i]] += 1
    assert (owned_k[:, : batch.visible] == keys).all()
    assert owned_k[:, batch.visible :].sum() == 0
    assert (owned_q == queries).all()


@thorough
@given(batches())
def test_attended_pairs_against_the_mask(batch: Batch) -> None:
    plan = batch.plan
    seen = batch.seen
    pairs = int(seen[batch.real_queries].sum())
    if batch.window is None or batch.is_contiguous:
        assert plan.attended_pairs(True) == pairs
    if not batch.causal and batch.window is None and batch.packed is None:
        assert plan.attended_pairs(False) == seen.sum()


@pytest.mark.parametrize("window", [None, 1, 60, 64, 65, 200, 1000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 64), (64, 64), (192, 144), (25, 128), (4, 2), (3, 7), (1, 1)]
)
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (5, 9), (64, 64), (129, 129), (300, 300), (70, 333), (402, 44), (131, 130)],
)
def test_tiles_that_hold_an_attended_pair(
    lengths: tuple[int, int], rows: int, columns: int, causal: bool, window: int | None
) -> None:
    q, k = lengths
    if causal and q > k:
        pytest.skip("queries beyond the keys see all of them, which the next test is about")
    places, keys = np.arange(q)[:, None] + (k - q if causal else 0), np.arange(k)
    seen = keys <= places if causal else np.ones((q, k), dtype=bool)
    if window is not None:
        seen = seen & (places - keys < window + (not causal)) & (keys - places <= window)
    padded = np.zeros((-(-q // rows) * rows, -(-k // columns) * columns), dtype=bool)
    padded[:q, :k] = seen
    tiles = padded.reshape(len(padded) // rows, rows, -1, columns).any(axis=(1, 3)).sum()
    found = count_tiled_pairs(np.array([q, 0]), np.array([k, 7]), causal, window, rows, columns)
    assert found == tiles * rows * columns


def test_queries_beyond_the_keys_see_all_of_them() -> None:
    assert count_tiled_pairs(np.array([5]), np.array([3]), True, None, 1, 1) == 1 + 2 + 3 + 3 + 3


def test_windows_over_other_keys_than_the_queries_hide_no_pair_twice() -> None:
    """Such plans are asked for their pairs before anything refuses them."""
    real = np.ones((2, 9), dtype=bool)
    real[1, 4:] = False
    for q_len in (3, 40):
        plan = Plan(2, q_len, 9, Pattern.BIDIRECTIONAL, CPU, window=2, real=real)
        seen = sum(abs(i - j) <= 2 for keys in (9, 4) for i in range(q_len) for j in range(keys))
        assert plan.attended_pairs(True) == seen


def test_what_is_counted_serves_other_devices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.ones((2, 9), dtype=bool)
    real[1, :4] = False
    plan = Plan(2, 9, 9, Pattern.CAUSAL, CPU, real=real)
    counted = plan.attended_pairs(True), plan.tiled_pairs(True, 4, 2), plan.is_uniform
    twin = plan.on(torch.device("meta"))
    monkeypatch.setattr(Plan, "_tiled_pairs", None)
    monkeypatch.setattr(Plan, "_uniform", None)
    assert (twin.attended_pairs(True), twin.tiled_pairs(True, 4, 2), twin.is_uniform) == counted


def test_what_is_not_recognised_is_a_dense_mask() -> None:
    m = masking_utils
    unknown = [
        m.or_masks(m.causal_mask_function, lambda b, h, q, k: k < 2),
        m.and_masks(m.causal_mask_function, lambda b, h, q, k: k < 2),
        m.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
        m.sliding_window_overlay(3),
        m.sliding_window_causal_mask_function(0),
        m.sliding_window_causal_mask_function(-1),
        m.and_masks(m.sliding_window_overlay(3), m.bidirectional_mask_function),
        m.and_masks(m.sliding_window_bidirectional_overlay(3), m.causal_mask_function),
        m.and_masks(m.sliding_window_overlay(3), m.sliding_window_causal_mask_function(2)),
        m.blockwise_overlay(torch.zeros(2, 6, dtype=torch.long)),
        lambda b, h, q, k: q >= k,
    ]
    for function in unknown:
        mask = smart_mask(2, 6, 6, mask_function=function)
        assert isinstance(mask, PlanMask)
        plan = mask.plan
        assert plan is not None
        assert plan.pattern is Pattern.OTHER, function
        assert plan.padding is Padding.UNKNOWN
        assert plan.sequences is None
        assert plan.attended_pairs(True) == 72
        expected = m.sdpa_mask(2, 6, 6, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(plan.dense_mask(), expected)
        with pytest.raises(ValueError, match="dense mask"):
            plan.varlen(True)


def test_a_packed_sequence_never_runs_into_the_next_row() -> None:
    starts = np.zeros((3, 4), dtype=bool)
    starts[1, 2] = True
    plan = Plan(3, 4, 4, Pattern.CAUSAL, CPU, packed=starts)
    assert plan.sequences is not None
    assert plan.sequences.row.tolist() == [0, 1, 1, 2]
    assert plan.varlen(True).cu_seqlens_q.tolist() == [0, 4, 6, 8, 12]
    mask = plan.dense_mask()
    assert mask is not None
    assert mask.shape == (3, 1, 4, 4)
    assert mask[:, 0].sum((1, 2)).tolist() == [10, 6, 10]


# -- dense masks -----------------------------------------------------------------------------------


@thorough
@given(batches(recognised=False), st.sampled_from([torch.float32, torch.bfloat16]))
def test_materialised_masks_equal_those_of_transformers(batch: Batch, dtype: torch.dtype) -> None:
    arguments = batch.arguments
    mask = smart_mask(**arguments, dtype=dtype)
    assert isinstance(mask, PlanMask)
    expected = masking_utils.eager_mask(**arguments, dtype=dtype)
    assert mask.shape == expected.shape
    assert mask.dtype == expected.dtype
    assert torch.equal(mask + 0, expected)
    assert mask.plan is not None
    assert np.array_equal(dense_of(mask.plan), batch.seen)
    assert torch.equal(mask[:, :, -1:], expected[:, :, -1:])


@thorough
@given(batches())
def test_a_plan_builds_its_own_mask(batch: Batch) -> None:
    """Plans that no mask function made, of packed batches among others."""
    if not batch.is_contiguous or batch.kv_offset:
        return
    packed = None
    if batch.packed is not None:
        packed = np.zeros((batch.batch, batch.q_len), dtype=bool)
        for row, lengths in enumerate(batch.packed):
            packed[row, np.cumsum([0, *lengths[:-1]])] = True
    plan = Plan(
        batch.batch,
        batch.q_len,
        batch.kv_len,
        Pattern.CAUSAL if batch.causal else Pattern.BIDIRECTIONAL,
        CPU,
        shift=batch.shift,
        window=batch.window,
        real=batch.real if batch.mask is not None else None,
        packed=packed,
    )
    assert np.array_equal(dense_of(plan), batch.seen)


@thorough
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(-3, 9),
    st.booleans(),
    st.none() | st.integers(1, 10),
)
def test_local_mask(q_len: int, kv_len: int, shift: int, causal: bool, window: int | None) -> None:
    mask = local_mask(q_len, kv_len, shift, causal, window, CPU)
    assert mask.shape == (q_len, kv_len)
    for query in range(q_len):
        for key in range(kv_len):
            distance = query + shift - key
            if causal:
                expected = 0 <= distance < (window or 10**6)
            else:
                expected = window is None or -window <= distance <= window
            assert bool(mask[query, key]) == expected


def test_writing_into_a_mask_discards_its_plan() -> None:
    mask, other = smart_mask(1, 3, 3), smart_mask(1, 3, 3)
    assert isinstance(mask, PlanMask)
    assert isinstance(other, PlanMask)
    mask.sum()
    assert mask.plan is not None
    mask[0, 0, 2, 0] = -5.0
    assert mask.plan is None
    assert float((mask + 0)[0, 0, 2, 0]) == -5.0
    assert other.plan is not None
    view = other[0]
    # Nothing would tell of a write through it.
    assert other.plan is None
    view.fill_(1.0)
    assert float((other + 0).min()) == 1.0


def test_additive_masks() -> None:
    plan = Plan(1, 3, 3, Pattern.CAUSAL, CPU)
    additive = plan.additive_mask(torch.float16)
    assert additive is plan.additive_mask(torch.float16)
    assert additive.dtype == torch.float16
    assert set(additive.flatten().tolist()) == {0.0, torch.finfo(torch.float16).min}
    assert Plan(1, 3, 3, Pattern.BIDIRECTIONAL, CPU).additive_mask(torch.float32) is None
    given = torch.randn(1, 1, 3, 3)
    plan = Plan(1, 3, 3, Pattern.OTHER, CPU, given=given)
    assert plan.dense_mask() is given
    assert plan.additive_mask(torch.float32) is given


# -- layouts of packed tokens ----------------------------------------------------------------------


def _call(batch: Batch, self_attention: bool) -> Call:
    return Call(
        device=CPU,
        dtype=torch.float32,
        batch=batch.batch,
        q_len=batch.q_len,
        kv_len=batch.kv_len,
        heads=1,
        kv_heads=1,
        head_dim=8,
        value_head_dim=8,
        self_attention=self_attention,
    )


@settings(thorough, max_examples=300)
@given(batches(), st.booleans())
def test_the_layout_says_what_the_mask_says(batch: Batch, self_attention: bool) -> None:
    """A dense mask put together from the layout equals Transformers' at the queries it holds."""
    self_attention &= batch.q_len == batch.kv_len
    plan, call = batch.plan, _call(batch, self_attention)
    reasons = varlen_refusals(plan, call)
    if reasons:
        return
    pack_queries = packs_queries(plan, call)
    one_query = batch.q_len == 1 and batch.packed is None
    assert pack_queries == (
        not one_query and (batch.causal or batch.packed is not None or self_attention)
    )
    layout = plan.varlen(pack_queries)
    assert layout is plan.varlen(pack_queries)
    cu_q, cu_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    assert layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32
    assert len(cu_q) == len(cu_k)
    assert (cu_q[0], cu_k[0], cu_q[-1], cu_k[-1]) == (0, 0, layout.total_q, layout.total_k)
    longest = max(np.diff(cu_q))
    if longest == 1 and layout.total_q != len(cu_q) - 1:
        # Flash kernels take 1 for exactly one query in every sequence.
        longest = 2
    assert layout.max_seqlen_q == longest
    assert layout.max_seqlen_k == max(np.diff(cu_k))

    places_q = _places(layout.q_index, layout.total_q, batch.batch * batch.q_len)
    places_k = _places(layout.k_index, layout.total_k, batch.batch * batch.kv_len)
    counted = batch.real_queries if pack_queries else np.ones_like(batch.real_queries)
    assert sorted(places_q) == np.flatnonzero(counted).tolist()
    if batch.packed is None:
        kept = batch.real & (np.arange(batch.kv_len) < batch.visible)
        assert sorted(places_k) == np.flatnonzero(kept).tolist()

    rebuilt = np.zeros((batch.batch, batch.q_len, batch.kv_len), dtype=bool)
    for sequence in range(len(cu_q) - 1):
        queries = places_q[cu_q[sequence] : cu_q[sequence + 1]]
        keys = places_k[cu_k[sequence] : cu_k[sequence + 1]]
        for i, query in enumerate(queries):
            position = i + len(keys) - len(queries)
            for j, key in enumerate(keys):
                distance = position - j
                visible = not batch.causal or distance >= 0
                if batch.window is not None and plan.window_matters:
                    near = (
                        distance < batch.window if batch.causal else (abs(distance) <= batch.window)
                    )
                    visible &= near
                row, token = divmod(int(query), batch.q_len)
                row_k, token_k = divmod(int(key), batch.kv_len)
                assert row == row_k
                rebuilt[row, token, token_k] = visible
    counted = counted & batch.seen.any(-1)
    assert np.array_equal(rebuilt[counted], batch.seen[counted])


def _places(index: torch.Tensor | None, total: int, tokens: int) -> list[int]:
    if index is None:
        assert total == tokens, "tokens are left out, and no index says which"
        return list(range(tokens))
    assert index.dtype == torch.int64
    assert len(index) == total
    return index.tolist()


@thorough
@given(batches(), st.booleans())
def test_what_is_refused_cannot_be_packed(batch: Batch, self_attention: bool) -> None:
    """No refusal without one of the reasons for which there is one."""
    self_attention &= batch.q_len == batch.kv_len
    plan, call = batch.plan, _call(batch, self_attention)
    reasons = varlen_refusals(plan, call)
    packs = packs_queries(plan, call)
    expected = plan.real_k == 0 or (packs and not batch.real_queries.any())
    if plan.window_matters:
        expected |= not batch.is_contiguous
        expected |= plan.is_padded and not packs
    assert bool(reasons) == expected, reasons


def test_queries_of_cross_attention_are_never_packed_with_the_mask_of_the_keys() -> None:
    mask = ((True, True, False, False), (True, True, True, False))
    plan = Batch(2, 4, 4, False, 0, 0, None, None, mask, None).plan
    crossed, own = plan.varlen(False), plan.varlen(True)
    assert crossed.q_index is None
    assert crossed.cu_seqlens_q.tolist() == [0, 4, 8]
    assert own.q_index.tolist() == [0, 1, 4, 5, 6]
    assert crossed.k_index.tolist() == own.k_index.tolist() == [0, 1, 4, 5, 6]


# -- devices ---------------------------------------------------------------------------------------


def test_a_plan_has_one_twin_per_device() -> None:
    mask = ((True, False, True), (True, True, True))
    plan = Batch(2, 3, 3, True, 0, 0, None, None, mask, None).plan
    plan.decisions["something"] = 1
    other = torch.device("cpu", 0)
    twin = plan.on(other)
    assert twin is not plan
    assert twin is plan.on(other)
    assert twin.on(CPU) is plan
    assert twin.device == other
    assert twin.decisions == {}
    assert twin.describe() == plan.describe()
    assert torch.equal(twin.dense_mask(), plan.dense_mask())
    assert twin.varlen(True) is not plan.varlen(True)
    for each in (plan, twin):
        assert each.varlen(True).q_index.tolist() == [0, 2, 3, 4, 5]


# -- real caches -----------------------------------------------------------------------------------


def _config(implementation: str, window: int | None) -> MistralConfig:
    config = MistralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        sliding_window=window,
    )  # fmt: skip
    config._attn_implementation = implementation
    return config


@pytest.mark.parametrize("window", [None, 3, 6, 50])
@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_masks_of_real_caches(kind: str, window: int | None, side: str | None) -> None:
    """Prefill, continued prefill and decoding, with caches that slide: the mask of eager."""
    config, eager = _config("smart", window), _config("eager", window)
    make = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=16),
        "none": lambda: None,
    }[kind]
    cache = make()
    mask = torch.ones(2, 0, dtype=torch.long)
    compared = 0
    for q_len in (5, 4, 1, 1) if cache is not None else (9,):
        new = torch.ones(2, q_len, dtype=torch.long)
        if side == "left" and not mask.shape[1]:
            new[0, :2] = 0
        if side == "right":
            new[1, -1:] = 0 if q_len > 1 else 1
        mask = torch.cat([mask, new], dim=1)
        arguments = {
            "inputs_embeds": torch.zeros(2, q_len, 16),
            "attention_mask": mask if side else None,
            CACHE: cache,
        }
        create = (
            masking_utils.create_causal_mask
            if window is None
            else masking_utils.create_sliding_window_causal_mask
        )
        smart, expected = create(config, **arguments), create(eager, **arguments)
        if isinstance(smart, PlanMask):
            assert torch.equal(smart + 0, expected)
            assert smart.plan is not None
            assert smart.plan.dense_mask().shape[-1] == expected.shape[-1]
            compared += 1
            plan = smart.plan
            assert 0 <= plan.shift <= plan.kv_len - plan.q_len
        elif smart is not None:
            assert torch.equal(smart, expected == 0 if smart.dtype == torch.bool else expected)
            compared += 1
        if cache is not None:
            states = torch.zeros(2, 2, q_len, 8)
            cache.update(states, states, 0)
    assert compared or kind == "static"


@pytest.mark.parametrize("extra", [None, "or", "and", "blocks"])
@pytest.mark.parametrize("window", [None, 3])
def test_masks_of_packed_sequences(window: int | None, extra: str | None) -> None:
    """In whatever order Transformers puts the parts of the function together."""
    create = (
        masking_utils.create_causal_mask
        if window is None
        else masking_utils.create_sliding_window_causal_mask
    )
    more: dict[str, Any] = {}
    if extra == "blocks":
        # The third block reaches from one sequence into the next.
        more["block_sequence_ids"] = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, -1]])
    elif extra is not None:
        more[f"{extra}_mask_function"] = lambda batch, head, q, kv: (q - kv) % 3 == 0
    if not more.keys() <= inspect.signature(create).parameters.keys():
        pytest.skip("this Transformers has no blocks in windows")
    smart, expected = (
        create(
            _config(implementation, window),
            inputs_embeds=torch.zeros(1, 12, 16),
            attention_mask=None,
            position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]),
            **{CACHE: None},
            **more,
        )
        for implementation in ("smart", "eager")
    )
    assert isinstance(smart, PlanMask)
    assert torch.equal(smart + 0, expected)
    plan = smart.plan
    assert plan is not None
    assert plan.pattern is (Pattern.CAUSAL if extra is None else Pattern.OTHER)
    assert plan.is_packed is (extra is None)
