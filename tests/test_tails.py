"""Launching the kernel that clears tails; what it computes is tested on GPUs."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smartattn import tails, triton_launch
from smartattn.backends.flash_attention_3 import FlashAttention3Backend
from smartattn.call import Call
from smartattn.layouts import LONGEST_TILE
from smartattn.plan import Pattern, Plan
from smartattn.triton_launch import Launcher


class Kernel:
    """What Triton gives for one set of facts."""

    function, packed_metadata = "function", (4, 1, 0)

    def __init__(self, launched: list[Any], refuses: bool) -> None:
        self.launched, self.refuses = launched, refuses

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        if self.refuses:
            raise TypeError("function takes exactly 9 arguments (8 given)")
        function, metadata, *hooks = rest[:5]
        assert (stream, function, metadata) == (7, self.function, self.packed_metadata)
        assert hooks == [None, None, None]
        self.launched.append(("built", self, (x, y, z), rest[5:]))


class Triton:
    """A jitted function that builds a kernel at every call."""

    def __init__(self, refuses: bool = False) -> None:
        self.launched: list[Any] = []
        self.refuses = refuses

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(
            *arguments: Any, TOKENS: int, ELEMENTS: int, RUN: int, enable_fp_fusion: bool
        ) -> Kernel:
            assert enable_fp_fusion
            kernel = Kernel(self.launched, self.refuses)
            self.launched.append(("jit", kernel, grid, (*arguments, TOKENS, ELEMENTS, RUN)))
            return kernel

        return launch


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Triton:
    made = Triton()
    module = SimpleNamespace(clear_kernel=made)
    monkeypatch.setitem(sys.modules, "smartattn.triton_kernels", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(tails, "_launcher", Launcher("clear_kernel", "TOKENS", "ELEMENTS", "RUN"))
    return made


def values(shift: int = 0, heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(12, heads, 64), ``shift`` elements behind an address that is a multiple of 64."""
    states = torch.zeros(12 * heads * 64 + shift, dtype=dtype)
    assert states.data_ptr() % 64 == 0
    return states[shift:].view(12, heads, 64)


def head_major(heads: int = 2) -> torch.Tensor:
    """(12, heads, 64) values of which those of a head follow each other."""
    return torch.zeros(heads, 12, 64, dtype=torch.bfloat16).transpose(0, 1)


GAPS = torch.tensor([[3, 4, 0, 0], [7, 12, 0, 0]], dtype=torch.int32)


def test_what_was_built_is_launched_again_with_the_same_arguments(triton: Triton) -> None:
    first, second, output = values(), values(), torch.zeros(12, 4, 64, dtype=torch.bfloat16)
    other_gaps = torch.cat([GAPS, GAPS])[1:]
    tails._clear(GAPS, first, output, 5)
    tails._clear(other_gaps, second, output, 65)
    (how, built, grid, given), (again, same, grid_again, given_again) = triton.launched
    assert (how, again) == ("jit", "built")
    assert same is built
    assert given[0] is first
    assert given[1] is output
    assert given[2] is GAPS
    # What was built is handed addresses.
    assert given_again[:3] == tuple(one.data_ptr() for one in (second, output, other_gaps))
    # Programs for the values of a gap, and for as many elements of its outputs.
    tails_of_a_gap = LONGEST_TILE // 64
    assert (given[3], given_again[3]) == (tails_of_a_gap + 1, tails_of_a_gap + 3)
    assert (grid, grid_again) == ((2 * given[3], 1, 1), (3 * given_again[3], 1, 1))
    assert given[4:] == given_again[4:] == (128, 64, 128, 1, tails_of_a_gap, 256, 64, 128, 8192)


@pytest.mark.parametrize(
    "other",
    [values(shift=1), values(heads=1), values(dtype=torch.float16), head_major()],
    ids=["address", "heads", "dtype", "strides"],
)
def test_a_kernel_serves_what_it_was_built_for_alone(triton: Triton, other: torch.Tensor) -> None:
    output = values(heads=4)
    tails._clear(GAPS, values(), output, 0)
    tails._clear(GAPS, other, output, 0)
    assert [how for how, *_ in triton.launched] == ["jit", "jit"]


def test_a_kernel_serves_outputs_as_it_was_built_for_alone(triton: Triton) -> None:
    outputs = [values(), values(shift=1), values(heads=4)]
    for output in outputs:
        tails._clear(GAPS, values(), output, 1)
    assert [how for how, *_ in triton.launched] == ["jit", "jit", "jit"]


