"""The page and the plot of :mod:`benchmarks.models`, from results that may have been saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import common
from .common import Judged, Run, judged, markdown, mean_of, number
from .models import IMPLEMENTATIONS, Result, Workload, ratio, table, tiny_workloads, workloads

SHORT = {"sdpa": "sdpa", "flash_attention_2": "FA2", "smart": "smart"}
#: What is wanted: the worst smart / better, and of means over padded forwards.
_WORST = 1.03
_PADDED = {
    "with FlashAttention-3": 1.12,
    "flash-attn alone": 1.06,
    "without flash-attn": 1.10,
}
_PADDED_TOKENS = 8000
_OVER = {"sdpa": 1.25, "flash_attention_2": 1.30}
#: Over the better of the two, per workload.
_NAMED = {
    "llama-1b generate 32x2048 pad50% left +64": 1.25,
    "llama-1b generate 8x8192 pad50% left +64": 1.4,
    "llama-1b train 8x2048 pad50% right": 1.02,
    "llama-1b train 2x16384 pad5% right": 1.12,
    "bert-large stream 200x2048": 1.15,
    "bert-large stream-again 200x2048": 1.15,
}


def expected(runs: Sequence[Run]) -> list[Workload]:
    """The grid that runs belong to, the report's or the tiny one."""
    names = {name for run in runs for name in (*run.not_run, *(r.workload for r in run.results))}
    full, tiny = list(workloads()), list(tiny_workloads())
    if any(workload.name in names for workload in tiny):
        return tiny
    return full


def _among(
    run: Run, grid: Sequence[Workload], belongs: Callable[[Workload], bool]
) -> tuple[list[Result], list[str]]:
    """(results, names of the workloads that were not measured) of a part of the grid."""
    found = {result.workload: result for result in run.results if result.speedup is not None}
    names = [workload.name for workload in grid if belongs(workload)]
    return [found[name] for name in names if name in found], [n for n in names if n not in found]


def is_padded(workload: Workload) -> bool:
    """Of those over which the gain under padding is averaged."""
    return (
        workload.task in ("forward", "prefill")
        and workload.padding > 0
        and workload.batch * workload.length >= _PADDED_TOKENS
    )


def _is_host_bound(workload: Workload) -> bool:
    shape = (workload.model, workload.task, workload.batch, workload.length)
    return shape == ("bert-large", "forward", 32, 128) and workload.padding > 0


def wanted(run: Run, grid: Sequence[Workload]) -> list[Judged]:
    """What a run is to show."""
    results, missing = _among(run, grid, lambda _: True)
    shares = {result.workload: ratio(result) or 0.0 for result in results}
    worst = max(shares, key=lambda name: shares[name], default=None)
    above = sum(share > _WORST for share in shares.values())
    rows = [
        judged(
            "every workload: smart / min(sdpa, FA2), the worst",
            run,
            shares[worst] if worst else None,
            at_most=_WORST,
            missing=len(missing),
            note=f"{worst}; {above} of {len(shares)} above {_WORST}",
        )
    ]
    padded, missing = _among(run, grid, is_padded)
    rows.append(
        judged(
            f"padded forwards of at least {_PADDED_TOKENS:,} tokens: min(sdpa, FA2) / smart, "
            "geometric mean",
            run,
            mean_of([result.speedup or 0.0 for result in padded]),
            at_least=_PADDED[run.label],
            missing=len(missing),
            note=f"{len(padded)} workloads",
        )
    )
    if run.label == "without flash-attn":
        return rows
    for name, bound in _OVER.items():
        over = [value for result in results if (value := result.over(name)) is not None]
        rows.append(
            judged(
                f"all workloads: {SHORT[name]} / smart, geometric mean",
                run,
                mean_of(over),
                at_least=bound,
                missing=len(grid) - len(over),
                note=f"{len(over)} workloads",
            )
        )
    by_name = {result.workload: result for result in results}
    for workload in grid:
        if workload.name in _NAMED:
            result = by_name.get(workload.name)
            value = result.speedup if result else None
            what = f"{workload.name}: min(sdpa, FA2) / smart"
            rows.append(judged(what, run, value, at_least=_NAMED[workload.name]))
    bound_by_host, missing = _among(run, grid, _is_host_bound)
    if bound_by_host or missing:
        slower = {r.workload: 1 / over for r in bound_by_host if (over := r.over("sdpa"))}
        worst = max(slower, key=lambda name: slower[name], default=None)
        rows.append(
            judged(
                "bert-large forward 32x128, padded: smart / sdpa, the worst",
                run,
                slower[worst] if worst else None,
                at_most=1.0,
                missing=len(missing),
                note=worst or "",
            )
        )
    return rows


