"""The command line: ``metafast train | evaluate | analyze | bench | doctor``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from metafast import commands, doctor
from metafast._stateless import BATCH_NORM_POLICIES
from metafast.config import UsageError, nearest, option_names, read_config
from metafast.inner_loop import OPTIMIZERS as INNER_OPTIMIZERS
from metafast.learners.protonet import METRICS
from metafast.learners.relation import LOSSES as RELATION_LOSSES
from metafast.methods import BACKBONES, INNER_BATCH_NORM, METHODS, OPTIMIZERS, methods_with
from metafast.mlp import ACTIVATIONS
from metafast.sources import ALL, SINUSOID, SOURCES, SPLITS
from metafast.training import Interrupted
from metafast.training.distributed import RankLostError, leave, ranks
from metafast.training.evaluate import BATCH_NORM_MODES
from metafast.training.fit import PRECISIONS, SCALED_PRECISIONS, SCHEDULES
from metafast.training.result import environment

EXAMPLES = """examples:
  metafast train --data image-folder --root data/birds --steps 2000 --out runs/birds
  metafast evaluate --checkpoint runs/birds --root data/birds --ways 5 --shots 1 5
  metafast analyze --checkpoint runs/birds --root data/birds --shift-data glyphs
  metafast doctor

metafast COMMAND --help shows the options of a command, with examples.
"""
TRAIN_EXAMPLES = """examples:
  metafast train --data glyphs --train-ways 20 --steps 400
      a small network on invented characters, no files needed
  metafast train --data omniglot --root data/omniglot --steps 20000 --ways 5 20 --test-shots 1 5
      Omniglot as in the paper: 60-way training, four test results
  metafast train --data image-folder --root data/birds --size 84 --steps 5000 --patience 5
      own images, a folder for each class; the classes are split at random
  metafast train --data omniglot glyphs --root data/omniglot --tasks 4
      episodes from two data sets
  metafast train --config birds.toml --lr 5e-4
      options from a file (root = "data/birds", ways = [5, 20] ...); the command line wins
  metafast train --data omniglot --root data/omniglot --steps 20000 --resume
      go on with a run that was stopped
  metafast train --method anil --data omniglot --root data/omniglot --steps 6000
      a linear head that adapts to each episode in five steps of gradient descent
  metafast train --method baseline --data omniglot --root data/omniglot --steps 30000 --out runs/baseline
  metafast train --method feat --data omniglot --root data/omniglot --encoder-from runs/baseline --lr 1e-4
      an encoder that classifies all training classes, and attention between prototypes that begins with it
  metafast train --method maml --data sinusoid --steps 70000 --schedule cosine --test-steps 1 5 10
      regression on sine waves: squared error after 1, 5 and 10 steps
  torchrun --nproc-per-node 4 -m metafast train --data omniglot --root data/omniglot --tasks 8
      four processes share out the tasks of each step
"""
EVALUATE_EXAMPLES = """examples:
  metafast evaluate --checkpoint runs/protonet-omniglot --root data/omniglot --ways 5 20 --shots 1 5
  metafast evaluate --checkpoint runs/protonet-glyphs/checkpoint-last.pt --batch-norm transductive
  metafast evaluate --checkpoint runs/birds --data image-folder --root data/insects --split all
      on all classes of other images
  metafast evaluate --checkpoint runs/maml-sinusoid --shots 5 10 20 --test-steps 1 5 10
      squared error of a learner of sine waves
  metafast evaluate --checkpoint runs/protonet-glyphs --record result.json --per-episode
      with the accuracy of every episode
"""
ANALYZE_EXAMPLES = """examples:
  metafast analyze --checkpoint runs/protonet-glyphs
  metafast analyze --checkpoint runs/protonet-omniglot --root data/omniglot --shift-data glyphs
  metafast analyze --checkpoint runs/birds --root data/birds --ways 5 --shots 5 --vary-shots 1 2 5 10 20
  metafast analyze --checkpoint runs/birds --root data/birds --shift-data image-folder --shift-root data/insects

The report is printed and saved in the folder of the checkpoint, as generalisation.json and generalisation.png.
"""
BENCH_EXAMPLES = """examples:
  metafast bench
      about 20 seconds: the main operators against eager PyTorch
  metafast bench --full --only prototypical
      the cases of that name against all competitors, torch.compile among them
