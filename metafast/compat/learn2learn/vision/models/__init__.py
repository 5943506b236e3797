"""Networks, with the parameter names and the initialisation of the original."""

from metafast.compat import absent
from metafast.compat.learn2learn.vision.models.cnn4 import (
    CNN4,
    CNN4Backbone,
    ConvBase,
    ConvBlock,
    MiniImagenetCNN,
    OmniglotCNN,
    OmniglotFC,
    fc_init_,
    maml_init_,
)
from metafast.compat.learn2learn.vision.models.resnet12 import ResNet12, ResNet12Backbone
from metafast.compat.learn2learn.vision.models.wrn28 import WRN28, WRN28Backbone

__getattr__ = absent(
    __name__,
    {
        "get_pretrained_backbone": "this package downloads nothing; load a file of such weights with "
        "CNN4Backbone().load_state_dict(torch.load(path)), or ResNet12Backbone(avg_pool=False) or WRN28Backbone()"
    },
)

__all__ = [
    "CNN4",
    "WRN28",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "ResNet12",
    "ResNet12Backbone",
    "WRN28Backbone",
    "fc_init_",
    "maml_init_",
]
