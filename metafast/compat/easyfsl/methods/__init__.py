"""Few-shot classifiers."""

from metafast.compat import absent
from metafast.compat.easyfsl.methods.bd_cspn import BDCSPN
from metafast.compat.easyfsl.methods.feat import FEAT
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.compat.easyfsl.methods.finetune import Finetune
from metafast.compat.easyfsl.methods.laplacian_shot import LaplacianShot
from metafast.compat.easyfsl.methods.matching_networks import MatchingNetworks
from metafast.compat.easyfsl.methods.prototypical_networks import PrototypicalNetworks
from metafast.compat.easyfsl.methods.pt_map import PTMAP
from metafast.compat.easyfsl.methods.relation_networks import RelationNetworks
from metafast.compat.easyfsl.methods.simple_shot import SimpleShot
from metafast.compat.easyfsl.methods.tim import TIM
from metafast.compat.easyfsl.methods.transductive_finetuning import TransductiveFinetuning

__getattr__ = absent(__name__)

__all__ = [
    "BDCSPN",
    "FEAT",
    "PTMAP",
    "TIM",
    "FewShotClassifier",
    "Finetune",
    "LaplacianShot",
    "MatchingNetworks",
    "PrototypicalNetworks",
    "RelationNetworks",
    "SimpleShot",
    "TransductiveFinetuning",
]
