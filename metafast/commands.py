"""What the commands of the command line do with their options."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import metafast
from metafast._library import keep_pages
from metafast.config import UsageError
from metafast.data import (
    Classes,
    Episodes,
    EpisodeSampler,
    FixedEpisodes,
    ImageClasses,
    RowSampler,
    SinusoidSampler,
)
from metafast.memory import predicted_memory
from metafast.methods import METHODS, OPTIMIZERS, OPTIONS, settle_options
from metafast.sources import (
    ALL,
    SINUSOID,
    SINUSOID_SEEDS,
    SOURCES,
    Reading,
    open_splits,
    sinusoids,
    with_roots,
)
from metafast.training import CheckpointError, History, analyze, evaluate, fit, load_checkpoint, pictures
from metafast.training.analyze import inner_steps, with_inner_steps
from metafast.training.checkpoint import seed_generators
from metafast.training.distributed import join, ranks
from metafast.training.evaluate import DEFAULT_EPISODES, fixed_episodes, settled_batch_norm
from metafast.training.progress import say
from metafast.training.result import command_line, environment, plain, write_result

#: Usual numbers, where the data set has as many classes and images.
TRAIN_QUERIES, TEST_WAYS, TEST_QUERIES = 5, 5, 15
#: Usual numbers of points of a sine wave.
WAVE_SHOTS, WAVE_QUERIES, TEST_WAVE_SHOTS, TEST_WAVE_QUERIES = 10, 10, 5, 100

Options = argparse.Namespace
Datasets = dict[str, ImageClasses]
#: Fixed episodes for each data set, number of ways (0 in regression) and number of shots.
Tests = dict[tuple[str, int, int], FixedEpisodes]


@dataclass(frozen=True)
class _Data:
    """What a learner is trained, chosen and tested on.

    Attributes:
        train: the sampler of training.
        validation: None where there are no classes for it.
        tests: the episodes of each test.
        settings: what describes the data in a checkpoint.
        names: of the data sets, in words.
        text: the same with numbers, for the first line of a run.
    """

    train: EpisodeSampler | RowSampler | SinusoidSampler
    validation: FixedEpisodes | None
    tests: Tests
    settings: dict[str, Any]
    names: str
    text: str


def train(options: Options, arguments: Sequence[str]) -> int:
    """``metafast train``: train a learner, test it and save both."""
    _check_train_options(options)
    out = options.out or Path("runs") / "-".join([options.method, *options.data])
    device = _prepare(options)
    seed_generators(options.seed)
    data = _sinusoid_data(options) if options.data == [SINUSOID] else _image_data(options, device)
    settings = _settings(options, data)
    learner = METHODS[options.method].make(settings).to(device)
    if options.encoder_from is not None:
        settings["encoder_from"] = _take_encoder(options.encoder_from, options.method, learner)
    _settle_batch_norm(options, learner)
    say(_introduction(options, data, device))
    if options.memory is not None:
        _fit_into_memory(options, learner, data.train, device)
    if data.validation is None:
        say("no validation: trainval leaves no classes for it, so the weights of the last step are tested")
    try:
        history = fit(
            learner,
            data.train,
            options.steps,
            validation=data.validation,
            validation_episodes=options.validation_episodes,
            validate_every=options.validate_every,
            patience=options.patience,
            batch_norm=options.batch_norm,
            optimizer=OPTIMIZERS[options.optimizer](learner.parameters(), lr=options.lr),
            schedule=options.schedule,
            decay_every=options.decay_every,
            decay=options.decay,
            warm_up=options.warm_up,
            clip_norm=options.clip_norm,
            tasks_at_once=options.tasks_at_once,
            precision=options.precision,
            sync_batch_norm=options.sync_batch_norm,
            out=out,
            resume=options.resume,
            overwrite=options.overwrite,
            settings=settings,
        )
    except FileExistsError as error:
        raise UsageError(
            f"--out: {out} already holds a run; add --resume or --overwrite, or choose another"
        ) from error
    except CheckpointError as error:
        raise UsageError(
            f"{error}; give the options of that run to go on with it, or --overwrite to start again"
        ) from error
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        if not hasattr(options, name):
            raise
        raise UsageError(f"--{name.replace('_', '-')}:{rest}") from error
    say(
        f"trained {len(history.rows)} steps in {history.seconds:.0f} s; "
        f"testing the weights of step {history.best_step}"
    )
    begin = time.perf_counter()
    results = _test(learner, data.tests, options)
    result = {
        "command": command_line(arguments),
        "options": _recorded(options),
        **history.result,
        "test_seconds": round(time.perf_counter() - begin, 1),
        "tests": results,
    }
    if ranks().first:
        write_result(out / "result.json", result)
        files = [out / "result.json", out / "metrics.csv", out / "checkpoint-best.pt"]
        files += _draw_run(out, f"{options.method} on {data.names}", history, learner, data, options)
        if options.record is not None:
            write_result(options.record, result)
            files.append(options.record)
        say("saved " + ", ".join(str(file) for file in files))
    return 0


def _check_train_options(options: Options) -> None:
    """What is wrong with the options by themselves, before any data is read."""
    if options.resume and options.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite starts it again; give one of them")
    if options.patience is not None and options.split == "trainval":
        raise UsageError("--patience needs validation classes, which --split trainval does not leave")
    if options.split_seed and "image-folder" not in options.data:
        raise UsageError(
            "--split-seed is for --data image-folder; the other data sets have splits of their own"
        )
    if options.memory is not None and options.tasks_at_once is not None:
        raise UsageError("--memory finds the number of --tasks-at-once; give one of them")
    _check_folder("--record", options.record)
    method = METHODS[options.method]
    if SINUSOID in options.data:
        _check_sinusoid_options(options)
    elif options.frequency is not None:
        raise UsageError(f"--frequency is for --data {SINUSOID}")
    settle_options(options)
    if options.test_steps is None and "inner_steps" in method.options:
        options.test_steps = [options.inner_steps]
    elif options.test_steps is not None and "inner_steps" not in method.options:
        raise UsageError(f"--test-steps: {options.method} does not adapt in steps; leave it out")


def _check_sinusoid_options(options: Options) -> None:
    """Sine waves are regression: nothing about classes and images applies to them."""
    if options.data != [SINUSOID]:
        raise UsageError(
            f"--data: {SINUSOID} is regression and does not go together with data sets of classes"
        )
    if not METHODS[options.method].waves:
        able = " or ".join(name for name, method in METHODS.items() if method.waves)
        raise UsageError(
            f"--data {SINUSOID} is regression, which needs --method {able}, got {options.method}"
        )
    for name in ("root", "train_ways", "ways", "size", "grey", "split_seed", "skip_corrupt"):
        if getattr(options, name, None):
            raise UsageError(
                f"--{name.replace('_', '-')}: {SINUSOID} has no classes and no images; leave it out"
            )
    if getattr(options, "min_images", 1) != 1:
        raise UsageError(f"--min-images: {SINUSOID} has no classes and no images; leave it out")
    if options.split not in SINUSOID_SEEDS:
        raise UsageError(f"--split {options.split}: {SINUSOID} has {', '.join(SINUSOID_SEEDS)}")
    frequency = getattr(options, "frequency", None) or [1.0]
    if len(frequency) > 2 or frequency[0] > frequency[-1]:
        given = " ".join(f"{value:g}" for value in frequency)
        raise UsageError(f"--frequency: expected one number, or the lowest and the highest, got {given}")


def _check_folder(option: str, file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise UsageError(f"{option}: there is no folder {file.parent}")


def _prepare(options: Options) -> torch.device:
    """Allocator, threads, processes and device."""
    keep_pages()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return join(options.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error


def _one_or_all(datasets: Datasets) -> Classes | list[ImageClasses]:
    each = list(datasets.values())
    return each[0] if len(each) == 1 else each


def _smallest(datasets: Datasets) -> int:
    """Images of the smallest class."""
    return min(int(dataset.class_sizes.min()) for dataset in datasets.values())


def _fewest(datasets: Datasets) -> int:
    """Classes of the data set that has the fewest."""
    return min(dataset.num_classes for dataset in datasets.values())


def _fill_in_numbers(options: Options, datasets: Datasets, tests: Datasets) -> None:
    """Usual numbers of ways and queries where none were given, as far as the data sets go."""
    if not METHODS[options.method].pretraining:
        if options.train_ways is None:
            usual = METHODS[options.method].train_ways or min(SOURCES[name].train_ways for name in datasets)
            options.train_ways = min(usual, _fewest(datasets))
        if options.shots is None:
            options.shots = 1
        if options.train_queries is None:
            options.train_queries = _at_most(TRAIN_QUERIES, _smallest(datasets) - options.shots)
    _fill_in_test_numbers(options, tests, options.method, options.train_ways)


def _fill_in_test_numbers(options: Options, tests: Datasets, method: str, train_ways: int) -> None:
    if METHODS[method].head:
        _require_head_ways(method, train_ways, options.ways or ())
        options.ways = [train_ways]
    if options.test_shots is None:
        options.test_shots = [1]
    if options.ways is None:
        options.ways = [_at_most(TEST_WAYS, _fewest(tests))]
    if options.queries is None:
        options.queries = _at_most(TEST_QUERIES, _smallest(tests) - max(options.test_shots))


def _require_head_ways(method: str, head: int, ways: Sequence[int | None]) -> None:
    if any(number not in (None, head) for number in ways):
        raise UsageError(
            f"--ways: {method} has a head for {head} classes from training (--train-ways), so all episodes are "
            f"{head}-way"
        )


def _at_most(usual: int, most: int) -> int:
    """``usual``, or ``most`` if it is less; what is impossible anyway is left for the sampler to name."""
    return min(usual, most) if most >= 1 else usual


def _made(title: str, options: Options, ways: str, images: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives; its error says which options to change, those for too many ``ways`` or ``images``."""
    try:
        return make()
    except ValueError as error:
        fewer = f"; choose fewer with {images}"
        if hasattr(options, "min_images"):
            fewer += r", or leave out small classes with --min-images \1"
        text = re.sub(r" \(dataset\.at_least\((\d+)\) leaves out what is too small\)", fewer, str(error))
        if text.startswith("ways"):
            text += f"; choose fewer with {ways}"
        raise UsageError(f"{title}: {text}") from error


