"""The real output of every command that answers questions, as one Markdown file per machine.

Run from the repository's root: ``python -m benchmarks.outputs``; it writes
``docs/reports/<cpu or the GPU>/commands.md``. The two real models come from the packages that
``examples/local_models.py`` names; SmolLM2 is read from its GGUF file once, in Python, and handed
to the commands as safetensors.

``smartattn.trace()`` is among the commands: a program around a model with random weights, which is
shown with what it prints. ``--only`` and ``--skip`` take patterns such as ``"*explain*"``; what is
left then is all that the file has. Commands that time nothing run beside each other, before the
others.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smartattn.machine import identify, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from local_models import find_minilm, load_smollm2  # noqa: E402

_CALL = "smartattn explain --heads 32 --kv-heads 8 --head-dim 128"

#: What stands for :data:`PROGRAM` among the commands.
TRACE = "smartattn.trace()"
PROGRAM = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import smartattn

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
model.eval().set_attn_implementation("smart")
lengths = torch.tensor([[512], [300], [120], [40]])
mask = (torch.arange(512) >= 512 - lengths).long().to(device)
batch = {"input_ids": torch.randint(1, 1000, (4, 512)).to(device) * mask, "attention_mask": mask}

with torch.no_grad(), smartattn.trace() as trace:
    model(**batch)
    model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    with smartattn.padding_free(model):
        model(**batch)
print(trace)
"""


class Output(NamedTuple):
    """What a command printed, its exit code, and seconds from its start to its end."""

    text: str
    code: int
    seconds: float


def commands(cuda: bool, here: str) -> list[str]:
    """What is run; ``$MINILM`` and ``$SMOLLM2`` stand for the models' paths.

    Args:
        here: the device as ``--device`` of explain takes it; the H200 is asked for elsewhere too.
    """
    small = "" if cuda else " --batch 4 --seq-len 64"
    short = " --new-tokens 32" if cuda else " --batch 2 --seq-len 32 --new-tokens 4 --rounds 3"
    padded = f"{_CALL} --batch 8 --seq-len 2048 --padding 0.4 --causal"
    return [
        "smartattn doctor",
        "smartattn show",
        "smartattn show --map",
        "smartattn profiles list",
        padded,
        *([] if here == "nvidia-h200" else [f"{padded} --device nvidia-h200"]),
        f"{_CALL} --batch 32 --seq-len 4096 --padding 0.4 --decode --device nvidia-h200",
        f"{_CALL} --seq-len 32768 --packed 16 --causal --grad --objective memory"
        " --device nvidia-h200",
        TRACE,
        f"smartattn verify $MINILM{small}",
        f"smartattn verify $MINILM{small} --per-layer",
        f"smartattn bench $MINILM{small} --padding 0.5 --seconds 5",
        f"smartattn verify $SMOLLM2{small}",
        f"smartattn bench $SMOLLM2{small} --padding 0.5 --seconds 10",
        f"smartattn bench $SMOLLM2{short} --padding 0.5 --seconds 10",
    ]