"""
DOCTOR_EXAMPLES = """examples:
  metafast doctor
      after an installation, or when something is slow; exit code 1 says that metafast does not work here
  metafast doctor --model package.models:Net --input 3 84 84
      how an inner loop adapts a model, and which operators keep it from exact second-order gradients
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are and adds defaults, where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None or default is argparse.SUPPRESS or isinstance(default, bool) or default == []:
            return text
        shown = " ".join(str(value) for value in default) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown})"


class _Parser(argparse.ArgumentParser):
    """Reports what is wrong as an exception."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Switch(argparse.BooleanOptionalAction):
    """``--name`` and ``--no-name``, without a default in the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        text = options.pop("help")
        super().__init__(option_strings, dest, **options)
        self.help = text


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        return _without_command(arguments)
    name = arguments[0]
    try:
        options = _options(name, arguments[1:])
        return COMMANDS[name].run(options, arguments)
    except UsageError as error:
        return _fail(name, error, 2)
    except (FloatingPointError, OSError) as error:
        return _fail(name, error, 1)
    except Interrupted as error:
        return _fail(name, error, 130)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    finally:
        leave()


def _without_command(arguments: list[str]) -> int:
    """Help, the version, or what is wrong."""
    if arguments[:1] == ["--version"]:
        print(f"metafast {environment(torch.device('cpu'))['metafast']}")
        return 0
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        wanted = ", ".join(COMMANDS)
        print(
            f"metafast: error: there is no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)} "
            f"(commands: {wanted})",
            file=sys.stderr,
        )
        return 2
    width = max(map(len, COMMANDS))
    print("usage: metafast COMMAND [options]\n\nFast few-shot and meta-learning in PyTorch.\n\ncommands:")
    for name, command in COMMANDS.items():
        print(f"  {name:{width}}  {command.summary}")
    print(f"\n{EXAMPLES}", end="")
    return 0 if arguments else 2


