"""The wheel built from the repo works where nothing else of the repo is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import smartattn

ROOT = Path(__file__).resolve().parents[1]

#: Asked of the metadata: importing pip, even looking for it, makes setuptools step back from
#: distutils in this process, and torch's compiler fails over that.
ABSENT = {"build", "hatchling", "pip"} - {d.name for d in importlib.metadata.distributions()}
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {sorted(ABSENT)}")

#: Runs where only the installed wheel is: prints what the parent checks.
PROGRAM = """
import logging
import pathlib
import sys

logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="LOGGED %(message)s")
import torch
import transformers

import smartattn
from smartattn.profiles import find, shipped_profiles

package = pathlib.Path(smartattn.__file__).parent
print("package", package)
print("profiles", shipped_profiles(), *sorted(path.name for path in shipped_profiles().iterdir()))
found = find(None)
print("default", found.profile.name, found.path, len(found.rejected))

torch.manual_seed(0)
model = transformers.LlamaForCausalLM._from_config(
    transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    ),
    attn_implementation="smart",
).eval()
ids = torch.randint(0, 64, (2, 8))
mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
with torch.no_grad(), smartattn.trace() as trace:
    smart = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    eager = model(ids, attention_mask=mask).logits
print("calls", sum(row.calls for row in trace.rows), trace.rows[0].reason)
print("agrees", bool(((smart - eager).abs()[mask.bool()] < 1e-5).all()))
"""


def run(*command: object, cwd: Path, path: list[Path]) -> str:
    """Standard output of a command that must succeed, with ``path`` before all else."""
    inherited = os.environ.get("PYTHONPATH")
    parts = [*map(str, path), *([inherited] if inherited else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(parts),
        "XDG_DATA_HOME": str(cwd / "data"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT),
        cwd=folder,
        path=[],
    )
    (built,) = folder.glob("smartattn-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*command, "--target", folder, wheel, cwd=wheel.parent, path=[])
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        entry_points = next(name for name in names if name.endswith("/entry_points.txt"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
        assert "smartattn = smartattn.cli:main" in archive.read(entry_points).decode()
    sources = {
        f"smartattn/{path.relative_to(ROOT / 'src/smartattn').as_posix()}" for path in _own()
    }
    shipped = (ROOT / "calibration/profiles").glob("*.json")
    profiles = {f"smartattn/calibration/profiles/{path.name}" for path in shipped}
    assert "smartattn/calibration/profiles/default.json" in profiles
    assert {name for name in names if ".dist-info/" not in name} == sources | profiles
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def _own() -> list[Path]:
    files = (path for path in (ROOT / "src/smartattn").rglob("*") if path.is_file())
    return [path for path in files if path.suffix == ".py" or path.name == "py.typed"]


def test_the_installed_wheel_runs_and_finds_its_profiles(site: Path, tmp_path: Path) -> None:
    output = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, path=[site])
    assert "LOGGED" not in output
    facts = dict(line.split(" ", 1) for line in output.splitlines())
    assert facts["package"] == str(site / "smartattn")
    folder, *names = facts["profiles"].split()
    assert folder == str(site / "smartattn/calibration/profiles")
    assert names == sorted(path.name for path in (ROOT / "calibration/profiles").iterdir())
    assert facts["default"] == f"default {folder}/default.json 0"
    assert facts["calls"].startswith("2 ")
    assert "profile default" in facts["calls"]
    assert facts["agrees"] == "True"


def test_the_command_of_the_installed_wheel_runs(site: Path, tmp_path: Path) -> None:
    script = site / "bin" / "smartattn"
    assert run(sys.executable, script, "--version", cwd=tmp_path, path=[site]) == (
        f"smartattn {smartattn.__version__}\n"
    )
