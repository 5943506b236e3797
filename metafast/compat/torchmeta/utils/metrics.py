"""How hard an episode is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad, relu

from metafast.compat import absent
from metafast.compat.torchmeta.utils.prototype import get_prototypes

__getattr__ = absent(__name__)

__all__ = ["hardness_metric"]

_SIDE = 224
#: torchvision's first weights of a ResNet-152 on ImageNet, which the original takes.
_WEIGHTS = "resnet152-b121ed2d.pth"


def hardness_metric(batch: Mapping[str, Any], num_classes: int) -> Tensor:
    """Mean log-odds of a wrong answer for the queries of each task, by class means of a network trained on ImageNet.

    Dhillon, Chaudhari, Ravichandran and Soatto, *A Baseline for Few-Shot Image Classification*, 2019. The network is
    torchvision's ResNet-152, whose file of weights has to be in torch's folder of them: nothing is downloaded.

    Args:
        batch: of ``BatchMetaDataLoader``, with ``train`` or ``support`` and ``test`` or ``query``: colour images
            ``[B, n, 3, height, width]`` and class numbers ``[B, n]``.
        num_classes: C.

    Returns:
        ``[B]``.

    Raises:
        ValueError: a batch without these keys, or images of another number of channels.
        ImportError: torchvision is not installed.
        FileNotFoundError: the weights are not there.
    """
    train, test = (_part(batch, keys) for keys in (("train", "support"), ("test", "query")))
    (images, labels), (queries, answers) = train, test
    for name, value in (("train", images), ("test", queries)):
        if value.dim() != 5 or value.shape[2] != 3:
            raise ValueError(f"{name}: expected colour images [B, n, 3, H, W], got {list(value.shape)}")
    with torch.no_grad():
        network = _network().to(images.device).eval()
        means = get_prototypes(relu(_outputs(network, images)), labels, num_classes)
        cosines = normalize(means, dim=2) @ normalize(_outputs(network, queries), dim=2).mT
        log_probability = -cross_entropy(cosines, answers, reduction="none")
        return (torch.log1p(-log_probability.exp()) - log_probability).mean(1)


def _part(batch: Mapping[str, Any], keys: tuple[str, str]) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise ValueError(f"batch: expected the key {keys[0]!r} or {keys[1]!r}, got {', '.join(map(repr, batch))}")


def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    """``[B, n, 1000]`` for images put in the middle of black ones of the network's size."""
    tasks, count, _, height, width = images.shape
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    framed = pad(images.flatten(0, 1), (left, _SIDE - width - left, top, _SIDE - height - top))
    return network(framed).view(tasks, count, -1)


def _network() -> nn.Module:
    try:
        models = import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(f"hardness_metric needs torchvision for its network ({error})") from error
    path = Path(torch.hub.get_dir(), "checkpoints", _WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"hardness_metric needs torchvision's weights {_WEIGHTS} in {path.parent}")
    network = models.resnet152(weights=None)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network
