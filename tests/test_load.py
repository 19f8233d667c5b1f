"""Many processes, killed ones, disks that are full, homes that cannot be written, and forks.

Damaged files, waiting for a lock and Ctrl-C are in test_profile.py and test_calibrate.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smartattn
from smartattn import machine, profile, profiles, samples

from .agreement import MASKS, WIDTH, assert_agree, output_of, run
from .tiny_models import tiny_model, token_ids

ROOT = Path(__file__).resolve().parents[1]
INPUTS = {"input_ids": token_ids(3, WIDTH), "attention_mask": MASKS["left"]}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks of POSIX")

#: One forward of a tiny model; prints the profile and the sum of the output.
SERVE = """
import logging, sys, torch
torch.set_num_threads(1)
logging.basicConfig(level="WARNING")
import smartattn
from smartattn.profiles import profile_for
from tests.agreement import MASKS, WIDTH, output_of
from tests.tiny_models import tiny_model, token_ids
model = tiny_model("llama", "smart")
def forward():
    with torch.no_grad(), smartattn.trace() as trace:
        output = output_of(model(input_ids=token_ids(3, WIDTH), attention_mask=MASKS["left"]))
    return trace.rows[0].backend, float(output[MASKS["left"].bool()].sum())
"""
REPORT = 'print(profile_for(torch.device("cpu")).name, *forward())'
#: ``smartattn calibrate`` with few shapes, so that seconds are enough.
CALIBRATE = """
import sys, torch
torch.set_num_threads(1)
from smartattn import calibrate, cli, grid
family = grid.Family("forward", False, ("left",), "float32", 64)
grid.families = lambda kind, mode, varlen: [family]
limits = grid.Limits(512, 4096, 1e8, 1e8, max_batch=16)
grid.limits = lambda kind, mode, memory: limits
calibrate._SAVE_EVERY = 0.2
cli.main(["calibrate", "--device", "cpu", "--quick", "--budget", sys.argv[1]])
"""


class Process:
    """A fresh Python with a home of its own."""

    def __init__(self, home: Path | str, code: str, *arguments: str, **options: Any) -> None:
        source = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        home = Path(home)
        environment = os.environ | {
            "PYTHONPATH": source,
            "HOME": str(home),
            "XDG_DATA_HOME": str(home / "data"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def end(self, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) after the process has ended with an exit code."""
        try:
            out, error = self.popen.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise
        assert self.popen.returncode == code, out + error
        return out, error


def data(home: Path) -> Path:
    return home / "data" / "smartattn"


def own_profile(home: Path) -> Path:
    (path,) = (data(home) / "profiles").glob("*.json")
    return path


@pytest.mark.load
@pytest.mark.slow
def test_eight_processes_start_at_once_without_a_profile(tmp_path: Path) -> None:
    started = [Process(tmp_path, SERVE + REPORT) for _ in range(8)]
    ended = [process.end() for process in started]
    assert len({out for out, _ in ended}) == 1, "all choose and compute alike"
    assert ended[0][0].startswith("default sdpa ")
    assert not any(error for _, error in ended)
    assert not data(tmp_path).exists(), "inference writes nothing"


@pytest.mark.load
@pytest.mark.slow
def test_two_calibrations_at_once_measure_once(tmp_path: Path) -> None:
    first, second = (Process(tmp_path, CALIBRATE, "10") for _ in range(2))
    outs = [first.end()[0], second.end()[0]]
    waited = [out for out in outs if "Another calibration is running" in out]
    measured = [out for out in outs if "samples on" in out]
    assert len(measured) == 1
    assert len(waited) <= 1
    assert any("Nothing to do" in out for out in outs)
    assert profile.load(own_profile(tmp_path)).run is not None
    assert not list(data(tmp_path).rglob("*.tmp"))


@pytest.mark.load
@pytest.mark.slow
def test_a_killed_calibration_leaves_whole_files_and_no_lock(tmp_path: Path) -> None:
    killed = Process(tmp_path, CALIBRATE, "60")
    deadline = time.monotonic() + 120
    raw: list[Path] = []
    while not raw:
        assert time.monotonic() < deadline
        assert killed.popen.poll() is None, killed.popen.communicate()
        time.sleep(0.05)
        raw = list((data(tmp_path) / "samples").glob("*.safetensors"))
    killed.popen.send_signal(signal.SIGKILL)
    killed.popen.communicate(timeout=30)
    header, rows = samples.load(raw[0])
    assert rows
    assert not header.complete
    assert not list((data(tmp_path) / "profiles").glob("*.json"))
    out, _ = Process(tmp_path, CALIBRATE, "8").end()
    assert "of a run before" in out
    assert "Another calibration" not in out
    assert profile.load(own_profile(tmp_path)).costs


