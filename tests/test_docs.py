"""Every command and every piece of Python in the documents runs, and every page can be built.

A block that cannot run here says so: ``<!-- not run: why -->`` stands on the line before it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import smartattn
from smartattn import cli, grid, profile, profiles

from . import real_models
from .test_examples import PRELUDE

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "calibration/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
#: What other tests check (the drop-in, the recipe of a backend), and output.
NOT_COMMANDS = {"diff", "py", "text", "json", ""}

needs_models = pytest.mark.skipif(
    real_models.missing() is not None, reason=real_models.missing() or "installed"
)


class Block(NamedTuple):
    language: str
    code: str
    #: Why it is not run, None if it is.
    excuse: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, without those in the sections that it takes from elsewhere."""
    text = (ROOT / page).read_text()
    found = re.finditer(
        r"^(?:<!-- not run: (.+?) -->\n)?```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    return [Block(match[2], match[3], match[1]) for match in found]


def commands(page: str) -> list[str]:
    lines = [
        line.split(" #")[0].strip()
        for block in blocks(page)
        if block.language == "bash" and block.excuse is None
        for line in block.code.splitlines()
    ]
    return [line for line in lines if line]


def with_commands() -> list[str]:
    return [page for page in PAGES if commands(page)]


def with_python() -> list[str]:
    return [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a command line of ``smartattn`` in a folder of its own; calibrations are short."""
    family = grid.Family("forward", True, ("left",), "float32", 64)
    monkeypatch.setattr(grid, "families", lambda kind, mode, varlen: [family])
    limits = grid.Limits(512, 4096, 1e8, 1e8, max_batch=16)
    monkeypatch.setattr(grid, "limits", lambda kind, mode, memory: limits)
    monkeypatch.setattr(profiles, "user_profiles", lambda: tmp_path / "data" / "profiles")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("The capital of France is\nA list of three colours:\n")
    if real_models.missing() is None:
        from local_models import find_minilm

        monkeypatch.setenv("MODEL", str(find_minilm()))

    def run(line: str) -> int:
        words = shlex.split(os.path.expandvars(line))
        with pytest.MonkeyPatch.context() as patch:
            while re.match(r"\w+=", words[0]):
                patch.setenv(*words.pop(0).split("=", 1))
            profiles.set_profile(None)
            command, *arguments = words
            assert command == "smartattn", f"{line!r}: say why it is not run"
            if arguments[0] == "calibrate":
                arguments += ["--device", "cpu", "--quick", "--budget", "1.5", "--force"]
            if arguments[0] in ("verify", "bench"):
                arguments += ["--device", "cpu"]
            if arguments[0] == "bench":
                arguments += ["--rounds", "1"]
            return cli.run(arguments)

    yield run
    profiles.set_profile(None)
    smartattn.configure()


@needs_models
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", with_commands())
def test_commands_run(page: str, shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(page):
        assert shell(line) == 0, f"{line}: {capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), line


@needs_models
@pytest.mark.parametrize("page", with_python())
def test_python_runs(page: str, tmp_path: Path) -> None:
    code = [b.code for b in blocks(page) if b.language == "python" and b.excuse is None]
    # Pages show pieces: what one of them leaves out is what the first page begins with.
    start = (
        "import smartattn\nfrom transformers import AutoModel\n"
        'model = AutoModel.from_pretrained(name, attn_implementation="smart")\n'
    )
    program = tmp_path / "page.py"
    program.write_text("\n".join([PRELUDE, start, *code]))
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_has_an_excuse(page: str) -> None:
    for block in blocks(page):
        known = {"bash", "python"} | NOT_COMMANDS
        assert block.language in known, f"{page}: nothing runs {block.language}"
    # Indented code would escape the tests.
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^    (smartattn|pip|make|python) ", text, re.MULTILINE)


def test_the_blocks_are_found() -> None:
    assert len(with_python()) >= 4
    assert "smartattn doctor" in commands("docs/index.md")
    excused = [block for page in PAGES for block in blocks(page) if block.excuse]
    assert 1 <= len(excused) <= 6, [block.code for block in excused]


# -- the site ------------------------------------------------------------------------------------


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_pages_are_made_and_their_links_hold(page: str) -> None:
    made = hooks().on_page_markdown((ROOT / page).read_text())
    assert not re.search(r"<!-- /?(section|intro|crossovers)", made), "something is not replaced"
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", made):
        path = (ROOT / page).parent / target
        assert path.exists(), f"{page} names {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_pages_can_be_read_as_they_are(page: str) -> None:
    """On GitHub nothing is replaced: what the site takes from elsewhere is linked to."""
    text = (ROOT / page).read_text()
    assert "{{" not in text
    for kind, source, heading, shown in re.findall(
        r'^<!-- (section|intro|crossovers) (\S+)(?: "(.+?)")? -->\n(.*?)^<!-- /\1 -->$',
        text,
        re.MULTILINE | re.DOTALL,
    ):
        assert shown.strip()
        if kind != "crossovers":
            (target,) = re.findall(r"\]\(([^)]+)\)", shown)
            file, _, anchor = target.partition("#")
            assert (ROOT / page).parent.joinpath(file).resolve() == ROOT / source
            assert anchor == heading.lower().replace(" ", "-")


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.startswith("docs/"):
            assert page.removeprefix("docs/") in text


def test_sections_are_those_of_the_source() -> None:
    module = hooks()
    limits = module.section("README.md", "Limits")
    assert limits.startswith("- **Output at padding positions**")
    assert "## More" not in limits
    recipe = module.section("CONTRIBUTING.md", "Add a backend")
    assert "class MyBackend(Backend)" in recipe, "a comment in code is no heading"
    assert "`src/smartattn/backends/base.py`" in recipe
    with pytest.raises(ValueError, match="no heading"):
        module.section("README.md", "No such thing")
    table = module.crossovers("nvidia-h200")
    shipped = profile.load(ROOT / "calibration" / "profiles" / "nvidia-h200.json")
    shown = [
        threshold
        for threshold in shipped.thresholds
        if threshold.dtype == "bfloat16" and threshold.head_dim in module.SHOWN_HEAD_DIMS
    ]
    assert shown
    assert table.count("\n") == len(shown) + 3


def test_the_example_of_explain_is_what_it_prints() -> None:
    """Copied from a run; a new profile of the H200 brings new figures, and this test says so."""
    (shown,) = [b.code for b in blocks("docs/explain.md") if b.language == "text"]
    answer = smartattn.explain(
        batch=8,
        seq_len=2048,
        padding=0.4,
        heads=32,
        kv_heads=8,
        head_dim=128,
        causal=True,
        device="nvidia-h200",
    )
    assert str(answer).replace(f"{ROOT}/", "") == shown.strip()
