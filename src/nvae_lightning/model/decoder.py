"""Top-down model: prior, posterior and draw of each group, then the likelihood's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nvae_lightning.model.cells import CellConstructor, Resampling
from nvae_lightning.model.distributions import Latent, Normal
from nvae_lightning.model.flows import FlowPair
from nvae_lightning.model.hierarchy import Hierarchy
from nvae_lightning.model.layers import (
    WeightNormConv2d,
    as_parameters,
    full_precision,
)
from nvae_lightning.model.shapes import FeatureMap
from nvae_lightning.utilities.image import Image


class EncoderCombiner(nn.Module):
    """Merge bottom-up and top-down states: ``feature + conv1x1(state)``.

    Several draws of the state may share a feature map; they are listed draw by draw.
    """

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.convolution = WeightNormConv2d(decoder_channels, encoder_channels, 1)

    def forward(
        self,
        feature: Float[Tensor, "image channel height width"],
        state: Float[Tensor, "draw channel_ height width"],
    ) -> Float[Tensor, "draw channel height width"]:
        by_draw = self.convolution(state).unflatten(0, (-1, len(feature)))
        return (feature + by_draw).flatten(0, 1)


class DecoderCombiner(nn.Module):
    """Merge top-down state and draw: ``conv1x1(concat(state, z))``."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.convolution = WeightNormConv2d(channels + latent_channels, channels, 1)

    def forward(self, state: FeatureMap, z: FeatureMap) -> FeatureMap:
        # In different layouts, cat would copy both.
        z = z.to(state.dtype, memory_format=torch.channels_last)
        return self.convolution(torch.cat([state, z], 1))


class LatentGroup(nn.Module, ABC):
    """One group of latent variables and its cells: one step of the decoder.

    Args:
        cells: Cells between the group above and this one.
        decoder_channels: Channels of the top-down state.
        latent_channels: Channels of z.
        num_flows: Number of flow pairs after the posterior.
    """

    def __init__(
        self, cells: nn.Module, decoder_channels: int, latent_channels: int, num_flows: int
    ) -> None:
        super().__init__()
        self.cells = cells
        self.flows = nn.Sequential(*(FlowPair(latent_channels) for _ in range(num_flows)))
        self.combine = DecoderCombiner(decoder_channels, latent_channels)

    @abstractmethod
    def distributions(
        self, state: FeatureMap, feature: Tensor | None
    ) -> tuple[Normal, Normal | None]:
        """Return the prior given the state, and the posterior if given a bottom-up ``feature``."""

    def forward(
        self,
        state: FeatureMap,
        noise: FeatureMap | None,
        *,
        feature: Tensor | None = None,
        z: FeatureMap | None = None,
        temperature: Float[Tensor, ""] | None = None,
    ) -> tuple[FeatureMap, Latent]:
        """Compute the state after this group from the state after the group above.

        Args:
            state: Top-down state after the group above.
            noise: Standard-normal noise of the draw; None if ``z`` is given.
            feature: Bottom-up feature map; if given, z is drawn from the posterior.
            z: Value of the latents; if given, nothing is drawn.
            temperature: Factor on the prior's standard deviation when z is drawn from the prior.
        """
        state = self.cells(state)
        prior, posterior = self.distributions(state, feature)
        if posterior is not None:
            assert noise is not None
            latent = self._infer(prior, posterior, noise)
        elif z is not None:
            latent = Latent(prior, prior, z)
        else:
            assert noise is not None
            tempered = prior if temperature is None else prior.tempered(temperature)
            latent = Latent(tempered, prior, tempered.sample(noise))
        return self.combine(state, latent.z), latent

    def _infer(self, prior: Normal, posterior: Normal, noise: FeatureMap) -> Latent:
        """Draw from the posterior and apply the flows."""
        base = posterior.sample(noise)
        if len(self.flows) == 0:
            return Latent(posterior, prior, z=base)
        z = self.flows(base.to(self.combine.convolution.weight.dtype))
        return Latent(posterior, prior, z=full_precision(z), base=base)


