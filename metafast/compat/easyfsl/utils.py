"""Evaluation, features of data sets, pictures."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metafast.compat import absent
from metafast.compat.easyfsl.datasets._images import pandas
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.training.progress import progress_bar

__getattr__ = absent(__name__)

#: Pixels between the images of a grid.
_GAP = 2


def plot_images(images: Tensor | Sequence[Tensor], title: str, images_per_row: int) -> None:
    """A figure of matplotlib with images in rows.

    Args:
        images: ``[n, channels, height, width]`` of one, three or, with opacity, four channels, or a list of such.
        title: of the figure.
        images_per_row: how many stand side by side.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: images of another shape; fewer than one per row.
    """
    if not isinstance(images, Tensor):
        images = torch.stack(tuple(images)) if len(images) else torch.empty(0)
    if images.dim() != 4 or not len(images) or images.shape[1] not in (1, 3, 4):
        raise ValueError(f"images: expected shape [n, 1, 3 or 4, height, width], got {list(images.shape)}")
    if images_per_row < 1:
        raise ValueError(f"images_per_row: expected at least 1, got {images_per_row}")
    from matplotlib import pyplot

    pyplot.figure()
    pyplot.title(title)
    pyplot.imshow(_grid(images.detach().cpu(), images_per_row).permute(1, 2, 0).numpy())


def _grid(images: Tensor, columns: int) -> Tensor:
    """One image ``[3 or 4, ...]`` of all, with black between them; a single one as it is."""
    images = images.expand(-1, max(images.shape[1], 3), -1, -1)
    if len(images) == 1:
        return images[0]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width = (side + _GAP for side in images.shape[2:])
    grid = images.new_zeros(images.shape[1], rows * height + _GAP, columns * width + _GAP)
    for k, image in enumerate(images):
        top, left = k // columns * height + _GAP, k % columns * width + _GAP
        grid[:, top : top + height - _GAP, left : left + width - _GAP] = image
    return grid


def sliding_average(value_list: Sequence[float], window: int) -> float:
    """The mean of the last ``window`` values, of all if there are fewer or ``window`` is 0.

    Raises:
        ValueError: no values.
    """
    if len(value_list) == 0:
        raise ValueError("value_list: expected at least one value, got none")
    return np.asarray(value_list[-window:]).mean()


def predict_embeddings(dataloader: DataLoader[Any], model: nn.Module, device: str | None = None) -> Any:
    """The features of a data set.

    Args:
        dataloader: gives ``(images, class names)``.
        model: from images to features.
        device: where the model is, for images that are elsewhere.

    Returns:
        a pandas DataFrame, on the CPU: columns ``embedding``, of tensors, and ``class_name``.

    Raises:
        ImportError: pandas is not installed.
    """
    frame = pandas().DataFrame
    embeddings, names = _embeddings(dataloader, model, device)
    return frame({"embedding": list(embeddings), "class_name": names})


def compute_average_features_from_images(
    dataloader: DataLoader[Any], model: nn.Module, device: str | None = None
) -> Tensor:
    """The mean of the features of a data set, such as ``feature_centering`` needs: ``[d]``.

    Args:
        dataloader, model, device: of :func:`predict_embeddings`; the mean is on the device, or on the CPU.
    """
    embeddings, _ = _embeddings(dataloader, model, device)
    average = embeddings.mean(dim=0)
    return average if device is None else average.to(device)


@torch.no_grad()
def _embeddings(
    dataloader: DataLoader[Any], model: nn.Module, device: str | None
) -> tuple[Tensor, list[Any]]:
    parts: list[Tensor] = []
    names: list[Any] = []
    # Some have no length, such as a loader of an IterableDataset.
    bar = progress_bar(operator.length_hint(dataloader) or None, "Predicting embeddings", "batch")
    for images, batch_names in dataloader:
        parts.append(model(images if device is None else images.to(device)).detach().cpu())
        names += batch_names.tolist() if isinstance(batch_names, Tensor) else batch_names
        bar.update()
    bar.close()
    return torch.cat(parts), names


def evaluate_on_one_task(
    model: FewShotClassifier,
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    query_labels: Tensor,
) -> tuple[int, int]:
    """How many queries of a task get the right label, and how many there are.

    The columns of the scores stand for the labels of the support set in ascending order, if there are as many; if not,
    for the labels 0, 1, ...
    """
    model.process_support_set(support_images, support_labels)
    scores = model(query_images).detach()
    predicted = scores.argmax(1)
    classes = sorted(set(support_labels.tolist()))
    if len(classes) == scores.shape[1] and classes != list(range(len(classes))):
        predicted = torch.tensor(classes, device=predicted.device)[predicted]
    return int((predicted == query_labels).sum()), len(query_labels)


def evaluate(
    model: FewShotClassifier,
    data_loader: DataLoader[Any],
    device: str = "cuda",
    use_tqdm: bool = True,
    tqdm_prefix: str | None = None,
) -> float:
    """The share of queries of all tasks that get the right label. The model is in evaluation mode afterwards.

    Args:
        model: the classifier.
        data_loader: gives tasks as :meth:`TaskSampler.episodic_collate_fn` makes them.
        device: where the model is.
        use_tqdm: show a bar, where somebody watches and tqdm is installed.
        tqdm_prefix: stands before it.

    Raises:
        ValueError: no task with a query.
    """
    correct = total = 0
    model.eval()
    bar = progress_bar(len(data_loader), tqdm_prefix or "", "task") if use_tqdm else None
    with torch.no_grad():
        for task in data_loader:
            right, queries = evaluate_on_one_task(model, *(part.to(device) for part in task[:4]))
            correct, total = correct + right, total + queries
            if bar is not None:
                bar.update()
                bar.set_postfix_str(f"accuracy={correct / total:.3g}", refresh=False)
    if bar is not None:
        bar.close()
    if not total:
        raise ValueError("data_loader: expected at least one task with a query, got none")
    return correct / total
