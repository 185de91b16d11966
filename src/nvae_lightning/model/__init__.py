"""NVAE as plain PyTorch modules, independent of training, data and configuration."""

from nvae_lightning.model.cells import DepthwiseCell, RegularCell, Resampling
from nvae_lightning.model.distributions import (
    Inference,
    Latent,
    Normal,
    importance_weighted_bound,
)
from nvae_lightning.model.flows import FlowPair
from nvae_lightning.model.hierarchy import Hierarchy, Scale
from nvae_lightning.model.likelihood import (
    BernoulliLikelihood,
    DiscretizedLogisticMixtureLikelihood,
    Likelihood,
    NormalLikelihood,
    PixelDistribution,
)
from nvae_lightning.model.nvae import NVAE
from nvae_lightning.utilities.image import Image

__all__ = [
    "NVAE",
    "BernoulliLikelihood",
    "DepthwiseCell",
    "DiscretizedLogisticMixtureLikelihood",
    "FlowPair",
    "Hierarchy",
    "Image",
    "Inference",
    "Latent",
    "Likelihood",
    "Normal",
    "NormalLikelihood",
    "PixelDistribution",
    "RegularCell",
    "Resampling",
    "Scale",
    "importance_weighted_bound",
]
