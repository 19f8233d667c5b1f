"""Launching the kernel that clears tails; what it computes is tested on GPUs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smartattn import tails
from smartattn.layouts import LONGEST_TILE


class Kernel:
    """What Triton gives for one set of facts."""

    def __init__(self, launched: list[Any], refuses: bool) -> None:
        self.launched, self.refuses = launched, refuses

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any) -> None:
            if self.refuses:
                raise TypeError("function takes exactly 9 arguments (8 given)")
            self.launched.append(("built", self, grid, arguments))

        return launch


class Triton:
    """A jitted function that builds a kernel at every call."""

    def __init__(self, refuses: bool = False) -> None:
        self.launched: list[Any] = []
        self.refuses = refuses

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, TOKENS: int, ELEMENTS: int) -> Kernel:
            kernel = Kernel(self.launched, self.refuses)
            self.launched.append(("jit", kernel, grid, (*arguments, TOKENS, ELEMENTS)))
            return kernel

        return launch


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Triton:
    made = Triton()
    module = SimpleNamespace(clear_kernel=made)
    monkeypatch.setitem(sys.modules, "smartattn.triton_kernels", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(tails, "_built", {})
    return made


def values(shift: int = 0, heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(12, heads, 64), ``shift`` elements behind an address that is a multiple of 64."""
    states = torch.zeros(12 * heads * 64 + shift, dtype=dtype)
    assert states.data_ptr() % 64 == 0
    return states[shift:].view(12, heads, 64)


BOUNDS = torch.tensor([3, 4, 7, 12], dtype=torch.int32)


def test_what_was_built_is_launched_again_with_the_same_arguments(triton: Triton) -> None:
    first, second = values(), values()
    tails._clear(first, BOUNDS)
    tails._clear(second, BOUNDS)
    (how, built, grid, given), (again, same, grid_again, given_again) = triton.launched
    assert (how, again) == ("jit", "built")
    assert same is built
    assert grid == grid_again == (2, LONGEST_TILE // 8, 1)
    assert given[0] is first
    assert given_again[0] is second
    assert given[1] is given_again[1] is BOUNDS
    assert given[2:] == given_again[2:] == (128, 64, 128, 64, 8, 1024)


@pytest.mark.parametrize(
    "other",
    [
        (values(shift=1), BOUNDS),
        (values(heads=1), BOUNDS),
        (values(dtype=torch.float16), BOUNDS),
        (values(), torch.cat([BOUNDS, BOUNDS])[1:5]),
        (values().transpose(0, 1).contiguous().transpose(0, 1), BOUNDS),
    ],
    ids=["address", "heads", "dtype", "address of the bounds", "strides"],
)
def test_a_kernel_serves_what_it_was_built_for_alone(
    triton: Triton, other: tuple[torch.Tensor, torch.Tensor]
) -> None:
    tails._clear(values(), BOUNDS)
    tails._clear(*other)
    assert [how for how, *_ in triton.launched] == ["jit", "jit"]


def test_a_launcher_that_takes_other_arguments_is_not_asked_twice(triton: Triton) -> None:
    triton.refuses = True
    for _ in range(3):
        tails._clear(values(), BOUNDS)
    assert [how for how, *_ in triton.launched] == ["jit", "jit", "jit"]
    assert list(tails._built.values()) == [None]


def test_kernels_of_many_shapes_are_forgotten(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "_MAX_BUILT", 2)
    for heads in (1, 2, 3):
        tails._clear(values(heads=heads), BOUNDS)
    assert len(tails._built) == 1
    tails._clear(values(heads=3), BOUNDS)
    assert [how for how, *_ in triton.launched] == ["jit", "jit", "jit", "built"]
