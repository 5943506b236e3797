"""Turns a result file into the README's speed section and a bar chart: ``python -m benchmarks.report``."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS
from benchmarks.ratios import DEFAULT_OUT, rates_text
from benchmarks.text import bound, duration
from metafast.training.files import write_atomically

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

Record = dict[str, Any]


def load(path: Path) -> Record:
    """Read a result file. Refuses one that is not a full run or whose correctness check failed."""
    try:
        result: Record = json.loads(path.read_text())
        records, quick = result["cases"], result["quick"]
        wrong = [record["name"] for record in records if not record["correct"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a result of benchmarks.ratios ({type(error).__name__}: {error})"
        ) from error
    if quick:
        raise ValueError(f"{path}: a --quick result measures too little for a report; run without --quick")
    if not records:
        raise ValueError(f"{path}: holds no case")
    if wrong:
        raise ValueError(f"{path}: wrong results in {', '.join(wrong)}; a report needs correct ones")
    return result


def rows(record: Record) -> Iterator[tuple[str, ...]]:
    """One row for each competitor: its name, its time, the ratio, the gate, the stretch and the verdict."""
    ours = record["timings"][OURS]["median"]
    goals = {goal["against"]: goal for goal in record["goals"]}
    for name, timing in record["timings"].items():
        if name == OURS:
            continue
        goal = goals.get(name)
        time = duration(timing["median"])
        if goal is None:
            yield name, time, f"{timing['median'] / ours:.2f}x", "", "", ""
        else:
            yield name, time, f"**{goal['ratio']:.2f}x**", *bounds(goal), goal["verdict"]
    for name, reason in record["unavailable"].items():
        # A bar inside a cell would end it.
        cell = f"unavailable: {reason}".replace("|", "/")
        yield name, cell, "", *(bounds(goals[name]) if name in goals else ("", "")), "not measured"


def bounds(goal: Record) -> tuple[str, str]:
    return bound(goal["gate"], goal["at_most"]), bound(goal["stretch"], goal["at_most"])


def conditions_text(result: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        "Forward and backward in float32; an episode batch is 32 tasks, 5-way 5-shot with 15 queries per "
        "class, where nothing else is said. "
        f"Measured on {result['date']} with `{result['command']}` on {result['cpu']}, "
        f"{result['threads']} threads; {versions}; allocator of every variant: {result['allocator']}. "
        f"Times are medians of {result['rounds']} interleaved rounds ({result['disturbed']:.0%} of the "
        "samples interrupted by other processes), and every result was first checked against float64. "
        "The ratio is their time over ours, for host cost (gates with <=) ours over theirs. GB/s and GFLOP/s "
        "are set against a copy of the same traffic and a large sgemm, measured in the same rounds."
    )


def render(result: Record, chart_link: str) -> str:
    """The README section, without its markers."""
    lines = [
        conditions_text(result),
        "",
        f"![Speed-up of every goal]({chart_link})",
        "",
        "| workload | metafast | against | time | ratio | gate | stretch | result |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in result["cases"]:
        own = "; ".join([duration(record["timings"][OURS]["median"]), *rates_text(record["rates"])])
        title = record["title"]
        for row in rows(record):
            lines.append("| " + " | ".join((title, own, *row)) + " |")
            title = own = ""
    return "\n".join(lines)


def insert(text: str, section: str) -> str:
    """``text`` with what lies between the markers replaced by ``section``."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"readme: expected {BEGIN} and, after it, {END}, once each")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{section}\n{END}{text.partition(END)[2]}"


def chart(result: Record) -> bytes:
    """PNG of how many times faster than each goal's reference metafast is, with gate and stretch."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("the bar chart needs matplotlib: pip install metafast[bench]") from error

    def speed_up(goal: Record, value: float) -> float:
        return 1 / value if goal["at_most"] else value

    bars = [
        (record["title"], goal)
        for record in result["cases"]
        for goal in record["goals"]
        if goal["ratio"] is not None
    ]
    if not bars:
        raise ValueError("chart: no goal was measured")
    held, missed, mark = "#2f6f9f", "#c0504d", "#222222"
    figure = Figure(figsize=(9.6, 1.4 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    shown = [1.0]
    for row, (_, goal) in enumerate(bars):
        ratio, gate = speed_up(goal, goal["ratio"]), speed_up(goal, goal["gate"])
        color = missed if goal["verdict"] == "miss" else held
        # On a log scale a bar is a factor, so it starts at 1.
        axes.barh(row, ratio - 1, left=1, height=0.6, color=color, zorder=2)
        axes.plot(gate, row, marker="|", markersize=20, markeredgewidth=2.2, color=mark, zorder=3)
        shown += [ratio, gate]
        if goal["stretch"] is not None:
            stretch = speed_up(goal, goal["stretch"])
            axes.plot(stretch, row, marker="D", markersize=5, color=mark, markerfacecolor="white", zorder=3)
            shown.append(stretch)
        axes.text(
            1.01,
            row,
            f"{ratio:.3g}x",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            fontweight="bold",
            color=color,
        )
    axes.set_yticks(range(len(bars)), [f"{title}\nvs {goal['against']}" for title, goal in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xscale("log")
    low, high = min(shown) / 1.3, max(shown) * 1.3
    axes.set_xlim(low, high)
    ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="#888888", linewidth=1, zorder=1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times faster than the named form (log scale)")
    versions = result["versions"]
    axes.set_title(
        f"metafast {versions['metafast']}, torch {versions['torch']}, {result['cpu']}, "
        f"{result['threads']} threads, {result['date']}",
        fontsize=10,
        loc="left",
    )
    handles: list[Any] = [
        Patch(color=held, label="gate held"),
        Line2D(
            [], [], color=mark, marker="|", linestyle="", markersize=12, markeredgewidth=2.2, label="gate"
        ),
        Line2D(
            [],
            [],
            color=mark,
            marker="D",
            markerfacecolor="white",
            linestyle="",
            markersize=5,
            label="stretch",
        ),
    ]
    if any(goal["verdict"] == "miss" for _, goal in bars):
        handles.insert(1, Patch(color=missed, label="gate missed"))
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, nargs="?", default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="file with the markers (README.md)"
    )
    parser.add_argument("--chart", type=Path, help="PNG to write (default: beside the result file)")
    options = parser.parse_args(arguments)
    chart_path: Path = options.chart or options.result.with_suffix(".png")
    try:
        result = load(options.result)
        link = Path(os.path.relpath(chart_path, options.readme.parent)).as_posix()
        readme = insert(options.readme.read_text(), render(result, link))
        picture = chart(result)
    except (ValueError, ImportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    write_atomically(chart_path, picture)
    write_atomically(options.readme, readme.encode())
    print(f"written: {chart_path}, {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
