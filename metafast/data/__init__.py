"""Episodes, the sampler that builds them and the data sets it draws from."""

from metafast.data.classes import ImageClasses
from metafast.data.episodes import Episodes, check
from metafast.data.glyphs import glyphs
from metafast.data.omniglot import omniglot
from metafast.data.sampler import EpisodeSampler

__all__ = ["EpisodeSampler", "Episodes", "ImageClasses", "check", "glyphs", "omniglot"]