def _test_episodes(tests: Datasets, options: Options) -> Tests:
    return {
        (name, ways, shots): _fixed(dataset, ways, shots, options)
        for name, dataset in tests.items()
        for ways in options.ways
        for shots in options.test_shots
    }


def _fixed(dataset: Any, ways: int, shots: int, options: Options) -> FixedEpisodes:
    fixed: FixedEpisodes = _made(
        "test episodes",
        options,
        "--ways",
        "--queries",
        lambda: fixed_episodes(dataset, ways, shots, options.queries, options.episodes, options.test_seed),
    )
    return fixed


def _validation(datasets: Datasets, options: Options) -> FixedEpisodes:
    """The hardest of the test settings, which tells checkpoints apart best, as far as the classes go."""
    ways, shots = min(max(options.ways), _fewest(datasets)), min(options.test_shots)
    queries = _at_most(options.queries, _smallest(datasets) - shots)
    if ways < max(options.ways):
        say(f"validation is {ways}-way: there are no more validation classes")
    fixed: FixedEpisodes = _made(
        "validation episodes",
        options,
        "--ways",
        "--queries",
        lambda: fixed_episodes(
            _one_or_all(datasets), ways, shots, queries, options.validation_episodes, options.test_seed
        ),
    )
    return fixed


def _training_sampler(datasets: Datasets, options: Options) -> EpisodeSampler | RowSampler:
    if METHODS[options.method].pretraining:
        return RowSampler(_one_or_all(datasets), options.tasks, options.seed)
    sampler: EpisodeSampler = _made(
        "training episodes",
        options,
        "--train-ways",
        "--shots or --train-queries",
        lambda: EpisodeSampler(
            _one_or_all(datasets),
            options.train_ways,
            options.shots,
            options.train_queries,
            options.tasks,
            options.seed,
        ),
    )
    return sampler


