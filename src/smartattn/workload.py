"""One attention call to time: the shape, the padding and the memory layout, all from few numbers.

A workload is drawn from a seed and its fields alone, so that raw timings need to keep no more than
these fields to be fitted again, also with features that did not exist when they were measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .call import Call
from .features import Mode
from .layouts import IntArray
from .plan import BoolArray, Pattern, Plan

Side = Literal["none", "left", "right", "packed"]
Spread = Literal["uniform", "skewed", "same"]
Memory = Literal["transposed", "concatenated"]


class Tensors(NamedTuple):
    """The arguments of one call; ``leaves`` and ``grad_output`` are for a backward."""

    #: (batch, heads, q_len, head_dim), a view of (batch, q_len, heads, head_dim) memory.
    query: torch.Tensor
    #: (batch, kv_heads, kv_len, head_dim), as are the values.
    key: torch.Tensor
    value: torch.Tensor
    #: What the three are views of.
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    #: (batch, q_len, heads, head_dim), zero where the query is padding.
    grad_output: torch.Tensor | None


@dataclass(frozen=True)
class Workload:
    """A call of attention as a model makes it. Lengths are in tokens.

    ``sequences`` counts the sequences of a packed batch, which has one row. ``padding_share`` is
    aimed at for the padding of the batch, 0 to 1; ``spread`` says how the lengths differ: drawn
    uniformly, a few full ones among short ones, or all the same. ``memory`` is where keys and
    values lie: (batch, kv_len, kv_heads, head_dim) handed over transposed, or contiguous as a cache
    concatenates them. Queries always lie transposed.
    """

    mode: Mode
    causal: bool
    side: Side
    dtype: str
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    sequences: int = 0
    window: int = 0
    padding_share: float = 0.0
    spread: Spread = "uniform"
    memory: Memory = "transposed"
    seed: int = 0

    def __str__(self) -> str:
        pattern = {"decode": ""}.get(self.mode, " causal" if self.causal else " bidirectional")
        padding = "" if self.side == "none" else f", {self.side}"
        if self.padding_share:
            padding += f" padding {self.padding_share:.0%}"
        if self.sequences:
            padding += f" of {self.sequences} sequences"
        if self.window:
            padding += f", window {self.window}"
        return (
            f"{self.mode}{pattern}{padding}, {self.batch} x {self.kv_len}, "
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.dtype}"
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def lengths(self) -> IntArray:
        """Keys per sequence: of each row, or of each sequence of a packed batch."""
        if self.side == "packed":
            return _packed_lengths(self)
        if self.side == "none" or self.padding_share <= 0:
            return np.full(self.batch, self.kv_len, dtype=np.int64)
        shape = (self.batch, self.padding_share, self.kv_len)
        return _padded_lengths(self.seed, *shape, self.spread)

    @property
    def shift(self) -> int:
        """Key index that query 0 stands at."""
        return self.kv_len - self.q_len if self.causal or self.mode == "decode" else 0

    def real_keys(self) -> BoolArray:
        """(batch, kv_len) True where a key is a real token."""
        if self.side == "packed":
            return np.ones((self.batch, self.kv_len), dtype=bool)
        keys = np.arange(self.kv_len)[None, :]
        lengths = self.lengths[:, None]
        return keys >= self.kv_len - lengths if self.side == "left" else keys < lengths

    def real_queries(self) -> BoolArray:
        """(batch, q_len) True where a query is a real token."""
        return self.real_keys()[:, self.shift : self.shift + self.q_len]

    def visible(self, row: int, queries: IntArray) -> BoolArray:
        """(queries, kv_len) True where a query of a row sees a key, from the definition alone."""
        keys = np.arange(self.kv_len)[None, :]
        position = queries[:, None] + self.shift
        seen = np.broadcast_to(self.real_keys()[row][None, :], (len(queries), self.kv_len))
        if self.side == "packed":
            number = np.repeat(np.arange(len(self.lengths)), self.lengths)
            seen = seen & (number[queries][:, None] == number[None, :])
        if self.causal or self.mode == "decode":
            seen = seen & (keys <= position)
            if self.window:
                seen = seen & (keys > position - self.window)
        elif self.window:
            seen = seen & (abs(keys - position) <= self.window)
        return seen

    def plan(self, device: torch.device) -> Plan:
        """The plan that a model's mask function would make of it."""
        real = packed = None
        if self.side == "packed":
            packed = np.zeros((1, self.q_len), dtype=bool)
            packed[0, np.cumsum(self.lengths)[:-1]] = True
            packed[0, 0] = True
        elif self.side != "none":
            real = self.real_keys()
        causal = self.causal or self.mode == "decode"
        return Plan(
            self.batch,
            self.q_len,
            self.kv_len,
            Pattern.CAUSAL if causal else Pattern.BIDIRECTIONAL,
            device,
            shift=self.shift,
            window=self.window or None,
            real=real,
            packed=packed,
        )

    def call(self, device: torch.device) -> Call:
        """The call that a layer would make of it."""
        return Call(
            device=device,
            dtype=self.torch_dtype,
            batch=self.batch,
            q_len=self.q_len,
            kv_len=self.kv_len,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.head_dim,
            scaling=self.head_dim**-0.5,
            grad=self.mode == "train",
            self_attention=self.q_len == self.kv_len,
            token_major_keys=self.memory == "transposed" or self.kv_heads == 1,
        )

    def tensors(self, device: torch.device) -> Tensors:
        """Normally distributed tensors, those of a backward in mode "train"."""
        generator = torch.Generator(device=device).manual_seed(self.seed)
        grad = self.mode == "train"

        def made(heads: int, length: int, *, concatenated: bool) -> torch.Tensor:
            shape = (self.batch, length, heads, self.head_dim)
            if concatenated:
                shape = (self.batch, heads, length, self.head_dim)
            states = torch.randn(shape, generator=generator, device=device, dtype=self.torch_dtype)
            return states.requires_grad_(grad)

        cached = self.memory == "concatenated"
        query = made(self.heads, self.q_len, concatenated=False)
        key = made(self.kv_heads, self.kv_len, concatenated=cached)
        value = made(self.kv_heads, self.kv_len, concatenated=cached)
        grad_output = None
        if grad:
            real = torch.from_numpy(self.real_queries()).to(device)
            grad_output = torch.randn(
                query.shape, generator=generator, device=device, dtype=self.torch_dtype
            ).mul_(real[:, :, None, None])
        return Tensors(
            query.transpose(1, 2),
            key if cached else key.transpose(1, 2),
            value if cached else value.transpose(1, 2),
            (query, key, value),
            grad_output,
        )

    @property
    def flops(self) -> float:
        """Floating-point operations of an implementation that computes all masked pairs too."""
        pairs = float(self.batch * self.q_len * self.kv_len)
        return 4.0 * pairs * self.heads * self.head_dim * (3.5 if self.mode == "train" else 1.0)

    @property
    def bytes(self) -> int:
        """Upper estimate of the memory that a run of any backend needs, in bytes."""
        size = self.torch_dtype.itemsize
        queries = self.batch * self.q_len * self.heads * self.head_dim
        repeated = self.batch * self.kv_len * self.heads * self.head_dim
        # Inputs, outputs and packed copies of either; gradients double that and more.
        tensors = (4 * queries + 6 * repeated) * size * (3 if self.mode == "train" else 1)
        mask = self.batch * self.q_len * self.kv_len * (1 + size)
        return tensors + 2 * mask


