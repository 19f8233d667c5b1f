"""The real output of every command that answers questions, as one Markdown file per machine.

Run from the repository's root: ``python -m benchmarks.outputs``; it writes
``docs/reports/<cpu or the GPU>/commands.md``. The two real models come from the packages that
``examples/local_models.py`` names.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from smartattn.machine import identify, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from local_models import find_minilm, find_smollm2  # noqa: E402

_CALL = "smartattn explain --heads 32 --kv-heads 8 --head-dim 128"


def commands(cuda: bool) -> list[str]:
    """What is run; ``$MINILM`` and ``$SMOLLM2`` stand for the models' paths."""
    small = "" if cuda else " --batch 4 --seq-len 64"
    short = " --new-tokens 32" if cuda else " --batch 2 --seq-len 32 --new-tokens 4 --rounds 3"
    return [
        "smartattn doctor",
        f"{_CALL} --batch 8 --seq-len 2048 --padding 0.4 --causal",
        f"{_CALL} --batch 8 --seq-len 2048 --padding 0.4 --causal --device nvidia-h200",
        f"{_CALL} --batch 32 --seq-len 4096 --padding 0.4 --decode --device nvidia-h200",
        f"{_CALL} --seq-len 32768 --packed 16 --causal --grad --device nvidia-h200",
        f"smartattn verify $MINILM{small}",
        f"smartattn verify $MINILM{small} --per-layer",
        f"smartattn bench $MINILM{small} --padding 0.5 --seconds 5",
        f"smartattn verify $SMOLLM2{small}",
        f"smartattn bench $SMOLLM2{small} --padding 0.5 --seconds 10",
        f"smartattn bench $SMOLLM2{short} --padding 0.5 --seconds 10",
    ]


def run(command: str) -> tuple[str, int, float]:
    """(output, exit code, seconds) of a command."""
    environment = os.environ | {
        "MINILM": str(find_minilm()),
        "SMOLLM2": str(find_smollm2()),
        "COLUMNS": "110",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    script = command.replace("smartattn", f"{shlex.quote(sys.executable)} -m smartattn", 1)
    start = time.perf_counter()
    done = subprocess.run(
        script,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    text = done.stdout.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
    return text, done.returncode, time.perf_counter() - start


def main() -> int:
    """Runs the commands and writes the file; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    identity = identify(torch.device("cuda" if cuda else "cpu"))
    assert identity is not None
    folder = identity.slug.removeprefix("nvidia-") if cuda else "cpu"
    output = arguments.output or ROOT / "docs" / "reports" / folder / "commands.md"
    found = versions("cuda" if cuda else "cpu").model_dump(exclude_none=True)
    date = datetime.now(timezone.utc).date().isoformat()
    parts = [
        f"# Commands on {identity}\n\nMade by `python -m benchmarks.outputs` on {date}: "
        + ", ".join(f"{name} {version}" for name, version in found.items())
        + ". Times next to a command include the start of Python.\n"
    ]
    worst = 0
    for command in commands(cuda):
        text, code, seconds = run(command)
        print(f"{code}  {seconds:5.1f} s  {command}", flush=True)
        worst = max(worst, code)
        parts.append(f"`{command}`, {seconds:.0f} s, exit code {code}\n\n```text\n{text}```\n")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join(parts))
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
