"""Episodes, the samplers that build them and the data sets they draw from."""

from metafast.data.classes import Classes, FeatureClasses, ImageClasses
from metafast.data.episodes import Episodes, check
from metafast.data.fixed import FixedEpisodes
from metafast.data.glyphs import glyphs
from metafast.data.image_files import ImageFiles
from metafast.data.image_folder import image_folder
from metafast.data.omniglot import omniglot
from metafast.data.rows import RowSampler
from metafast.data.sampler import EpisodePlan, EpisodeSampler, TaskSampler
from metafast.data.sinusoids import SinusoidPlan, SinusoidSampler
from metafast.data.stream import EpisodeLoader, EpisodeStream
from metafast.data.tables import feature_table, tensors
from metafast.data.vision import cifar_fs, cub, fc100, mini_imagenet

__all__ = [
    "Classes",
    "EpisodeLoader",
    "EpisodePlan",
    "EpisodeSampler",
    "EpisodeStream",
    "Episodes",
    "FeatureClasses",
    "FixedEpisodes",
    "ImageClasses",
    "ImageFiles",
    "RowSampler",
    "SinusoidPlan",
    "SinusoidSampler",
    "TaskSampler",
    "check",
    "cifar_fs",
    "cub",
    "fc100",
    "feature_table",
    "glyphs",
    "image_folder",
    "mini_imagenet",
    "omniglot",
    "tensors",
]