def _image_data(options: Options, device: torch.device) -> _Data:
    roots = with_roots(options.data, options.root)
    reading = Reading(
        options.size,
        1 if options.grey else None,
        options.split_seed,
        options.min_images,
        options.skip_corrupt,
    )
    datasets, reading = open_splits(roots, options.split, reading, device)
    tests, _ = open_splits(roots, "test", reading, device)
    _fill_in_numbers(options, datasets, tests)
    sampler = _training_sampler(datasets, options)
    sources = _test_episodes(tests, options)
    validation = None
    if options.split == "train":
        validation = _validation(open_splits(roots, "val", reading, device)[0], options)
    settings = {"train_ways": options.train_ways, "in_channels": reading.channels, "size": reading.size}
    settings |= {name: getattr(reading, name) for name in ("split_seed", "min_images", "skip_corrupt")}
    settings["training_classes"] = _classes_digest(datasets)
    training = f"{options.train_ways}-way {options.shots}-shot {options.train_queries}-query training"
    if isinstance(sampler, RowSampler):
        settings["base_classes"] = sampler.ways
        training = f"pre-training on {options.tasks} a step"
    size = "x".join(map(str, next(iter(datasets.values())).images.shape[1:]))
    text = (
        f"{_names(roots)}: {sum(dataset.num_classes for dataset in datasets.values())} training classes, "
        f"images {size}, {training}"
    )
    return _Data(sampler, validation, sources, settings, _names(roots), text)


