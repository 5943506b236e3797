"""Inner loops, prototypes, matching, ridge regression, and the data classes."""

from metafast.compat import absent
from metafast.compat.torchmeta.utils import data
from metafast.compat.torchmeta.utils.gradient_based import gradient_update_parameters
from metafast.compat.torchmeta.utils.matching import (
    matching_log_probas,
    matching_loss,
    matching_probas,
    pairwise_cosine_similarity,
)
from metafast.compat.torchmeta.utils.metrics import hardness_metric
from metafast.compat.torchmeta.utils.prototype import get_num_samples, get_prototypes, prototypical_loss
from metafast.compat.torchmeta.utils.r2d2 import ridge_regression

__getattr__ = absent(__name__)

__all__ = [
    "data",
    "get_num_samples",
    "get_prototypes",
    "gradient_update_parameters",
    "hardness_metric",
    "matching_log_probas",
    "matching_loss",
    "matching_probas",
    "pairwise_cosine_similarity",
    "prototypical_loss",
    "ridge_regression",
]
