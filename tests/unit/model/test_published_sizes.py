"""The published models, built on the meta device, have the published numbers of parameters."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    RegularCell,
)
from nvae_lightning.model.layers import MaskedConv2d
from nvae_lightning.model.normalization import BatchNorm


@dataclass(frozen=True)
class Published:
    """One column of the paper's Table 6, and the counts of its model."""

    image: Image
    channels: int
    num_groups: tuple[int, ...]
    downsample: int
    num_flows: int
    num_parameters: int
    num_convolutions: int
    num_masked_convolutions: int
    num_batch_norms: int
    initial_state: tuple[int, int, int]
    num_latent_variables: int
    num_resampling_cells: int = 2


PUBLISHED = {
    "mnist": Published(
        Image(channels=1, size=28, bits=1, padding=2), 32, (5, 10), 4, 0,
        33_363_134, 255, 0, 214, (256, 4, 4), 14_400, num_resampling_cells=3,
    ),
    "cifar10 without flows": Published(
        Image(channels=3, size=32, bits=8), 128, (30,), 2, 0,
        129_215_680, 430, 0, 364, (256, 16, 16), 153_600,
    ),
    "cifar10": Published(
        Image(channels=3, size=32, bits=8), 128, (30,), 2, 1,
        130_852_480, 610, 180, 364, (256, 16, 16), 153_600,
    ),
    "celeba64": Published(
        Image(channels=3, size=64, bits=8), 64, (5, 10, 20), 2, 1,
        153_281_364, 730, 210, 436, (512, 8, 8), 467_200,
    ),
    "imagenet32": Published(
        Image(channels=3, size=32, bits=8), 192, (28,), 2, 1,
        268_509_444, 570, 168, 340, (384, 16, 16), 143_360,
    ),
    "celeba_hq and ffhq": Published(
        Image(channels=3, size=256, bits=5), 30, (4, 4, 4, 8, 16), 2, 2,
        330_798_664, 986, 432, 460, (960, 8, 8), 6_005_760,
    ),
}  # fmt: skip


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_model_has_the_published_number_of_parameters(published: Published) -> None:
    likelihood = (
        BernoulliLikelihood
        if published.image.bits == 1
        else partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=10)
    )
    with torch.device("meta"):
        model = NVAE(
            published.image,
            Hierarchy.doubling(
                channels=published.channels,
                num_groups=published.num_groups,
                downsample=published.downsample,
                latent_channels=20,
            ),
            encoder_cell=RegularCell,
            decoder_cell=DepthwiseCell,
            preprocess_cell=RegularCell,
            postprocess_cell=partial(DepthwiseCell, expansion=3.0),
            likelihood=likelihood,
            num_encoder_cells=2,
            num_decoder_cells=2,
            num_preprocess_cells=published.num_resampling_cells,
            num_postprocess_cells=published.num_resampling_cells,
            num_flows=published.num_flows,
        )
    modules = list(model.modules())
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    assert sum(p.numel() for p in model.parameters()) == published.num_parameters
    assert len(convolutions) == published.num_convolutions
    masked = [module for module in convolutions if isinstance(module, MaskedConv2d)]
    assert len(masked) == published.num_masked_convolutions
    batch_norms = [module for module in modules if isinstance(module, BatchNorm)]
    assert len(batch_norms) == published.num_batch_norms
    assert tuple(model.decoder.initial_state.shape) == published.initial_state
    num_latent_variables = sum(c * h * w for c, h, w in model.latent_shapes)
    assert num_latent_variables == published.num_latent_variables
