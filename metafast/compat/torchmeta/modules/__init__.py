"""Layers that compute with parameters given in the call."""

from metafast.compat import absent
from metafast.compat.torchmeta.modules.activation import MetaMultiheadAttention
from metafast.compat.torchmeta.modules.batchnorm import MetaBatchNorm1d, MetaBatchNorm2d, MetaBatchNorm3d
from metafast.compat.torchmeta.modules.container import MetaSequential
from metafast.compat.torchmeta.modules.conv import MetaConv1d, MetaConv2d, MetaConv3d
from metafast.compat.torchmeta.modules.linear import MetaBilinear, MetaLinear
from metafast.compat.torchmeta.modules.module import MetaModule
from metafast.compat.torchmeta.modules.normalization import MetaLayerNorm
from metafast.compat.torchmeta.modules.parallel import DataParallel
from metafast.compat.torchmeta.modules.sparse import MetaEmbedding, MetaEmbeddingBag

__getattr__ = absent(__name__)

__all__ = [
    "DataParallel",
    "MetaBatchNorm1d",
    "MetaBatchNorm2d",
    "MetaBatchNorm3d",
    "MetaBilinear",
    "MetaConv1d",
    "MetaConv2d",
    "MetaConv3d",
    "MetaEmbedding",
    "MetaEmbeddingBag",
    "MetaLayerNorm",
    "MetaLinear",
    "MetaModule",
    "MetaMultiheadAttention",
    "MetaSequential",
]