def _sinusoid_data(options: Options) -> _Data:
    options.shots = options.shots or WAVE_SHOTS
    options.train_queries = options.train_queries or WAVE_QUERIES
    frequency = options.frequency = options.frequency or [1.0]
    train = sinusoids("train", options.shots, options.train_queries, options.tasks, options.seed, frequency)
    tests = _sinusoid_tests("test", options, frequency)
    shots = min(options.test_shots)
    waves = sinusoids("val", shots, options.queries, 1, options.test_seed, frequency)
    validation = _fixed_sinusoids(waves, options.validation_episodes)
    between = " to ".join(f"{value:g}" for value in frequency)
    text = f"{SINUSOID}: waves of frequency {between}, {options.shots}-shot {options.train_queries}-query training"
    return _Data(train, validation, tests, {"frequency": frequency}, SINUSOID, text)


def _sinusoid_tests(split: str, options: Options, frequency: Sequence[float]) -> Tests:
    options.test_shots = options.test_shots or [TEST_WAVE_SHOTS]
    options.queries = options.queries or TEST_WAVE_QUERIES
    tests = {}
    for shots in options.test_shots:
        waves = sinusoids(split, shots, options.queries, 1, options.test_seed, frequency)
        tests[SINUSOID, 0, shots] = _fixed_sinusoids(waves, options.episodes)
    return tests


def _fixed_sinusoids(waves: SinusoidSampler, count: int) -> FixedEpisodes:
    return FixedEpisodes(waves, count, batch=DEFAULT_EPISODES)


def _settings(options: Options, data: _Data) -> dict[str, Any]:
    """What the weights depend on besides the arguments of fit: a resumed run must have the same."""
    method = METHODS[options.method]
    names = ("method", *(name for name in OPTIONS if name in method.options))
    names = (*names, "data", "split", "shots", "train_queries", "tasks", "seed")
    settings = {name: getattr(options, name) for name in names}
    if "channels" in method.options:
        settings["encoder"] = method.encoder
    settings |= data.settings
    if data.validation is not None:
        sampler: Any = data.validation.sampler
        settings["validation"] = {
            name: getattr(sampler, name) for name in ("ways", "shots", "queries", "seed")
        }
    return settings


def _classes_digest(datasets: Datasets) -> str:
    """Number of classes and a digest of their names and sizes: a resumed run must have the same ones."""
    lines = [
        f"{name}\t{size}"
        for part in datasets.values()
        for name, size in zip(part.names, part.class_sizes.tolist(), strict=True)
    ]
    return f"{len(lines)}, SHA-256 {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def _names(roots: Mapping[str, Path]) -> str:
    """The data sets in words; an image folder has its own name."""
    return " and ".join(
        root.resolve().name if name == "image-folder" else name for name, root in roots.items()
    )


