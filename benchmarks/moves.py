"""Copies between padded and packed tensors: torch's own operations and smartattn's kernel.

Run from the repository's root on a GPU: ``python -m benchmarks.moves``. "cache" puts the keys of a
packed forward into a padded cache, as concatenating them to an empty one does; "tokens" puts hidden
states back; "gather" takes the real tokens of heads that follow each other out. What comes
out is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch

from smartattn import moves
from smartattn.packing import scatter
from smartattn.plan import Pattern, Plan
from smartattn.timing import interleaved

from . import common

#: (batch, length, heads, head_dim), a heading of heads = 1 is of hidden states.
SHAPES = ((8, 512, 8, 128), (8, 4096, 8, 64), (4, 16384, 8, 64), (32, 2048, 8, 128))
WIDTHS = (1024, 2048)
ROUNDS, SECONDS = 15, 0.4

Task = tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor], int]


def tasks(device: torch.device) -> Iterator[Task]:
    """(what, by torch, by the kernel, bytes that have to be moved)."""
    for batch, length, heads, dim in SHAPES:
        lengths = np.random.default_rng(0).integers(1, length, batch, endpoint=True)
        real = np.arange(length) < lengths[:, None]
        plan = Plan(batch, length, length, Pattern.CAUSAL, device, real=real)
        index, sources = plan.varlen(True).q_index, plan.sources(True)
        assert index is not None
        total, places = len(index), batch * length
        name = f"{batch}x{length} {heads}x{dim}, {total:,} real"
        keys = torch.randn(1, total, heads, dim, dtype=torch.bfloat16, device=device)
        empty = torch.tensor([], dtype=keys.dtype, device=device)

        def cache() -> torch.Tensor:
            padded = scatter(keys[0], index, batch, length)  # noqa: B023
            return torch.cat([empty, padded.transpose(1, 2)], dim=-2)  # noqa: B023

        def moved_cache() -> torch.Tensor:
            padded = keys.new_empty(batch, heads, length, dim)  # noqa: B023
            assert moves.moved(keys, sources, padded.transpose(1, 2))  # noqa: B023
            return padded

        yield f"cache {name}", cache, moved_cache, 2 * heads * dim * (total + places)
        held = moved_cache().transpose(1, 2)

        def gather() -> torch.Tensor:
            return held[index // length, index % length]  # noqa: B023

        def moved_gather() -> torch.Tensor:
            packed = keys.new_empty(keys.shape)  # noqa: B023
            assert moves.moved(held, index, packed)  # noqa: B023
            return packed[0]

        yield f"gather {name}", gather, moved_gather, 4 * heads * dim * total
        for width in WIDTHS:
            tokens = torch.randn(total, 1, width, dtype=torch.bfloat16, device=device)

            def put() -> torch.Tensor:
                return scatter(tokens, index, batch, length)  # noqa: B023

            def moved() -> torch.Tensor:
                return scatter(tokens, index, batch, length, sources)  # noqa: B023

            what = f"tokens {batch}x{length} of {width}, {total:,} real"
            yield what, put, moved, 2 * width * (total + places)


def main() -> None:
    """Prints a table."""
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := moves.unavailable(device)) is not None:
        raise SystemExit(reason)
    rows = []
    for what, by_torch, by_kernel, size in tasks(device):
        assert torch.equal(by_torch(), by_kernel()), what
        functions = {"torch": by_torch, "kernel": by_kernel}
        times = interleaved(functions, device, max_rounds=ROUNDS, seconds=SECONDS, spread=0.0)
        shown = [f"{one.host_us:.1f}, {one.device_us:.1f}" for one in times.values()]
        rows.append((what, *shown, f"{size / times['kernel'].device_us / 1e6:.2f}"))
    print(f"{torch.cuda.get_device_name(device)}: host, device microseconds\n")
    print(common.markdown(("copies", "torch", "kernel", "kernel TB/s"), rows))


if __name__ == "__main__":
    main()
