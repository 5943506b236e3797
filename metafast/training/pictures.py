"""Pictures of a training run. They need matplotlib (``pip install metafast[train]``)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy
import torch
from torch import nn

from metafast.data import Episodes
from metafast.training.evaluate import learner_device
from metafast.training.files import write_atomically
from metafast.training.history import History, Row

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9730d", "#2e8b57", "#c0282d", "#6b6b6b"
#: Classes and images per class that still make a readable picture.
MOST_CLASSES, MOST_SUPPORT, MOST_QUERIES = 20, 5, 15


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
    """Loss, and accuracy with its 95 % interval in validation, against the steps."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = _figure(10.0, 4.2)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    left, right = figure.subplots(1, 2)
    rows, checks = history.rows, history.validations
    loss, accuracy = [row.loss for row in rows], [100 * row.accuracy for row in rows]
    window = max(1, len(rows) // 50)
    _curve(left, rows, loss, window, train_label)
    _curve(right, rows, accuracy, window, train_label)
    if checks:
        steps = [row.step for row in checks]
        left.plot(
            steps, [row.validation_loss for row in checks], "o-", color=ORANGE, ms=4, label=validation_label
        )
        means = numpy.array([100 * row.validation_accuracy for row in checks])
        interval = numpy.array([100 * row.validation_interval for row in checks])
        right.fill_between(steps, means - interval, means + interval, color=ORANGE, alpha=0.25, lw=0)
        right.plot(steps, means, "o-", color=ORANGE, ms=4, label=f"{validation_label}, 95 % interval")
        best = next((row for row in checks if row.step == history.best_step), None)
        if best is not None:
            text = f"best {100 * best.validation_accuracy:.2f} % at step {best.step}"
            right.axvline(best.step, color=GREY, lw=0.8, ls=":", label=text)
    positive = [value for value in loss if value > 0]
    if len(positive) == len(loss) and max(positive) > 10 * min(positive):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    left.set_ylabel("loss")
    right.set_ylabel("accuracy in %")
    right.set_ylim(*_limits(accuracy))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(True, color="#e4e4e4", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.02 * max(rows[-1].step, 2))
    left.legend(frameon=False, fontsize=9, loc="upper right")
    right.legend(frameon=False, fontsize=9, loc="lower right")
    _save(figure, path)


def draw_episode(learner: nn.Module, episodes: Episodes, path: str | os.PathLike[str], title: str) -> None:
    """The hardest of a batch of episodes: support images, and query images marked right or wrong.

    Raises:
        ValueError: episodes whose inputs are no images ``[T, n, channels, height, width]``.
    """
    if episodes.support_x.dim() != 5:
        raise ValueError(f"support_x: expected images [T, n, C, H, W], got {list(episodes.support_x.shape)}")
    training = learner.training
    learner.eval()
    try:
        with torch.inference_mode():
            predicted = learner(episodes.to(learner_device(learner))).logits.argmax(-1).cpu()
    finally:
        learner.train(training)
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
