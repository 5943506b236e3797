"""The command line: ``metafast train | evaluate | doctor``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TRAIN_EXAMPLES = """examples:
  metafast train --data glyphs --train-ways 20 --steps 400
      a small network on invented characters, no download
  metafast train --data omniglot --root data/omniglot --steps 20000 --ways 5 20 --test-shots 1 5
      Omniglot as in the paper: 60-way training, four test results
  metafast train --data omniglot --root data/omniglot --steps 20000 --resume
      go on with a run that was stopped
"""
EVALUATE_EXAMPLES = """examples:
  metafast evaluate --checkpoint runs/protonet-omniglot --root data/omniglot --ways 5 20 --shots 1 5
  metafast evaluate --checkpoint runs/protonet-glyphs/checkpoint-last.pt --batch-norm transductive
"""

METHODS = ("protonet",)
DATA = ("omniglot", "glyphs")
#: Classes of the procedural data set, all disjoint: number and first class.
GLYPHS = {"train": (400, 0), "val": (100, 400), "trainval": (500, 0), "test": (200, 500)}
#: Images that go through the encoder at once in evaluation.
EVALUATION_IMAGES = 1000


class UsageError(Exception):
    """An option or a file that the command cannot work with; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["doctor"]:
        from metafast import doctor

        return int(doctor.main(arguments[1:]))
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2

    from metafast.training import Interrupted

    try:
        return int(options.run(options, arguments))
    except UsageError as error:
        return _fail(options.command, error, 2)
    except (FloatingPointError, OSError) as error:
        return _fail(options.command, error, 1)
    except Interrupted as error:
        return _fail(options.command, error, 130)
    except KeyboardInterrupt:
        return _fail(options.command, "interrupted", 130)


def _fail(command: str, reason: object, code: int) -> int:
    print(f"metafast {command}: {'' if code == 130 else 'error: '}{reason}", file=sys.stderr)
    return code