def _side_by_side(
    runs: Sequence[Run], grid: Sequence[Workload], field: str, form: str, names: Sequence[str]
) -> str:
    """One figure of all runs, one row per workload."""
    found = [{result.workload: getattr(result, field) for result in run.results} for run in runs]
    columns = [
        (place, name)
        for place, by_workload in enumerate(found)
        for name in names
        if any(name in values for values in by_workload.values())
    ]
    header = ["workload"]
    for place, name in columns:
        header.append(SHORT[name] + (f", {runs[place].label}" if len(runs) > 1 else ""))
    rows = [
        [w.name, *(number(found[place].get(w.name, {}).get(name), form) for place, name in columns)]
        for w in grid
        if any(by_workload.get(w.name) for by_workload in found)
    ]
    return markdown(header, rows) if columns else ""


def _agreement(runs: Sequence[Run], grid: Sequence[Workload]) -> list[str]:
    """Differences from sdpa."""
    tasks = {workload.name: workload.task for workload in grid}
    lines = []
    for run in runs:
        for name in IMPLEMENTATIONS[1:]:
            groups: dict[str, dict[str, float]] = {"hidden states": {}, "losses": {}, "tokens": {}}
            for result in run.results:
                task = tasks.get(result.workload, "")
                if name in result.difference and task != "generate":
                    kind = "losses" if task.startswith("train") else "hidden states"
                    groups[kind][result.workload] = result.difference[name]
                if name in result.equal_tokens:
                    groups["tokens"][result.workload] = result.equal_tokens[name]
            for kind in ("hidden states", "losses"):
                if groups[kind]:
                    where = max(groups[kind], key=lambda one: groups[kind][one])
                    figure = f"{groups[kind][where]:.1e}, {where}"
                    lines.append((SHORT[name], run.label, f"{kind}, largest difference", figure))
            if groups["tokens"]:
                where = min(groups["tokens"], key=lambda one: groups["tokens"][one])
                figure = f"{groups['tokens'][where]:.1%}, {where}"
                lines.append((SHORT[name], run.label, "generated tokens, least equal", figure))
    if not lines:
        return []
    return [
        "## Agreement with sdpa",
        "At real tokens, relative to the largest value of sdpa. Generated tokens of models with "
        "random weights part early: their largest logits are often equal in bfloat16.",
        markdown(("implementation", "run", "what", "figure"), lines),
    ]


_HOW_TO_READ = """\
Milliseconds per forward, generation or training step: the median of interleaved rounds, in each of
which every implementation runs once, with the device synchronised before and after. Models have
the shapes of real ones and random weights, in bfloat16 on a GPU. "smart / better" is the time of
`smart` divided by that of the better of `sdpa` and `flash_attention_2`: below 1, `smart` is faster.
"chosen" are the backends that ran when the rounds began. One that builds kernels for each shape
takes over from them once that pays; where two seconds of warming up did not bring it about, it says
for which one it was still waiting.
Compare ratios within one run, not times between runs. A workload is named by its model, its task,
sequences x padded length, the share of padding and its side. Every round of "stream" brings batches
that no round before had, as traffic does, so that what is built per shape is built again;
"stream-again" repeats one."""