@pytest.mark.load
@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """No file may grow beyond 1 KiB: the system refuses to write, as a full disk does."""
    here = machine.identify(torch.device("cpu"))
    assert here is not None
    # What the process looks for: one thread, as it has.
    identity = here.model_copy(update={"threads": 1})
    path = data(tmp_path) / "profiles" / f"{identity.slug}.json"
    path.parent.mkdir(parents=True)
    old = profile.Profile(name="old", device=identity)
    profile.save(old, path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    _, error = Process(tmp_path, CALIBRATE, "2", preexec_fn=limit).end(2)
    assert error.count("\n") == 1
    assert "make room" in error
    assert profile.load(path) == old
    assert not list(data(tmp_path).rglob("*.tmp"))
    assert not list(data(tmp_path).rglob("*.safetensors"))


@pytest.mark.load
@pytest.mark.slow
def test_a_home_that_cannot_be_written() -> None:
    """/proc refuses everybody, root included."""
    out, error = Process("/proc", SERVE + REPORT).end()
    assert out.startswith("default sdpa ")
    assert not error
    _, error = Process("/proc", CALIBRATE, "2").end(2)
    assert error.count("\n") == 1
    assert "XDG_DATA_HOME" in error


FORK = (
    SERVE
    + """
import os, threading
from smartattn import control, profile, profiles
expected = forward()
children = []
held = threading.Event()
def hold(lock):
    with lock:
        held.set()
        threading.Event().wait()
for lock in (profiles._lock, control._lock):
    held.clear()
    threading.Thread(target=hold, args=(lock,), daemon=True).start()
    held.wait()
for number in range(4):
    child = os.fork()
    if child == 0:
        # Locks that another thread held in the parent must be open here.
        profiles.set_profile(None)
        smartattn.configure(backends=["sdpa"] if number % 2 else None)
        os._exit(0 if forward() == expected else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
os._exit(0)
"""
)


@pytest.mark.slow
def test_children_of_a_process_that_has_run(tmp_path: Path) -> None:
    out, _ = Process(tmp_path, FORK).end()
    assert out == "[0, 0, 0, 0]\n"


def serve_while(act: Callable[[int], None]) -> set[str]:
    """Threads run a model while ``act`` is called; the outputs are right. The profiles' reasons."""
    model = tiny_model("llama")
    expected = run(model, "eager", **INPUTS)
    model.set_attn_implementation("smart")
    problems: list[BaseException] = []
    reasons: set[str] = set()
    stop = threading.Event()

    def serve() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad(), smartattn.trace() as trace:
                    assert_agree(output_of(model(**INPUTS)), expected, where=MASKS["left"])
                reasons.update(row.reason for row in trace.rows)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(60):
        act(number)
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not problems, problems
    return reasons


def test_a_profile_is_replaced_while_a_server_runs(tmp_path: Path) -> None:
    """By whole ones, by rubbish and by nothing, with and without being looked up again."""
    path = tmp_path / "p.json"
    rules = [
        profile.Rule(prefer=(name,), because=f"prefers {name}")
        for name in ("sdpa", "sdpa_unpadded")
    ]

    def act(number: int) -> None:
        if number % 5 == 3:
            path.write_text(json.dumps({"name": "half"})[: number % 11])
        elif number % 5 == 4:
            path.unlink()
        else:
            profile.save(profile.Profile(name=f"p{number}", rules=(rules[number % 2],)), path)
        if number % 3:
            profiles.set_profile(path)

    try:
        reasons = serve_while(act)
    finally:
        profiles.set_profile(None)
    used = {name for name in ("prefers sdpa", "prefers sdpa_unpadded") if name in str(reasons)}
    assert used == {"prefers sdpa", "prefers sdpa_unpadded"}, reasons
    assert any("profile default" in reason for reason in reasons)


def test_settings_change_while_a_server_runs() -> None:
    choices: list[Any] = [None, ["sdpa"], ["sdpa_unpadded"], ["sdpa_unpadded", "sdpa"]]
    try:
        reasons = serve_while(lambda number: smartattn.configure(backends=choices[number % 4]))
    finally:
        smartattn.configure()
    assert len(reasons) > 1
