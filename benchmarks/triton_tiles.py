"""Tiles for ``triton_varlen``: which are fastest, by head size and length, beside other backends.

Run from the repository's root on a GPU: ``python -m benchmarks.triton_tiles``. A tile is given as
rows x keys, warps of a program, and tiles of keys on their way; the one that the backend takes by
itself is marked. Microseconds of the device with the caches flushed, and over the best backend of
another name.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch

from smartattn.backends import BACKENDS, NAMED, triton_varlen
from smartattn.measure import candidates, runner
from smartattn.timing import cache_flush, interleaved
from smartattn.workload import Side, Workload, as_padded

from . import common

#: By head_dim up to which they are tried.
TILES = {
    64: ((64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (64, 32, 4, 2)),
    128: ((64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (64, 32, 4, 2)),
    256: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 3), (128, 32, 8, 2)),
}
#: (causal, side, batch, length, heads, key/value heads, head_dim)
SHAPES: tuple[tuple[bool, Side, int, int, int, int, int], ...] = (
    (False, "right", 128, 128, 16, 16, 64),
    (False, "right", 32, 256, 16, 16, 64),
    (False, "right", 128, 512, 16, 16, 64),
    (False, "right", 8, 1024, 16, 16, 64),
    (False, "right", 4, 4096, 16, 16, 64),
    (True, "left", 32, 128, 32, 8, 64),
    (True, "left", 8, 512, 32, 8, 64),
    (True, "left", 8, 2048, 32, 8, 64),
    (True, "right", 8, 2048, 16, 16, 64),
    (True, "left", 16, 512, 20, 20, 80),
    (False, "right", 32, 512, 12, 12, 96),
    (False, "right", 8, 512, 16, 16, 128),
    (True, "left", 8, 512, 32, 8, 128),
    (True, "left", 8, 2048, 32, 8, 128),
    (True, "right", 8, 1024, 16, 16, 128),
    (False, "right", 16, 512, 8, 8, 256),
    (True, "left", 16, 512, 8, 4, 256),
)


def row(workload: Workload, device: torch.device, seconds: float) -> tuple[str, ...]:
    """One row of the table: the shape, the best other backend, and a cell per tile."""
    plan, call, tensors = workload.plan(device), workload.call(device), workload.tensors(device)
    ours = NAMED["triton_varlen"]
    if reasons := ours.refusals(plan, call):
        raise SystemExit("; ".join(reasons))
    functions: dict[str, Any] = {
        backend.name: runner(backend, plan, call, tensors)
        for backend in candidates(plan, call, BACKENDS, {})
        if backend is not ours
    }
    taken = (64, triton_varlen._keys(plan, call), 4, 3 if call.head_dim <= 128 else 2)
    tiles = next(tiles for largest, tiles in TILES.items() if call.head_dim <= largest)
    for rows, keys, warps, stages in tiles:
        with mock.patch.multiple(
            triton_varlen,
            _ROWS=rows,
            _WARPS=warps,
            _STAGES=stages,
            _FEW_STAGES=stages,
            _keys=lambda plan, call, keys=keys: keys,
        ):
            # What is looked up when a layer runs is the number of warps alone, for a first build.
            functions[f"{rows}x{keys}, {warps}, {stages}"] = first = runner(
                ours, plan, call, tensors
            )
            first()
    for function in functions.values():
        function()
    times = interleaved(functions, device, seconds=seconds, flush=cache_flush(device))
    us = {name: timing.device_us for name, timing in times.items()}
    best = min(us[name] for name in us if name in NAMED)
    cells = []
    for tile in tiles:
        name = "{}x{}, {}, {}".format(*tile)
        mark = " *" if tile == taken else ""
        cells.append(f"{name}: {us[name]:.1f} ({us[name] / best:.2f}){mark}")
    other = min((name for name in us if name in NAMED), key=lambda name: us[name])
    return str(workload), f"{other} {best:.1f}", "; ".join(cells)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=0.2, help="per call")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for causal, side, batch, length, heads, kv_heads, dim in SHAPES:
        memory = "concatenated" if side == "left" else "transposed"
        workload = as_padded(
            Workload(
                "forward",
                causal,
                side,
                "bfloat16",
                batch,
                length,
                length,
                heads,
                kv_heads,
                dim,
                padding_share=0.5,
                memory=memory,
            )
        )
        rows.append(row(workload, device, arguments.seconds))
        print(" | ".join(rows[-1]), flush=True)
    print(f"\n{torch.cuda.get_device_name(device)}\n")
    print(common.markdown(("call", "best of the others", "tiles"), rows))


if __name__ == "__main__":
    main()
