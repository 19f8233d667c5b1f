"""The order of the measurements, their time limit, and what the next run of the command does."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import pytest
from benchmarks import everything
from benchmarks.everything import Part, main

QUICK = Part("quick", 1.0, "-c print('measured')")
HIDDEN = Part("hidden", 1.0, "-c __import__('colorsys')", ("colorsys",))
ENDLESS = Part("endless", 0.5, "-c __import__('time').sleep(60)")
LONG = Part("long", 1000.0, "-c print('never')")


def status(folder: Path) -> dict[str, int]:
    return {
        name: one["status"] for name, one in json.loads((folder / "parts.json").read_text()).items()
    }


def test_each_part_has_a_folder_with_its_output(tmp_path: Path) -> None:
    assert main([str(tmp_path)], [QUICK]) == 0
    assert (tmp_path / "quick" / "output.txt").read_text() == "measured\n"
    assert status(tmp_path) == {"quick": 0}


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    assert main([str(folder)], [Part("quick", 1.0, "-c print('{out}')")]) == 0
    assert (folder / "quick" / "output.txt").read_text() == f"{folder / 'quick'}\n"


def test_hidden_packages_cannot_be_imported(tmp_path: Path) -> None:
    assert main([str(tmp_path)], [HIDDEN]) == 1
    assert "colorsys" in (tmp_path / "hidden" / "output.txt").read_text()
    seen = Part("seen", 1.0, HIDDEN.words)
    assert main([str(tmp_path)], [seen]) == 0


def test_what_does_not_fit_is_left_for_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--limit", "60"], [LONG, QUICK]) == 2
    assert "long                 left out: takes 1000 s" in capsys.readouterr().out
    assert status(tmp_path) == {"quick": 0}


def test_a_part_that_takes_far_too_long_is_ended(tmp_path: Path) -> None:
    assert main([str(tmp_path)], [ENDLESS]) == 1
    assert status(tmp_path) == {"endless": 124}


def test_what_a_part_has_started_ends_with_it(tmp_path: Path) -> None:
    late = tmp_path / "late"
    started = tmp_path / "started.py"
    started.write_text(f"import time\ntime.sleep(3)\nopen({str(late)!r}, 'w')\n")
    starting = f"-c __import__('subprocess').Popen(['{sys.executable}','{started}'])"
    assert main([str(tmp_path)], [Part("starting", 1.0, starting)]) == 0
    time.sleep(4)
    assert not late.exists()


def test_the_next_run_repeats_what_failed_and_what_is_named(tmp_path: Path) -> None:
    counting = Part("quick", 1.0, "-c print(1,file=open('{out}/runs','a'))")
    runs = tmp_path / "quick" / "runs"
    for arguments, expected in (([], 1), ([], 1), (["quick"], 2)):
        assert main([str(tmp_path), *arguments], [counting]) == 0
        assert runs.read_text().count("1") == expected
    (tmp_path / "parts.json").write_text('{"quick": {"status": 1, "seconds": 0.1}}')
    assert main([str(tmp_path)], [counting]) == 0
    assert runs.read_text().count("1") == 3


def test_unknown_parts_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "nothing"], [QUICK])


@pytest.mark.parametrize("part", everything.PARTS, ids=lambda part: part.name)
def test_every_part_names_a_command_that_takes_its_arguments(
    part: Part, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its arguments are parsed up to ``--help``, which comes last."""
    first, *arguments = part.words.split()
    if first != "-m":
        assert (everything.ROOT / first).exists()
        return
    module, *arguments = arguments
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code
    assert "usage" in capsys.readouterr().out.lower()