def covered(states: torch.Tensor, grid: tuple[int, int, int], given: Any) -> torch.Tensor:
    """How often the programs of a launch visit each place in a gap of ``LONGEST_TILE`` tokens."""
    pieces, token_stride, part_stride, width, shares, count, _, tokens, elements, _ = given[3:]
    assert (count, grid) == (pieces, (len(GAPS) * pieces, 1, 1))
    seen = torch.zeros(states.untyped_storage().nbytes() // states.itemsize, dtype=torch.int64)
    blocks = -(-width // elements)
    for piece in range(pieces):
        step, place = divmod(piece, shares)
        token = (step * tokens + torch.arange(tokens))[:, None]
        element = (place % blocks * elements + torch.arange(elements))[None]
        offset = token * token_stride + place // blocks * part_stride + element
        seen[offset[(token < LONGEST_TILE) & (element < width)]] += 1
    return torch.as_strided(seen, states.shape, states.stride())


@pytest.mark.parametrize("layout", ["tokens first", "heads first", "beside queries", "one head"])
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 80), (16, 64), (20, 128), (4, 256)])
def test_programs_see_every_element_of_a_gap_once(
    triton: Triton, layout: str, heads: int, dim: int
) -> None:
    shape = (LONGEST_TILE, heads, dim)
    if layout == "tokens first":
        states = torch.zeros(shape)
    elif layout == "heads first":
        states = torch.zeros(heads, LONGEST_TILE, dim).transpose(0, 1)
    elif layout == "beside queries":
        states = torch.zeros(LONGEST_TILE, 3, heads, dim)[:, 0]
    else:
        states = torch.zeros(LONGEST_TILE, heads, dim)[:, :1]
    tails._clear(GAPS, states, None, 0)
    ((_, _, grid, given),) = triton.launched
    assert bool((covered(states, grid, given) == 1).all())
    assert given[-3] * given[-2] <= 8192


def test_a_launcher_that_takes_other_arguments_is_not_asked_twice(triton: Triton) -> None:
    triton.refuses = True
    for _ in range(3):
        tails._clear(GAPS, values(), None, 0)
    assert [how for how, *_ in triton.launched] == ["jit", "jit", "jit"]


def test_kernels_of_many_shapes_are_forgotten(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "_MOST", 2)
    for heads in (1, 2, 3):
        tails._clear(GAPS, values(heads=heads), None, 0)
    assert len(tails._launcher._built) == 1
    tails._clear(GAPS, values(heads=3), None, 0)
    assert [how for how, *_ in triton.launched] == ["jit", "jit", "jit", "built"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), NotImplementedError),
        (RuntimeError("Failed to find C compiler"), NotImplementedError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_what_triton_cannot_build_is_not_supported(
    triton: Triton, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    """Such an error leaves the backend out; any other one would end the forward."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(
        triton, "__class__", type("Failing", (Triton,), {"__getitem__": lambda *_: fail})
    )
    with pytest.raises(raised) as caught:
        tails._clear(GAPS, values(), None, 0)
    assert type(caught.value) is raised
    assert str(error.args[-1]) in str(caught.value)


class Elsewhere:
    """A tensor on the second GPU."""

    device = SimpleNamespace(index=1)

    def __init__(self, states: torch.Tensor) -> None:
        self._states = states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._states, name)


def test_what_is_launched_stays_loaded(triton: Triton) -> None:
    """Triton unloads a function with the kernel that nothing refers to any more."""
    tails._clear(GAPS, values(), None, 0)
    kernel = weakref.ref(triton.launched.pop()[1])
    gc.collect()
    assert kernel() is not None


def test_each_device_has_its_kernels_and_its_context(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Any] = []

    class Context:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Context)
    there: Any = Elsewhere(values())
    tails._clear(GAPS, values(), None, 0)
    assert entered == []
    tails._clear(GAPS, there, None, 0)
    assert entered == [there.device]
    assert [how for how, *_ in triton.launched] == ["jit", "jit"]


def test_a_device_without_a_number_is_the_current_one(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {1: 7}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    without: Any = Elsewhere(values())
    without.device = SimpleNamespace(index=None)
    for there in (without, without, Elsewhere(values())):
        tails._clear(GAPS, there, None, 0)
    assert [how for how, *_ in triton.launched] == ["jit", "built", "built"]
    (kind,) = (kind for _, kind in tails._launcher._built)
    built = tails._launcher.built(without.device, kind)
    assert built is not None
    assert built.kernel is triton.launched[0][1]


@pytest.mark.parametrize("pattern", [Pattern.CAUSAL, Pattern.BIDIRECTIONAL])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("window", [None, 16])
def test_no_tile_is_longer_than_what_is_cleared(
    pattern: Pattern, dim: int, window: int | None
) -> None:
    real = np.arange(256) < np.array([[256], [100]])
    device = torch.device("cuda")
    plan = Plan(2, 256, 256, pattern, device, real=real, window=window)
    call = Call(device, torch.bfloat16, 2, 256, 256, 8, 8, dim, dim, self_attention=True)
    assert FlashAttention3Backend().tile(plan, call)[1] <= LONGEST_TILE