class FirstGroup(LatentGroup):
    """Coarsest group, with a fixed prior and a posterior that depends only on the encoder.

    Args:
        encoder_channels: Channels of the group's bottom-up feature map.
        prior_std: Standard deviation of the prior, N(0, prior_std²).
        others: Arguments of :class:`LatentGroup`.
    """

    def __init__(
        self,
        encoder_channels: int,
        decoder_channels: int,
        latent_channels: int,
        num_flows: int,
        prior_std: float,
    ) -> None:
        super().__init__(nn.Identity(), decoder_channels, latent_channels, num_flows)
        self.posterior = WeightNormConv2d(encoder_channels, 2 * latent_channels, 3, padding=1)
        self.latent_channels = latent_channels
        self.prior_std = prior_std

    def distributions(
        self, state: FeatureMap, feature: Tensor | None
    ) -> tuple[Normal, Normal | None]:
        batch, _, height, width = state.shape
        mean = full_precision(state.new_zeros(batch, self.latent_channels, height, width))
        prior = Normal(mean, torch.full_like(mean, self.prior_std).log())
        if feature is None:
            return prior, None
        raw_posterior = as_parameters(self.posterior(feature))
        if batch > len(feature):
            raw_posterior = raw_posterior.repeat(batch // len(feature), 1, 1, 1)
        return prior, Normal.soft_clamped(*raw_posterior.chunk(2, 1))


class ConditionalGroup(LatentGroup):
    """Group whose prior and posterior depend on all coarser groups.

    In the residual form, the network's output is added to the raw parameters of the prior, so
    that the posterior moves with the prior:
    ``q = N(mu_p + delta_mu, sigma_p * delta_sigma)``.

    Source: Vahdat & Kautz 2020, Sec. 3.2 and Table 4.

    Args:
        encoder_channels: Channels of the group's bottom-up feature map.
        residual_posterior: Whether the posterior is relative to the prior.
        others: Arguments of :class:`LatentGroup`.
    """

    def __init__(
        self,
        cells: nn.Module,
        encoder_channels: int,
        decoder_channels: int,
        latent_channels: int,
        num_flows: int,
        residual_posterior: bool,
    ) -> None:
        super().__init__(cells, decoder_channels, latent_channels, num_flows)
        self.prior = nn.Sequential(
            nn.ELU(), WeightNormConv2d(decoder_channels, 2 * latent_channels, 1)
        )
        self.merge = EncoderCombiner(encoder_channels, decoder_channels)
        self.posterior = WeightNormConv2d(encoder_channels, 2 * latent_channels, 3, padding=1)
        self.residual_posterior = residual_posterior

    def distributions(
        self, state: FeatureMap, feature: Tensor | None
    ) -> tuple[Normal, Normal | None]:
        raw_prior = as_parameters(self.prior(state))
        prior = Normal.soft_clamped(*raw_prior.chunk(2, 1))
        if feature is None:
            return prior, None
        raw_posterior = as_parameters(self.posterior(self.merge(feature, state)))
        if self.residual_posterior:
            raw_posterior = raw_prior + raw_posterior
        return prior, Normal.soft_clamped(*raw_posterior.chunk(2, 1))


class Decoder(nn.Module):
    """Top-down tower shared by inference, sampling and decoding (paper, Fig. 2).

    Args:
        image: Image format.
        hierarchy: Scales and groups.
        num_logits: Number of output channels, the likelihood's parameters per pixel.
        cell: Constructor of the groups' cells.
        num_cells_per_group: Number of residual cells before each group but the first.
        postprocess_cell: Constructor of the cells between the finest scale and the image.
        num_postprocess_cells: Number of these cells per doubling of the resolution, the first of
            which doubles it.
        num_flows: Number of flow pairs per group.
        residual_posterior: Whether posteriors are relative to their priors.
        first_prior_std: Standard deviation of the coarsest group's prior.

    Raises:
        ValueError: If the channels cannot be halved between finest scale and image.
    """

    def __init__(
        self,
        image: Image,
        hierarchy: Hierarchy,
        num_logits: int,
        *,
        cell: CellConstructor,
        num_cells_per_group: int,
        postprocess_cell: CellConstructor,
        num_postprocess_cells: int,
        num_flows: int,
        residual_posterior: bool,
        first_prior_std: float,
    ) -> None:
        super().__init__()
        coarsest, finest = hierarchy.scales[0], hierarchy.scales[-1]
        channels = coarsest.top_down_channels
        side = image.padded_size // coarsest.downsample
        self.initial_state = nn.Parameter(torch.rand(channels, side, side))
        latent_channels = hierarchy.latent_channels
        sides = [image.padded_size // scale.downsample for _, scale in hierarchy.groups]
        self.latent_shapes = [(latent_channels, side, side) for side in sides]

        self.groups = nn.ModuleList()
        for scale in hierarchy.scales:
            for index in range(scale.num_groups):
                if len(self.groups) == 0:
                    group: LatentGroup = FirstGroup(
                        scale.channels, channels, latent_channels, num_flows, first_prior_std
                    )
                else:
                    cells: list[nn.Module] = []
                    if index == 0:
                        cells.append(cell(channels, scale.top_down_channels, Resampling.UP))
                        channels = scale.top_down_channels
                    cells += [cell(channels, channels) for _ in range(num_cells_per_group)]
                    group = ConditionalGroup(
                        nn.Sequential(*cells),
                        scale.channels,
                        channels,
                        latent_channels,
                        num_flows,
                        residual_posterior,
                    )
                self.groups.append(group)

        if channels % finest.downsample:
            raise ValueError(
                "decoder channels of the finest scale must be a multiple of its downsample "
                f"{finest.downsample}, got {channels}"
            )
        cells = []
        for _ in range(finest.num_halvings):
            cells.append(postprocess_cell(channels, channels // 2, Resampling.UP))
            channels //= 2
            cells += [
                postprocess_cell(channels, channels) for _ in range(num_postprocess_cells - 1)
            ]
        self.postprocess = nn.Sequential(*cells)
        self.head = nn.Sequential(nn.ELU(), WeightNormConv2d(channels, num_logits, 3, padding=1))

    def forward(
        self,
        batch_size: int,
        features: Sequence[Tensor] = (),
        given: Sequence[FeatureMap] = (),
        noise: Sequence[FeatureMap] | None = None,
        temperature: float | Sequence[float] = 1.0,
    ) -> tuple[tuple[Latent, ...], Float[Tensor, "batch parameter height width"]]:
        """Walk down the groups: the one loop of inference, sampling and decoding.

        Args:
            batch_size: Number of images, or of draws.
            features: Bottom-up feature maps of the first groups, whose z is drawn from the
                posterior. Their batch size divides ``batch_size``: each image has one or more
                draws, listed draw by draw.
            given: Values of z of the first groups, without ``features``.
            noise: Standard-normal noise of every group; drawn here if None.
            temperature: Factor on the standard deviation of the other groups' priors; one for all
                groups, or one per group.

        Returns:
            The latent groups, coarsest first, and the likelihood's raw parameters.
        """
        state = self.initial_state.expand(batch_size, -1, -1, -1)
        state = state.contiguous(memory_format=torch.channels_last)
        dtype = torch.promote_types(state.dtype, torch.float32)
        latents = []
        for index, group in enumerate(self.groups):
            feature = features[index] if index < len(features) else None
            z = given[index] if feature is None and index < len(given) else None
            epsilon = factor = None
            if z is None:
                # Drawn here, because a compiled group would use its own random number generator.
                shape = (batch_size, *self.latent_shapes[index])
                epsilon = (
                    torch.randn(shape, dtype=dtype, device=state.device)
                    if noise is None
                    else noise[index]
                )
                if feature is None:  # a tensor, because a number would be compiled in
                    single = isinstance(temperature, int | float)
                    factor = torch.full(
                        (), temperature if single else temperature[index], dtype=dtype,
                        device=state.device,
                    )  # fmt: skip
            state, latent = group(state, epsilon, feature=feature, z=z, temperature=factor)
            latents.append(latent)
        return tuple(latents), full_precision(self.head(self.postprocess(state)))
