"""What it costs to clear padding for FlashAttention-3, by how the kernel for it is launched.

Run from the repository's root on a GPU: ``python -m benchmarks.tails``. "jit" is Triton's own way,
which looks at every argument of each launch; "built" launches what it built the last time. It keeps
NaN among the values from tiles ("values"), and writes zeros for the padding's outputs ("all"); the
latter beside filling a tensor of as many elements by torch ("zeros").
"""

from __future__ import annotations

import argparse
from unittest import mock

import numpy as np
import torch

from smartattn import tails
from smartattn.layouts import used_layout
from smartattn.plan import Pattern, Plan
from smartattn.timing import interleaved
from smartattn.triton_launch import Launcher

from . import common

#: (batch, kv_len, kv_heads, head_dim).
SHAPES = ((8, 512, 16, 64), (32, 512, 8, 128), (8, 2048, 32, 128), (128, 128, 16, 64))
ROUNDS, SECONDS = 15, 0.5


def main() -> None:
    """Prints a table."""
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := tails.unavailable(device)) is not None:
        raise SystemExit(reason)
    rows = []
    for batch, kv_len, heads, dim in SHAPES:
        lengths = np.random.default_rng(0).integers(1, kv_len, batch, endpoint=True)
        real = np.arange(kv_len) < lengths[:, None]
        plan = Plan(batch, kv_len, kv_len, Pattern.BIDIRECTIONAL, device, real=real)
        layout = used_layout(plan, True, kv_len)
        assert layout.gaps is not None
        values = torch.randn(batch * kv_len, heads, dim, dtype=torch.bfloat16, device=device)
        output = torch.empty_like(values)
        padding = torch.empty(int((~real).sum()), heads, dim, dtype=values.dtype, device=device)
        jit = Launcher("clear_kernel", *tails._launcher._constants)
        jit._direct = False

        def by_triton(launcher: Launcher = jit) -> None:
            with mock.patch.object(tails, "_launcher", launcher):
                tails.clear(layout, values)  # noqa: B023

        functions = {
            "jit": by_triton,
            "values": lambda: tails.clear(layout, values),  # noqa: B023
            "all": lambda: tails.clear(layout, values, output),  # noqa: B023
            "zeros": padding.zero_,
        }
        for function in functions.values():
            function()
        times = interleaved(functions, device, max_rounds=ROUNDS, seconds=SECONDS, spread=0.0)
        shown = [f"{one.host_us:.1f}, {one.device_us:.1f}" for one in times.values()]
        rows.append((f"{batch}x{kv_len} {heads}x{dim}", *shown))
    print(f"{torch.cuda.get_device_name(device)}: host, device\n")
    print(common.markdown(("values", *functions), rows))


if __name__ == "__main__":
    main()
