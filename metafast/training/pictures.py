"""Pictures of training runs and reports. They need matplotlib (``pip install metafast[train]``)."""

from __future__ import annotations

import importlib.util
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import nn

from metafast.data import Episodes, FixedEpisodes, SinusoidSampler
from metafast.training.analyze import Report, with_inner_steps
from metafast.training.evaluate import Accuracy, evaluation_mode, learner_device
from metafast.training.files import write_atomically
from metafast.training.history import History, Row

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9730d", "#2e8b57", "#c0282d", "#6b6b6b"
#: Classes and images per class that still make a readable picture.
MOST_CLASSES, MOST_SUPPORT, MOST_QUERIES = 20, 5, 15
#: Share of the answers below which a bin of a reliability diagram says little.
FEW_ANSWERS = 0.01


def have_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_learning_curve(
    history: History,
    path: str | os.PathLike[str],
    title: str,
    train_label: str = "training",
    validation_label: str = "validation",
) -> None:
    """Loss, and accuracy with its 95 % interval in validation, against the steps; regression has a loss alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    rows, checks = history.rows, history.validations
    regression = math.isnan(rows[0].accuracy)
    figure = _figure(6.0 if regression else 10.0, 4.2)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    panels = figure.subplots(1, 1 if regression else 2, squeeze=False)[0]
    left = panels[0]
    loss, window = [row.loss for row in rows], max(1, len(rows) // 50)
    _curve(left, rows, loss, window, train_label)
    if checks:
        steps = [row.step for row in checks]
        left.plot(
            steps, [row.validation_loss for row in checks], "o-", color=ORANGE, ms=4, label=validation_label
        )
    best = history.best_validation
    if not regression:
        right, accuracy = panels[1], [100 * row.accuracy for row in rows]
        _curve(right, rows, accuracy, window, train_label)
        right.set_ylabel("accuracy in %")
        right.set_ylim(*_limits(accuracy))
    elif best is not None:
        text = f"best {best.validation_loss:.4f} at step {best.step}"
        left.axvline(best.step, color=GREY, lw=0.8, ls=":", label=text)
    if checks and not regression:
        means = numpy.array([100 * row.validation_accuracy for row in checks])
        interval = numpy.array([100 * row.validation_interval for row in checks])
        right.fill_between(steps, means - interval, means + interval, color=ORANGE, alpha=0.25, lw=0)
        right.plot(steps, means, "o-", color=ORANGE, ms=4, label=f"{validation_label}, 95 % interval")
        if best is not None:
            text = f"best {100 * best.validation_accuracy:.2f} % at step {best.step}"
            right.axvline(best.step, color=GREY, lw=0.8, ls=":", label=text)
    positive = [value for value in loss if value > 0]
    if len(positive) == len(loss) and max(positive) > 10 * min(positive):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    left.set_ylabel("squared error" if regression else "loss")
    for axes in panels:
        axes.set_xlabel("step")
        axes.grid(True, color="#e4e4e4", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.02 * max(rows[-1].step, 2))
    left.legend(frameon=False, fontsize=9, loc="upper right")
    if not regression:
        right.legend(frameon=False, fontsize=9, loc="lower right")
    _save(figure, path)


def draw_episode(
    learner: nn.Module,
    episodes: Episodes,
    path: str | os.PathLike[str],
    title: str,
    batch_norm: str = "running",
) -> None:
    """The hardest of a batch of episodes: support images, and query images marked right or wrong.

    BatchNorm layers normalise as :func:`evaluate` with ``batch_norm`` lets them.

    Raises:
        ValueError: episodes whose inputs are no images ``[T, n, channels, height, width]``.
    """
    if episodes.support_x.dim() != 5:
        raise ValueError(f"support_x: expected images [T, n, C, H, W], got {list(episodes.support_x.shape)}")
    device = learner_device(learner)
    with torch.no_grad(), evaluation_mode(learner, batch_norm):
        each = [learner(episodes[task].to(device)).logits.argmax(-1).cpu() for task in range(episodes.tasks)]
    predicted = torch.cat(each)
    episodes = episodes.to("cpu")
    right = predicted == episodes.query_y
    task = int(right.sum(1).argmin())
    ways = min(episodes.ways, MOST_CLASSES)
    support_rows = [_rows(episodes.support_y[task], label, MOST_SUPPORT) for label in range(ways)]
    query_rows = [_rows(episodes.query_y[task], label, MOST_QUERIES) for label in range(ways)]
    shots, queries = max(map(len, support_rows)), max(map(len, query_rows))

    # A grid in inches: class name, support images, a gap, query images.
    cell, name, gap, top, bottom = 0.62, 0.75, 0.3, 0.95, 0.45
    width, height = name + shots * cell + gap + queries * cell + 0.15, top + ways * cell + bottom
    width = max(width, 7.0)
    figure = _figure(width, height, constrained=False)

    def place(column: float, row: int) -> Any:
        axes = figure.add_axes(
            (
                (column + 0.04) / width,
                (height - top - (row + 1) * cell + 0.04) / height,
                (cell - 0.08) / width,
                (cell - 0.08) / height,
            )
        )
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, y / height, text, **style)

    hits, total = int(right[task].sum()), right.shape[1]
    chosen = f"the hardest of {episodes.tasks} test episodes: " if episodes.tasks > 1 else "a test episode: "
    write(0.1, height - 0.3, title, fontsize=12, fontweight="bold", va="center")
    write(
        0.1,
        height - 0.53,
        f"{chosen}{hits} of {total} query images right",
        fontsize=10,
        va="center",
        color=GREY,
    )
    query_start = name + shots * cell + gap
    write(name + 0.04, height - top + 0.06, "support", fontsize=10, va="bottom")
    write(query_start + 0.04, height - top + 0.06, "query", fontsize=10, va="bottom")
    for label in range(ways):
        middle = height - top - (label + 0.5) * cell
        write(0.1, middle, f"class {label + 1}", fontsize=9, va="center")
        for column, row in enumerate(support_rows[label]):
            _show(place(name + column * cell, label), episodes.support_x[task, row], GREY, 0.8)
        for column, row in enumerate(query_rows[label]):
            correct = bool(right[task, row])
            axes = place(query_start + column * cell, label)
            _show(axes, episodes.query_x[task, row], GREEN if correct else RED, 1.2 if correct else 2.6)
            mark = "✓" if correct else f"✗ {int(predicted[task, row]) + 1}"
            axes.text(
                0.98,
                0.02,
                mark,
                transform=axes.transAxes,
                ha="right",
                va="bottom",
                fontsize=7 if correct else 8,
                color="white",
                fontweight="bold",
                bbox={
                    "boxstyle": "square,pad=0.12",
                    "facecolor": GREEN if correct else RED,
                    "edgecolor": "none",
                },
            )
    note = "✓ right   ✗ 3: taken for class 3"
    if (
        ways < episodes.ways
        or shots * episodes.ways < episodes.support_y.shape[1]
        or queries * episodes.ways < total
    ):
        note += f"   (shown: {ways} of {episodes.ways} classes, their first {shots} and {queries} images)"
    write(0.1, 0.2, note, fontsize=9, va="center", color=GREY)
    _save(figure, path)


def draw_adaptation(
    learner: nn.Module,
    waves: FixedEpisodes,
    path: str | os.PathLike[str],
    title: str,
    steps: Sequence[int] = (0, 1, 10),
) -> None:
    """Three sine waves: the true wave, the support points, and the predictions after numbers of inner steps.

    Args:
        learner: with an attribute ``steps``, such as :class:`metafast.learners.MAML`.
        waves: episodes of a :class:`metafast.data.SinusoidSampler`, of which the first are drawn.
    """
    sampler = waves.sampler
    if not isinstance(sampler, SinusoidSampler):
        raise TypeError(f"waves: expected those of a SinusoidSampler, got {type(sampler).__name__}")
    plan = sampler._joined([sampler.single_plan(number) for number in range(min(3, waves.count))])
    # The support points stay, and all along the axis there is a query point.
    grid = numpy.broadcast_to(numpy.linspace(*sampler.x_range, 201), (len(plan.x), 201))
    plan = replace(plan, x=numpy.concatenate([plan.x[:, : plan.shots], grid], axis=1))
    episodes = sampler._episodes(plan).to(learner_device(learner))
    curves = {}
    training = learner.training
    learner.eval()
    try:
        for number in sorted(set(steps)):
            with torch.no_grad(), with_inner_steps(learner, number):
                curves[number] = learner(episodes).logits.cpu()
    finally:
        learner.train(training)
    episodes = episodes.to("cpu")
    figure = _figure(4.2 * episodes.tasks, 4.0)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    colours = (GREY, ORANGE, GREEN, BLUE)
    panels = figure.subplots(1, episodes.tasks, squeeze=False)[0]
    for task, axes in enumerate(panels):
        x = episodes.query_x[task, :, 0]
        axes.plot(x, episodes.query_y[task, :, 0], color=RED, lw=1.8, label="true wave")
        for place, (number, curve) in enumerate(curves.items()):
            last = place == len(curves) - 1
            name = "before adaptation" if number == 0 else f"after {number} step{'s' * (number != 1)}"
            colour = colours[-1] if last and number else colours[min(place, len(colours) - 2)]
            axes.plot(
                x, curve[task, :, 0], color=colour, lw=1.5, ls="-" if last and number else "--", label=name
            )
        axes.plot(
            episodes.support_x[task, :, 0],
            episodes.support_y[task, :, 0],
            "^",
            color="black",
            ms=6,
            label="support points",
        )
        # A loop that diverges for more steps than it was trained for must not flatten the waves.
        high = 1.6 * float(episodes.query_y[task].abs().max()) + 0.5
        axes.set_ylim(-high, high)
        axes.set_xlabel("x")
        _panel(axes, f"wave {task + 1}")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=6, loc="outside lower left"
    )
    _save(figure, path)


def draw_report(report: Report, path: str | os.PathLike[str], title: str) -> None:
    """The generalisation report on one page: curves, classes and data sets, reliability and the numbers."""
    figure = _figure(13.0, 8.6)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12, wspace=0.02, hspace=0.03, rect=(0, 0, 1, 0.93))
    figure.text(0.012, 0.97, title, fontsize=13, fontweight="bold", va="center")
    text = f"{report.setting()}. Bars and bands are 95 % intervals."
    figure.text(0.012, 0.938, text, fontsize=9.5, color=GREY, va="center")
    grid = figure.add_gridspec(2, 6)
    chance = f"chance {100 / report.ways:.4g} %"
    curves: list[tuple[str, dict[int, Accuracy], int | None, str]] = [
        ("shots", report.by_shots, report.shots, chance),
        ("ways", report.by_ways, report.ways, "chance 1 / ways"),
    ]
    if report.by_steps:
        curves.append(("inner steps", report.by_steps, report.steps, chance))
    span = 6 // len(curves)
    for number, curve in enumerate(curves):
        axes = figure.add_subplot(grid[0, number * span : (number + 1) * span])
        _accuracy_curve(axes, *curve)
    _places(figure.add_subplot(grid[1, :2]), report)
    _reliability(figure.add_subplot(grid[1, 2:4]), report)
    _numbers(figure.add_subplot(grid[1, 4:]), report)
    _save(figure, path)


def _accuracy_curve(
    axes: Any, name: str, points: dict[int, Accuracy], marked: int | None, remark: str
) -> None:
    """Accuracy in percent with intervals at evenly spaced places; the setting of the report in bold."""
    places = list(range(len(points)))
    means = [100 * point.mean for point in points.values()]
    intervals = [100 * point.interval for point in points.values()]
    lower = [mean - half for mean, half in zip(means, intervals, strict=True)]
    upper = [mean + half for mean, half in zip(means, intervals, strict=True)]
    axes.fill_between(places, lower, upper, color=BLUE, alpha=0.15, lw=0)
    axes.errorbar(places, means, intervals, fmt="o-", color=BLUE, ms=5, lw=1.5, capsize=3)
    for place, mean, top in zip(places, means, upper, strict=True):
        _value(axes, f"{mean:.1f}", (place, top))
    height = max(max(upper) - min(lower), 4.0)
    axes.set_ylim(min(lower) - 0.15 * height, max(upper) + 0.15 * height)
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set_xticks(places, [f"{value}" for value in points])
    if marked is not None:
        axes.get_xticklabels()[list(points).index(marked)].set_fontweight("bold")
    axes.set_xlabel(name)
    axes.set_ylabel("accuracy in %")
    axes.text(0.99, 0.02, remark, fontsize=8.5, color=GREY, ha="right", transform=axes.transAxes)
    _panel(axes, f"accuracy against {name}")


def _value(axes: Any, text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8.5)


def _places(axes: Any, report: Report) -> None:
    """Accuracy on the classes of training, validation and test, and on other data sets."""
    names = {"train": "training\nclasses", "validation": "validation\nclasses", "test": "test\nclasses"}
    colours = {"train": GREEN, "validation": GREY, "test": BLUE}
    rows = [(names[name], colours[name], value) for name, value in report.by_classes.items()]
    rows += [(name, ORANGE, value) for name, value in report.by_data.items()]
    test = 100 * report.by_classes["test"].mean
    axes.axvline(test, color=BLUE, lw=0.8, ls=":")
    lower = [100 * (value.mean - value.interval) for *_, value in rows]
    upper = [100 * (value.mean + value.interval) for *_, value in rows]
    for place, (_, colour, value) in enumerate(rows):
        axes.errorbar(
            100 * value.mean, place, xerr=100 * value.interval, fmt="o", color=colour, ms=6, capsize=3
        )
        text = f"{100 * value.mean:.1f}"
        if value is not report.by_classes["test"]:
            text += f"  ({100 * value.mean - test:+.1f})"
        _value(axes, text, (100 * value.mean, place - 0.06))
    width = max(max(upper) - min(lower), 4.0)
    axes.set_xlim(min(lower) - 0.2 * width, max(upper) + 0.2 * width)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.set_xlabel("accuracy in %  (difference to test classes)")
    _panel(axes, "seen and unseen classes, other data" if report.by_data else "seen and unseen classes")


def _reliability(axes: Any, report: Report) -> None:
    """Accuracy against confidence, and below it how the confidence is spread."""
    axes.plot([0, 100], [0, 100], color=GREY, lw=1.0, ls="--", label="perfectly calibrated")
    calibration = report.calibration
    parts = [("softmax", BLUE, calibration.before)]
    if calibration.after is not None and calibration.temperature is not None:
        parts.append((f"temperature {calibration.temperature.value:.2f}", ORANGE, calibration.after))
    largest = max(bin_.share for _, _, part in parts for bin_ in part.bins)
    for number, (name, colour, part) in enumerate(parts):
        # Bins of a few answers, which say little, are pale and not in the line.
        for few in (True, False):
            bins = [bin_ for bin_ in part.bins if bin_.share > 0 and (bin_.share < FEW_ANSWERS) == few]
            if not bins:
                continue
            points = numpy.array(
                [(bin_.confidence, bin_.accuracy, *bin_.interval) for bin_ in bins if bin_.interval]
            )
            confidence, accuracy, low, high = 100 * points.T
            axes.errorbar(
                confidence,
                accuracy,
                numpy.stack([accuracy - low, high - accuracy]).clip(0),
                fmt="o" if few else "o-",
                color=colour,
                alpha=0.3 if few else 1.0,
                ms=4,
                lw=1.3,
                elinewidth=0.8,
                capsize=2,
                label=None if few else f"{name}: error {100 * part.error.value:.1f} %",
            )
        # The spread of the confidence takes the lowest part of the panel.
        middles = [50 * (bin_.low + bin_.high) + 1.3 * (2 * number - len(parts) + 1) for bin_ in part.bins]
        heights = [18 * bin_.share / largest for bin_ in part.bins]
        axes.bar(middles, heights, width=2.4, bottom=-28, color=colour, alpha=0.45, lw=0)
    axes.axhline(-4, color="#c8c8c8", lw=0.8)
    axes.text(1, -6, f"share of the answers, highest {100 * largest:.0f} %", fontsize=8, color=GREY, va="top")
    axes.set_xlim(0, 101)
    # The legend has the space above 100 %.
    axes.set_ylim(-28, 132)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("confidence in %")
    axes.set_ylabel("accuracy in %")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    _panel(axes, "calibration on test classes")


def _numbers(axes: Any, report: Report) -> None:
    """The summary that is not read off the curves, and the notes."""
    axes.set_axis_off()
    rows = report.rows()
    rows = rows[next(number for number, (title, *_) in enumerate(rows) if title == "classes") :]
    notes = list(report.notes)
    if not report.by_steps:
        notes.insert(0, f"no inner steps: {report.learner} has none")
    remarks = [line for note in notes for line in textwrap.wrap(note, 62)]
    titles = sum(1 for title, *_ in rows if title)
    scale = min(1.0, 17.5 / (len(rows) + 1.5 * titles + 0.7 * len(remarks)))
    place = 1.0

    def write(x: float, text: str, size: float, **style: Any) -> None:
        axes.text(x, place, text, fontsize=size * scale, va="top", transform=axes.transAxes, **style)

    for title, name, value in rows:
        if title:
            place -= 0.0 if place == 1.0 else 0.025 * scale
            write(0.0, title, 9.5, fontweight="bold")
            place -= 0.065 * scale
        write(0.0, name, 8.7)
        write(1.0, value.replace("+-", "±"), 8.7, ha="right")
        place -= 0.058 * scale
    place -= 0.02
    write(0.0, "\n".join(remarks), 8, color=GREY)


def _panel(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(True, color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float, constrained: bool = True) -> Any:
    # A bare Figure draws with Agg and leaves pyplot's global state and backend alone.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained" if constrained else None)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_atomically(path, buffer.getvalue())


def _curve(axes: Any, rows: list[Row], values: list[float], window: int, label: str) -> None:
    """Single steps in pale, and their mean over windows."""
    steps = numpy.array([row.step for row in rows])
    if window > 1:
        axes.plot(steps, values, color=BLUE, alpha=0.2, lw=0.6)
        whole = len(values) // window * window
        steps = steps[:whole].reshape(-1, window).mean(1)
        values = list(numpy.array(values[:whole]).reshape(-1, window).mean(1))
        label += f", mean of {window} steps"
    axes.plot(steps, values, color=BLUE, lw=1.4, label=label)


def _limits(accuracy: list[float]) -> tuple[float, float]:
    """Leave the first steps out of the picture where the rest is much better."""
    late = sorted(accuracy[len(accuracy) // 20 :])
    low = late[len(late) // 50]
    return (max(0.0, low - 0.25 * (100 - low) - 2), 100.5)


def _rows(labels: torch.Tensor, label: int, most: int) -> list[int]:
    found: list[int] = (labels == label).nonzero().flatten()[:most].tolist()
    return found


def _show(axes: Any, image: torch.Tensor, colour: str, line: float) -> None:
    if image.shape[0] == 3:
        axes.imshow(image.float().clamp(0, 1).permute(1, 2, 0).numpy())
    else:
        axes.imshow(image.float()[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(line)
