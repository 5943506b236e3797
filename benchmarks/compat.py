"""Drop-in modules against the originals, the import alone changed: ``python -m benchmarks.compat [--out FILE]``.

Each workload is a function of the library as a module, called with the original and with ours in turn, medians of
interleaved rounds; both must give the same numbers. "Handed over" is the same work by the one further line of the
migration pages, which gives all tasks at once to metafast.

The originals are no dependencies: ``pip install -r benchmarks/peers.txt`` installs those that still install. A library
that is not there is listed as such.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.training import conditions
from metafast import Conv4, compat, inner_loop, prototypical_loss
from metafast.data import glyphs
from metafast.training.files import write_atomically

TASKS, STEPS, RATE = 25, 5, 0.01
#: Of what two libraries compute in float32.
TOLERANCE = 1e-4

#: Runs once, and gives what it computed.
Run = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """``gate``: how many times as fast as the original, at least; ``handed_over``: the same with the further line."""

    name: str
    library: str
    of: Callable[[Any], Run]
    gate: float
    handed_over: Callable[[], Run] | None = None
    gate_handed_over: float = 20.0


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def sines() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The sine network of the MAML paper, and tasks of 10 support and 10 query points."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return model, tuple(torch.rand(TASKS, 10, 1) for _ in range(4))


def images() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A convolutional network, and 4 tasks of 5 ways and 1 shot with 5 queries per class."""
    torch.manual_seed(0)
    encoder = Conv4(1, 64)
    labels = torch.arange(5)
    x, query = torch.rand(4, 5, 1, 28, 28), torch.rand(4, 25, 1, 28, 28)
    return nn.Sequential(encoder, nn.Linear(64, 5)), (
        x,
        labels.expand(4, -1),
        query,
        labels.repeat(5).expand(4, -1),
    )


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets) if targets.dtype == torch.int64 else mse_loss(outputs, targets)


def handed_over(model: nn.Module, data: tuple[Tensor, ...], steps: int) -> Run:
    x, y, query, query_y = data
    loss = "cross_entropy" if y.dtype == torch.int64 else "mse"

    def run() -> Any:
        outputs = inner_loop(model, x, y, RATE, steps, loss=loss)(query)
        return gradients(model, loss_of(outputs.flatten(0, 1), query_y.flatten(0, 1)))

    return run


def higher_loop(
    setting: Callable[[], Any], steps: int, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
) -> Callable[[Any], Run]:
    def of(higher: Any) -> Run:
        model, data = setting()
        inner = optimizer(model.parameters(), lr=RATE)  # type: ignore[call-arg]

        def run() -> Any:
            total: Any = 0.0
            for x, y, query, query_y in zip(*data, strict=True):
                with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (adapted, steps_of):
                    for _ in range(steps):
                        steps_of.step(loss_of(adapted(x), y))
                    total = total + loss_of(adapted(query), query_y)
            return gradients(model, total / len(data[0]))

        return run

    return of


def higher_copies(higher: Any) -> Run:
    """A functional copy of a deep network, and one update of its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(30)))

    def run() -> Any:
        adapted = higher.monkeypatch(model, copy_initial_weights=False)
        adapted.update_params([p * 0.5 for p in adapted.parameters()])
        return list(adapted.parameters())

    return run


def learn2learn_loop(setting: Callable[[], Any], steps: int, algorithm: str = "MAML") -> Callable[[Any], Run]:
    def of(learn2learn: Any) -> Run:
        model, data = setting()
        learner = getattr(learn2learn.algorithms, algorithm)(model, lr=RATE)

        def run() -> Any:
            total: Any = 0.0
            for x, y, query, query_y in zip(*data, strict=True):
                clone = learner.clone()
                for _ in range(steps):
                    clone.adapt(loss_of(clone(x), y))
                total = total + loss_of(clone(query), query_y)
            return gradients(learner, total / len(data[0]))

        return run

    return of


def learn2learn_copies(learn2learn: Any) -> Run:
    """Clone and update of a deep network."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(30)))
    grads = [torch.rand_like(p) for p in model.parameters()]
    learner = learn2learn.algorithms.MAML(model, lr=RATE)

    def run() -> Any:
        clone = learner.clone()
        learn2learn.algorithms.maml_update(clone.module, RATE, grads)
        return list(clone.parameters())

    return run


