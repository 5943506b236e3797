"""Fast few-shot and meta-learning in PyTorch."""

from metafast import data, learners, reference
from metafast.attention_lstm import attention_lstm
from metafast.backbones import MLP, Conv4
from metafast.conv_block import conv_norm_relu_pool
from metafast.data import Episodes, EpisodeSampler, FixedEpisodes, check
from metafast.distance import cdist, pairwise_distance
from metafast.inner_loop import Adapted, inner_loop
from metafast.inner_update import sgd_update
from metafast.linear_head import adapt_linear, adapted_logits
from metafast.matching import matching_log_probs
from metafast.memory import predicted_memory
from metafast.mlp import adapt_mlp, adapted_mlp
from metafast.norm_relu_pool import norm_relu_pool
from metafast.prototype import prototypes, prototypical_loss
from metafast.ridge import ridge_logits
from metafast.second_order import SecondOrderError
from metafast.training import analyze, evaluate, fit

__all__ = [
    "MLP",
    "Adapted",
    "Conv4",
    "EpisodeSampler",
    "Episodes",
    "FixedEpisodes",
    "SecondOrderError",
    "adapt_linear",
    "adapt_mlp",
    "adapted_logits",
    "adapted_mlp",
    "analyze",
    "attention_lstm",
    "cdist",
    "check",
    "conv_norm_relu_pool",
    "data",
    "evaluate",
    "fit",
    "inner_loop",
    "learners",
    "matching_log_probs",
    "norm_relu_pool",
    "pairwise_distance",
    "predicted_memory",
    "prototypes",
    "prototypical_loss",
    "reference",
    "ridge_logits",
    "sgd_update",
]
