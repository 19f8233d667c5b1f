"""The crossover map: it says what the profile predicts, in the terminal and as a picture."""

from __future__ import annotations

import builtins
import io
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from smartattn import crossover, profile, profiles
from smartattn.backends import BACKENDS
from smartattn.cost import Cost
from smartattn.explaining import explain
from smartattn.machine import Device
from smartattn.profile import Profile
from smartattn.surroundings import Surroundings
from smartattn.workload import Workload, as_padded

CUDA = torch.device("cuda")


def cost(backend: str, device_us: dict[str, float], **changes: Any) -> Cost:
    given: dict[str, Any] = {
        "mode": "forward",
        "layout": "padded",
        "causal": False,
        "dtype": "bfloat16",
        "head_dim": 64,
        "host_us": {},
        "longest_kv_len": 4096,
        "samples": 9,
        "median_error": 0.0,
    }
    return Cost(backend=backend, device_us=device_us, **{**given, **changes})


MADE = Profile(
    name="made",
    costs=(
        cost("sdpa", {"call": 10.0, "dense_tiles": 1.0}),
        cost("torch_varlen", {"call": 40.0, "real_tiles": 1.0}),
        # Less was measured of another head_dim, which has no map.
        cost("sdpa", {"call": 1.0}, head_dim=128, samples=2),
    ),
)


def test_the_map_is_what_the_profile_predicts() -> None:
    (one,) = crossover.maps(MADE)
    assert "bidirectional" in one.title
    assert "heads of 64" in one.title
    assert one.lengths[-1] == 4096
    assert set(one.wins) == {"sdpa", "torch_varlen"}
    # Nothing was measured without padding: such a row would be empty.
    assert one.shares == crossover.SHARES[1:]
    for share, row in zip(one.shares, one.cells, strict=True):
        for length, cell in zip(one.lengths, row, strict=True):
            workload = as_padded(Workload(
                "forward", False, "right", "bfloat16", 16, length, length, 16, 16, 64, 0, 0, share
            ))  # fmt: skip
            plan, call = workload.plan(torch.device("cpu")), workload.call(torch.device("cpu"))
            times = {n: MADE.predict(n, plan, call) or 0.0 for n in ("sdpa", "torch_varlen")}
            assert cell is not None
            assert times[cell.backend] == min(times.values())
            assert cell.speedup == pytest.approx(max(times.values()) / min(times.values()))


#: How ``explain`` is asked for the calls of a map, by the beginning of its title.
ASKED: dict[str, dict[str, Any]] = {
    "forward, bidirectional": {"side": "right"},
    "forward, causal, padding on the left": {"causal": True, "side": "left"},
    "forward, causal, padding on the right": {"causal": True, "side": "right"},
    "decode": {"decode": True},
    "forward and backward, bidirectional": {"grad": True},
    "forward and backward, causal": {"grad": True, "causal": True},
}


@pytest.mark.parametrize("name", ["nvidia-h200", "cpu-amd-epyc-2-threads"])
def test_the_map_says_what_explain_says(name: str) -> None:
    """Of the same call, at every length: padding, and where keys lie, are the same."""
    path = profiles.shipped_profiles() / f"{name}.json"
    shipped = profile.load(path)
    profiles.set_profile(path)
    asked = 0
    try:
        for one in crossover.maps(shipped):
            given = next(given for words, given in ASKED.items() if one.title.startswith(words))
            head_dim, dtype = one.title.split(" of ")[1].split("; ")[0].split(", ")
            for share in (0.1, 0.5, 0.9):
                answer = explain(
                    batch=16, seq_len=512, heads=16, head_dim=int(head_dim), dtype=dtype,
                    padding=share, device=str(shipped.device), **given,
                )  # fmt: skip
                for length, cell in zip(
                    one.lengths, one.cells[one.shares.index(share)], strict=True
                ):
                    before = [w for w in answer.winners if w.from_seq_len <= length]
                    if cell is not None and cell.speedup is not None:
                        asked += 1
                        assert before[-1].backend == cell.backend, (one.title, share, length)
    finally:
        profiles.set_profile(None)
    assert asked > 50


@pytest.mark.parametrize("name", ["nvidia-h200", "cpu-amd-epyc-2-threads"])
def test_thresholds_say_what_explain_says(name: str) -> None:
    path = profiles.shipped_profiles() / f"{name}.json"
    shipped = profile.load(path)
    profiles.set_profile(path)
    asked = 0
    try:
        for one in shipped.thresholds:
            if one.head_dim != 64 or one.padding_share not in (0.0, 0.5) or one.alike:
                continue
            if one.layout not in ("plain", "right", "padded"):
                continue
            given: dict[str, Any] = {"causal": one.causal, "padding": one.padding_share}
            given |= {"grad": one.mode == "train", "decode": one.mode == "decode"}
            left = one.mode == "decode" or (one.causal and one.layout == "padded")
            given["side"] = "left" if left else "right"
            answer = explain(
                batch=8, seq_len=512, heads=16, head_dim=64, dtype=one.dtype,
                device=str(shipped.device), **given,
            )  # fmt: skip
            for length in crossover.LENGTHS[: crossover.LENGTHS.index(512)]:
                (*_, winner) = [w for w in one.winners if w.from_kv_len <= length]
                (*_, other) = [w for w in answer.winners if w.from_seq_len <= length]
                asked += 1
                assert winner.backend == other.backend, (one.mode, one.layout, one.dtype, length)
    finally:
        profiles.set_profile(None)
    assert asked > 20