def episodes(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Features and classes of support rows and of queries, the task dimension first."""
    tasks, ways, shots, queries, features = sizes
    torch.manual_seed(0)
    support, query = torch.rand(tasks, ways * shots, features), torch.rand(tasks, ways * queries, features)
    labels, answers = (torch.arange(ways).repeat_interleave(n).expand(tasks, -1) for n in (shots, queries))
    return support, labels.contiguous(), query, answers.contiguous()


def prototypical_head(*sizes: int) -> Callable[[Any], Run]:
    """The loss of a prototypical network on one episode after the other, forward and backward."""

    def of(learn2learn: Any) -> Run:
        support, labels, query, answers = episodes(sizes)
        head = learn2learn.nn.PrototypicalClassifier()

        def run() -> Any:
            rows, others = support.detach().requires_grad_(), query.detach().requires_grad_()
            losses = []
            for x, y, q, wanted in zip(rows, labels, others, answers, strict=True):
                head.fit_(x, y)
                losses.append(cross_entropy(head(q), wanted))
            loss = torch.stack(losses).mean()
            return [loss, *torch.autograd.grad(loss, (rows, others))]

        return run

    return of


def prototypical_head_handed_over(*sizes: int) -> Run:
    support, labels, query, answers = episodes(sizes)

    def run() -> Any:
        rows, others = support.detach().requires_grad_(), query.detach().requires_grad_()
        loss = prototypical_loss(rows, labels, others, answers, sizes[1])[0].mean()
        return [loss, *torch.autograd.grad(loss, (rows, others))]

    return run


def tasks_of(learn2learn: Any) -> Run:
    """A 5-way 5-shot task with 15 queries per class of 1,000 classes, as the library's examples sample it."""
    g = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.rand(20000, 8, generator=g), torch.arange(1000).repeat_interleave(20)
    )
    dataset = learn2learn.data.MetaDataset(data)
    of_tasks = learn2learn.data.transforms
    tasks = learn2learn.data.Taskset(
        dataset,
        task_transforms=[
            of_tasks.NWays(dataset, 5),
            of_tasks.KShots(dataset, 20),
            of_tasks.LoadData(dataset),
            of_tasks.RemapLabels(dataset),
            of_tasks.ConsecutiveLabels(dataset),
        ],
    )

    def run() -> Any:
        random.seed(0)
        return list(tasks.sample())

    return run


def torchmeta_loop(steps: int) -> Callable[[Any], Run]:
    """The network of ``sines`` as the library's modules, and one step after the other for each task."""

    def of(torchmeta: Any) -> Run:
        _, data = sines()
        torch.manual_seed(0)
        of = torchmeta.modules
        model = of.MetaSequential(
            of.MetaLinear(1, 40), nn.ReLU(), of.MetaLinear(40, 40), nn.ReLU(), of.MetaLinear(40, 1)
        )

        def run() -> Any:
            total: Any = 0.0
            for x, y, query, query_y in zip(*data, strict=True):
                params = None
                for _ in range(steps):
                    loss = loss_of(model(x, params=params), y)
                    params = torchmeta.utils.gradient_update_parameters(
                        model, loss, params=params, step_size=RATE
                    )
                total = total + loss_of(model(query, params=params), query_y)
            return gradients(model, total / len(data[0]))

        return run

    return of