def _options(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command: its defaults, those of ``--config``, those of the command line."""
    parsers = {other: command.parser() for other, command in COMMANDS.items()}
    parser = parsers[name]
    finder = _Parser(add_help=False, allow_abbrev=False)
    _add_config_option(finder)
    path = finder.parse_known_args(arguments)[0].config
    options = argparse.Namespace()
    if path is not None:
        try:
            parser.parse_args(read_config(path, name, parsers), options)
        except UsageError as error:
            raise UsageError(error if str(path) in str(error) else f"{path}: {error}") from error
    options, extra = parser.parse_known_args(arguments, options)
    if extra:
        option = extra[0].partition("=")[0]
        if not option.startswith("-"):
            raise UsageError(f"unexpected argument {option!r}; metafast {name} takes options only")
        known = [f"--{other}" for other in option_names(parser)]
        hint = nearest(option, known) or f"; metafast {name} --help lists them"
        raise UsageError(f"there is no option {option}{hint}")
    return options


def _fail(command: str, reason: object, code: int) -> int:
    # Every process has the same to say, but for those that lost another one.
    if ranks().first or isinstance(reason, RankLostError):
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
_count = _parsed(int, lambda value: value >= 0, "a whole number from 0")
_ways = _parsed(int, lambda value: value >= 2, "at least 2 ways")
_size = _parsed(int, lambda value: value >= 16, "a whole number of at least 16 pixels")
_positive_float = _parsed(float, lambda value: value > 0 and math.isfinite(value), "a positive number")
_not_negative_float = _parsed(float, lambda value: 0 <= value < math.inf, "a number that is not negative")
_dropout = _parsed(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
_fraction = _parsed(float, lambda value: 0 < value < 1, "a number between 0 and 1")
_seed = _parsed(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1")
_episode_count = _parsed(int, lambda value: value >= 2, "at least 2 episodes")


def _parser(name: str, usage: str, description: str, examples: str) -> _Parser:
    return _Parser(
        prog=f"metafast {name}",
        usage=f"metafast {name} {usage}",
        description=description,
        epilog=examples,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def _train_parser() -> argparse.ArgumentParser:
    parser = _parser("train", "[options]", "Train a learner, test it and save both.", TRAIN_EXAMPLES)
    _add_method_options(parser)
    data = _add_data_options(parser, ["glyphs"], "data set, or several that episodes are drawn from")
    data.add_argument(
        "--split",
        choices=("train", "trainval"),
        default="train",
        help="classes to train on; trainval leaves none for validation, and the last weights are tested",
    )
    data.add_argument(
        "--size", type=_size, metavar="PIXELS", help="height and width of the images (default: the usual one)"
    )
    data.add_argument("--grey", action=_Switch, default=False, help="turn the images grey")
    data.add_argument(
        "--split-seed", type=_seed, default=0, metavar="S", help="of the split of an image folder"
    )
    data.add_argument(
        "--min-images",
        type=_positive_int,
        default=1,
        metavar="N",
        help="leave out classes with fewer images",
    )
    data.add_argument(
        "--skip-corrupt", action=_Switch, default=False, help="leave out files that cannot be read"
    )
    data.add_argument(
        "--frequency",
        type=_positive_float,
        nargs="+",
        metavar="X",
        help=f"of {SINUSOID}: one number, or lowest and highest as of Meta-SGD's 0.8 1.2 (default: 1)",
    )
    episodes = parser.add_argument_group("training episodes")
    episodes.add_argument(
        "--train-ways",
        type=_ways,
        metavar="N",
        help="classes per episode (default: 5 for methods with a head, else 60 for glyphs and omniglot, 20 for "
        "others, or all classes if fewer)",
    )
    episodes.add_argument(
        "--shots",
        type=_positive_int,
        metavar="K",
        help=f"support images per class (default: 1; {SINUSOID}: {commands.WAVE_SHOTS} points)",
    )
    episodes.add_argument(
        "--train-queries",
        type=_positive_int,
        metavar="Q",
        help=f"query images per class (default: {commands.TRAIN_QUERIES}, or as many as there are; {SINUSOID}: "
        f"{commands.WAVE_QUERIES} points)",
    )
    usual = ", ".join(f"{method.tasks} for {name}" for name, method in METHODS.items() if method.tasks > 1)
    images = " and ".join(name for name, method in METHODS.items() if method.pretraining)
    episodes.add_argument(
        "--tasks",
        type=_positive_int,
        metavar="T",
        help=f"episodes per step, single images for {images} (default: {usual}, else 1)",
    )
    _add_course_options(parser)
    test = parser.add_argument_group("test")
    _add_test_options(test, "--test-shots", "--test-seed")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: runs/METHOD-DATA)"
    )
    files.add_argument("--resume", action=_Switch, default=False, help="go on with the run in the folder")
    files.add_argument(
        "--overwrite", action=_Switch, default=False, help="start again if the folder holds a run"
    )
    files.add_argument("--record", type=Path, metavar="FILE", help="copy result.json to this file too")
    _add_common_options(parser)
    return parser


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """Without defaults, so that options of another method can be told from those that were not given."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=tuple(METHODS), default="protonet", help="few-shot method")

    def add(name: str, text: str, **options: Any) -> None:
        group.add_argument(name, help=f"{text} [{methods_with(name[2:].replace('-', '_'))}]", **options)

    number: dict[str, Any] = {"type": _positive_float, "metavar": "X"}
    add(
        "--backbone",
        "what adapts (default: mlp for maml, metasgd and sinusoid, else conv4)",
        choices=BACKBONES,
    )
    add(
        "--channels",
        "channels of the encoder, Conv4 or that of relation networks (default: 64)",
        type=_positive_int,
        metavar="N",
    )
    add(
        "--episode-statistics",
        "in training, BatchNorm normalises each episode by its own images, not by those of all episodes of a step",
        action=_Switch,
    )
    add("--metric", "distance to the prototypes (default: sqeuclidean)", choices=METRICS)
    add(
        "--temperature",
        "factor of the distances (default: 10 for cosine, whose distances are small, 1/64 for feat, else 1)",
        **number,
    )
    add("--learn-temperature", "train the temperature too", action=_Switch)
    add("--heads", "of the attention between prototypes (default: 1)", type=_positive_int, metavar="N")
    add(
        "--dropout",
        "of what the attention adds to the prototypes (default: 0.5)",
        type=_dropout,
        metavar="X",
    )
    add(
        "--balance",
        "weight of the contrastive loss (default: 1)",
        type=_not_negative_float,
        metavar="X",
    )
    add(
        "--contrastive-temperature",
        "factor of the distances in the contrastive loss (default: 1/16)",
        **number,
    )
    add("--regularisation", "initial factor of the identity in the ridge regression (default: 50)", **number)
    add(
        "--scale",
        "factor of the logits, at first of r2d2's (default: 10; baseline-plus-plus: 2 for 200 classes or fewer)",
        **number,
    )
    add("--learn-scale", "train the factor too", action=_Switch)
    add("--full-context", "embed every image in the context of the support images", action=_Switch)
    add("--relation-loss", "of the scores (default: mse)", choices=RELATION_LOSSES)
    add("--hidden", "widths of the hidden layers (default: 40 40 for sinusoid, else 256 128 64 64)",
        type=_positive_int, nargs="+", metavar="N")  # fmt: skip
    add("--activation", "of the hidden layers (default: relu)", choices=ACTIVATIONS)
    add(
        "--inner-lr",
        "rate of the inner steps, of metasgd and maml++ the initial one (default: 0.1 for anil, boil and maml++, "
        "0.01 for maml, protomaml, baseline, baseline-plus-plus and sinusoid, 0.001 for reptile, for metasgd drawn "
        "from 0.005 to 0.1)",
        **number,
    )
    add("--learn-inner-lr", "train the rate too", action=_Switch)
    add(
        "--inner-steps",
        "steps of adaptation (default: 1 for maml, metasgd and boil, else 5)",
        type=_count,
        metavar="N",
    )
    add(
        "--inner-batch-norm",
        "what BatchNorm normalises by in and after the inner steps: the rows at hand; these in training, whose "
        "running statistics follow, and those in tests (per_step: of each step, maml++); or running statistics as "
        "they are (default: transductive)",
        choices=INNER_BATCH_NORM,
    )
    add(
        "--inner-batch",
        "support rows of an inner step (default: 10 for reptile, else 4)",
        type=_positive_int,
        metavar="N",
    )
    add(
        "--inner-epochs",
        "passes over the support rows that fit a head (default: 100)",
        type=_count,
        metavar="N",
    )
    add("--inner-optimizer", "of the inner steps (default: adam)", choices=INNER_OPTIMIZERS)
    add(
        "--multi-step",
        "first training steps in which the loss after each inner step counts (default: 5000)",
        type=_count,
        metavar="N",
    )
    add(
        "--first-order-steps",
        "first training steps that are of first order (default: 0)",
        type=_count,
        metavar="N",
    )
    add(
        "--init-std",
        "of the initial weights, such as 0.01 (default: He's square root of 2 / inputs)",
        **number,
    )
    add("--first-order", "take the gradients of the inner steps for constants", action=_Switch)
    add("--recompute", "compute the inner steps again in the backward pass, for less memory", action=_Switch)


def _add_course_options(parser: argparse.ArgumentParser) -> None:
    course = parser.add_argument_group("course of training")
    course.add_argument("--steps", type=_positive_int, default=10000, metavar="N", help="optimiser steps")
    course.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), help="optimiser (default: sgd for reptile, else adam)"
    )
    course.add_argument(
        "--lr", type=_positive_float, metavar="X", help="learning rate (default: 1 for reptile, else 0.001)"
    )
    course.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="course of the learning rate: drops, half a cosine or a line down to 0, or none (default: linear for "
        "reptile, cosine for maml++, else step)",
    )
    course.add_argument(
        "--decay-every", type=_positive_int, default=2000, metavar="N", help="steps between drops (step)"
    )
    course.add_argument(
        "--decay", type=_fraction, default=0.5, metavar="X", help="factor of each drop (step)"
    )
    course.add_argument(
        "--warm-up", type=_count, default=0, metavar="N", help="first steps, in which the rate rises"
    )
    course.add_argument(
        "--clip-norm",
        type=_positive_float,
        metavar="X",
        help="largest norm of the gradient; a longer one is scaled down",
    )
    course.add_argument(
        "--tasks-at-once",
        type=_positive_int,
        metavar="N",
        help="go through so many tasks of a step at a time, for less memory",
    )
    course.add_argument(
        "--memory",
        type=_positive_float,
        metavar="GIB",
        help="as many tasks at a time as a step is predicted to need so much memory for",
    )
    course.add_argument(
        "--precision",
        choices=(*PRECISIONS, *SCALED_PRECISIONS),
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
        "--patience",
        type=_positive_int,
        metavar="N",
        help="stop early after so many validations in a row that were no better",
    )
    course.add_argument(
        "--sync-batch-norm",
        action=_Switch,
        default=True,
        help="under torchrun: BatchNorm normalises by the images of all processes (the default), or of its own",
    )
    course.add_argument(
        "--encoder-from",
        type=Path,
        metavar="FILE",
        help="begin with the encoder of another run: its folder (the best checkpoint) or a checkpoint",
    )
    course.add_argument(
        "--seed", type=_seed, default=0, metavar="S", help="of the weights and the training episodes"
    )


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = _parser("evaluate", "--checkpoint FILE [options]", "Test a trained learner.", EVALUATE_EXAMPLES)
    _add_checkpoint_option(parser)
    data = _add_data_options(parser, None, "data set (default: the one that the checkpoint was trained on)")
    data.add_argument(
        "--split",
        choices=(*SPLITS, ALL),
        default="test",
        help=f"classes to test on; {ALL}: the whole of an image folder",
    )
    test = parser.add_argument_group("test")
    _add_test_options(test, "--shots", "--seed")
    files = parser.add_argument_group("files")
    files.add_argument("--record", type=Path, metavar="FILE", help="write the result to this JSON file")
    files.add_argument(
        "--per-episode", action=_Switch, default=False, help="with the accuracy of every episode"
    )
    _add_common_options(parser)
    return parser


