"""The few-shot methods of the command line, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metafast._stateless import BATCH_NORM_POLICIES
from metafast.backbones import MLP, Conv4
from metafast.config import UsageError
from metafast.learners import (
    ANIL,
    BOIL,
    FEAT,
    MAML,
    R2D2,
    Baseline,
    BaselinePlusPlus,
    MAMLPlusPlus,
    MatchingNet,
    MetaSGD,
    ProtoMAML,
    ProtoNet,
    RelationEncoder,
    RelationHead,
    RelationNet,
    Reptile,
    SetAttention,
    SimpleShot,
)
from metafast.sources import SINUSOID

#: Hidden layers of an MLP: those of the MAML paper for sinusoids, and for images of Omniglot's size.
HIDDEN_FOR_WAVES, HIDDEN_FOR_IMAGES = [40, 40], [256, 128, 64, 64]

#: Largest usual rate of the inner steps on sinusoids, whose squared errors are larger than other losses.
WAVE_RATE = 0.01

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method that the command line knows.

    Attributes:
        make: from the settings of a run to a new learner.
        options: those of :data:`OPTIONS` that it understands, with their defaults.
        tasks: usual number of episodes per step, in pre-training of images.
        train_ways: usual number of ways in training, None for that of the data set.
        head: whether it has an output for each class, so that all episodes have as many ways.
        waves: whether it does regression.
        pretraining: whether it is trained to classify single images of all classes, and not on episodes.
        optimizer, lr, schedule: usual ones of the outer steps.
        encoder: what has the option ``channels``.
    """

    make: Callable[[Settings], nn.Module]
    options: Mapping[str, Any]
    tasks: int = 1
    train_ways: int | None = None
    head: bool = False
    waves: bool = False
    pretraining: bool = False
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "step"
    encoder: str = "Conv4"


def _encoder(settings: Settings) -> Conv4:
    return Conv4(settings["in_channels"], settings["channels"])


def _protonet(settings: Settings) -> ProtoNet:
    names = ("metric", "temperature", "learn_temperature", "episode_statistics")
    return ProtoNet(_encoder(settings), **{name: settings[name] for name in names})


def _r2d2(settings: Settings) -> R2D2:
    names = ("regularisation", "scale", "episode_statistics")
    return R2D2(_encoder(settings), **{name: settings[name] for name in names})


def _matching(settings: Settings) -> MatchingNet:
    encoder = _encoder(settings)
    return MatchingNet(
        encoder,
        settings["scale"],
        settings["learn_scale"],
        full_context=encoder.features(settings["size"]) if settings["full_context"] else None,
        episode_statistics=settings["episode_statistics"],
    )


def _simpleshot(settings: Settings) -> SimpleShot:
    encoder = _encoder(settings)
    return SimpleShot(
        encoder,
        encoder.features(settings["size"]),
        settings["base_classes"],
        settings["metric"],
        settings["temperature"],
    )


def _baseline(settings: Settings) -> Baseline:
    encoder = _encoder(settings)
    features, classes = encoder.features(settings["size"]), settings["base_classes"]
    options: dict[str, Any] = {
        "lr": settings["inner_lr"],
        "batch_size": settings["inner_batch"],
        "epochs": settings["inner_epochs"],
    }
    if settings["method"] == "baseline":
        return Baseline(encoder, features, classes, **options)
    return BaselinePlusPlus(encoder, features, classes, settings["scale"], **options)


def _feat(settings: Settings) -> FEAT:
    encoder = _encoder(settings)
    return FEAT(
        encoder,
        SetAttention(encoder.features(settings["size"]), settings["heads"], dropout=settings["dropout"]),
        **{name: settings[name] for name in ("metric", "temperature", "balance", "contrastive_temperature")},
        episode_statistics=settings["episode_statistics"],
    )


def _relation(settings: Settings) -> RelationNet:
    channels = settings["channels"]
    try:
        side = RelationEncoder.side(settings["size"])
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error
    return RelationNet(
        RelationEncoder(settings["in_channels"], channels),
        RelationHead(side, channels),
        settings["relation_loss"],
    )


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