def page(runs: Sequence[Run], plot_file: Path | None = None) -> list[str]:
    """The parts of the page, in Markdown."""
    grid = expected(runs)
    name = next((run.versions.get("device") for run in runs), None) or "unknown device"
    parts = [f"# Whole models: {name}", "Made by `python -m benchmarks.models`.", _HOW_TO_READ]
    parts.append(common.described(runs))
    if plot_file is not None:
        parts.append(f"![Speed-up by workload]({plot_file.name})")
    for run in runs:
        parts += [f"## Times, {run.label}", table(run.results)]
        spreads = [
            result.spread_ms[name] / result.median_ms[name]
            for result in run.results
            for name in result.spread_ms
            if result.median_ms.get(name)
        ]
        if spreads:
            middle, _ = common.middle(spreads)
            text = "The interquartile range of the rounds is"
            parts.append(f"{text} {middle:.1%} of the median for half of the figures, or less.")
        failed = [
            f"- {result.workload}, {SHORT[name]}: {why.splitlines()[0]}"
            for result in run.results
            for name, why in result.failed.items()
            # That flash-attn is not there is what such a run is for.
            if name != "flash_attention_2" or run.label != "without flash-attn"
        ]
        parts += ["Did not run:", "\n".join(failed)] if failed else []
    parts.append(common.left_out(runs, [workload.name for workload in grid]))
    if grid[0] not in tiny_workloads():
        rows = [one for run in runs for one in wanted(run, grid)]
        # By figure, then by run: what one asks is what the packages change.
        order = {what: place for place, what in enumerate(dict.fromkeys(row.what for row in rows))}
        parts += [
            "## Wanted and measured",
            'A figure of which workloads are missing is "incomplete", however good the rest is.\n'
            "Without flash-attn, min(sdpa, FA2) is sdpa.",
            common.judgements(sorted(rows, key=lambda row: order[row.what])),
        ]
    for run in runs:
        above = [
            (
                result.workload,
                f"{share:.3f}",
                number(result.uncertainty, ".3f"),
                result.chosen,
            )
            for result in run.results
            if (share := ratio(result)) is not None and share > _WORST
        ]
        if above:
            above.sort(key=lambda cells: cells[1], reverse=True)
            parts += [f"Above {_WORST}, {run.label}:"]
            parts += [
                markdown(
                    ("workload", "smart / better", "standard error within the run", "chosen"), above
                )
            ]
    parts += [
        "## First call",
        "Milliseconds of the first call in the process, which builds and loads what later ones\n"
        "find. The implementations come in this order on every workload, so that the first pays\n"
        "for what they share.",
    ]
    parts.append(_side_by_side(runs, grid, "first_ms", ".0f", IMPLEMENTATIONS))
    peaks = _side_by_side(runs, grid, "peak_mib", ",.0f", IMPLEMENTATIONS)
    if peaks:
        parts += ["## Peak memory", "MiB that tensors hold, weights included.", peaks]
    return [*parts, *_agreement(runs, grid)]


def write(path: Path, runs: Sequence[Run], plot_file: Path | None = None) -> None:
    """Writes the page of runs."""
    common.write(path, page(runs, plot_file))


#: Colours of the tasks.
_COLOURS = ("#4477aa", "#228833", "#ccbb44", "#aa3377", "#66ccee")


def _group(workload: Workload) -> str:
    return workload.task.split("-")[0]


def plot(path: Path, runs: Sequence[Run]) -> None:
    """Draws the speed-ups of smart over the better of the others as PNG, a panel per run.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(
            f"--plot needs matplotlib ({error}): pip install 'smartattn[plot]', then draw what "
            "--json has saved with --from-json FILE --plot FILE"
        ) from None
    there = {result.workload for run in runs for result in run.results}
    bars = [workload for workload in expected(runs) if workload.name in there]
    groups = list(dict.fromkeys(map(_group, bars)))
    bars.sort(key=lambda workload: groups.index(_group(workload)))
    # A gap between the groups.
    places = [number_ + groups.index(_group(bar)) for number_, bar in enumerate(bars)]
    height = 0.19 * (len(bars) + len(groups)) + 1.2
    figure: Any = Figure(figsize=(4.5 + 3.5 * len(runs), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, run in zip(axes, runs, strict=True):
        speedups = {result.workload: result.speedup for result in run.results}
        for group, colour in zip(groups, _COLOURS, strict=False):
            mine = [
                (place, speedup)
                for place, bar in zip(places, bars, strict=True)
                if _group(bar) == group and (speedup := speedups.get(bar.name)) is not None
            ]
            if not mine:
                continue
            axis.barh(*zip(*mine, strict=True), height=0.75, color=colour)
            for place, speedup in mine:
                axis.text(
                    speedup + 0.01, place, f"{speedup:.2f}", va="center", ha="left", fontsize=6
                )
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_yticks(places, [bar.name for bar in bars], fontsize=7)
        axis.set_xlim(0.0, 1.12 * max([1.2, *(s for s in speedups.values() if s is not None)]))
        axis.set_ylim(max(places, default=0) + 1, -1)
        axis.set_title(run.label, fontsize=9)
        others = "sdpa" if run.label == "without flash-attn" else "min(sdpa, flash_attention_2)"
        axis.set_xlabel(f"{others} / smart", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    device = runs[0].versions.get("device", "") if runs else ""
    figure.suptitle(f"Speed-up of smart by workload, {device}", fontsize=10)
    figure.savefig(path, dpi=130)
