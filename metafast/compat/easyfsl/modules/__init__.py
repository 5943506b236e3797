"""Networks and their parts."""

from metafast.compat import absent
from metafast.compat.easyfsl.modules.attention_modules import MultiHeadAttention
from metafast.compat.easyfsl.modules.feat_resnet12 import feat_resnet12
from metafast.compat.easyfsl.modules.predesigned_modules import (
    default_matching_networks_query_encoder,
    default_matching_networks_support_encoder,
    default_relation_module,
    resnet10,
    resnet12,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from metafast.compat.easyfsl.modules.resnet import ResNet

__getattr__ = absent(__name__)

__all__ = [
    "MultiHeadAttention",
    "ResNet",
    "default_matching_networks_query_encoder",
    "default_matching_networks_support_encoder",
    "default_relation_module",
    "feat_resnet12",
    "resnet10",
    "resnet12",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
