"""The page of the commands' real output: which of them run, beside each other or alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
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
    assert len(timed) == 4
    outputs.run_all([*timed, *quick], 3, run_one, report)
    assert sorted(order[: len(quick)]) == sorted(quick)
    assert order[len(quick) :] == timed


def test_a_failing_command_is_reported() -> None:
    made = outputs.run("smartattn explain --device mars --seq-len 1 --heads 1 --head-dim 8", {})
    assert made.code == 2
    assert "mars" in made.text


def test_a_real_trace_and_the_profiles_are_on_the_page() -> None:
    for command in ("smartattn show", "smartattn show --map", "smartattn profiles list"):
        assert command in EVERY
    assert outputs.TRACE in EVERY
    assert not outputs.times_something(outputs.TRACE)


def test_the_program_that_traces_prints_its_trace() -> None:
    made = outputs.run(outputs.TRACE, {})
    assert made.code == 0, made.text
    lines = made.text.splitlines()
    assert lines[0].startswith("forwards  batch")
    assert any(" 513-519 " in line for line in lines), "the steps of a generation"
    assert lines[-1].startswith("LlamaForCausalLM: 1 forward ")


def test_the_page_shows_the_program_with_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "commands.md"
    arguments = ["outputs", "--output", str(page), "--only", outputs.TRACE, "--only", "*list"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(outputs, "run", lambda command, models: Output(f"of {command}\n", 0, 1.0))
    assert outputs.main() == 0
    text = page.read_text()
    program = f"```python\n{outputs.PROGRAM}```\n\n```text\nof {outputs.TRACE}\n```\n"
    assert program in text
    assert text.count("```python") == 1
    assert "of smartattn profiles list" in text


def test_no_path_of_the_machine_is_on_the_page() -> None:
    made = outputs.run("smartattn profiles list", {})
    assert str(outputs.ROOT) not in made.text
    assert "shipped: calibration/profiles" in made.text