def _introduction(options: Options, data: _Data, device: torch.device) -> str:
    group = ranks()
    processes = f"{group.count} processes, " if group.count > 1 else ""
    method = METHODS[options.method]
    network, norm = f"{method.encoder}-{options.channels}", ""
    if "backbone" in method.options:
        if options.backbone != "conv4":
            network = f"hidden layers of {' '.join(map(str, options.hidden))}"
        if options.backbone != "mlp":
            norm = f"{options.inner_batch_norm} BatchNorm in the inner loop, "
    else:
        whose = "each episode's" if options.episode_statistics else "batch"
        norm = f"{whose} statistics in BatchNorm, "
    return (
        f"{options.method} with {network} on {data.text}, {norm}{options.precision}, {processes}{device}, "
        f"{torch.get_num_threads()} threads"
    )


def _test(learner: nn.Module, tests: Tests, options: Options) -> list[dict[str, Any]]:
    """Accuracies, or squared errors, as plain values; each is printed when it is there."""
    results = []
    several = len({name for name, _, _ in tests}) > 1
    for (name, ways, shots), episodes in tests.items():
        for steps in options.test_steps or [None]:
            after = "" if steps is None else f"after {steps} inner step{'s' * (steps != 1)} "
            title = f"{name} " if several else ""
            shape = f"{ways}-way {shots}-shot" if ways else f"{shots}-shot"
            with with_inner_steps(learner, steps):
                score = evaluate(
                    learner, episodes, batch_norm=options.batch_norm, progress=f"{title}{after}{shape}"
                )
            say(f"test {title}{after}{score}")
            result = {"data": name} if steps is None else {"data": name, "inner_steps": steps}
            results.append(result | score.as_dict(per_episode=getattr(options, "per_episode", False)))
    return results


def _recorded(options: Options) -> Any:
    """All options as JSON values, without absolute paths."""
    return plain(dict(sorted(vars(options).items())))


def _draw_run(
    out: Path, title: str, history: History, learner: nn.Module, data: _Data, options: Options
) -> list[Path]:
    """The learning curve, and an episode of the first test."""
    if not _can_draw():
        return []
    validation = history.result["settings"].get("validation")
    (_, ways, shots), episodes = next(iter(data.tests.items()))

    def shape(ways: int, shots: int) -> str:
        return f"{ways}-way {shots}-shot" if ways else f"{shots}-shot"

    curve, episode = out / "learning-curve.png", out / ("episode.png" if ways else "adaptation.png")
    pictures.draw_learning_curve(
        history,
        curve,
        title,
        "training, single images"
        if isinstance(data.train, RowSampler)
        else f"training, {shape(options.train_ways or 0, options.shots)}",
        f"validation, {shape(validation['ways'], validation['shots'])}" if validation else "",
    )
    title = f"{title}: {shape(ways, shots)} test"
    if ways:
        pictures.draw_episode(learner, episodes[0], episode, title, options.batch_norm)
    else:
        pictures.draw_adaptation(learner, episodes, episode, title, (0, *options.test_steps))
    return [curve, episode]


def _can_draw() -> bool:
    if pictures.have_matplotlib():
        return True
    say("no pictures drawn: matplotlib is not installed (pip install metafast[train])")
    return False


