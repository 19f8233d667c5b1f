"""All measurements of a GPU that the reports quote, one after the other, as far as the time goes.

Run from the repository's root: ``python -m benchmarks.everything FOLDER``. Each part is a command
of its own, whose output and figures go to the folder; the same command again goes on with the parts
that have not succeeded. Nothing in ``docs/`` or in the user's own data folder is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FLASH_3 = ("fa3_fwd_interface", "flash_attn_interface")
FLASH = ("flash_attn", "flash_attn_2_cuda", *FLASH_3)

#: Hides packages from a process and from all that it starts.
_HIDING = "import sys\nfor name in {names!r}:\n    sys.modules[name] = None\n"
#: Seconds that a part may take longer than it took on an H200, if the time allows it.
_SLACK = 2.0


@dataclass(frozen=True)
class Part:
    """One command. ``{out}`` in its words is a folder of its own."""

    name: str
    #: What it took on an H200.
    seconds: float
    words: str
    #: Packages that look as if they were not installed.
    hidden: tuple[str, ...] = ()


#: In the order in which they are wanted most: right first, then what others are made from.
PARTS = (
    Part("report", 150, "-m tests.gpu_report --out {out}"),
    Part("report_without", 110, "-m tests.gpu_report --out {out}", FLASH),
    Part("demo", 40, "examples/demo.py"),
    Part("demo_without", 40, "examples/demo.py", FLASH),
    Part("models", 300, "-m benchmarks.models --rounds 15 --json {out}/models.json"),
    Part("padding_free", 115, "-m benchmarks.padding_free --json {out}/padding_free.json"),
    Part("calls", 60, "-m benchmarks.calls --json {out}/calls.json"),
    Part("calibration", 120, "-m smartattn calibrate --force"),
    Part("second_calibration", 120, "-m smartattn calibrate --force"),
    Part("quick_calibration", 35, "-m smartattn calibrate --force --quick"),
    Part("heldout", 75, "-m benchmarks.regret --seed 2 --keep {out}/heldout.safetensors"),
    Part("models_alone", 150, "-m benchmarks.models --json {out}/models.json", FLASH_3),
    Part("models_without", 120, "-m benchmarks.models --json {out}/models.json", FLASH),
    Part("embeddings", 115, "-m benchmarks.embeddings --json {out}/embeddings.json"),
    Part("outputs", 150, "-m benchmarks.outputs --output {out}/commands.md"),
    Part("sdpa_forms", 90, "-m benchmarks.sdpa_forms --json {out}/sdpa_forms.json"),
    Part("decode", 100, "-m benchmarks.decode --json {out}/decode.json"),
    Part("decode_parts", 40, "-m benchmarks.decode --parts --json {out}/decode_parts.json"),
    Part("skipping", 60, "-m benchmarks.skipping --json {out}/skipping.json"),
    Part("choices", 120, "-m benchmarks.choices --json {out}/choices.json"),
)


def run(part: Part, folder: Path, limit: float) -> int:
    """Runs a part for ``limit`` seconds at most; returns its exit status, 124 if they ran out."""
    out = folder / part.name
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as first:
        (Path(first) / "sitecustomize.py").write_text(_HIDING.format(names=part.hidden))
        paths = [first, str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        changes = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            # A user's own profile and calibrations are neither read nor replaced.
            "XDG_DATA_HOME": str(out),
            "PYTHONUNBUFFERED": "1",
        }
        words = [word.format(out=out) for word in part.words.split()]
        with (
            (out / "output.txt").open("w") as log,
            subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | changes,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return 124
            finally:
                # What it has started goes on otherwise, on the same device.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def run_all(
    parts: Sequence[Part], folder: Path, limit: float, again: bool = False
) -> dict[str, dict[str, float]]:
    """Runs what has not succeeded and fits into ``limit`` seconds; returns what was ever run."""
    end = time.monotonic() + limit
    kept = folder / "parts.json"
    done: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in parts:
        left = end - time.monotonic()
        if not again and done.get(part.name, {}).get("status") == 0:
            continue
        if part.seconds > left:
            print(f"{part.name:<20} left out: takes {part.seconds:.0f} s, {left:.0f} s are left")
            continue
        start = time.monotonic()
        status = run(part, folder, min(left, _SLACK * part.seconds))
        took = time.monotonic() - start
        done[part.name] = {"status": status, "seconds": round(took, 1)}
        kept.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{part.name:<20} exit status {status}, {took:.0f} s", flush=True)
    return done


def main(arguments: list[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Runs parts; returns 1 if one has failed, 2 if some are left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everything", description=__doc__)
    parser.add_argument("folder", type=Path, help="where outputs and figures go")
    names = [part.name for part in parts]
    parser.add_argument("part", nargs="*", help=f"these alone, and again: {', '.join(names)}")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.part) - set(names)):
        parser.error(f"no such part: {', '.join(unknown)}")
    wanted = [part for part in parts if not given.part or part.name in given.part]
    given.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(wanted, given.folder.resolve(), given.limit, bool(given.part))
    if any(done.get(part.name, {}).get("status") for part in wanted):
        return 1
    return 2 if any(part.name not in done for part in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