def _adapting_encoder(settings: Settings, *outputs: int) -> nn.Module:
    """Conv4, or an MLP that ends with ``outputs``."""
    if settings["backbone"] == "conv4":
        return _encoder(settings)
    waves = settings["data"] == [SINUSOID]
    inputs = 1 if waves else settings["in_channels"] * settings["size"] ** 2
    return MLP(
        (inputs, *settings["hidden"], *outputs),
        settings["activation"],
        batch_norm=settings["backbone"] == "mlp-batchnorm",
        init_std=settings["init_std"],
    )


def _adapting_model(settings: Settings) -> nn.Module:
    outputs = 1 if settings["data"] == [SINUSOID] else settings["train_ways"]
    model = _adapting_encoder(settings, outputs)
    if not isinstance(model, Conv4):
        return model
    return nn.Sequential(model, nn.Linear(model.features(settings["size"]), outputs))


def _adapting(
    kind: Callable[..., nn.Module],
    names: Mapping[str, str],
    model: Callable[[Settings], nn.Module] = _adapting_model,
) -> Callable[[Settings], nn.Module]:
    """Makes learners of a kind; ``names``: its arguments by the options of the command line."""

    def make(settings: Settings) -> nn.Module:
        options = {name: settings[option] for option, name in names.items()}
        if model is _adapting_model:
            options["loss"] = "mse" if settings["data"] == [SINUSOID] else "cross_entropy"
        return kind(
            model(settings),
            settings["inner_lr"],
            settings["inner_steps"],
            batch_norm=settings["inner_batch_norm"],
            **options,
        )

    return make


_CONV4_OPTIONS: dict[str, Any] = {"channels": 64, "episode_statistics": False}
_BASELINE_OPTIONS: dict[str, Any] = {
    "channels": 64,
    "inner_lr": 0.01,
    "inner_batch": 4,
    "inner_epochs": 100,
}
_ADAPTING_OPTIONS: dict[str, Any] = {
    "backbone": "conv4",
    "channels": 64,
    "hidden": None,
    "activation": "relu",
    "init_std": None,
    "inner_lr": 0.01,
    "inner_steps": 1,
    "inner_batch_norm": "transductive",
}
_OF_MAML = {"first_order": "first_order", "recompute": "recompute"}
_MAML_OPTIONS: dict[str, Any] = {**_ADAPTING_OPTIONS, "first_order": False, "recompute": False}
#: What methods of the MAML family adapt: an MLP, one with BatchNorm, or Conv4 and a linear layer; and the options that
#: are not for all.
BACKBONES = ("mlp", "mlp-batchnorm", "conv4")
_OF_MLP, _OF_CONV4 = ("hidden", "activation", "init_std"), ("channels",)