def usual_memory(mode: Mode, causal: bool, side: Side) -> Memory:
    """Where keys and values lie in the models that make such calls.

    A decoder has a cache unless told otherwise, which concatenates those of a prefill too.
    Training, packed sequences and encoders have none.
    """
    cached = mode == "decode" or (mode == "forward" and causal and side != "packed")
    return "concatenated" if cached else "transposed"


def as_padded(workload: Workload, seeds: int = 64) -> Workload:
    """The workload with the seed, of the first few, whose padding is closest to what is aimed at.

    Drawn lengths have the wanted mean only in expectation; of few rows they may be far from it.
    """
    if workload.side not in ("left", "right"):
        return workload
    shape = (workload.batch, workload.padding_share, workload.kv_len)
    return replace(workload, seed=_closest_seed(*shape, workload.spread, seeds))


@lru_cache(maxsize=4096)
def _closest_seed(batch: int, share: float, width: int, spread: Spread, seeds: int) -> int:
    wanted = (1 - share) * batch * width
    if batch == 1 or spread == "same":
        return 0

    def off(seed: int) -> float:
        return abs(int(_padded_lengths(seed, batch, share, width, spread).sum()) - wanted)

    return min(range(seeds), key=off)


def _padded_lengths(seed: int, batch: int, share: float, width: int, spread: Spread) -> IntArray:
    rng = np.random.default_rng(seed)
    if spread == "same" or batch == 1:
        lengths = np.full(batch, (1 - share) * width)
    elif spread == "skewed":
        full = max(1, round(batch * min(0.125, (1 - share) / 2)))
        short = width * max(batch * (1 - share) - full, 0) / (batch - full)
        lengths = short * rng.uniform(0.8, 1.2, batch)
        lengths[rng.permutation(batch)[:full]] = width
    else:
        # The power of a uniform number whose mean is 1 - share.
        lengths = width * rng.uniform(0, 1, batch) ** (share / (1 - share))
        lengths[rng.integers(batch)] = width
    return np.asarray(np.clip(np.ceil(lengths), 1, width), dtype=np.int64)


def _packed_lengths(workload: Workload) -> IntArray:
    rng = np.random.default_rng(workload.seed)
    count, total = max(1, workload.sequences), workload.kv_len
    if workload.spread == "same":
        cuts = np.arange(1, count) * total // count
    else:
        cuts = np.sort(rng.permutation(np.arange(1, total))[: count - 1])
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


#: The fields of a workload, and the words that those hold which are no numbers.
FIELDS: tuple[str, ...] = tuple(field.name for field in fields(Workload))
WORDS: dict[str, tuple[Any, ...]] = {
    "mode": ("forward", "train", "decode"),
    "side": ("none", "left", "right", "packed"),
    "spread": ("uniform", "skewed", "same"),
    "memory": ("transposed", "concatenated"),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
}