def _parsed(
    convert: Callable[[str], Any], accept: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    """A converter for argparse that says what it wanted."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


_positive_int = _parsed(int, lambda value: value >= 1, "a positive whole number")
_positive_float = _parsed(float, lambda value: value > 0 and math.isfinite(value), "a positive number")
_seed = _parsed(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1")
_episode_count = _parsed(int, lambda value: value >= 2, "at least 2 episodes")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are and adds defaults, where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if (
            default is None
            or default is argparse.SUPPRESS
            or isinstance(default, bool)
            or "%(default)" in text
        ):
            return text
        shown = " ".join(str(value) for value in default) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metafast", description="Fast few-shot and meta-learning in PyTorch.", formatter_class=_Formatter
    )
    commands = parser.add_subparsers(dest="command", metavar="command")

    train = commands.add_parser(
        "train",
        help="train a learner, test it and save both",
        usage="metafast train [options]",
        epilog=TRAIN_EXAMPLES,
        formatter_class=_Formatter,
    )
    train.set_defaults(run=_train)
    method = train.add_argument_group("method")
    method.add_argument("--method", choices=METHODS, default="protonet", help="few-shot method")
    method.add_argument(
        "--metric",
        choices=("sqeuclidean", "euclidean", "cityblock", "cosine"),
        default="sqeuclidean",
        help="distance to the prototypes",
    )
    method.add_argument(
        "--temperature",
        type=_positive_float,
        metavar="X",
        help="factor of the distances (default: 10 for cosine, whose distances are small, else 1)",
    )
    method.add_argument("--learn-temperature", action="store_true", help="train the temperature too")
    method.add_argument(
        "--channels", type=_positive_int, default=64, metavar="N", help="channels of the Conv4 encoder"
    )
    data = _add_data_options(train, "glyphs")
    data.add_argument(
        "--split",
        choices=("train", "trainval"),
        default="train",
        help="classes to train on; trainval leaves none for validation, and the last weights are tested",
    )
    episodes = train.add_argument_group("training episodes")
    episodes.add_argument(
        "--train-ways", type=_positive_int, default=60, metavar="N", help="classes per episode"
    )
    episodes.add_argument(
        "--shots", type=_positive_int, default=1, metavar="K", help="support images per class"
    )
    episodes.add_argument(
        "--train-queries", type=_positive_int, default=5, metavar="Q", help="query images per class"
    )
    episodes.add_argument("--tasks", type=_positive_int, default=1, metavar="T", help="episodes per step")
    course = train.add_argument_group("course of training")
    course.add_argument("--steps", type=_positive_int, default=10000, metavar="N", help="optimiser steps")
    course.add_argument("--lr", type=_positive_float, default=1e-3, metavar="X", help="learning rate of Adam")
    course.add_argument(
        "--schedule",
        choices=("halve", "cosine", "constant"),
        default="halve",
        help="course of the learning rate",
    )
    course.add_argument(
        "--halve-every",
        type=_positive_int,
        default=2000,
        metavar="N",
        help="steps between halvings of the rate",
    )
    course.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the encoder in training; distances, losses, weights and evaluation are always float32",
    )
    course.add_argument(
        "--validate-every",
        type=_positive_int,
        default=500,
        metavar="N",
        help="steps between validations and saves",
    )
    course.add_argument(
        "--validation-episodes",
        type=_episode_count,
        default=400,
        metavar="E",
        help="episodes of a validation",
    )
    course.add_argument(
        "--seed", type=_seed, default=0, metavar="S", help="of the weights and the training episodes"
    )
    test = train.add_argument_group("test")
    _add_test_options(test, "--test-shots", "--test-seed")
    files = train.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: runs/METHOD-DATA)"
    )
    files.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    files.add_argument("--overwrite", action="store_true", help="start again if the folder holds a run")
    files.add_argument("--record", type=Path, metavar="FILE", help="copy result.json to this file too")
    _add_machine_options(train)

    evaluation = commands.add_parser(
        "evaluate",
        help="test a trained learner",
        usage="metafast evaluate --checkpoint FILE [options]",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=_Formatter,
    )
    evaluation.set_defaults(run=_evaluate)
    evaluation.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="checkpoint, or folder of a run (its best one)",
    )
    data = _add_data_options(evaluation, None)
    data.add_argument(
        "--split", choices=("train", "val", "trainval", "test"), default="test", help="classes to test on"
    )
    _add_test_options(evaluation, "--shots", "--seed")
    evaluation.add_argument("--record", type=Path, metavar="FILE", help="write the result to this JSON file")
    _add_machine_options(evaluation)

    commands.add_parser(
        "doctor", help="show what is installed, what runs fast and what is wrong", add_help=False
    )
    return parser


def _add_data_options(parser: argparse.ArgumentParser, default: str | None) -> Any:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        choices=DATA,
        default=default,
        help="data set" if default else "data set (default: the one that the checkpoint was trained on)",
    )
    data.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of the data set's files (omniglot: the two zips)"
    )
    return data


def _add_test_options(group: Any, shots: str, seed: str) -> None:
    group.add_argument(
        "--ways", type=_positive_int, nargs="+", default=[5], metavar="N", help="classes per episode"
    )
    group.add_argument(
        shots,
        type=_positive_int,
        nargs="+",
        default=[1],
        metavar="K",
        dest="test_shots",
        help="support images per class",
    )
    group.add_argument(
        "--queries", type=_positive_int, default=15, metavar="Q", help="query images per class"
    )
    group.add_argument(
        "--episodes", type=_episode_count, default=1000, metavar="E", help="episodes for each of ways x shots"
    )
    group.add_argument(
        seed, type=_seed, default=0, metavar="S", dest="test_seed", help="of the test episodes"
    )
    group.add_argument(
        "--batch-norm",
        choices=("running", "transductive"),
        default="running",
        help="statistics of BatchNorm in tests: those of training, or those of each episode's images",
    )


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ...; auto takes CUDA if any"
    )
    machine.add_argument(
        "--threads", type=_positive_int, metavar="N", help="CPU threads (default: torch's choice)"
    )


def _prepare(options: argparse.Namespace) -> Any:
    """Allocator, threads and device."""
    import torch

    from metafast._library import keep_pages

    keep_pages()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _open(data: str, root: Path | None, split: str, device: Any) -> Any:
    """A split of a data set, on the device."""
    from metafast.data import glyphs, omniglot

    if data == "glyphs":
        if root is not None:
            raise UsageError("--root: glyphs are computed and have no folder; leave --root out")
        classes, first = GLYPHS[split]
        return glyphs(classes, first_class=first, rotations=True).to(device)
    if root is None:
        raise UsageError(
            "--data omniglot needs --root DIR, "
            "the folder with images_background.zip and images_evaluation.zip"
        )
    try:
        return omniglot(root, split).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--root: {error}") from error


def _sampler(dataset: Any, title: str, ways: int, shots: int, queries: int, tasks: int, seed: int) -> Any:
    from metafast.data import EpisodeSampler

    try:
        return EpisodeSampler(dataset, ways, shots, queries, tasks, seed)
    except ValueError as error:
        raise UsageError(f"{title}: {error}") from error


def _test_samplers(dataset: Any, options: argparse.Namespace) -> list[Any]:
    return [
        _evaluation_sampler(dataset, "test episodes", ways, shots, options.queries, options.test_seed)
        for ways in options.ways
        for shots in options.test_shots
    ]


def _evaluation_sampler(dataset: Any, title: str, ways: int, shots: int, queries: int, seed: int) -> Any:
    tasks = max(1, EVALUATION_IMAGES // (ways * (shots + queries)))
    return _sampler(dataset, title, ways, shots, queries, tasks, seed)


def _learner(settings: dict[str, Any], device: Any) -> Any:
    from metafast.backbones import Conv4
    from metafast.learners import ProtoNet

    encoder = Conv4(settings["in_channels"], settings["channels"])
    learner = ProtoNet(encoder, settings["metric"], settings["temperature"], settings["learn_temperature"])
    return learner.to(device)


def _test(learner: Any, samplers: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    from metafast.training import evaluate

    results = []
    for sampler in samplers:
        accuracy = evaluate(
            learner,
            sampler,
            options.episodes,
            batch_norm=options.batch_norm,
            progress=f"{sampler.ways}-way {sampler.shots}-shot",
        )
        print(f"test {accuracy}", flush=True)
        results.append(accuracy.as_dict())
    return results


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """All options as JSON values, without absolute paths."""
    from metafast.training.result import without_absolute_path

    return {
        name: without_absolute_path(str(value)) if isinstance(value, Path) else value
        for name, value in sorted(vars(options).items())
        if name not in ("run", "command")
    }


def _settings(options: argparse.Namespace, in_channels: int, validation: Any) -> dict[str, Any]:
    """What the weights depend on: kept in the checkpoints, and a resumed run must have the same."""
    names = (
        "method", "channels", "metric", "temperature", "learn_temperature", "data", "split", "train_ways",
        "shots", "train_queries", "tasks", "lr", "schedule", "precision", "validate_every", "seed",
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    settings |= {"encoder": "Conv4", "in_channels": in_channels}
    if options.schedule == "halve":
        settings["halve_every"] = options.halve_every
    elif options.schedule == "cosine":
        settings["steps"] = options.steps
    if validation is not None:
        settings["validation"] = {
            "ways": validation.ways,
            "shots": validation.shots,
            "queries": validation.queries,
            "seed": validation.seed,
            "episodes": options.validation_episodes,
            "batch_norm": options.batch_norm,
        }
    return settings


def _train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import torch

    from metafast.training import CheckpointError, fit
    from metafast.training.result import command_line, environment, write_result

    if options.resume and options.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite starts it again; give one of them")
    if options.temperature is None:
        options.temperature = 10.0 if options.metric == "cosine" else 1.0
    out = options.out or Path("runs") / f"{options.method}-{options.data}"
    if options.record is not None and not options.record.absolute().parent.is_dir():
        raise UsageError(f"--record: there is no folder {options.record.parent}")
    device = _prepare(options)
    torch.manual_seed(options.seed)
    dataset = _open(options.data, options.root, options.split, device)
    test_set = _open(options.data, options.root, "test", device)
    train = _sampler(
        dataset,
        "training episodes",
        options.train_ways,
        options.shots,
        options.train_queries,
        options.tasks,
        options.seed,
    )
    tests = _test_samplers(test_set, options)
    validation = None
    if options.split == "train":
        # The hardest of the test settings tells checkpoints apart best.
        validation = _evaluation_sampler(
            _open(options.data, options.root, "val", device),
            "validation episodes",
            max(options.ways),
            min(options.test_shots),
            options.queries,
            options.test_seed,
        )
    settings = _settings(options, dataset.images.shape[1], validation)
    learner = _learner(settings, device)
    print(
        f"{options.method} with Conv4-{options.channels} on {options.data}: "
        f"{dataset.num_classes} training classes, "
        f"{train.ways}-way {train.shots}-shot {train.queries}-query training, "
        f"batch statistics in BatchNorm, {options.precision}, {device}, {torch.get_num_threads()} threads",
        flush=True,
    )
    if validation is None:
        print("no validation: trainval leaves no classes for it, so the weights of the last step are tested")
    try:
        history = fit(
            learner,
            train,
            options.steps,
            validation=validation,
            validation_episodes=options.validation_episodes,
            validate_every=options.validate_every,
            batch_norm=options.batch_norm,
            optimizer=torch.optim.Adam(learner.parameters(), lr=options.lr),
            schedule=options.schedule,
            halve_every=options.halve_every,
            precision=options.precision,
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
        raise UsageError(f"{error}; --overwrite starts again") from error
    print(
        f"trained {options.steps} steps in {history.seconds:.0f} s; "
        f"testing the weights of step {history.best_step}"
    )
    begin = time.perf_counter()
    results = _test(learner, tests, options)
    result = {
        "command": command_line(arguments),
        "options": _recorded(options),
        "settings": settings,
        "environment": environment(device),
        "batch_norm": {"train": "batch", "evaluation": options.batch_norm},
        "steps": len(history.rows),
        "train_seconds": round(history.seconds, 1),
        "test_seconds": round(time.perf_counter() - begin, 1),
        "best_step": history.best_step,
        "best_validation_accuracy": history.best_accuracy,
        "tests": results,
    }
    write_result(out / "result.json", result)
    files = [out / "result.json", out / "metrics.csv", out / "checkpoint-best.pt"]
    files += _draw(out, history, learner, tests[0], options)
    if options.record is not None:
        write_result(options.record, result)
        files.append(options.record)
    print("saved " + ", ".join(str(file) for file in files))
    return 0


def _draw(out: Path, history: Any, learner: Any, sampler: Any, options: argparse.Namespace) -> list[Path]:
    from metafast.training import pictures

    if not pictures.have_matplotlib():
        print("no pictures drawn: matplotlib is not installed (pip install metafast[train])")
        return []
    curve, episode = out / "learning-curve.png", out / "episode.png"
    name = f"{options.method} on {options.data}"
    pictures.draw_learning_curve(
        history,
        curve,
        name,
        f"training, {options.train_ways}-way {options.shots}-shot",
        f"validation, {max(options.ways)}-way {min(options.test_shots)}-shot",
    )
    pictures.draw_episode(
        learner, sampler(0), episode, f"{name}: {sampler.ways}-way {sampler.shots}-shot test"
    )
    return [curve, episode]


def _evaluate(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from metafast.training import CheckpointError, load_checkpoint
    from metafast.training.result import command_line, environment, write_result

    if options.record is not None and not options.record.absolute().parent.is_dir():
        raise UsageError(f"--record: there is no folder {options.record.parent}")
    path = options.checkpoint
    if path.is_dir():
        path = path / "checkpoint-best.pt"
    try:
        checkpoint = load_checkpoint(path)
    except (FileNotFoundError, CheckpointError) as error:
        raise UsageError(f"--{error}") from error
    device = _prepare(options)
    settings = checkpoint["settings"]
    try:
        learner = _learner(settings, device)
        learner.load_state_dict(checkpoint["model"])
        data = options.data or settings["data"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UsageError(f"--checkpoint: {path} was not written by metafast train ({error})") from error
    samplers = _test_samplers(_open(data, options.root, options.split, device), options)
    begin = time.perf_counter()
    results = _test(learner, samplers, options)
    if options.record is not None:
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
        print(f"saved {options.record}")
    return 0
