"""The page of the commands' real output: which of them run, beside each other or alone."""

from __future__ import annotations

import threading

from benchmarks import outputs
from benchmarks.outputs import Output

EVERY = outputs.commands(True, "nvidia-l4")


def test_a_selection() -> None:
    assert outputs.selected(EVERY, [], []) == EVERY
    explained = outputs.selected(EVERY, ["*explain*"], [])
    assert explained
    assert all("explain" in command for command in explained)
    both = outputs.selected(EVERY, ["*doctor*", "*bench*"], ["*SMOLLM2*"])
    assert [command.split()[1] for command in both] == ["doctor", "bench"]
    assert outputs.selected(EVERY, ["nothing"], []) == []


def test_on_an_h200_nothing_is_asked_twice() -> None:
    assert len(outputs.commands(True, "nvidia-h200")) == len(EVERY) - 1


def test_what_times_something_runs_alone_and_last() -> None:
    together = threading.Barrier(3)
    running: set[str] = set()
    order: list[str] = []

    def run_one(command: str) -> Output:
        running.add(command)
        if outputs.times_something(command):
            assert running == {command}
        elif command in quick:
            together.wait(timeout=30)
        running.discard(command)
        return Output(command, 0, 0.0)

    def report(command: str, made: Output) -> None:
        assert made.text == command
        order.append(command)

    # A multiple of the jobs, or the last ones would wait at the barrier for nobody.
    quick = [command for command in EVERY if not outputs.times_something(command)][:6]
    timed = [command for command in EVERY if outputs.times_something(command)]
    assert len(timed) == 3
    outputs.run_all([*timed, *quick], 3, run_one, report)
    assert sorted(order[: len(quick)]) == sorted(quick)
    assert order[len(quick) :] == timed


def test_a_failing_command_is_reported() -> None:
    made = outputs.run("smartattn explain --device mars --seq-len 1 --heads 1 --head-dim 8", {})
    assert made.code == 2
    assert "mars" in made.text
