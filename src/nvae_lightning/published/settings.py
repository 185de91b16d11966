"""Settings of the published code, and the model that they describe."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, PositiveInt, ValidationError
from torch import nn

from nvae_lightning.model import (
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    NormalLikelihood,
    RegularCell,
)
from nvae_lightning.model.cells import CellConstructor
from nvae_lightning.utilities.plain_data import shown

#: Standard deviation of the coarsest group's prior: exp(0) + 0.01, as in any other group.
_FIRST_PRIOR_STD = 1.01


class _Cells(NamedTuple):
    """Constructors that the name of an architecture stands for."""

    preprocess: CellConstructor
    encoder: CellConstructor
    decoder: CellConstructor
    postprocess: CellConstructor


def _depthwise_decoder(cell: CellConstructor) -> _Cells:
    return _Cells(cell, cell, DepthwiseCell, _DEPTHWISE_3)


_DEPTHWISE_3 = partial(DepthwiseCell, expansion=3)
_GROUPS_OF_8 = partial(DepthwiseCell, expansion=3, num_groups=8)
_DEPTHWISE_11 = partial(DepthwiseCell, kernel_size=11)

_ARCHITECTURES = {
    "res_mbconv": _depthwise_decoder(RegularCell),
    "res53_mbconv": _depthwise_decoder(partial(RegularCell, dilations=(2, 1))),
    "res35_mbconv": _depthwise_decoder(partial(RegularCell, dilations=(1, 2))),
    "res55_mbconv": _depthwise_decoder(partial(RegularCell, dilations=(2, 2))),
    "res_bnswish": _Cells(*[RegularCell] * 4),
    "res_bnelu": _Cells(*[partial(RegularCell, activation=nn.ELU)] * 4),
    "res_elu": _Cells(*[partial(RegularCell, normalization=nn.Identity, activation=nn.ELU)] * 4),
    "mbconv_sep": _Cells(_DEPTHWISE_3, DepthwiseCell, DepthwiseCell, _DEPTHWISE_3),
    "mbconv_sep11": _Cells(_DEPTHWISE_3, _DEPTHWISE_11, _DEPTHWISE_11, _DEPTHWISE_3),
    "mbconv_den": _Cells(_GROUPS_OF_8, DepthwiseCell, DepthwiseCell, _GROUPS_OF_8),
    "mbconv_res": _Cells(_DEPTHWISE_3, DepthwiseCell, RegularCell, RegularCell),
}

_BINARY_DATASETS = ("mnist", "omniglot")
_SIZES = {"cifar10": 32, "ffhq": 256}
#: Each of these halves the image size.
_Scales = Annotated[int, Field(ge=1, le=30)]
_Halvings = Annotated[int, Field(ge=0, le=30)]


class PublishedSettings(BaseModel, frozen=True, strict=True):
    """Settings of the published code that determine a model, by their published names.

    Older checkpoints lack a few; these have defaults, which the shapes of the weights confirm.

    Args:
        dataset: Training data, which determine the image size and whether images are binary.
        arch_instance: Name of the cells of the model.
        num_x_bits: Bits per pixel channel of images that are not binary.
        num_latent_scales: Number of scales.
        num_groups_per_scale: Number of groups of the finest scale.
        num_latent_per_group: Channels of a latent group.
        num_channels_enc: Channels of the encoder at full resolution.
        num_channels_dec: Channels of the decoder at full resolution.
        num_preprocess_blocks: Halvings of the resolution before the finest scale.
        num_preprocess_cells: Cells per halving.
        num_postprocess_blocks: Doublings of the resolution after the finest scale.
        num_postprocess_cells: Cells per doubling.
        num_cell_per_cond_enc: Bottom-up cells per group.
        num_cell_per_cond_dec: Top-down cells per group.
        num_nf: Pairs of flows per group.
        use_se: Whether cells end in a channel-wise gate.
        res_dist: Whether posteriors are relative to their priors.
        ada_groups: Whether each coarser scale has half as many groups.
        min_groups_per_scale: Smallest number of groups of a coarser scale.
        num_mixture_dec: Components of the likelihood's mixture; 1 is a normal distribution.

    """

    dataset: str
    arch_instance: str
    num_x_bits: PositiveInt
    num_latent_scales: _Scales
    num_groups_per_scale: PositiveInt
    num_latent_per_group: PositiveInt
    num_channels_enc: PositiveInt
    num_channels_dec: PositiveInt
    num_preprocess_blocks: _Halvings
    num_preprocess_cells: PositiveInt
    num_postprocess_blocks: _Halvings
    num_postprocess_cells: PositiveInt
    num_cell_per_cond_enc: PositiveInt
    num_cell_per_cond_dec: PositiveInt
    num_nf: Annotated[int, Field(ge=0)]
    use_se: bool
    res_dist: bool
    ada_groups: bool = False
    min_groups_per_scale: PositiveInt = 1
    num_mixture_dec: PositiveInt = 10

    @classmethod
    def of(cls, settings: Mapping[str, object] | Namespace) -> PublishedSettings:
        """Select them from all the settings of a training.

        Raises:
            ValueError: If one is missing, has the wrong type or is out of range.
        """
        try:
            found = cls.model_validate(
                vars(settings) if isinstance(settings, Namespace) else settings
            )
        except ValidationError as error:
            faults = [
                f"{fault['loc'][0]}: {fault['msg']}"
                + ("" if fault["type"] == "missing" else f", got {shown(fault['input'])}")
                for fault in error.errors()
            ]
            raise ValueError(f"published settings: {'; '.join(faults)}") from error
        if found.arch_instance not in _ARCHITECTURES:
            raise ValueError(
                f"published setting arch_instance names an unknown architecture "
                f"{shown(found.arch_instance)}; choose from {', '.join(sorted(_ARCHITECTURES))}"
            )
        if found.num_preprocess_blocks != found.num_postprocess_blocks:
            raise ValueError(
                "published settings num_preprocess_blocks and num_postprocess_blocks must be "
                f"equal, because the latents lie between them, got {found.num_preprocess_blocks} "
                f"and {found.num_postprocess_blocks}"
            )
        return found

    @property
    def image(self) -> Image:
        """Images of the dataset; ValueError if it is unknown."""
        if self.dataset in _BINARY_DATASETS:
            return Image(channels=1, size=28, bits=1, padding=2)
        trailing = re.search(r"_(\d+)$", self.dataset)
        size = int(trailing[1]) if trailing else _SIZES.get(self.dataset)
        if size is None:
            raise ValueError(
                f"published setting dataset names an unknown dataset {shown(self.dataset)}; "
                f"choose {', '.join((*_BINARY_DATASETS, *_SIZES))} or a name that ends in the "
                "image size, such as celeba_64"
            )
        return Image(channels=3, size=size, bits=self.num_x_bits)

    @property
    def num_groups(self) -> list[int]:
        """Number of groups per scale, coarsest first."""
        counts = [self.num_groups_per_scale]
        while len(counts) < self.num_latent_scales:
            halved = max(self.min_groups_per_scale, counts[-1] // 2)
            counts.append(halved if self.ada_groups else counts[-1])
        return counts[::-1]

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of the model, with the published numerics."""
        image, cells = self.image, _ARCHITECTURES[self.arch_instance]
        if self.dataset in _BINARY_DATASETS:
            likelihood = BernoulliLikelihood
        elif self.num_mixture_dec == 1:
            likelihood = NormalLikelihood
        else:
            likelihood = partial(
                DiscretizedLogisticMixtureLikelihood,
                num_mixtures=self.num_mixture_dec,
                published_tails=True,
                published_temperature=True,
            )
        return dict(
            image=image,
            hierarchy=Hierarchy.doubling(
                channels=self.num_channels_enc,
                decoder_channels=self.num_channels_dec,
                num_groups=self.num_groups,
                downsample=2**self.num_preprocess_blocks,
                latent_channels=self.num_latent_per_group,
            ),
            encoder_cell=cells.encoder,
            decoder_cell=cells.decoder,
            preprocess_cell=cells.preprocess,
            postprocess_cell=cells.postprocess,
            likelihood=likelihood,
            num_encoder_cells=self.num_cell_per_cond_enc,
            num_decoder_cells=self.num_cell_per_cond_dec,
            num_preprocess_cells=self.num_preprocess_cells,
            num_postprocess_cells=self.num_postprocess_cells,
            num_flows=self.num_nf,
            squeeze_excitation=self.use_se,
            residual_posterior=self.res_dist,
            first_prior_std=_FIRST_PRIOR_STD,
        )