def torchmeta_head(*sizes: int, matching: bool = False) -> Callable[[Any], Run]:
    """The loss of a batch of episodes, forward and backward."""

    def of(torchmeta: Any) -> Run:
        support, labels, query, answers = episodes(sizes)
        losses = torchmeta.utils

        def run() -> Any:
            rows, others = support.detach().requires_grad_(), query.detach().requires_grad_()
            if matching:
                loss = losses.matching_loss(rows, labels, others, answers, sizes[1])
            else:
                means = losses.get_prototypes(rows, labels, sizes[1])
                loss = losses.prototypical_loss(means, others, answers)
            return [loss, *torch.autograd.grad(loss, (rows, others))]

        return run

    return of


def torchmeta_images(shots: int, queries: int) -> Callable[[Any], Run]:
    """4 batches of 16 5-way tasks of images in Double MNIST's layout, whose images have been asked for before."""

    def of(torchmeta: Any) -> Run:
        folder = tempfile.mkdtemp()
        home = Path(folder, "doublemnist")
        _write_images(home, in_hdf5=torchmeta.__name__ == "torchmeta")
        tasks = torchmeta.datasets.helpers.doublemnist(
            folder, shots, 5, test_shots=queries, meta_train=True, seed=0
        )
        batches = torchmeta.utils.data.BatchMetaDataLoader(tasks, batch_size=16)

        def run() -> Any:
            random.seed(0)
            torch.manual_seed(0)
            tasks.seed(0)
            return drawn(batches, 4)

        weakref.finalize(run, shutil.rmtree, folder)
        return run

    return of


def _write_images(home: Path, in_hdf5: bool) -> None:
    """The images as PNG files, or as what the original makes of them."""
    from PIL import Image

    found = glyphs(20, 40, size=64)
    place = home / "double_mnist_seed_123_image_size_64_64" / "train"
    files: dict[str, list[bytes]] = {}
    for c in range(20):
        for image in found.images[40 * c : 40 * c + 40, 0].numpy():
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            files.setdefault(f"{c:02d}", []).append(png.getvalue())
    if not in_hdf5:
        for name, images in files.items():
            (place / name).mkdir(parents=True)
            for row, content in enumerate(images):
                (place / name / f"{row:03d}.png").write_bytes(content)
        return
    h5py = import_module("h5py")
    home.mkdir()
    (home / "train_labels.json").write_text(json.dumps(sorted(files)))
    with h5py.File(home / "train_data.hdf5", "w") as file:
        for name, images in files.items():
            rows = file.create_dataset(
                f"datasets/{name}", (len(images),), dtype=h5py.special_dtype(vlen=np.uint8)
            )
            for row, content in enumerate(images):
                rows[row] = np.frombuffer(content, dtype=np.uint8)


def torchmeta_sines(torchmeta: Any) -> Run:
    """20 batches of 25 tasks of sine waves, 10 support and 10 query points."""
    tasks = torchmeta.toy.helpers.sinusoid(10, num_tasks=10000, seed=0)
    # Draws the parameters of all tasks, once.
    tasks[0]
    batches = torchmeta.utils.data.BatchMetaDataLoader(tasks, batch_size=25)

    def run() -> Any:
        torch.manual_seed(0)
        tasks.seed(0)
        return drawn(batches, 20)

    return run


def drawn(batches: Any, count: int) -> list[Tensor]:
    """The tensors of the first batches of one pass, as the library's examples draw them."""
    return [part for batch in islice(batches, count) for split in ("train", "test") for part in batch[split]]


def easyfsl_episode(
    method: str, ways: int, shots: int, queries: int, features: int, **options: Any
) -> Callable[[Any], Run]:
    """Support set and scores of an episode of features, as an evaluation has them."""

    def of(easyfsl: Any) -> Run:
        torch.manual_seed(0)
        support, query = torch.rand(ways * shots, features), torch.rand(ways * queries, features)
        labels = torch.arange(ways).repeat_interleave(shots)
        model = getattr(import_module(f"{easyfsl.__name__}.methods"), method)(**options)

        @torch.no_grad()
        def run() -> Any:
            model.process_support_set(support, labels)
            return [model(query)]

        return run

    return of


