"""The readers of profiles and samples on anything; ``python -m tests.fuzz`` tries a million."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartattn import profile, samples

from . import fuzz

ROOT = Path(__file__).resolve().parents[1]

texts = st.text(max_size=20)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)
field_names = st.sampled_from(sorted(profile.Profile.model_fields))
documents = st.dictionaries(field_names | texts, values, max_size=6)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=2000))
def test_any_bytes(content: bytes) -> None:
    for target in fuzz.TARGETS:
        assert fuzz.try_one(target, content) == "refused"


@settings(max_examples=300, deadline=None)
@given(document=documents)
def test_any_json(document: dict[str, Any]) -> None:
    fuzz.try_one("profile", json.dumps({"name": "a", **document}).encode())


@settings(max_examples=300, deadline=None)
@given(header=values, metadata=values, inner=values, body=st.binary(max_size=200))
def test_any_safetensors(header: Any, metadata: Any, inner: Any, body: bytes) -> None:
    if isinstance(metadata, dict):
        metadata["smartattn"] = json.dumps(inner)
    if isinstance(header, dict):
        header["__metadata__"] = metadata
    encoded = json.dumps(header).encode()
    assert fuzz.try_one("samples", struct.pack("<Q", len(encoded)) + encoded + body) == "refused"


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_mutations_of_valid_files(target: str, tmp_path: Path) -> None:
    for content in fuzz.corpus(target):
        assert fuzz.try_one(target, content) == "taken"
    result = fuzz.run(target, 1500, 7, tmp_path / "findings")
    assert not result.findings
    assert result.outcomes["refused"] > 500, "mutations reach what is checked"
    assert result.outcomes["taken"] > 50, "and some are harmless"
    assert result.distinct > 800


@pytest.mark.parametrize(
    ("module", "target", "error", "says"),
    [
        (profile, "profile", AttributeError("oh"), "AttributeError at"),
        (samples, "samples", RecursionError("oh"), "RecursionError at"),
        (profile, "profile", MemoryError(), "MemoryError at"),
        (profile, "profile", profile.ProfileError("two\nlines"), "no plain line"),
        (samples, "samples", samples.SamplesError("x" * 5000), "message of 5000"),
    ],
)
def test_a_reader_that_raises_something_else_is_found(
    module: Any,
    target: str,
    error: Exception,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(content: bytes) -> Any:
        raise error

    monkeypatch.setattr(module, "parse", fails)
    result = fuzz.run(target, 5, 0, tmp_path)
    assert len(result.findings) == 1
    (path,) = result.findings.values()
    with pytest.raises(fuzz.Finding, match=says):
        fuzz.try_one(target, Path(path).read_bytes())


def test_a_profile_that_predicts_nonsense_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile.Profile, "predict", lambda *_: float("nan"))
    with pytest.raises(fuzz.Finding, match="predicts nan"):
        fuzz.try_one("profile", fuzz.corpus("profile")[0])


def test_the_same_seed_gives_the_same_inputs() -> None:
    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [fuzz.mutated(fuzz.corpus("profile")[0], "profile", rng) for _ in range(50)]

    assert some(1) == some(1) != some(2)
    assert all(len(content) <= fuzz.LARGEST for content in some(1))


@pytest.mark.parametrize(
    ("target", "content"),
    [
        # What the fuzzer found when it was first run.
        ("profile", b'{"name": "a", "ru\xef\xbb\xbfles": []}'),
        ("samples", struct.pack("<Q", 2) + b"[]"),
        ("samples", struct.pack("<Q", 4) + b"null"),
        ("samples", struct.pack("<Q", 19) + b'{"__metadata__": 5} '),
        (
            "samples",
            struct.pack("<Q", 50046)
            + b'{"__metadata__": {"smartattn": "'
            + b"[" * 50_000
            + b'"}}' + b" " * 11,
        ),
    ],
)  # fmt: skip
def test_what_was_found_once(target: str, content: bytes) -> None:
    assert fuzz.try_one(target, content) == "refused"


@pytest.mark.slow
def test_the_command_writes_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "200", "--json", "r.json"]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/bin"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240)
    record = json.loads((tmp_path / "r.json").read_text())
    assert {t["inputs"] for t in record["targets"].values()} == {100}
    assert not any(t["findings"] for t in record["targets"].values())
