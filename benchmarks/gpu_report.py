"""Text of a result of ``benchmarks.gpu`` or ``benchmarks.gpu_check``: plain data in, tables out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.text import duration, table

Record = dict[str, Any]

#: What plain PyTorch is grouped by in the short table, by the beginning of a variant's name.
KINDS = ("torch.cdist", "torch.compile", "")

#: What the three times are; benchmarks/gpu.py says it in full.
TIMES = (
    "A call is a forward and a backward pass in float32. *Wall* is the host's time per call while calls follow one "
    "another. *Kernel* is the device's time per call in a replayed CUDA graph, with all kernels and the gaps between "
    "them: cold, when copies of the inputs that exceed the L2 cache three times take turns, and warm, when all calls "
    "read the same inputs. Ratios are their time over metafast's. Shares are the bytes and operations that the shapes "
    "ask for over the cold kernel time, against a copy of 2 GiB and a 4096-wide float32 product without tf32 of the "
    "same run."
)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"


def seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)


def kind_of(variant: str) -> str:
    return next(kind for kind in KINDS if variant.startswith(kind))


def fastest(record: Record, kind: str) -> str:
    """The least wall and kernel ratio over the plain variants of a kind."""
    others = [row for row in record["rows"][1:] if kind_of(row["variant"]) == kind]
    found = []
    for key in ("wall_ratio", "kernel_ratio"):
        ratios = [row[key] for row in others if row[key] is not None]
        found.append(f"{min(ratios):.3g}" if ratios else "-")
    return "-" if found == ["-", "-"] else " / ".join(found)


def gate(record: Record) -> str:
    """The gate on the kernel time and its verdict."""
    found = record["kernel_gate"]
    if found is None:
        return "-"
    word = found["verdict"].upper() if found["verdict"] == "miss" else found["verdict"]
    return f"{duration(found['gate'])} {word}"


def share(record: Record, of: str) -> str:
    value = record["shares"].get(f"share_of_{of}")
    return "-" if value is None else f"{value:.0%}"


def short_row(record: Record) -> tuple[str, ...]:
    if not record["correct"]:
        return record["title"], "WRONG, not timed: " + ", ".join(record["wrong"]), *[""] * 8
    ours = record["rows"][0]
    return (
        record["title"],
        seconds(ours["kernel"]),
        seconds(ours["kernel_warm"]),
        gate(record),
        share(record, "copy"),
        share(record, "sgemm"),
        seconds(ours["wall"]),
        *(fastest(record, kind) for kind in KINDS),
    )


SHORT_HEAD = (
    "workload", "kernel", "warm", "gate", "of copy", "of sgemm", "wall", "cdist", "compile", "other eager",
)  # fmt: skip


def short_table(records: Iterable[Record]) -> str:
    """A line for each workload; the last columns are ratios, wall / kernel, to the fastest form of that kind."""
    return table([SHORT_HEAD, *map(short_row, records)])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    # A bar inside a cell would end it.
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"


def workload(record: Record) -> Iterator[str]:
    yield f"### {record['title']}"
    yield ""
    if not record["correct"]:
        yield f"**Wrong results of {', '.join(record['wrong'])}; not timed.**"
        return
    facts = [f"{name} {value}" for name, value in record["sizes"].items()]
    for name, unit in (("traffic", "MB"), ("flops", "MFLOP")):
        if record[name]:
            facts.append(f"{record[name] / 1e6:.4g} {unit}")
    for unit, name, of in (("bytes", "GB/s", "copy"), ("flops", "GFLOP/s", "sgemm")):
        if (rate := record["shares"].get(f"{unit}_per_second")) is not None:
            facts.append(f"{rate / 1e9:.4g} {name} ({share(record, of)} of the {of})")
    if record["copies"] > 1:
        facts.append(f"{record['copies']} copies of the inputs for the cold times")
    yield "; ".join(facts) + "."
    yield ""
    head = ("variant", "wall", "ratio", "kernel, cold", "ratio", "kernel, warm", "ratio", "")
    yield from markdown_table(
        head,
        (
            (
                row["variant"],
                *(
                    cell
                    for key in ("wall", "kernel", "kernel_warm")
                    for cell in (seconds(row[key]), "" if k == 0 else ratio(row[f"{key}_ratio"]))
                ),
                row["note"],
            )
            for k, row in enumerate(record["rows"])
        ),
    )
    verdicts = [
        f"kernel time at most {duration(g['gate'])}: **{g['verdict']}**" for g in [record["kernel_gate"]] if g
    ]
    verdicts += [
        f"wall time at least {goal['gate']:g} times as fast as {goal['against']}: **{goal['verdict']}**"
        for goal in record["goals"]
    ]
    if verdicts:
        yield ""
        yield "; ".join(verdicts) + "."
    if record["profile"]:
        total = sum(event["seconds"] for event in record["profile"])
        yield ""
        yield f"Kernels of metafast's call (profiler, {duration(total)} in all):"
        yield ""
        yield from markdown_table(
            ("kernel", "runs", "time"),
            (
                (f"`{event['kernel']}`", f"{event['runs']:g}", duration(event["seconds"]))
                for event in record["profile"]
            ),
        )


def phase_lines(phases: Iterable[Record]) -> list[str]:
    return [f"{p['name']}: {p['verdict']} in {p['seconds']:.0f} s. {p['detail']}" for p in phases]


def summary(result: Record) -> str:
    """The short text that ends a run."""
    rows = [("phase", "result", "time", "")]
    rows += [(p["name"], p["verdict"], f"{p['seconds']:.0f} s", p["detail"]) for p in result["phases"]]
    text = [f"{result['machine']['device']}, torch {result['machine']['torch']}", table(rows)]
    if records := (result["benchmarks"] or {}).get("cases"):
        text.append(short_table(records))
    return "\n\n".join(text)


def markdown(result: Record) -> str:
    """The whole result of ``benchmarks.gpu_check``."""
    machine = result["machine"]
    lines = [f"# GPU check: {machine['device']}", ""]
    lines.append(
        f"`{result['command']}` on {result['date']}, {result['seconds']:.0f} s: **{result['verdict']}**."
    )
    lines.append("")
    lines += markdown_table(("", ""), ((name, str(value)) for name, value in machine.items()))
    lines += ["", "## Phases", ""]
    lines += markdown_table(
        ("phase", "result", "time", "what it found"),
        ((p["name"], p["verdict"], f"{p['seconds']:.0f} s", p["detail"]) for p in result["phases"]),
    )
    for phase in result["phases"]:
        if phase["log"]:
            lines += ["", f"End of the log of {phase['name']}:", "", "```", *phase["log"], "```"]
    if benchmarks := result["benchmarks"]:
        limits = benchmarks["ceilings"]
        lines += ["", "## Speed", "", TIMES, ""]
        lines.append(
            f"Ceilings of this run: copy {limits['bytes_per_second'] / 1e9:.4g} GB/s, sgemm "
            f"{limits['flops_per_second'] / 1e12:.3g} TFLOP/s."
        )
        lines += [f"Failed: {name}: {reason}" for name, reason in benchmarks["failed"].items()]
        for record in benchmarks["cases"]:
            lines += ["", *workload(record)]
    return "\n".join(lines) + "\n"
