"""The algorithms as modules of PyTorch Lightning."""

from metafast.compat.learn2learn.algorithms.lightning.lightning_anil import LightningANIL
from metafast.compat.learn2learn.algorithms.lightning.lightning_episodic_module import LightningEpisodicModule
from metafast.compat.learn2learn.algorithms.lightning.lightning_maml import LightningMAML
from metafast.compat.learn2learn.algorithms.lightning.lightning_metaoptnet import LightningMetaOptNet
from metafast.compat.learn2learn.algorithms.lightning.lightning_protonet import LightningPrototypicalNetworks

__all__ = [
    "LightningANIL",
    "LightningEpisodicModule",
    "LightningMAML",
    "LightningMetaOptNet",
    "LightningPrototypicalNetworks",
]