def _analyze_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "analyze",
        "--checkpoint FILE [options]",
        "Report how a trained learner generalises: accuracy against shots, ways and inner steps, on seen and "
        "unseen classes\nand on other data sets, and how well its confidence is calibrated.",
        ANALYZE_EXAMPLES,
    )
    _add_checkpoint_option(parser)
    data = parser.add_argument_group("data")
    _add_root_option(data, "--root", "folder of the data set that the checkpoint was trained on")
    data.add_argument(
        "--shift-data",
        choices=tuple(SOURCES),
        nargs="+",
        metavar="NAME",
        help="other data sets to test on; images are made the size and colour of the training's",
    )
    _add_root_option(data, "--shift-root", "their folders, in order, of those that have one")
    setting = parser.add_argument_group("setting of all that is not varied")
    setting.add_argument("--ways", type=_ways, metavar="N", help="classes per episode (default: 5)")
    setting.add_argument(
        "--shots", type=_positive_int, default=1, metavar="K", help="support images per class"
    )
    setting.add_argument(
        "--queries",
        type=_positive_int,
        metavar="Q",
        help=f"query images per class (default: {commands.TEST_QUERIES}, or as many as there are)",
    )
    setting.add_argument(
        "--episodes", type=_episode_count, default=600, metavar="E", help="episodes of every measurement"
    )
    setting.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the episodes")
    _add_batch_norm_option(setting)
    curves = parser.add_argument_group("curves (default: the usual values that the data set allows)")
    for option, convert, what in (
        ("--vary-ways", _ways, "classes per episode"),
        ("--vary-shots", _positive_int, "support images per class"),
        ("--vary-steps", _count, "inner steps, for methods that adapt in steps"),
    ):
        curves.add_argument(option, type=convert, nargs="+", metavar="N", help=what)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the report (default: that of the checkpoint)"
    )
    _add_common_options(parser)
    return parser