#: By the names of `--method`.
METHODS = {
    "protonet": Method(
        _protonet,
        {**_CONV4_OPTIONS, "metric": "sqeuclidean", "temperature": None, "learn_temperature": False},
    ),
    "matching": Method(
        _matching, {**_CONV4_OPTIONS, "scale": 10.0, "learn_scale": False, "full_context": False}
    ),
    "relation": Method(_relation, {"channels": 64, "relation_loss": "mse"}, encoder="RelationEncoder"),
    "feat": Method(
        _feat,
        {
            **_CONV4_OPTIONS,
            "metric": "sqeuclidean",
            "temperature": None,
            "heads": 1,
            "dropout": 0.5,
            "balance": 1.0,
            "contrastive_temperature": 1 / 16,
        },
        tasks=16,
        train_ways=5,
    ),
    "simpleshot": Method(
        _simpleshot,
        {"channels": 64, "metric": "sqeuclidean", "temperature": None},
        tasks=64,
        pretraining=True,
    ),
    "baseline": Method(_baseline, _BASELINE_OPTIONS, tasks=64, pretraining=True),
    "baseline-plus-plus": Method(_baseline, {**_BASELINE_OPTIONS, "scale": None}, tasks=64, pretraining=True),
    "anil": Method(
        _anil,
        {**_CONV4_OPTIONS, "inner_lr": 0.1, "inner_steps": 5, "learn_inner_lr": False, "first_order": False},
        tasks=16,
        train_ways=5,
        head=True,
    ),
    "r2d2": Method(_r2d2, {**_CONV4_OPTIONS, "regularisation": 50.0, "scale": 10.0}),
    "maml": Method(
        _adapting(MAML, _OF_MAML),
        {**_MAML_OPTIONS, "backbone": "mlp"},
        tasks=25,
        train_ways=5,
        head=True,
        waves=True,
    ),
    "metasgd": Method(
        _adapting(MetaSGD, _OF_MAML),
        {**_MAML_OPTIONS, "backbone": "mlp", "inner_lr": None},
        tasks=25,
        train_ways=5,
        head=True,
        waves=True,
    ),
    "boil": Method(
        _adapting(BOIL, _OF_MAML),
        {**_MAML_OPTIONS, "inner_lr": 0.1},
        tasks=16,
        train_ways=5,
        head=True,
        waves=True,
    ),
    "maml++": Method(
        _adapting(
            MAMLPlusPlus, {**_OF_MAML, "multi_step": "multi_step", "first_order_steps": "first_order_steps"}
        ),
        {**_MAML_OPTIONS, "inner_lr": 0.1, "inner_steps": 5, "multi_step": 5000, "first_order_steps": 0},
        tasks=16,
        train_ways=5,
        head=True,
        waves=True,
        schedule="cosine",
    ),
    "reptile": Method(
        _adapting(Reptile, {"inner_batch": "batch_size", "inner_optimizer": "optimizer"}),
        {
            **_ADAPTING_OPTIONS,
            "inner_lr": 1e-3,
            "inner_steps": 5,
            "inner_batch": 10,
            "inner_optimizer": "adam",
        },
        tasks=5,
        train_ways=5,
        head=True,
        waves=True,
        optimizer="sgd",
        lr=1.0,
        schedule="linear",
    ),
    "protomaml": Method(
        _adapting(ProtoMAML, _OF_MAML, _adapting_encoder),
        {**_MAML_OPTIONS, "inner_steps": 5},
        tasks=16,
        train_ways=5,
    ),
}
#: The policies of BatchNorm in the inner loop; the last is one of maml++ alone.
INNER_BATCH_NORM = (*BATCH_NORM_POLICIES, "per_step")
#: Outer optimisers by name.
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
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
        usual = method.options["inner_lr"]
        if options.data == [SINUSOID] and options.inner_lr is None and usual is not None:
            options.inner_lr = min(WAVE_RATE, usual)
    if method.pretraining:
        for name in ("train_ways", "shots", "train_queries"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')}: {options.method} is trained on single images of all classes, not "
                    "on episodes; leave it out"
                )
    for name in OPTIONS:
        if name in method.options:
            if getattr(options, name) is None:
                setattr(options, name, method.options[name])
        elif getattr(options, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is an option of {methods_with(name)}; {options.method} has no use for it"
            )
    if options.method == "maml++" and options.inner_steps == 0:
        raise UsageError("--inner-steps: maml++ expects at least 1, got 0")
    if options.inner_batch_norm == "per_step" and options.method != "maml++":
        raise UsageError(
            f"--inner-batch-norm per_step is of maml++; {options.method} has no statistics of each step"
        )
    if "temperature" in method.options and options.temperature is None:
        usual = 1 / 64 if options.method == "feat" else 1.0
        options.temperature = 10.0 if options.metric == "cosine" else usual
    if "hidden" in method.options and options.hidden is None:
        options.hidden = HIDDEN_FOR_WAVES if options.data == [SINUSOID] else HIDDEN_FOR_IMAGES
    for name in ("tasks", "optimizer", "lr", "schedule"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(method, name))


def _settle_backbone(options: argparse.Namespace) -> None:
    if options.backbone is None:
        waves = options.data == [SINUSOID]
        options.backbone = "mlp" if waves else METHODS[options.method].options["backbone"]
    for name in _OF_MLP if options.backbone == "conv4" else _OF_CONV4:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: --backbone {options.backbone} has no use for it")
    if options.data == [SINUSOID] and options.backbone == "conv4":
        raise UsageError(f"--backbone conv4 is for images, and {SINUSOID} has none")