def test_a_map_has_the_padding_that_it_names() -> None:
    for share in crossover.SHARES[1:]:
        made = as_padded(Workload(
            "forward", True, "left", "float32", 16, 512, 512, 16, 16, 64, 0, 0, share
        ))  # fmt: skip
        assert made.plan(torch.device("cpu")).padding_share == pytest.approx(share, abs=0.01)


def test_a_call_that_its_layer_hides_is_not_many_times_as_fast() -> None:
    """One adds next to nothing to a layer of 800 us, the other 9 us: 90 times as much."""
    around = Surroundings(host_us=2000.0, flops_per_us=1e9, bytes_per_us=1e9)
    costs = (cost("sdpa", {"call": 809.0}), cost("torch_varlen", {"call": 800.1}))
    (alone,) = crossover.maps(Profile(name="made", costs=costs))
    (inside,) = crossover.maps(Profile(name="made", costs=costs, surroundings=around))
    assert (alone.ratio_of, inside.ratio_of) == ("call", "layer")
    for row in inside.cells:
        for cell in row:
            assert cell is not None
            assert cell.speedup is not None
            assert 1.0 < cell.speedup < 1.02
    for found, says in (
        (alone, "how many times as fast as the next one"),
        (inside, "a whole layer runs"),
    ):
        console = Console(record=True, width=120, file=io.StringIO())
        crossover.show([found], console)
        assert says in console.export_text()


def test_a_map_ends_at_the_longest_length_measured_of_its_kind() -> None:
    costs = (
        *MADE.costs,
        cost("sdpa", {"call": 1.0}, mode="decode", longest_kv_len=700),
        # A regime that has no cost of the usual head_dim is measured all the same.
        cost("sdpa", {"call": 1.0}, layout="plain", head_dim=128, longest_kv_len=100),
    )
    made = Profile(name="made", costs=costs)
    forward, decode = crossover.maps(made)
    assert forward.lengths[-1] == 4096
    assert decode.lengths[-1] == 512
    assert forward.shares == crossover.SHARES
    assert [cell is not None for cell in forward.cells[0]] == [True, True] + [False] * 6
    assert decode.shares == crossover.SHARES[1:]


def test_a_title_is_one_line_however_narrow_the_map() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    made = Profile(name="made", costs=(cost("sdpa", {"call": 1.0}, longest_kv_len=40),))
    (one,) = crossover.maps(made)
    assert one.lengths == (32,)
    crossover.show([one], console)
    assert one.title in console.export_text().splitlines()


def test_what_is_set_aside_wins_nothing() -> None:
    costs = (cost("sdpa", {"dense_tiles": 1.0}), cost("sdpa_unpadded", {"real_tiles": 0.1}))
    gpu = Device(kind="cuda", name="NVIDIA H200")
    (here,) = crossover.maps(Profile(name="here", costs=costs))
    (there,) = crossover.maps(Profile(name="there", costs=costs, device=gpu))
    assert set(here.wins) == {"sdpa_unpadded"}
    assert set(there.wins) == {"sdpa"}


def test_the_map_prints_a_letter_per_winner() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    crossover.show(crossover.maps(MADE), console)
    text = console.export_text()
    assert "S sdpa" in text
    assert "TV torch_varlen" in text
    assert "S 3.9" in text
    assert "TV" in text.split("90%")[1].splitlines()[0]
    assert "4k" in text


def test_a_lead_that_is_none_has_no_number() -> None:
    for speedup, says in ((None, ""), (1.0, ""), (1.049, ""), (1.06, " 1.1"), (12.0, " >9.9")):
        assert crossover._times(crossover.Cell("sdpa", speedup)) == says
    shipped = profile.load(profiles.shipped_profiles() / "nvidia-h200.json")
    console = Console(record=True, width=120, file=io.StringIO())
    crossover.show(crossover.maps(shipped), console)
    text = console.export_text()
    assert "1.0│" not in text
    assert "none: less than 1.05" in text


def test_of_backends_that_count_as_equal_the_map_has_the_one_that_is_chosen() -> None:
    costs = (cost("sdpa", {"call": 100.5}), cost("flash_attention_2", {"call": 100.0}))
    (one,) = crossover.maps(Profile(name="made", costs=costs))
    assert set(one.wins) == {"sdpa"}


def test_letters_are_told_apart() -> None:
    names = ["sdpa", "sdpa_unpadded", "flash_attention_2", "flash_attention_3", "s"]
    names += ["triton_varlen", "torch_varlen"]
    letters = list(crossover._letters(names).values())
    assert letters == ["S", "SU", "F2", "F3", "S0", "TV", "TO"]


def test_there_is_a_colour_for_every_backend() -> None:
    measured = [backend.name for backend in BACKENDS if not backend.last_resort]
    assert len(set(crossover.COLOURS)) == len(set(crossover._SHADES)) >= len(measured)


def test_a_profile_of_rules_alone_has_no_map() -> None:
    assert crossover.maps(Profile(name="rules", rules=profiles.default_rules())) == []


def test_the_picture_is_a_png_of_some_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    shipped = profile.load(profiles.shipped_profiles() / "nvidia-h200.json")
    crossover.plot(crossover.maps(shipped), "NVIDIA H200", path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000
    assert height > 600


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(crossover.PlotError, match=r"pip install 'smartattn\[plot\]'"):
        crossover.plot(crossover.maps(MADE), "made", tmp_path / "map.png")
