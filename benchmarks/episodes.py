"""Building episodes: the sampler's one gather against a loop over tasks and torch's DataLoader.

``python -m benchmarks.episodes`` compares them roughly; the benchmark runner takes the calls and the check.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from metafast.data import Episodes, EpisodeSampler, ImageClasses, glyphs

Build = Callable[[], Episodes]


@dataclass(frozen=True)
class EpisodeSizes:
    """A batch of ``tasks`` episodes of ``classes`` glyphs in four rotations, 20 drawings of each class."""

    ways: int = 5
    shots: int = 1
    queries: int = 15
    tasks: int = 32
    classes: int = 1000


SIZES = {
    "5-way 1-shot": EpisodeSizes(),
    "60-way 1-shot": EpisodeSizes(ways=60, queries=5),
}


@functools.cache
def dataset(classes: int) -> ImageClasses:
    """A data set of the size of Omniglot's training split for 1,000 classes."""
    return glyphs(classes, rotations=True)


def ours(sizes: EpisodeSizes) -> Build:
    """A call that builds the next batch with ``EpisodeSampler``."""
    steps = iter(EpisodeSampler(dataset(sizes.classes), sizes.ways, sizes.shots, sizes.queries, sizes.tasks))
    return lambda: next(steps)


class _Images(Dataset[tuple[Tensor, int]]):
    """One image at a time, already decoded and resized, rotated and scaled when it is asked for."""

    def __init__(self, classes: ImageClasses) -> None:
        self.images = classes.images
        self.labels = torch.arange(len(classes.names)).repeat_interleave(classes.class_sizes).tolist()
        self.base = len(classes.names)

    def __len__(self) -> int:
        return 4 * len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        turns, row = divmod(index, len(self.images))
        image = self.images[row].float() / 255
        return torch.rot90(image, turns, (1, 2)) if turns else image, self.labels[row] + turns * self.base


class _TaskSampler(Sampler[list[int]]):
    """The indices of one task after the other, class by class."""

    def __init__(self, classes: ImageClasses, sizes: EpisodeSizes) -> None:
        self.sizes = sizes
        self.random = random.Random(0)
        spans = zip(classes.class_starts.tolist(), classes.class_sizes.tolist(), strict=True)
        upright = [range(start, start + size) for start, size in spans]
        total = len(classes.images)
        self.rows = [
            range(rows.start + turns * total, rows.stop + turns * total)
            for turns in range(4)
            for rows in upright
        ]

    def __iter__(self) -> Iterator[list[int]]:
        per_class = self.sizes.shots + self.sizes.queries
        while True:
            task = self.random.sample(self.rows, self.sizes.ways)
            yield [index for rows in task for index in self.random.sample(rows, per_class)]


def loop_dataloader(sizes: EpisodeSizes, workers: int = 0) -> Build:
    """A call that builds the next batch task by task: a sampler of indices, a DataLoader, its collation."""
    classes = dataset(sizes.classes)
    labels = torch.arange(sizes.ways)

    def collate(
        items: list[tuple[Tensor, int]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = torch.stack([image for image, _ in items])
        x = x.view(sizes.ways, -1, *x.shape[1:])
        support, query = (
            x[:, : sizes.shots].flatten(0, 1),
            x[:, sizes.shots :].flatten(0, 1),
        )
        return (
            support,
            labels.repeat_interleave(sizes.shots),
            query,
            labels.repeat_interleave(sizes.queries),
        )

    tasks = iter(
        DataLoader(
            _Images(classes),
            batch_sampler=_TaskSampler(classes, sizes),
            collate_fn=collate,
            num_workers=workers,
        )
    )

    def build() -> Episodes:
        fields = zip(*(next(tasks) for _ in range(sizes.tasks)), strict=True)
        support_x, support_y, query_x, query_y = map(torch.stack, fields)
        return Episodes(support_x, support_y, query_x, query_y, sizes.ways)

    return build


@functools.cache
def _classes_of_images(classes: int) -> dict[bytes, int]:
    """The class of every image of the data set and of its rotations, by its pixels."""
    data = dataset(classes)
    rows = torch.arange(len(data.images))
    known = {}
    for turns in range(4):
        pixels = (data.gather(rows, torch.full_like(rows, turns)) * 255).round().to(torch.uint8)
        for row, image in enumerate(pixels.numpy()):
            known[image.tobytes()] = row // 20 + turns * len(data.names)
    return known


def wrong(episodes: Episodes, sizes: EpisodeSizes) -> int:
    """Rows and labels that break a rule: images of the data set, a class to a label, distinct in a task."""
    known = _classes_of_images(sizes.classes)
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    rows = sizes.ways * (sizes.shots + sizes.queries)
    count = abs(episodes.tasks - sizes.tasks) + abs(x.shape[1] - rows)
    for images, labels in zip((x * 255).round().to(torch.uint8).numpy(), y.tolist(), strict=True):
        pixels = [image.tobytes() for image in images]
        pairs = {(label, known.get(p, -1)) for label, p in zip(labels, pixels, strict=True)}
        count += sum(p not in known for p in pixels)
        count += len(pixels) - len(set(pixels))
        count += abs(len(pairs) - sizes.ways) + abs(len({c for _, c in pairs}) - sizes.ways)
    return count


def main() -> None:
    """Check both ways of each size, time them interleaved and print episodes per second."""
    for name, sizes in SIZES.items():
        builds = {
            "EpisodeSampler": ours(sizes),
            "loop and DataLoader": loop_dataloader(sizes),
        }
        times: dict[str, list[float]] = {variant: [] for variant in builds}
        for variant, build in builds.items():
            if wrong(build(), sizes):
                raise SystemExit(f"{name}: {variant} builds wrong episodes")
        for _ in range(15):
            for variant, build in builds.items():
                start = time.perf_counter()
                build()
                times[variant].append(time.perf_counter() - start)
        seconds = {variant: statistics.median(found) for variant, found in times.items()}
        rates = ", ".join(f"{v} {sizes.tasks / s:,.0f} episodes/s" for v, s in seconds.items())
        print(f"{name}: {rates}, ratio {seconds['loop and DataLoader'] / seconds['EpisodeSampler']:.1f}")


if __name__ == "__main__":
    main()
