"""Toy regression problems."""

from metafast.compat import absent
from metafast.compat.torchmeta.toy import helpers
from metafast.compat.torchmeta.toy.harmonic import Harmonic
from metafast.compat.torchmeta.toy.sinusoid import Sinusoid
from metafast.compat.torchmeta.toy.sinusoid_line import SinusoidAndLine

__getattr__ = absent(__name__)

__all__ = ["Harmonic", "Sinusoid", "SinusoidAndLine", "helpers"]