def easyfsl_loader(easyfsl: Any, classes: int, rows: int, features: int) -> Any:
    """A hundred 5-way 5-shot tasks with 15 queries per class."""
    g = torch.Generator().manual_seed(0)
    labels = [k // rows for k in range(classes * rows)]
    embeddings = torch.rand(classes * rows, features, generator=g)
    names = [str(k) for k in range(classes)]
    dataset = import_module(f"{easyfsl.__name__}.datasets").FeaturesDataset(labels, embeddings, names)
    # The original hands torch's Sampler an argument that it no longer takes.
    with mock.patch.object(torch.utils.data.Sampler, "__init__", lambda self, data_source=None: None):
        sampler = import_module(f"{easyfsl.__name__}.samplers").TaskSampler(dataset, 5, 5, 15, 100)
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)


def easyfsl_tasks(classes: int, rows: int, features: int) -> Callable[[Any], Run]:
    def of(easyfsl: Any) -> Run:
        loader = easyfsl_loader(easyfsl, classes, rows, features)

        def run() -> Any:
            random.seed(0)
            return [part for task in loader for part in task[:4]]

        return run

    return of


def easyfsl_evaluation(easyfsl: Any) -> Run:
    loader = easyfsl_loader(easyfsl, 64, 600, 64)
    model = import_module(f"{easyfsl.__name__}.methods").PrototypicalNetworks()
    evaluate = import_module(f"{easyfsl.__name__}.utils").evaluate

    def run() -> Any:
        random.seed(0)
        return [torch.tensor(evaluate(model, loader, device="cpu", use_tqdm=False))]

    return run


