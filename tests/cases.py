"""Generated attention calls: every pattern, padding and geometry, with brute-force masks.

A :class:`Situation` is what a mask says about a batch; a :class:`Case` adds the tensors of one
layer. What a query may see, which queries count and which backend should take a case are all
derived here from positions alone, independently of the package under test.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import masking_utils

from smartattn.backends import Backend, flash_attention_3
from smartattn.backends.flash import Route
from smartattn.call import Call
from smartattn.integration import smart_mask
from smartattn.mask import PlanMask
from smartattn.packing import where_keys_lie
from smartattn.plan import Pattern, Plan

Rows = np.ndarray[Any, np.dtype[np.bool_]]

CHUNK = 6
CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Situation:
    """What a mask says about one batch; lengths in tokens."""

    name: str
    batch: int
    q_len: int
    kv_len: int
    causal: bool
    #: Tokens before the first query.
    shift: int = 0
    window: int | None = None
    padding: str = "none"
    #: Lengths of the sequences that each row holds.
    packed: tuple[int, ...] | None = None
    #: "chunked" or "prefix": patterns that are known as dense masks only.
    overlay: str | None = None
    #: "bool" or "float": a mask that the caller made.
    given: str | None = None
    #: The keys come from other tokens than the queries.
    cross: bool = False

    @property
    def visible(self) -> int:
        """Keys up to the last query's; a static cache is longer."""
        return self.q_len + self.shift if self.causal else self.kv_len

    @functools.cached_property
    def real(self) -> Rows:
        """(batch, visible) True where a key is a real token."""
        return padding_rows(self.padding, self.batch, self.visible)

    def pattern(self, windowed: bool = True) -> Rows:
        """(batch, q_len, kv_len) True where the pattern without padding lets a query see a key."""
        query = np.arange(self.q_len)[None, :, None] + self.shift
        key = np.arange(self.kv_len)[None, None, :]
        seen = np.ones((self.batch, self.q_len, self.kv_len), dtype=bool)
        if self.causal:
            seen &= key <= query
        if self.window is not None and windowed:
            seen &= (query - key < self.window) if self.causal else abs(query - key) <= self.window
        if self.packed is not None:
            ids = np.repeat(np.arange(len(self.packed)), self.packed)
            seen &= ids[query] == ids[key]
        if self.overlay == "chunked":
            left = self.left_padding()[:, None, None]
            seen &= (key - left) // CHUNK == (query - left) // CHUNK
        if self.overlay == "prefix":
            seen |= (key < self.q_len // 3) & (query < self.q_len // 3)
        return seen

    def left_padding(self) -> np.ndarray[Any, Any]:
        """(batch,) tokens before the first real one, as Transformers counts them."""
        return self.real.argmax(axis=1)

    @functools.cached_property
    def seen(self) -> Rows:
        """(batch, q_len, kv_len) True where a query sees a key."""
        hidden = np.zeros((self.batch, self.kv_len - self.visible), dtype=bool)
        return self.pattern() & np.concatenate([self.real, hidden], axis=1)[:, None, :]

    @functools.cached_property
    def counts(self) -> Rows:
        """(batch, q_len) True where a query is a real token that sees some key.

        The mask says nothing of the queries of cross-attention, and a single query is never
        padding, whatever stands at its place.
        """
        some = self.seen.any(-1)
        if self.cross or self.q_len == 1:
            return some
        return some & self.real[:, self.shift :][:, : self.q_len]

    @functools.cached_property
    def is_padded(self) -> bool:
        return not bool(self.real.all())

    @functools.cached_property
    def has_holes(self) -> bool:
        return bool((np.diff(self.real.astype(int), prepend=0, axis=1) == 1).sum(1).max() > 1)

    @functools.cached_property
    def ends_at_the_query(self) -> bool:
        """One query per row, which stands at the last real key of its row."""
        ends = self.real[:, -1] | ~self.real.any(1)
        begins_late = self.real.any(1) & ~self.real[:, 0]
        return self.causal and self.q_len == 1 and bool(ends.all() and begins_late.any())

    @functools.cached_property
    def window_hides(self) -> bool:
        return bool((self.pattern() != self.pattern(windowed=False)).any())

    def plan(self, device: torch.device, dtype: torch.dtype) -> Plan:
        """The plan that a forward of a model would make of this batch."""
        if self.given is not None:
            mask = torch.from_numpy(self.seen)[:, None].to(device)
            if self.given == "float":
                zero = torch.zeros((), dtype=dtype, device=device)
                mask = torch.where(mask, zero, torch.finfo(dtype).min)
            return Plan(self.batch, self.q_len, self.kv_len, Pattern.OTHER, device, given=mask)
        attention_mask = None
        if self.padding != "none":
            attention_mask = torch.from_numpy(self.real).to(device)
        mask = smart_mask(
            batch_size=self.batch,
            q_length=self.q_len,
            kv_length=self.kv_len,
            q_offset=self.shift,
            mask_function=self.mask_function(device),
            attention_mask=attention_mask,
            local_size=CHUNK if self.overlay == "chunked" else self.window,
            use_vmap=self.overlay == "prefix",
            dtype=dtype,
            device=device,
        )
        assert isinstance(mask, PlanMask)
        assert mask.plan is not None
        return mask.plan

    def mask_function(self, device: torch.device) -> Any:
        """The function with which Transformers describes this pattern."""
        m = masking_utils
        if self.causal:
            function = m.causal_mask_function
            if self.window is not None:
                function = m.sliding_window_causal_mask_function(self.window)
        else:
            function = m.bidirectional_mask_function
            if self.window is not None:
                function = m.sliding_window_bidirectional_mask_function(self.window)
        if self.packed is not None:
            ids = torch.repeat_interleave(torch.arange(len(self.packed)), torch.tensor(self.packed))
            ids = ids.expand(self.batch, -1).to(device)
            function = m.and_masks(function, m.packed_sequence_mask_function(ids))
        if self.overlay == "chunked":
            left = torch.from_numpy(self.left_padding()).to(device)
            function = m.chunked_causal_mask_function(CHUNK, left)
        if self.overlay == "prefix":
            prefix = self.q_len // 3
            function = m.or_masks(function, lambda b, h, q, k: (q < prefix) & (k < prefix))
        return function


def padding_rows(kind: str, batch: int, width: int) -> Rows:
    """(batch, width) True at real tokens; row 0 is full where the kind allows one."""
    real = np.ones((batch, width), dtype=bool)
    for row in range(batch):
        cut = min(width - 1, (row * width) // (batch + 1) + (row > 0))
        if kind == "right":
            real[row, width - cut :] = False
        elif kind == "left":
            real[row, :cut] = False
        elif kind == "both":
            real[row, : (cut + 1) // 2] = False
            real[row, width - cut // 2 :] = False
        elif kind == "holes":
            real[row, row + 1 : row + 1 + (row > 0)] = False
            real[row, width // 2 : width // 2 + cut // 3] = False
            real[row, width - row // 2 :] = False
        elif kind == "equal right":
            real[row, width - width // 3 :] = False
        elif kind == "equal left":
            real[row, : width // 3] = False
        elif kind in ("empty row", "empty row left"):
            part = slice(width - cut, None) if kind == "empty row" else slice(cut)
            real[row, part] = False
            real[row] &= row != batch - 1 or batch == 1
        elif kind == "one token":
            real[row, 1 + row :] = False
        elif kind == "nothing":
            real[row] = False
        elif kind not in ("none", "ones"):
            raise ValueError(kind)
    return real


PADDINGS = (
    "none",
    "ones",
    "right",
    "left",
    "both",
    "holes",
    "equal right",
    "equal left",
    "empty row",
    "empty row left",
    "one token",
)


def situations(n: int) -> Iterator[Situation]:
    """All combinations that a model can meet, with sequences of about ``n`` tokens.

    Left out are those in which no query is a real token.
    """

    def make(name: str, q_len: int, kv_len: int, causal: bool, **facts: Any) -> Situation:
        facts.setdefault("batch", 3)
        label = f"{name}-{facts['padding'].replace(' ', '_')}" if "padding" in facts else name
        return Situation(f"{label}-{n}", q_len=q_len, kv_len=kv_len, causal=causal, **facts)

    return (s for s in _situations(n, make) if s.counts.any())


def _situations(n: int, make: Callable[..., Situation]) -> Iterator[Situation]:
    few = max(2, n // 5)
    for padding in PADDINGS:
        pad = {"padding": padding}
        yield make("causal", n, n, True, **pad)
        yield make("bidirectional", n, n, False, **pad)
        yield make("prefill_continued", few, n, True, shift=n - few, **pad)
        yield make("decode", 1, n, True, shift=n - 1, **pad)
        yield make("static_prefill", n, n + 15, True, **pad)
        yield make("static_continued", few, n + 15, True, shift=n - few - 2, **pad)
        yield make("static_decode", 1, n + 15, True, shift=n - 3, **pad)
        yield make("cross", few, n, False, cross=True, **pad)
        yield make("cross_longer_queries", n + 7, n, False, cross=True, **pad)
        yield make("cross_equal_lengths", n, n, False, cross=True, **pad)
        yield make("cross_decode", 1, n, False, cross=True, **pad)
        yield make("block_continued", few, n, False, shift=n - few, **pad)
        yield make("causal_window", n, n, True, window=few, **pad)
        yield make("causal_window_continued", few, n, True, shift=n - few, window=few + 1, **pad)
        yield make("causal_window_decode", 1, n, True, shift=n - 1, window=few, **pad)
        yield make("symmetric_window", n, n, False, window=few, **pad)
        yield make("chunked", n, n, True, overlay="chunked", **pad)
        yield make("prefix", n, n, True, overlay="prefix", **pad)
    for padding in ("none", "right", "left", "holes"):
        for given in ("bool", "float"):
            pad = {"padding": padding}
            yield make(f"given_{given}", n, n, True, given=given, **pad)
            yield make(f"given_{given}_continued", few, n, True, shift=n - few, given=given, **pad)
        for causal in (True, False):
            name = "causal_batch_of_one" if causal else "bidirectional_batch_of_one"
            yield make(name, n, n, causal, batch=1, padding=padding)
    for window in (1, 2, n - 1, n, n + 40):
        for padding in ("none", "right", "left"):
            pad = {"padding": padding, "window": window}
            yield make(f"causal_window_{window}", n, n, True, **pad)
            yield make(f"symmetric_window_{window}", n, n, False, **pad)
            yield make(f"static_window_{window}", few, n + 15, True, shift=n - few, **pad)
    yield make("symmetric_window_cross", n, n, False, window=few, cross=True, padding="right")
    yield make("symmetric_window_lengths", few, n, False, window=few, cross=True, padding="none")
    parts = (n // 2, 1, n // 4, n - n // 2 - 1 - n // 4)
    for batch, lengths in itertools.product((1, 2), (parts, (n,), (1,) * 4 + (n - 4,))):
        packed = {"batch": batch, "packed": lengths}
        name = f"packed_{batch}x{len(lengths)}"
        yield make(name, n, n, True, **packed)
        yield make(f"{name}_bidirectional", n, n, False, **packed)
        yield make(f"{name}_window", n, n, True, window=few, **packed)
        yield make(f"{name}_symmetric_window", n, n, False, window=few, **packed)


LAYOUTS = ("tokens first", "heads first", "fused", "expanded")

#: (heads, kv_heads, head_dim, value_head_dim): multi-head, grouped, multi-query, unequal dims.
SHAPES = (
    (4, 4, 16, 16),
    (4, 2, 32, 32),
    (6, 2, 24, 24),
    (4, 1, 64, 64),
    (3, 3, 8, 8),
    (2, 2, 24, 16),
    (4, 2, 16, 40),
    (2, 1, 20, 20),
)


@dataclass(frozen=True)
class Case:
    """One call of one layer."""

    situation: Situation
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    layout: str
    dtype: torch.dtype
    grad: bool
    scaling: float | None = None
    #: An argument that changes the result: "softcap" or "position_bias".
    feature: str | None = None

    @property
    def id(self) -> str:
        shape = f"{self.heads}/{self.kv_heads}x{self.head_dim}"
        if self.value_head_dim != self.head_dim:
            shape += f"+{self.value_head_dim}"
        parts = [
            self.situation.name,
            shape,
            self.layout.replace(" ", "_"),
            str(self.dtype).removeprefix("torch."),
            "backward" if self.grad else "forward",
        ]
        return "-".join([*parts, self.feature] if self.feature else parts)

    def call(self, device: torch.device, **changes: Any) -> Call:
        """The facts of this call, as the attention function would state them."""
        s = self.situation
        call = Call(
            device=device,
            dtype=self.dtype,
            batch=s.batch,
            q_len=s.q_len,
            kv_len=s.kv_len,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            scaling=self.scaling,
            softcap=SOFTCAP if self.feature == "softcap" else None,
            grad=self.grad,
            self_attention=not s.cross,
            features=frozenset({self.feature} if self.feature else ()),
        )
        return replace(call, **changes)

    def call_with(self, key: torch.Tensor, value: torch.Tensor) -> Call:
        """The same, which also says where keys and values lie."""
        token_major_keys, key_pitch = where_keys_lie(key, value)
        call = self.call(key.device)
        return replace(call, token_major_keys=token_major_keys, key_pitch=key_pitch)

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value in this case's memory layout.

        What no query sees is filled with large values, so that a leak shows.
        """
        s = self.situation
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.id.encode()))

        def random(heads: int, length: int, dim: int) -> torch.Tensor:
            shape = (s.batch, length, heads, dim)
            return torch.randn(shape, generator=generator, device=device)

        kv_heads = 1 if self.layout == "expanded" else self.kv_heads
        query = random(self.heads, s.q_len, self.head_dim)
        key = random(kv_heads, s.kv_len, self.head_dim)
        value = random(kv_heads, s.kv_len, self.value_head_dim)
        hidden = torch.from_numpy(~s.seen.any(1)).to(device)
        key[hidden] *= 8
        value[hidden] = 1000.0
        states = [x.to(self.dtype) for x in (query, key, value)]
        if self.layout == "fused":
            fused = [states] if s.q_len == s.kv_len else [states[:1], states[1:]]
            states = [part for group in fused for part in _fused(group)]
        elif self.layout == "heads first":
            states = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in states]
        elif self.layout == "sliced":
            states = [states[0], *map(_sliced, states[1:])]
        elif self.layout == "stacked":
            both = torch.stack([x.transpose(1, 2) for x in states[1:]], dim=1)
            states = [states[0], *(x.transpose(1, 2) for x in both.unbind(1))]
        query, key, value = (x.requires_grad_(self.grad).transpose(1, 2) for x in states)
        if self.layout == "expanded":
            key, value = (x.expand(-1, self.kv_heads, -1, -1) for x in (key, value))
        return query, key, value

    def bias(self, device: torch.device) -> torch.Tensor | None:
        """(1, heads, q_len, kv_len) learned bias of the scores."""
        if self.feature != "position_bias":
            return None
        generator = torch.Generator(device).manual_seed(7)
        shape = (1, self.heads, self.situation.q_len, self.situation.kv_len)
        bias = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        return bias.requires_grad_(self.grad)


SOFTCAP = 2.0


def _sliced(states: torch.Tensor) -> torch.Tensor:
    """The same values as a (batch, heads, length, dim) cache that holds NaN behind them."""
    batch, length, heads, dim = states.shape
    cache = states.new_full((batch, heads, 2 * length + 1, dim), torch.nan)
    cache[:, :, :length] = states.transpose(1, 2)
    return cache[:, :, :length].transpose(1, 2)


def _fused(states: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same values as slices of one (batch, length, heads * dims) tensor."""
    flat = torch.cat([x.flatten(2) for x in states], dim=-1)
    parts = flat.split([x.shape[2] * x.shape[3] for x in states], dim=-1)
    return [part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, states, strict=True)]


def cases(
    n: int,
    dtypes: tuple[torch.dtype, ...],
    every: int = 1,
    forward_every: int = 1,
    shapes: Any = SHAPES,
) -> list[Case]:
    """A case with a backward per situation and dtype; shapes and layouts take turns.

    Args:
        every: keeps one situation of so many for all dtypes but the first.
        forward_every: adds a case without gradients for one situation of so many.
    """
    found = []
    turn = 0
    for place, situation in enumerate(situations(n)):
        for dtype in dtypes:
            if dtype is not dtypes[0] and place % every:
                continue
            for grad in (True, False) if place % forward_every == 0 else (True,):
                # Every layout comes up with every shape, and with and without a scaling.
                rounds, place_of_shape = divmod(turn, len(shapes))
                shape, layout = shapes[place_of_shape], LAYOUTS[(turn + rounds) % len(LAYOUTS)]
                scaling = (None, 0.3)[(turn + turn // 3) % 2]
                turn += 1
                found.append(Case(situation, *shape, layout, dtype, grad, scaling))
    return found


#: One situation for every path through the backends.
CORE = (
    "causal-none",
    "causal-right",
    "causal-left",
    "bidirectional-both",
    "causal_window-left",
    "symmetric_window-right",
    "decode-left",
    "cross_equal_lengths-right",
    "packed_1x4",
)


def shape_cases(
    n: int, backend: Backend, dtypes: tuple[torch.dtype, ...], layouts: int = len(LAYOUTS)
) -> list[Case]:
    """Cases at the limits of what a backend declares, in so many layouts each."""
    support = backend.support
    unit = support.head_dim_multiple
    dims = {unit * 1, unit * 5, 64, 80, 96, 128, support.max_head_dim or 320}
    core = {s.name.removesuffix(f"-{n}"): s for s in situations(n)}
    found = []
    for (turn, name), (place, dim), layer in itertools.product(
        enumerate(CORE), enumerate(sorted(dims)), range(layouts)
    ):
        heads, kv_heads = ((4, 4), (4, 2), (2, 1))[place % 3]
        layout = LAYOUTS[(turn + place + layer) % len(LAYOUTS)]
        dtype = dtypes[len(found) % len(dtypes)]
        grad = bool(len(found) // len(dtypes) % 2) and support.backward
        found.append(Case(core[name], heads, kv_heads, dim, dim, layout, dtype, grad))
    return found


def feature_cases(n: int, dtypes: tuple[torch.dtype, ...], dim: int = 16) -> list[Case]:
    """Cases with an argument that changes the result."""
    names = (*CORE, "given_bool-left", "given_float-left", "static_prefill-none", "decode-none")
    core = {s.name.removesuffix(f"-{n}"): s for s in situations(n)}
    return [
        Case(core[name], 4, 2, dim, dim, LAYOUTS[0], dtype, grad, None, feature)
        for name in names
        for dtype in dtypes
        for grad in (False, True)
        for feature in ("softcap", "position_bias")
    ]


def fewest_kinds(backend: Backend, cases: list[Case]) -> list[Case]:
    """All cases; of a backend that builds kernels for seconds, few kinds that show everything.

    Every fact of a kind comes up with every way to read a batch, with a gradient and without.
    """
    found, seen = [], set()
    for case in cases:
        if not takes(backend, case):
            continue
        call = case.call(CUDA)
        kind = backend.built_for(case.situation.plan(torch.device("cpu"), case.dtype), call)
        if kind is None:
            return cases
        assert isinstance(kind, tuple)
        ways = (call.grad, next(fact for fact in kind if isinstance(fact, Route)))
        facts = {(*ways, place, fact) for place, fact in enumerate(kind)}
        facts.add((call.grad, "layout", case.layout))
        if not facts <= seen:
            found.append(case)
            seen |= facts
    return found


def takes(backend: Backend, case: Case) -> bool:
    """Whether a backend should run a case, from its declarations and what packing can express."""
    support, s = backend.support, case.situation
    if support.dtypes is not None and case.dtype not in support.dtypes:
        return False
    if support.max_head_dim is not None and case.head_dim > support.max_head_dim:
        return False
    if case.head_dim % support.head_dim_multiple:
        return False
    if case.value_head_dim != case.head_dim and not support.mixed_head_dims:
        return False
    if case.feature is not None and case.feature not in support.features:
        return False
    if case.grad and not support.backward:
        return False
    if backend.name == "sdpa":
        return True
    if backend.name == "flash_attention_3" and support.devices is not None:
        # The real one, of which there are builds without these.
        if case.dtype is torch.float16 and not flash_attention_3.has("float16", CUDA):
            return False
        if s.window_hides and not flash_attention_3.has("window", CUDA):
            return False
    if s.given or s.overlay:
        return False
    if s.window_hides:
        if not s.causal and s.q_len != s.kv_len:
            return False
        packs_queries = not s.cross and (s.q_len > 1 or s.packed is not None)
        if s.has_holes or (s.is_padded and not packs_queries and not s.ends_at_the_query):
            return False
    if not (s.is_padded or s.packed):
        if backend.name == "sdpa_unpadded":
            return False
        # varlen_attn has no dense call, and the operator under it no known backward.
        if backend.name == "torch_varlen" and case.grad:
            return False
    return not (backend.name in ("sdpa_unpadded", "triton_varlen") and s.has_holes)
