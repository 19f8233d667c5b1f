"""What it costs to keep NaN in the padding from FlashAttention-3, by how its kernel is launched.

Run from the repository's root on a GPU: ``python -m benchmarks.tails``. "jit" is Triton's own way,
which looks at every argument of each launch; "built" launches what it built the last time.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from smartattn import tails
from smartattn.layouts import in_place_layout
from smartattn.plan import Pattern, Plan
from smartattn.timing import interleaved

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
    from smartattn.triton_kernels import clear_kernel

    rows = []
    for batch, kv_len, heads, dim in SHAPES:
        lengths = np.random.default_rng(0).integers(1, kv_len, batch, endpoint=True)
        real = np.arange(kv_len) < lengths[:, None]
        plan = Plan(batch, kv_len, kv_len, Pattern.BIDIRECTIONAL, device, real=real)
        layout = in_place_layout(plan, True, True, kv_len)
        bounds = layout.tails
        assert bounds is not None
        values = torch.randn(batch * kv_len, heads, dim, dtype=torch.bfloat16, device=device)
        launch = tails._Launch.of(*values.stride()[:2], heads, dim)
        grid = (len(bounds) // 2, *launch.programs)
        tokens, elements = launch.sizes

        def jit() -> None:
            with torch.cuda.device(device):
                clear_kernel[grid](  # noqa: B023
                    values, bounds, *launch.strides,  # noqa: B023
                    TOKENS=tokens, ELEMENTS=elements,  # noqa: B023
                )  # fmt: skip

        def built() -> None:
            tails.clear_tails(values, layout)  # noqa: B023

        for function in (jit, built, built):
            function()
        times = interleaved(
            {"jit": jit, "built": built}, device, max_rounds=ROUNDS, seconds=SECONDS, spread=0.0
        )
        shown = [times["jit"].host_us, times["built"].host_us]
        shown += [times["jit"].device_us, times["built"].device_us]
        rows.append((f"{batch}x{kv_len} {heads}x{dim}", *(f"{us:.1f}" for us in shown)))
    print(torch.cuda.get_device_name(device))
    header = ("values", "host, jit", "host, built", "device, jit", "device, built")
    print(common.markdown(header, rows))


if __name__ == "__main__":
    main()
