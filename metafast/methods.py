"""The few-shot methods of the command line, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from metafast.backbones import MLP, Conv4
from metafast.config import UsageError
from metafast.learners import ANIL, MAML, R2D2, ProtoNet
from metafast.sources import SINUSOID

#: Hidden layers of an MLP: those of the MAML paper for sinusoids, and for images of Omniglot's size.
HIDDEN_FOR_WAVES, HIDDEN_FOR_IMAGES = [40, 40], [256, 128, 64, 64]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method that the command line knows.

    Attributes:
        make: from the settings of a run to a new learner.
        options: those of :data:`OPTIONS` that it understands, with their defaults.
        tasks: usual number of episodes per step.
        train_ways: usual number of ways in training, None for that of the data set.
        head: whether it has an output for each class, so that all episodes have as many ways.
        waves: whether it does regression.
    """

    make: Callable[[Settings], nn.Module]
    options: Mapping[str, Any]
    tasks: int = 1
    train_ways: int | None = None
    head: bool = False
    waves: bool = False


def _encoder(settings: Settings) -> Conv4:
    return Conv4(settings["in_channels"], settings["channels"])


def _protonet(settings: Settings) -> ProtoNet:
    names = ("metric", "temperature", "learn_temperature", "episode_statistics")
    return ProtoNet(_encoder(settings), **{name: settings[name] for name in names})


def _r2d2(settings: Settings) -> R2D2:
    names = ("regularisation", "scale", "episode_statistics")
    return R2D2(_encoder(settings), **{name: settings[name] for name in names})


def _anil(settings: Settings) -> ANIL:
    encoder = _encoder(settings)
    return ANIL(
        encoder,
        encoder.features(settings["size"]),
        settings["train_ways"],
        settings["inner_lr"],
        settings["inner_steps"],
        learn_lr=settings["learn_inner_lr"],
        first_order=settings["first_order"],
        episode_statistics=settings["episode_statistics"],
    )


def _adapting_model(settings: Settings) -> nn.Module:
    waves = settings["data"] == [SINUSOID]
    outputs = 1 if waves else settings["train_ways"]
    if settings["backbone"] == "conv4":
        encoder = _encoder(settings)
        return nn.Sequential(encoder, nn.Linear(encoder.features(settings["size"]), outputs))
    inputs = 1 if waves else settings["in_channels"] * settings["size"] ** 2
    return MLP(
        (inputs, *settings["hidden"], outputs),
        settings["activation"],
        batch_norm=settings["backbone"] == "mlp-batchnorm",
        init_std=settings["init_std"],
    )


def _maml(settings: Settings) -> MAML:
    return MAML(
        _adapting_model(settings),
        settings["inner_lr"],
        settings["inner_steps"],
        loss="mse" if settings["data"] == [SINUSOID] else "cross_entropy",
        learn_lr=settings["method"] == "metasgd",
        first_order=settings["first_order"],
        recompute=settings["recompute"],
    )


_CONV4_OPTIONS: dict[str, Any] = {"channels": 64, "episode_statistics": False}
_MAML_OPTIONS: dict[str, Any] = {
    "backbone": "mlp",
    "channels": 64,
    "hidden": None,
    "activation": "relu",
    "init_std": None,
    "inner_lr": None,
    "inner_steps": 1,
    "first_order": False,
    "recompute": False,
}
#: What MAML adapts: an MLP, one with BatchNorm, or Conv4 and a linear layer; and the options that are not for all.
BACKBONES = ("mlp", "mlp-batchnorm", "conv4")
_OF_MLP, _OF_CONV4 = ("hidden", "activation", "init_std"), ("channels",)

#: By the names of `--method`.
METHODS = {
    "protonet": Method(
        _protonet,
        {**_CONV4_OPTIONS, "metric": "sqeuclidean", "temperature": None, "learn_temperature": False},
    ),
    "anil": Method(
        _anil,
        {**_CONV4_OPTIONS, "inner_lr": 0.1, "inner_steps": 5, "learn_inner_lr": False, "first_order": False},
        tasks=16,
        train_ways=5,
        head=True,
    ),
    "r2d2": Method(_r2d2, {**_CONV4_OPTIONS, "regularisation": 50.0, "scale": 10.0}),
    "maml": Method(_maml, _MAML_OPTIONS, tasks=25, train_ways=5, head=True, waves=True),
    "metasgd": Method(_maml, _MAML_OPTIONS, tasks=25, train_ways=5, head=True, waves=True),
}
#: The options that not every method understands.
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.options))


def methods_with(option: str) -> str:
    """The methods that understand an option, in words for the help."""
    return ", ".join(name for name, method in METHODS.items() if option in method.options)


def settle_options(options: argparse.Namespace) -> None:
    """Fill in what the method wants by default.

    Raises:
        UsageError: an option of other methods.
    """
    method = METHODS[options.method]
    if "backbone" in method.options:
        _settle_backbone(options)
    for name in OPTIONS:
        if name in method.options:
            if getattr(options, name) is None:
                setattr(options, name, method.options[name])
        elif getattr(options, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is an option of {methods_with(name)}; {options.method} has no use for it"
            )
    if options.method == "protonet" and options.temperature is None:
        options.temperature = 10.0 if options.metric == "cosine" else 1.0
    if "hidden" in method.options and options.hidden is None:
        options.hidden = HIDDEN_FOR_WAVES if options.data == [SINUSOID] else HIDDEN_FOR_IMAGES
    if options.tasks is None:
        options.tasks = method.tasks


def _settle_backbone(options: argparse.Namespace) -> None:
    if options.backbone is None:
        options.backbone = _MAML_OPTIONS["backbone"]
    for name in _OF_MLP if options.backbone == "conv4" else _OF_CONV4:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: --backbone {options.backbone} has no use for it")
    if options.data == [SINUSOID] and options.backbone == "conv4":
        raise UsageError(f"--backbone conv4 is for images, and {SINUSOID} has none")