def _bench_parser() -> argparse.ArgumentParser:
    parser = _parser("bench", "[options]", "Time the operators against plain PyTorch.", BENCH_EXAMPLES)
    parser.add_argument(
        "--full", action=_Switch, default=False, help="all cases and competitors, which takes minutes"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cases whose name contains one of these"
    )
    parser.add_argument("--threads", type=_positive_int, metavar="N", help="CPU threads (default: 2)")
    _add_config_option(parser)
    return parser


def _doctor_parser() -> argparse.ArgumentParser:
    text = (
        "What metafast runs on here, which kernels it has, and what is wrong, in words; with --model how an\n"
        "inner loop adapts a model, and what keeps it from exact second-order gradients."
    )
    parser = _parser("doctor", "[options]", text, DOCTOR_EXAMPLES)
    parser.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="a class or function without arguments that gives a model, or a model",
    )
    parser.add_argument(
        "--input",
        type=_positive_int,
        nargs="+",
        default=[1, 28, 28],
        metavar="N",
        help="shape of a row of its input",
    )
    parser.add_argument("--rows", type=_positive_int, default=5, metavar="N", help="rows of a call")
    parser.add_argument(
        "--batch-norm",
        choices=BATCH_NORM_POLICIES,
        default="transductive",
        help="what BatchNorm normalises by in the inner loop",
    )
    return parser


