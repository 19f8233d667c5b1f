"""What FlashAttention-3 could be told beside its batch: the work's schedule, and heads kept apart.

Run from the repository's root on a Hopper GPU: ``python -m benchmarks.flash_3``. Calls whose rows
are of several lengths are scheduled by a kernel of their own, unless they bring the schedule along
(``schedule``), which all layers of a forward could share. The heads of a group share a tile in such
calls, which short sequences need, and which takes another way to load queries (``apart``: they do
not). Padding between sequences is left out if the queries in use are told (``used``), where
zeros are written and NaN is cleared by a kernel of smartattn; it is given as sequences of its own
otherwise, or the first key of each row is (``bounds``). Microseconds of the host and the device,
beside what is asked for without a word.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smartattn import tails
from smartattn.backends import flash_attention_3
from smartattn.layouts import used_layout
from smartattn.plan import Pattern, Plan
from smartattn.timing import interleaved

from . import common

FORMS = ("now", "schedule", "apart", "schedule, apart", "used", "used, apart", "bounds")
#: Largest difference of two forms, relative to the largest value.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Shape:
    """A call with lengths drawn uniformly, half of the tokens being padding.

    ``how``: "decode" and "prefill" give first and last keys of padded rows, "packed" sequences, and
    "in place" sequences in left-padded rows, with the padding as sequences without keys.
    """

    how: str
    causal: bool
    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int


SHAPES = (
    Shape("decode", False, 8, 512, 32, 8, 64),
    Shape("decode", False, 32, 2048, 32, 8, 64),
    Shape("decode", False, 8, 8192, 32, 8, 64),
    Shape("decode", False, 64, 1024, 32, 8, 128),
    Shape("decode", False, 8, 2048, 16, 16, 64),
    Shape("prefill", True, 8, 256, 32, 8, 64),
    Shape("prefill", True, 8, 1024, 32, 8, 128),
    Shape("prefill", True, 4, 16384, 32, 8, 64),
    Shape("in place", True, 8, 512, 32, 8, 128),
    Shape("in place", True, 32, 512, 16, 16, 128),
    Shape("in place", True, 8, 1024, 32, 8, 128),
    Shape("in place", True, 8, 2048, 32, 8, 64),
    Shape("in place", True, 8, 4096, 32, 8, 64),
    Shape("in place", True, 4, 16384, 32, 8, 64),
    Shape("in place", True, 4, 16384, 32, 8, 128),
    Shape("packed", True, 8, 256, 32, 8, 64),
    Shape("packed", True, 32, 512, 32, 8, 128),
    Shape("packed", True, 8, 4096, 32, 8, 64),
    Shape("packed", True, 4, 16384, 32, 8, 64),
    Shape("packed", True, 4, 16384, 32, 8, 128),
    Shape("packed", False, 32, 128, 16, 16, 64),
    Shape("packed", False, 128, 512, 16, 16, 64),
)


def forms(shape: Shape, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to ask for a call, which differ in nothing but speed."""
    operator, reason = flash_attention_3._operator()
    if reason is not None:
        raise SystemExit(reason)
    rng = np.random.default_rng(shape.length + shape.batch)
    lengths = rng.integers(1, shape.length, shape.batch, endpoint=True)

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

    def states(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16, device=device)

    given = dict.fromkeys(flash_attention_3._ARGUMENTS)
    given |= {
        "softmax_scale": shape.dim**-0.5,
        "is_causal": shape.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "attention_chunk": 0,
        "softcap": 0.0,
        "is_rotary_interleaved": False,
        "num_splits": 0 if shape.how == "decode" else 1,
        "sm_margin": 0,
    }
    if shape.how == "packed":
        total, longest = int(lengths.sum()), int(lengths.max())
        bounds = integers([0, *np.cumsum(lengths)])
        queries, keys = (total, shape.heads, shape.dim), (total, shape.kv_heads, shape.dim)
        given |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        given |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        used, q_len, kv_len = integers(lengths), longest, longest
    elif shape.how == "in place":
        total, longest = shape.batch * shape.length, shape.length
        starts = np.arange(shape.batch) * longest
        ends = starts + longest
        bounds = integers([0, *np.stack([ends - lengths, ends], 1).reshape(-1), total])
        queries, keys = (total, shape.heads, shape.dim), (total, shape.kv_heads, shape.dim)
        used = np.zeros(2 * shape.batch + 1)
        used[1::2] = lengths
        given |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "seqused_k": integers(used)}
        given |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        used, q_len, kv_len = integers(used), longest, longest
    else:
        q_len, kv_len = 1 if shape.how == "decode" else shape.length, shape.length
        queries = (shape.batch, q_len, shape.heads, shape.dim)
        keys = (shape.batch, kv_len, shape.kv_heads, shape.dim)
        used = integers(np.full(shape.batch, kv_len))
        given |= {"seqused_k": used, "leftpad_k": integers(kv_len - lengths)}
    given |= {"q": states(*queries), "k": states(*keys), "v": states(*keys)}

    def schedule(pack_gqa: bool | None) -> torch.Tensor:
        namespace = getattr(torch.ops, operator.namespace)
        made: torch.Tensor = namespace.get_scheduler_metadata(
            len(used), q_len, kv_len, shape.heads, shape.kv_heads, shape.dim, shape.dim,
            torch.bfloat16, used, given["cu_seqlens_q"], None, None, None, given["leftpad_k"],
            None, 0, shape.causal, -1, -1, 0, False, given["num_splits"], pack_gqa, 0,
        )  # fmt: skip
        return made

    def told(pack_gqa: bool | None) -> Callable[[], torch.Tensor]:
        """What :mod:`smartattn.backends.flash_attention_3` does in place."""
        real = np.arange(shape.length) >= shape.length - lengths[:, None]
        plan = Plan(
            shape.batch, shape.length, shape.length,
            Pattern.CAUSAL if shape.causal else Pattern.BIDIRECTIONAL, device, real=real,
        )  # fmt: skip
        layout = used_layout(plan, True, shape.length)
        options = given | {"pack_gqa": pack_gqa, "seqused_q": layout.used_q}
        options |= {"cu_seqlens_q": layout.cu_seqlens_q, "cu_seqlens_k": layout.cu_seqlens_k}
        options |= {"seqused_k": layout.used_k}

        def call() -> torch.Tensor:
            output = torch.empty_like(given["q"])
            tails.clear(layout, given["v"], output)
            made: torch.Tensor = operator(*(options | {"out": output}).values())[0]
            return made

        return call

    def bounded() -> Callable[[], torch.Tensor]:
        """With the first key of each row, beside which nothing need be cleared."""
        whole = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device)
        rows = {name: given[name].unflatten(0, (shape.batch, -1)) for name in "qkv"}
        none = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        first = {"seqused_k": whole, "leftpad_k": integers(shape.length - lengths)}
        values = tuple((given | rows | dict.fromkeys(none) | first).values())
        return lambda: operator(*values)[0].flatten(0, 1)

    def asked(name: str) -> Callable[[], torch.Tensor]:
        pack_gqa = False if "apart" in name else None
        if "used" in name:
            return told(pack_gqa)
        if name == "bounds":
            return bounded()
        metadata = schedule(pack_gqa) if "schedule" in name else None
        options = given | {"pack_gqa": pack_gqa, "scheduler_metadata": metadata}
        values = tuple(options.values())
        return lambda: operator(*values)[0]

    in_place = shape.how == "in place"
    names = [name for name in FORMS if in_place or not name.startswith(("used", "bounds"))]
    grouped = shape.heads > shape.kv_heads
    return {name: asked(name) for name in names if grouped or "apart" not in name}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", default="", help="those that are asked in this way")
    parser.add_argument("--seconds", type=float, default=0.3, help="per call")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for shape in SHAPES:
        if not shape.how.startswith(arguments.only):
            continue
        made = forms(shape, device)
        reference = made["now"]()
        cells, working = {}, {}
        for name, call in made.items():
            try:
                output = call()
            except RuntimeError as error:
                cells[name] = str(error).splitlines()[0][:60]
                continue
            wrong = float((output - reference).abs().max() / reference.abs().max())
            if not wrong <= _TOLERANCE:
                cells[name] = f"wrong by {wrong:.1e}"
            else:
                working[name] = call
        times = interleaved(working, device, max_rounds=15, seconds=arguments.seconds, spread=0.01)
        for name, one in times.items():
            # A schedule is used again and again, and must not wear out.
            wrong = float((working[name]() - reference).abs().max() / reference.abs().max())
            if not wrong <= _TOLERANCE:
                cells[name] = f"wrong by {wrong:.1e} after use"
                continue
            over = one.device_us / times["now"].device_us
            cells[name] = f"{one.host_us:.1f}, {one.device_us:.1f} ({over:.3f})"
        pattern = "causal" if shape.causal else "all keys"
        label = f"{shape.how} {pattern} {shape.batch}x{shape.length} "
        label += f"{shape.heads}/{shape.kv_heads}x{shape.dim}"
        rows.append((label, *(cells.get(name, "-") for name in FORMS)))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    print(f"\n{torch.cuda.get_device_name(device)}: host, device (over now)\n")
    print(common.markdown(("call", *FORMS), rows))


if __name__ == "__main__":
    main()