def selected(every: Sequence[str], only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The commands that match one of ``only``, if there are any, and none of ``skip``."""
    return [
        command
        for command in every
        if (not only or any(fnmatch(command, pattern) for pattern in only))
        and not any(fnmatch(command, pattern) for pattern in skip)
    ]


def times_something(command: str) -> bool:
    """Whether other work on the machine would change what a command says."""
    return command.startswith(("smartattn bench ", "smartattn doctor"))


def run(command: str, models: Mapping[str, str]) -> Output:
    """Runs a command with the paths of the models in its environment."""
    environment = {
        **os.environ,
        **models,
        "COLUMNS": "110",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    python = shlex.quote(sys.executable)
    script = command.replace("smartattn", f"{python} -m smartattn", 1)
    if command == TRACE:
        script = f"{python} -c {shlex.quote(PROGRAM)}"
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
    if elsewhere := os.environ.get("XDG_DATA_HOME"):
        # A run that must not meet a user's own profiles has its data in another folder.
        text = text.replace(elsewhere.rstrip("/"), "~/.local/share")
    return Output(text, done.returncode, time.perf_counter() - start)


def run_all(
    chosen: Sequence[str],
    jobs: int,
    run_one: Callable[[str], Output],
    report: Callable[[str, Output], None],
) -> None:
    """Runs commands, up to ``jobs`` at a time of those that time nothing, then the others alone."""
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Output], str] = {
            pool.submit(run_one, command): command
            for command in chosen
            if not times_something(command)
        }
        for done in as_completed(running):
            report(running[done], done.result())
    for command in chosen:
        if times_something(command):
            report(command, run_one(command))


def _save_smollm2(folder: str) -> str:
    read, tokenizer = load_smollm2("sdpa")
    # Transformers saves no model that it read from GGUF, although its weights are plain by now.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    """Runs the commands and writes the file; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    pattern: dict[str, Any] = {"action": "append", "default": [], "metavar": "GLOB"}
    parser.add_argument("--only", help="run what matches; may be repeated", **pattern)
    parser.add_argument("--skip", help="leave out what matches; may be repeated", **pattern)
    parser.add_argument(
        "--jobs", type=int, help="commands at a time, of those that time nothing", default=None
    )
    arguments = parser.parse_args()
    jobs = arguments.jobs or max(1, min(4, (os.cpu_count() or 1) // 4))
    cuda = torch.cuda.is_available()
    identity = identify(torch.device("cuda" if cuda else "cpu"))
    assert identity is not None
    chosen = selected(commands(cuda, identity.slug), arguments.only, arguments.skip)
    if not chosen:
        parser.error("no command is left")
    folder = identity.slug.removeprefix("nvidia-") if cuda else "cpu"
    output = arguments.output or ROOT / "docs" / "reports" / folder / "commands.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    found = versions("cuda" if cuda else "cpu").model_dump(exclude_none=True)
    date = datetime.now(timezone.utc).date().isoformat()
    start = time.perf_counter()
    outputs: dict[str, Output] = {}

    def report(command: str, made: Output) -> None:
        print(f"{made.code}  {made.seconds:5.1f} s  {command}", flush=True)
        outputs[command] = made
        beside = (
            f"; commands other than `bench` and `doctor` ran up to {jobs} at a time"
            if jobs > 1
            else ""
        )
        left = [one for one in commands(cuda, identity.slug) if one not in chosen]
        parts = [
            f"# Commands on {identity}\n\nMade by `python -m benchmarks.outputs` on {date}: "
            + ", ".join(f"{name.replace('_', '-')} {version}" for name, version in found.items())
            + ". Seconds next to a command include the start of Python and the loading of models, "
            + f"and say nothing of the package{beside}. "
            + "`$MINILM` is all-MiniLM-L6-v2 (6 layers), `$SMOLLM2` SmolLM2-135M-Instruct (30 "
            + "layers), converted from GGUF to safetensors before."
            + (f" Left out: {', '.join(f'`{one}`' for one in left)}." if left else "")
            + "\n"
        ]
        parts += [
            f"`{one}`, {outputs[one].seconds:.0f} s, exit code {outputs[one].code}\n\n"
            + (f"```python\n{PROGRAM}```\n\n" if one == TRACE else "")
            + f"```text\n{outputs[one].text}```\n"
            for one in chosen
            if one in outputs
        ]
        output.write_text("\n".join(parts))

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as converting:
        # Beside the first commands: reading the file takes longer than most of them.
        needed = any("$SMOLLM2" in command for command in chosen)
        smollm2 = converting.submit(_save_smollm2, scratch) if needed else None

        def run_one(command: str) -> Output:
            models = {"MINILM": str(find_minilm())}
            if smollm2 is not None and "$SMOLLM2" in command:
                models["SMOLLM2"] = smollm2.result()
            return run(command, models)

        # What needs the model comes last, so that nothing waits behind it.
        run_all(sorted(chosen, key=lambda one: "$SMOLLM2" in one), jobs, run_one, report)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 1 if any(made.code for made in outputs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