def _add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="checkpoint, or folder of a run (its best one)"
    )


def _add_data_options(parser: argparse.ArgumentParser, default: list[str] | None, text: str) -> Any:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        choices=(*SOURCES, SINUSOID),
        nargs="+",
        default=default,
        metavar="NAME",
        help=f"{text}: {', '.join((*SOURCES, SINUSOID))}",
    )
    _add_root_option(data, "--root", "folder of the data set's files; one for each data set that has files")
    return data


def _add_root_option(group: Any, option: str, text: str) -> None:
    group.add_argument(option, type=Path, nargs="+", default=[], metavar="DIR", help=text)


def _add_test_options(group: Any, shots: str, seed: str) -> None:
    group.add_argument(
        "--ways",
        type=_ways,
        nargs="+",
        metavar="N",
        help=f"classes per episode (default: {commands.TEST_WAYS}, or all classes if fewer; those of training for "
        "methods with a head)",
    )
    group.add_argument(
        shots,
        type=_positive_int,
        nargs="+",
        metavar="K",
        dest="test_shots",
        help=f"support images per class (default: 1; {SINUSOID}: {commands.TEST_WAVE_SHOTS} points)",
    )
    group.add_argument(
        "--test-steps",
        type=_count,
        nargs="+",
        metavar="N",
        help="inner steps, for methods that adapt in steps (default: those of training)",
    )
    group.add_argument(
        "--queries",
        type=_positive_int,
        metavar="Q",
        help=f"query images per class (default: {commands.TEST_QUERIES}, or as many as there are; {SINUSOID}: "
        f"{commands.TEST_WAVE_QUERIES} points)",
    )
    group.add_argument(
        "--episodes", type=_episode_count, default=1000, metavar="E", help="episodes for each of ways x shots"
    )
    group.add_argument(
        seed, type=_seed, default=0, metavar="S", dest="test_seed", help="of the test episodes"
    )
    _add_batch_norm_option(group)


def _add_batch_norm_option(group: Any) -> None:
    group.add_argument(
        "--batch-norm",
        choices=BATCH_NORM_MODES,
        help="statistics of BatchNorm in tests: those of training, or those of each episode's images (default: "
        "transductive for methods with --inner-batch-norm transductive, else running)",
    )


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ...; auto takes CUDA if any"
    )
    machine.add_argument(
        "--threads", type=_positive_int, metavar="N", help="CPU threads (default: torch's choice)"
    )
    _add_config_option(parser)


def _add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with options, named as here without the dashes; the command line wins",
    )


@dataclass(frozen=True)
class _Command:
    """A command: one line about it, its parser and what it does."""

    summary: str
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace, Sequence[str]], int]


COMMANDS = {
    "train": _Command("train a learner, test it and save both", _train_parser, commands.train),
    "evaluate": _Command("test a trained learner", _evaluate_parser, commands.evaluate_checkpoint),
    "analyze": _Command(
        "report how a trained learner generalises", _analyze_parser, commands.analyze_checkpoint
    ),
    "bench": _Command("time the operators against plain PyTorch", _bench_parser, commands.bench),
    "doctor": _Command(
        "show what is installed, what runs fast and what is wrong",
        _doctor_parser,
        lambda options, arguments: doctor.main(options),
    ),
}
