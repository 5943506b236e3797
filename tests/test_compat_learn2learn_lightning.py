"""metafast.compat.learn2learn: the modules of PyTorch Lightning, where it is installed."""

from __future__ import annotations

import importlib.util
import logging
from argparse import ArgumentParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import metafast.compat.learn2learn as l2l
from metafast.compat.learn2learn.data import MetaDataset, Taskset
from metafast.compat.learn2learn.data.transforms import (
    ConsecutiveLabels,
    FusedNWaysKShots,
    LoadData,
    RemapLabels,
)

installed = importlib.util.find_spec("pytorch_lightning") is not None
needs_lightning = pytest.mark.skipif(not installed, reason="needs pytorch-lightning")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.skipif(installed, reason="pytorch-lightning is installed")
@pytest.mark.parametrize("name", ["LightningMAML", "LightningANIL", "LightningPrototypicalNetworks"])
def test_without_lightning_an_error_says_how_to_get_it(name: str) -> None:
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        getattr(l2l.algorithms, name)
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        exec(f"from metafast.compat.learn2learn.algorithms import {name}")
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        exec("from metafast.compat.learn2learn.utils.lightning import EpisodicBatcher")


def tasks(dtype: torch.dtype = torch.float32) -> Taskset:
    """Three-way tasks of two support and two query rows of each of 6 classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    data = torch.randn(60, 4, generator=generator) + 3 * torch.eye(6, 4)[labels]
    meta = MetaDataset(TensorDataset(data.to(dtype), labels))
    kinds = [FusedNWaysKShots(meta, n=3, k=4), LoadData(meta), RemapLabels(meta), ConsecutiveLabels(meta)]
    return Taskset(meta, kinds, num_tasks=40)


SIZES = {
    "train_ways": 3,
    "train_shots": 2,
    "train_queries": 2,
    "test_ways": 3,
    "test_shots": 2,
    "test_queries": 2,
}


def modules() -> dict[str, Any]:
    from metafast.compat.learn2learn.algorithms import (
        LightningANIL,
        LightningMAML,
        LightningMetaOptNet,
        LightningPrototypicalNetworks,
    )

    return {
        "maml": LightningMAML(nn.Linear(4, 3), adaptation_lr=0.5, adaptation_steps=2, lr=0.05, **SIZES),
        "anil": LightningANIL(nn.Linear(4, 5), nn.Linear(5, 3), adaptation_lr=0.5, lr=0.05, **SIZES),
        "protonet": LightningPrototypicalNetworks(nn.Linear(4, 5), lr=0.05, **SIZES),
        "metaoptnet": LightningMetaOptNet(nn.Linear(4, 5), lr=0.05, svm_C_reg=0.5, **SIZES),
    }


def parted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support and query rows of classes that stand one after the other."""
    support = torch.tensor([True, True, False, False] * 3)
    return x[support], y[support], x[~support], y[~support]


@needs_lightning
@pytest.mark.parametrize("name", ["maml", "anil", "protonet", "metaoptnet"])
def test_meta_learn(name: str) -> None:
    module = modules()[name]
    data, labels = tasks()[0]
    order = labels.sort(stable=True)[1]
    x, y, query, target = parted(data, labels)
    if name in ("maml", "anil"):
        features = module.features if name == "anil" else nn.Identity()
        learner = (module.classifier if name == "anil" else module.model).clone()
        for _ in range(2 if name == "maml" else 1):
            learner.adapt(cross_entropy(learner(features(x)), y))
        logits = learner(features(query))
    else:
        x, y, query, target = parted(module.features(data[order]), labels[order])
        head: Any = l2l.nn.PrototypicalClassifier(x, y)
        if name == "metaoptnet":
            head = l2l.nn.SVClassifier(x, y, ways=3, C_reg=0.5)
        logits = head(query)
    loss, accuracy = module.meta_learn((data, labels), 0, 3, 2, 2)
    torch.testing.assert_close(loss, cross_entropy(logits, target), rtol=1e-6, atol=1e-6)
    assert accuracy == (logits.argmax(1) == target).float().mean()
    parameters = list(module.parameters())
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(slope is not None for slope in slopes)


@needs_lightning
@pytest.mark.parametrize("name", ["maml", "anil", "protonet", "metaoptnet"])
def test_fit_and_test(name: str) -> None:
    import pytorch_lightning

    from metafast.compat.learn2learn.utils.lightning import EpisodicBatcher

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module, batches = modules()[name], EpisodicBatcher(tasks(), epoch_length=4)
    before = [p.detach().clone() for p in module.parameters()]
    trainer = pytorch_lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    assert {"train_loss", "train_accuracy", "valid_loss", "valid_accuracy"} <= trainer.callback_metrics.keys()
    assert not all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    (results,) = trainer.test(module, batches, verbose=False)
    assert results.keys() == {"test_loss", "test_accuracy"} and 0 <= results["test_accuracy"] <= 1


@needs_lightning
def test_options() -> None:
    from metafast.compat.learn2learn.algorithms import LightningMAML, LightningMetaOptNet

    parser = LightningMAML.add_model_specific_args(ArgumentParser(add_help=False))
    args = parser.parse_args(["--train_ways", "7", "--adaptation_lr", "0.3"])
    assert (args.train_ways, args.test_ways, args.adaptation_lr, args.adaptation_steps) == (7, 5, 0.3, 1)
    module = LightningMAML(nn.Linear(4, 7), **{**vars(args), "test_ways": 7})
    assert module.hparams["train_ways"] == 7 and module.model.lr == 0.3
    assert list(module.state_dict()) == ["model.module.weight", "model.module.bias"]
    optimizers, schedulers = module.configure_optimizers()
    assert optimizers[0].param_groups[0]["lr"] == 0.001 and schedulers[0].step_size == 20
    with pytest.raises(ValueError, match="test_ways: expected 7, as train_ways, got 5"):
        LightningMAML(nn.Linear(4, 7), **vars(args))
    assert "svm_C_reg" in vars(
        LightningMetaOptNet.add_model_specific_args(ArgumentParser(add_help=False)).parse_args([])
    )


@needs_lightning
def test_episodic_batcher() -> None:
    from metafast.compat.learn2learn.utils.lightning import EpisodicBatcher

    first, second = tasks(), tasks()
    batches = EpisodicBatcher(first, second, epoch_length=3)
    assert batches.test_tasks is batches.validation_tasks is second
    assert len(batches.train_dataloader()) == len(list(batches.val_dataloader())) == 3
    assert next(iter(batches.test_dataloader()))[0].shape == (12, 4)
