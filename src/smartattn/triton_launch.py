"""Launches Triton's kernels by what was built the last time, which takes the host half as long."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from .machine import one_line

#: Kinds of launches that are remembered for each kernel.
_MOST = 1024


def hindrance(launch: Callable[[], object]) -> str | None:
    """Why a first launch cannot be, None if it can; what it computes is not waited for."""
    try:
        launch()
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        return str(error)
    except RuntimeError as error:  # of the driver
        return f"no Triton kernel can be launched: {one_line(str(error))}"
    return None


class Built(NamedTuple):
    """What Triton has built for one kind of launches.

    Called as torch's Inductor calls it, but for Triton's hooks for profilers, which are told of the
    first launch alone. Source: TritonCompileResult.make_launcher in
    torch/_inductor/runtime/triton_heuristics.py.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    #: Unloads the function when nothing refers to it any more.
    kernel: Any

    def launch(self, grid: tuple[int, int, int], stream: int, arguments: tuple[Any, ...]) -> None:
        """Launches on a stream of the current device, with addresses for tensors."""
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *arguments)


class Launcher:
    """One kernel, and what Triton has built of it so far.

    Triton's own way to a built kernel looks at every argument of every launch, and what was built
    asks the driver about every tensor, but not about addresses.

    Args:
        kernel: the name of a function in ``smartattn.triton_kernels``, which is imported when the
            first one is launched: not every machine has Triton.
        constants: the names of its last parameters, those that a kernel is built for.
    """

    def __init__(self, kernel: str, *constants: str) -> None:
        self._kernel = kernel
        self._constants = constants
        self._built: dict[Hashable, Built] = {}
        self._direct = True

    def __call__(
        self,
        device: torch.device,
        kind: Hashable,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        arguments: tuple[Any, ...],
        **options: int,
    ) -> None:
        """Launches on the current stream of a device.

        Args:
            device: the current one if it has no number.
            kind: what Triton builds kernels for, beside the device: dtypes, whether addresses are
                multiples of 16, the constants, and of integers that it is not told to take as they
                come the size, multiplicity and whether they are 1.
            tensors: for the first parameters of the kernel.
            arguments: for all of them in their order, with the addresses of those tensors.
            options: of a build, such as ``num_warps``.

        Raises:
            NotImplementedError: Triton cannot build the kernel here.
        """
        current = torch.cuda.current_device()
        index = current if device.index is None else device.index
        if index == current:
            return self._launch(index, kind, grid, tensors, arguments, options)
        with torch.cuda.device(device):
            return self._launch(index, kind, grid, tensors, arguments, options)

    def built(self, device: torch.device, kind: Hashable) -> Built | None:
        """What Triton has built for a kind on a device, None if nothing has."""
        index = torch.cuda.current_device() if device.index is None else device.index
        return self._built.get((index, kind))

    def _launch(
        self,
        device: int,
        kind: Hashable,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        arguments: tuple[Any, ...],
        options: dict[str, int],
    ) -> None:
        known = self._built.get((device, kind))
        if known is not None:
            try:
                known.launch(grid, torch._C._cuda_getCurrentRawStream(device), arguments)
            except TypeError:
                # The launcher of another version takes other arguments.
                self._built.clear()
                self._direct = False
            else:
                return
        count = len(arguments) - len(self._constants)
        constants = dict(zip(self._constants, arguments[count:], strict=True))
        given = (*tensors, *arguments[len(tensors) : count])
        try:
            kernels = importlib.import_module("smartattn.triton_kernels")
            built = getattr(kernels, self._kernel)[grid](*given, **constants, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # No compiler, a full disk, too little shared memory: only what CUDA reports is no
            # matter of the build.
            if "CUDA" in str(error):
                raise
            said = one_line(f"{type(error).__name__}: {error}")
            raise NotImplementedError(f"no Triton kernel can be built: {said}") from error
        # An interpreter returns nothing.
        if self._direct and built is not None:
            if len(self._built) >= _MOST:
                self._built.clear()
            found = Built(built.run, built.function, built.packed_metadata, built)
            self._built[device, kind] = found