WORKLOADS = (
    Workload(
        f"sine MLP, {TASKS} tasks, {STEPS} SGD steps",
        "higher",
        higher_loop(sines, STEPS),
        1.0,
        lambda: handed_over(*sines(), STEPS),
    ),
    Workload(
        f"sine MLP, {TASKS} tasks, {STEPS} Adam steps",
        "higher",
        higher_loop(sines, STEPS, torch.optim.Adam),
        1.0,
    ),
    Workload("Conv4-64, 4 tasks, 1 SGD step", "higher", higher_loop(images, 1), 1.0),
    Workload("copy and update of 60 layers", "higher", higher_copies, 1.2),
    Workload(
        f"sine MLP, {TASKS} tasks, {STEPS} MAML steps",
        "learn2learn",
        learn2learn_loop(sines, STEPS),
        1.0,
        lambda: handed_over(*sines(), STEPS),
    ),
    Workload(
        f"sine MLP, {TASKS} tasks, {STEPS} Meta-SGD steps",
        "learn2learn",
        learn2learn_loop(sines, STEPS, "MetaSGD"),
        1.0,
    ),
    Workload("Conv4-64, 4 tasks, 1 MAML step", "learn2learn", learn2learn_loop(images, 1), 1.0),
    Workload("clone and update of 60 layers", "learn2learn", learn2learn_copies, 1.2),
    *(
        Workload(
            f"prototypical classifier, {tasks} tasks, {ways}-way {shots}-shot, {queries} queries per class, "
            f"d = {features}",
            "learn2learn",
            prototypical_head(tasks, ways, shots, queries, features),
            20.0,
            partial(prototypical_head_handed_over, tasks, ways, shots, queries, features),
        )
        for tasks, ways, shots, queries, features in (
            (4, 60, 1, 5, 64),
            (4, 20, 5, 15, 1600),
            (16, 5, 5, 15, 1600),
            (16, 5, 5, 15, 64),
        )
    ),
    Workload("a task of 100 rows", "learn2learn", tasks_of, 10.0),
    Workload(
        f"sine MLP, {TASKS} tasks, {STEPS} MAML steps",
        "torchmeta",
        torchmeta_loop(STEPS),
        1.0,
        lambda: handed_over(*sines(), STEPS),
    ),
    *(
        Workload(
            f"{'matching' if matching else 'prototypical'} loss, {tasks} tasks, {ways}-way {shots}-shot, "
            f"15 queries per class, d = {features}",
            "torchmeta",
            torchmeta_head(tasks, ways, shots, 15, features, matching=matching),
            2.0,
        )
        for matching in (False, True)
        for tasks, ways, shots, features in (
            (16, 5, 1, 64),
            (16, 5, 5, 64),
            (16, 20, 5, 64),
            (4, 5, 5, 1600),
        )
    ),
    *(
        Workload(
            f"4 batches of 16 tasks of images, 5-way {shots}-shot, {queries} queries per class",
            "torchmeta",
            torchmeta_images(shots, queries),
            10.0,
        )
        for shots, queries in ((1, 1), (1, 15), (5, 15))
    ),
    Workload("20 batches of 25 tasks of sine waves, 20 points", "torchmeta", torchmeta_sines, 10.0),
    *(
        Workload(
            f"prototypical network, {ways}-way {shots}-shot, {queries} queries per class, d = {features}",
            "easyfsl",
            easyfsl_episode("PrototypicalNetworks", ways, shots, queries, features),
            3.0,
        )
        for ways, shots, queries, features in ((5, 1, 15, 64), (5, 5, 15, 640), (20, 5, 15, 1600))
    ),
    *(
        Workload(
            f"matching network, 5-way 5-shot, 15 queries per class, d = {features}",
            "easyfsl",
            easyfsl_episode("MatchingNetworks", 5, 5, 15, features, feature_dimension=features),
            2.0,
        )
        for features in (64, 640)
    ),
    *(
        Workload(
            f"100 tasks of 100 rows out of {classes * rows:,}",
            "easyfsl",
            easyfsl_tasks(classes, rows, 64),
            10.0,
        )
        for classes, rows in ((1000, 20), (64, 600))
    ),
    Workload("prototypical network evaluated on 100 tasks of 100 rows", "easyfsl", easyfsl_evaluation, 3.0),
)


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def interleaved(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Medians of each, which take turns for so long."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or min(map(len, times.values())) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def measured(workload: Workload, seconds: float) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": workload.name,
        "library": workload.library,
        "gate": workload.gate,
    }
    try:
        original = import_module(workload.library)
    except ImportError as error:
        return {**record, "unavailable": str(error)}
    runs = {
        "original": workload.of(original),
        "metafast": workload.of(import_module(f"metafast.compat.{workload.library}")),
    }
    if workload.handed_over is not None:
        runs["handed over"] = workload.handed_over()
        record["gate_handed_over"] = workload.gate_handed_over
    wanted = runs["original"]()
    for run in runs.values():
        same(run(), wanted)
    medians = interleaved(runs, seconds)
    ratios = {name: medians["original"] / median for name, median in medians.items() if name != "original"}
    return {**record, "seconds": medians, "ratio": ratios}


def described(record: dict[str, Any]) -> str:
    head = f"{record['library']}: {record['name']}"
    if "unavailable" in record:
        return f"{head}: unavailable: {record['unavailable']}"
    gates = {"metafast": record["gate"], "handed over": record.get("gate_handed_over")}
    found = ", ".join(
        f"{name} {1e3 * record['seconds'][name]:.3g} ms ({ratio:.2f}x, gate {gates[name]:g})"
        for name, ratio in record["ratio"].items()
    )
    return f"{head}: original {1e3 * record['seconds']['original']:.3g} ms; {found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each workload")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=compat.LIBRARIES)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for workload in WORKLOADS:
        if options.only in (None, workload.library):
            records.append(measured(workload, options.seconds))
            print(described(records[-1]), flush=True)
    if options.out is not None:
        result = {**conditions("benchmarks.compat", options.threads), "workloads": records}
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
