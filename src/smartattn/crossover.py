"""The crossover map: which backend wins by length and padding, and by how much."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cost import Predictor
from .features import Mode, Regime, regime_of
from .profile import Profile, RatioOf
from .thresholds import predictions, speedup
from .units import LEAD, TIMES_AS_FAST, in_words
from .workload import Side, Workload, as_padded, usual_memory

#: Padded lengths and shares of padding of a map, as far as something was measured there.
LENGTHS = tuple(2**exponent for exponent in range(5, 17))
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
#: The kinds of call that get a map: mode, causal or not, side of the padding.
KINDS: tuple[tuple[Mode, bool, Side], ...] = (
    ("forward", False, "right"),
    ("forward", True, "left"),
    ("forward", True, "right"),
    ("decode", False, "left"),
    ("train", False, "right"),
    ("train", True, "right"),
)
BATCH, HEADS = 16, 16
#: Colours of backends in the order in which they win most, for plots and for terminals.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#332288")
_SHADES = ("blue", "red", "green", "yellow", "cyan", "magenta", "white", "bright_blue")


class PlotError(RuntimeError):
    """Why a map cannot be drawn, in one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The backend that is chosen, and how many times as fast as with the next one it is.

    Of the whole layer where something is known of it, see ``Map.ratio_of``.
    """

    backend: str
    #: None if no other backend has a prediction there.
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Map:
    """The winners of one kind of call: ``cells[share][length]``, None where nothing was measured.

    No length and no share is there that has no cell.
    """

    title: str
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    #: What the cells' ratios are of: the time of a whole layer, or of the call alone.
    ratio_of: RatioOf = "call"

    @property
    def wins(self) -> Counter[str]:
        """How many cells each backend wins."""
        return Counter(cell.backend for row in self.cells for cell in row if cell)


def maps(profile: Profile) -> list[Map]:
    """The maps of a profile, for the dtype and head_dim that most was measured of.

    A map ends at the longest length measured of its kind of call, causal and bidirectional ones
    together.
    """
    if not profile.costs:
        return []
    device = torch.device(profile.device.kind if profile.device else "cpu")
    usual: Counter[tuple[str, int]] = Counter()
    for cost in profile.costs:
        usual[cost.dtype, cost.head_dim] += cost.samples
    dtype, head_dim = usual.most_common(1)[0][0]
    backends = sorted({cost.backend for cost in profile.costs})
    longest: dict[tuple[str, ...], int] = defaultdict(int)
    for cost in profile.costs:
        kind = _kind(cost.regime)
        longest[kind] = max(longest[kind], cost.longest_kv_len)
    found = []
    for mode, causal, side in KINDS:
        words = in_words(mode, causal, f"padding on the {side}" if causal else "")
        title = f"{words}; batch {BATCH}, {HEADS} heads of {head_dim}, {dtype}"
        cells = tuple(
            tuple(
                _cell(
                    Workload(
                        mode=mode,
                        causal=causal,
                        side=side if share else "none",
                        dtype=dtype,
                        batch=BATCH,
                        q_len=1 if mode == "decode" else length,
                        kv_len=length,
                        heads=HEADS,
                        kv_heads=HEADS,
                        head_dim=head_dim,
                        padding_share=share,
                        memory=usual_memory(mode, causal, side),
                    ),
                    profile.predictor,
                    backends,
                    device,
                    longest,
                )
                for length in LENGTHS
            )
            for share in SHARES
        )
        ratio_of: RatioOf = "layer" if profile.predictor.of_layers else "call"
        one = _filled(Map(title, LENGTHS, SHARES, cells, ratio_of))
        if one.wins:
            found.append(one)
    return found


def _filled(one: Map) -> Map:
    """A map without the shares and the lengths of which nothing was measured."""
    rows = [row for row, cells in enumerate(one.cells) if any(cells)]
    columns = [column for column, cells in enumerate(zip(*one.cells, strict=True)) if any(cells)]
    return Map(
        one.title,
        tuple(one.lengths[column] for column in columns),
        tuple(one.shares[row] for row in rows),
        tuple(tuple(one.cells[row][column] for column in columns) for row in rows),
        one.ratio_of,
    )


def _kind(regime: Regime) -> tuple[str, ...]:
    """What a length is measured for, whatever the head_dim."""
    return regime.mode, regime.layout, str(regime.causal), regime.dtype


def _cell(
    workload: Workload,
    predictor: Predictor,
    backends: Sequence[str],
    device: torch.device,
    longest: Mapping[tuple[str, ...], int],
) -> Cell | None:
    workload = as_padded(workload)
    plan, call = workload.plan(device), workload.call(device)
    regime = regime_of(plan, call)
    if regime is None or call.kv_len > longest.get(_kind(regime), 0):
        return None
    times = predictions(predictor, backends, plan, call)
    if not times or times[0][0] <= 0:
        return None
    return Cell(times[0][1], speedup(predictor, times, plan, call))


def _places(found: Sequence[Map]) -> dict[str, int]:
    """The backends that win anywhere, those that win most first, to their places."""
    wins: Counter[str] = Counter()
    for one in found:
        wins.update(one.wins)
    return {name: place for place, (name, _) in enumerate(sorted(wins.items(), key=_most_first))}


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _letters(names: Sequence[str]) -> dict[str, str]:
    """One or two letters per backend, no two equal: of its first and its last part."""
    letters: dict[str, str] = {}
    for name in names:
        first, *others = name.upper().split("_")
        short = first[0] + (others[-1][0] if others else "")
        numbers = (f"{first[0]}{number}" for number in range(10))
        letters[name] = next(c for c in (short, first[:2], *numbers) if c not in letters.values())
    return letters


def show(found: Sequence[Map], console: Console) -> None:
    """Prints the maps: a letter per winner, and how far ahead of the next one it is."""
    places = _places(found)
    letters = _letters(list(places))
    legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    console.print(
        f"{legend}; the number: {_captions(found)}, by prediction; none: less than "
        f"{LEAD}, or there is no other; as far as one backend was measured in calls of "
        "that kind with heads of any size, causal and bidirectional ones together, and padding on "
        "the right together with none",
        soft_wrap=True,
        highlight=False,
    )
    for one in found:
        # Not a title of the table, which would be cut into lines as short as the table.
        console.print(one.title, style="italic", soft_wrap=True, highlight=False)
        table = Table("padding", pad_edge=False, padding=0)
        for length in one.lengths:
            table.add_column(f"{length // 1024}k" if length >= 1024 else str(length))
        for share, row in zip(one.shares, one.cells, strict=True):
            texts = [Text(f"{share:.0%}")]
            for cell in row:
                if cell is None:
                    texts.append(Text(""))
                    continue
                shade = _SHADES[places[cell.backend] % len(_SHADES)]
                texts.append(Text(letters[cell.backend] + _times(cell), style=shade))
            table.add_row(*texts)
        console.print(table)


def _captions(found: Sequence[Map]) -> str:
    return " or ".join(dict.fromkeys(TIMES_AS_FAST[one.ratio_of] for one in found))


def _times(cell: Cell) -> str:
    if cell.speedup is None or cell.speedup < LEAD:
        return ""
    return f" {cell.speedup:.1f}" if cell.speedup < 9.95 else " >9.9"


def plot(found: Sequence[Map], name: str, path: Path) -> None:
    """Draws the maps into one PNG file.

    Raises:
        PlotError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise PlotError(
            f"a plot needs matplotlib ({error}): pip install 'smartattn[plot]', "
            "or leave out --plot for the map in the terminal"
        ) from None
    places = _places(found)
    colours = {name: COLOURS[place % len(COLOURS)] for name, place in places.items()}
    columns = 2 if len(found) > 1 else 1
    rows = -(-len(found) // columns)
    figure: Any = Figure(figsize=(7.5 * columns, 2.9 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, one in zip(axes, found, strict=False):
        for y, row in enumerate(one.cells):
            for x, cell in enumerate(row):
                if cell is None:
                    continue
                # The clearer the win, the stronger the colour.
                gain = 1.0 if cell.speedup is None else min(1.0, cell.speedup - 1.0)
                box = Rectangle((x, y), 1, 1, facecolor=colours[cell.backend], edgecolor="white")
                box.set_alpha(0.35 + 0.65 * gain)
                axis.add_patch(box)
                axis.text(x + 0.5, y + 0.5, _times(cell), ha="center", va="center", fontsize=8)
        axis.set_xlim(0, len(one.lengths))
        axis.set_ylim(0, len(one.shares))
        ticks = [f"{n // 1024}k" if n >= 1024 else str(n) for n in one.lengths]
        axis.set_xticks([x + 0.5 for x in range(len(one.lengths))], ticks, fontsize=8)
        shares = [f"{share:.0%}" for share in one.shares]
        axis.set_yticks([y + 0.5 for y in range(len(one.shares))], shares, fontsize=8)
        axis.set_xlabel("padded length in tokens", fontsize=8)
        axis.set_ylabel("padding", fontsize=8)
        axis.set_title(one.title, fontsize=8.5)
        axis.tick_params(length=0)
    for axis in axes[len(found) :]:
        axis.axis("off")
    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9)
    figure.suptitle(
        f"{name}: the fastest backend, and {_captions(found)} (from {LEAD} on)",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, format="png")
