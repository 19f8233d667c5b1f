"""Shows the difference between before.py and after.py, that they agree, and what each costs.

Both run in this process, in alternating rounds. Exits with 1 if a score differs by over 1e-5.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import after
import before
import smartattn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from compare import interleaved, pick_device  # noqa: E402

TOLERANCE = 1e-5


def main() -> int:
    old, new = ((HERE / name).read_text().splitlines() for name in ("before.py", "after.py"))
    print("\n".join(difflib.unified_diff(old, new, "before.py", "after.py", lineterm="", n=1)))
    device = pick_device()
    plain, smart = before.load(), after.load()
    expected = before.rank(*plain)
    with smartattn.trace() as trace:
        ranking = after.rank(*smart)
    error = max(abs(new[0] - old[0]) for new, old in zip(ranking, expected, strict=True))
    seconds = interleaved(
        {"before": lambda: before.rank(*plain), "after": lambda: after.rank(*smart)}, device, 9
    )
    print(f"\nlargest difference of a score: {error:.0e}")
    for (name, value), (model, _) in zip(seconds.items(), (plain, smart), strict=True):
        print(f"{name} ({model.config._attn_implementation}): median {value * 1e3:.1f} ms")
    print(f"\n{trace}")
    return 0 if error <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