def _read_checkpoint(path: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """The file and its content; a folder is that of a run."""
    if path.is_dir():
        path = path / "checkpoint-best.pt"
    try:
        return path, load_checkpoint(path)
    except (FileNotFoundError, CheckpointError) as error:
        raise UsageError(str(error).replace("checkpoint", option, 1)) from error


def _take_encoder(path: Path, method: str, learner: nn.Module) -> str:
    """Give the learner the encoder of a checkpoint; a digest of its weights, which a resumed run must have too."""
    encoder = getattr(learner, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise UsageError(f"--encoder-from: {method} has no encoder that could be another's")
    path, checkpoint = _read_checkpoint(path, "--encoder-from")
    state = {
        name.removeprefix("encoder."): value
        for name, value in checkpoint["model"].items()
        if name.startswith("encoder.")
    }
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--encoder-from: {path} has another encoder ({reason[:200]})") from error
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _load(options: Options) -> tuple[Path, dict[str, Any], nn.Module, torch.device]:
    """The file, the content and the learner of ``--checkpoint``, and the device."""
    if options.checkpoint is None:
        raise UsageError(
            "--checkpoint is missing: the folder of a run, or a checkpoint in it, such as "
            "--checkpoint runs/protonet-glyphs"
        )
    path, checkpoint = _read_checkpoint(options.checkpoint, "--checkpoint")
    device = _prepare(options)
    settings = checkpoint["settings"]
    try:
        learner = METHODS[settings["method"]].make(settings).to(device)
        learner.load_state_dict(checkpoint["model"])
        if settings["data"] == [SINUSOID]:
            settings["frequency"], settings["split"]
        else:
            _reading(settings), settings["train_ways"], settings["split"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UsageError(f"--checkpoint: {path} was not written by metafast train ({error})") from error
    _settle_batch_norm(options, learner)
    return path, checkpoint, learner, device


def _fit_into_memory(
    options: Options, learner: nn.Module, train: Callable[[int], Episodes], device: torch.device
) -> None:
    """Choose how many tasks go through a step at a time."""
    learner.train()
    memory = predicted_memory(learner, train(0)[:2].to(device))
    options.tasks_at_once = min(memory.tasks(int(options.memory * 2**30)), options.tasks)
    say(
        f"{options.tasks_at_once} of {options.tasks} tasks at a time: a step is predicted to need "
        f"{memory.peak(options.tasks_at_once) / 2**20:.0f} MiB, {memory.peak(options.tasks) / 2**20:.0f} with all"
    )


def _settle_batch_norm(options: Options, learner: nn.Module) -> None:
    try:
        options.batch_norm = settled_batch_norm(learner, options.batch_norm)
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('batch_norm', 'batch-norm', 1)}") from error


def _reading(settings: dict[str, Any]) -> Reading:
    names = ("size", "split_seed", "min_images", "skip_corrupt")
    return Reading(channels=settings["in_channels"], **{name: settings[name] for name in names})


def evaluate_checkpoint(options: Options, arguments: Sequence[str]) -> int:
    """``metafast evaluate``: test a trained learner."""
    _check_folder("--record", options.record)
    if options.per_episode and options.record is None:
        raise UsageError("--per-episode writes into the file of --record; give one")
    _, checkpoint, learner, device = _load(options)
    settings = checkpoint["settings"]
    options.method = settings["method"]
    options.data = options.data or settings["data"]
    steps = inner_steps(learner)
    if options.test_steps is None and steps is not None:
        options.test_steps = [steps]
    elif options.test_steps is not None and steps is None:
        raise UsageError(f"--test-steps: {options.method} does not adapt in steps; leave it out")
    if (SINUSOID in options.data) != (settings["data"] == [SINUSOID]):
        trained = " ".join(settings["data"])
        raise UsageError(f"--data: the checkpoint was trained on {trained}, got {' '.join(options.data)}")
    if SINUSOID in options.data:
        _check_sinusoid_options(options)
        sources = _sinusoid_tests(options.split, options, settings["frequency"])
    else:
        roots = with_roots(options.data, options.root)
        tests, _ = open_splits(roots, options.split, _reading(settings), device)
        _fill_in_test_numbers(options, tests, options.method, settings["train_ways"])
        sources = _test_episodes(tests, options)
    begin = time.perf_counter()
    results = _test(learner, sources, options)
    if options.record is not None and ranks().first:
        write_result(
            options.record,
            {
                "command": command_line(arguments),
                "options": _recorded(options),
                "settings": settings,
                "environment": environment(device),
                "batch_norm": {"train": "batch", "evaluation": options.batch_norm},
                "steps": checkpoint["step"],
                "test_seconds": round(time.perf_counter() - begin, 1),
                "tests": results,
            },
        )
        say(f"saved {options.record}")
    return 0


def analyze_checkpoint(options: Options, arguments: Sequence[str]) -> int:
    """``metafast analyze``: the generalisation report of a trained learner."""
    path, checkpoint, learner, device = _load(options)
    settings = checkpoint["settings"]
    if settings["data"] == [SINUSOID]:
        raise UsageError(
            f"--checkpoint: {SINUSOID} is regression; the report is on classes, so use metafast evaluate"
        )
    out: Path = options.out or path.parent
    if not out.is_dir():
        raise UsageError(f"--out: there is no folder {out}")
    if options.vary_steps and inner_steps(learner) is None:
        raise UsageError(f"--vary-steps: {settings['method']} does not adapt in steps; leave it out")
    reading = _reading(settings)
    roots = with_roots(settings["data"], options.root)
    shift_roots = with_roots(options.shift_data or [], options.shift_root, "--shift-data", "--shift-root")
    splits = {split: open_splits(roots, split, reading, device)[0] for split in (settings["split"], "test")}
    digest = _classes_digest(splits[settings["split"]])
    if settings.get("training_classes", digest) != digest:
        raise UsageError(
            f"--root: the classes there are not those of the training (they were {settings['training_classes']}, are "
            f"{digest}), so the random split may call classes that were trained on test classes"
        )
    if settings["split"] == "train":
        splits["val"] = open_splits(roots, "val", reading, device)[0]
    others: Datasets = {}
    for name, root in shift_roots.items():
        split = ALL if name == "image-folder" else "test"
        opened, _ = open_splits({name: root}, split, reading, device, "--shift-root")
        shown = root.resolve().name if name == "image-folder" else name
        if shown in others:
            raise UsageError(
                f"--shift-root: two of the data sets would be called {shown!r}; rename the folder"
            )
        others[shown] = opened[name]
    if METHODS[settings["method"]].head:
        _require_head_ways(
            settings["method"], settings["train_ways"], (options.ways, *(options.vary_ways or ()))
        )
        options.ways = settings["train_ways"]
    if options.ways is None:
        options.ways = min(_at_most(TEST_WAYS, _fewest(part)) for part in (*splits.values(), others) if part)
    if options.queries is None:
        smallest = min(_smallest(part) for part in (*splits.values(), others) if part)
        options.queries = _at_most(TEST_QUERIES, smallest - options.shots)
    begin = time.perf_counter()
    report = _made(
        "analysis",
        options,
        "--ways or --vary-ways",
        "--shots, --vary-shots or --queries",
        lambda: analyze(
            learner,
            _one_or_all(splits["test"]),
            train=_one_or_all(splits[settings["split"]]),
            validation=_one_or_all(splits["val"]) if "val" in splits else None,
            others=others,
            ways=options.ways,
            shots=options.shots,
            queries=options.queries,
            vary_ways=options.vary_ways,
            vary_shots=options.vary_shots,
            vary_steps=options.vary_steps,
            episodes=options.episodes,
            seed=options.seed,
            batch_norm=options.batch_norm,
        ),
    )
    title = f"generalisation of {settings['method']} on {_names(roots)}, step {checkpoint['step']}"
    say(f"{title}\n{report}")
    if not ranks().first:
        return 0
    files = [out / "generalisation.json"]
    write_result(
        files[0],
        {
            "command": command_line(arguments),
            "options": _recorded(options),
            "settings": settings,
            "environment": environment(device),
            "steps": checkpoint["step"],
            "seconds": round(time.perf_counter() - begin, 1),
            **report.as_dict(),
        },
    )
    if _can_draw():
        files.append(out / "generalisation.png")
        pictures.draw_report(report, files[1], title)
    say("saved " + ", ".join(str(file) for file in files))
    return 0


def bench(options: Options, arguments: Sequence[str]) -> int:
    """``metafast bench``: time the operators against plain PyTorch, by the cases of the source tree."""
    source = Path(metafast.__file__).resolve().parents[1]
    if not (source / "benchmarks" / "ratios.py").is_file():
        raise UsageError(
            "the benchmarks are part of the source tree, not of the installed package: get the sources of "
            "metafast and run metafast bench, or make bench, in an environment where they are installed "
            "with pip install -e ."
        )
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    ratios = importlib.import_module("benchmarks.ratios")
    given = [] if options.full else ["--quick"]
    given += [part for name in options.only for part in ("--only", name)]
    if options.threads is not None:
        given += ["--threads", str(options.threads)]
    return int(ratios.main(given))
