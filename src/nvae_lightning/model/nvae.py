"""The whole model: encoder, decoder and likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nvae_lightning.model.cells import CellConstructor
from nvae_lightning.model.decoder import Decoder
from nvae_lightning.model.distributions import Inference, importance_weighted_bound
from nvae_lightning.model.encoder import Encoder
from nvae_lightning.model.hierarchy import Hierarchy
from nvae_lightning.model.images import check_shape, check_values
from nvae_lightning.model.likelihood import Likelihood, PixelDistribution
from nvae_lightning.model.memory import Footprint
from nvae_lightning.model.shapes import FeatureMap
from nvae_lightning.utilities.image import Image

Model = TypeVar("Model", bound="NVAE")
Latents = Sequence[FeatureMap]
Temperature = int | float | Sequence[int | float]


class NVAE(nn.Module):
    r"""Deep hierarchical variational autoencoder of images.

    .. math::
        p(x, z) = p(x | z) \prod_l p(z_l | z_{<l}), \qquad
        q(z | x) = \prod_l q(z_l | z_{<l}, x)

    Source: Vahdat & Kautz 2020. Groups are listed coarsest first everywhere.

    Args:
        image: Image format.
        hierarchy: Scales and latent groups.
        encoder_cell: Constructor of the bottom-up cells.
        decoder_cell: Constructor of the top-down cells.
        preprocess_cell: Constructor of the cells between the image and the finest scale.
        postprocess_cell: Constructor of the cells between the finest scale and the likelihood.
        likelihood: Constructor of p(x | z), given the image format.
        num_encoder_cells: Number of bottom-up cells per group.
        num_decoder_cells: Number of top-down cells per group.
        num_preprocess_cells: Number of preprocess cells per halving of the resolution.
        num_postprocess_cells: Number of postprocess cells per doubling of the resolution.
        num_flows: Number of pairs of inverse autoregressive flows per group.
        squeeze_excitation: Whether every cell ends in a channel-wise gate (Table 5).
        residual_posterior: Whether posteriors are relative to their priors (Table 4).
        first_prior_std: Standard deviation of the coarsest group's prior; 1.01 for published
            weights, whose bound on standard deviations also applied to that group.

    Raises:
        ValueError: If a number is out of range or the scales do not divide the image.
    """

    def __init__(
        self,
        image: Image,
        hierarchy: Hierarchy,
        *,
        encoder_cell: CellConstructor,
        decoder_cell: CellConstructor,
        preprocess_cell: CellConstructor,
        postprocess_cell: CellConstructor,
        likelihood: Callable[[Image], Likelihood],
        num_encoder_cells: int = 2,
        num_decoder_cells: int = 2,
        num_preprocess_cells: int = 2,
        num_postprocess_cells: int = 2,
        num_flows: int = 0,
        squeeze_excitation: bool = True,
        residual_posterior: bool = True,
        first_prior_std: float = 1.0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        hierarchy.check(image)
        for name, value in arguments.items():
            least = int(name != "num_flows")
            if name.startswith("num_") and (type(value) is not int or value < least):
                raise ValueError(f"model.{name} must be at least {least}, got {value!r}")
            if name.endswith("_cell") and not callable(value):
                raise ValueError(
                    f"model.{name} must be a constructor, got {value!r}; choose a file of "
                    "conf/model/cell, or set _target_ and _partial_: true"
                )
        if not 0.0 < first_prior_std < math.inf:
            raise ValueError(f"model.first_prior_std must be positive, got {first_prior_std}")
        self._arguments = arguments
        self._footprints: dict[object, Footprint] = {}
        self.image = image
        self.hierarchy = hierarchy
        self.likelihood = likelihood(image)
        gated = {"squeeze_excitation": squeeze_excitation}
        self.encoder = Encoder(
            image,
            hierarchy,
            cell=partial(encoder_cell, **gated),
            num_cells_per_group=num_encoder_cells,
            preprocess_cell=partial(preprocess_cell, **gated),
            num_preprocess_cells=num_preprocess_cells,
        )
        self.decoder = Decoder(
            image,
            hierarchy,
            self.likelihood.num_logits,
            cell=partial(decoder_cell, **gated),
            num_cells_per_group=num_decoder_cells,
            postprocess_cell=partial(postprocess_cell, **gated),
            num_postprocess_cells=num_postprocess_cells,
            num_flows=num_flows,
            residual_posterior=residual_posterior,
            first_prior_std=first_prior_std,
        )

    @property
    def architecture(self) -> dict[str, Any]:
        """Constructor arguments as plain data, from which the model can be rebuilt."""
        from nvae_lightning.serialization.architecture import describe

        return describe(self._arguments)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the model to a folder; see ``serialization.hub.save_pretrained``."""
        from nvae_lightning.serialization import hub

        hub.save_pretrained(self, folder, **kwargs)

    @classmethod
    def from_pretrained(cls: type[Model], source: str | Path, **kwargs: Any) -> Model:
        """Read a model in evaluation mode; see ``serialization.hub.from_pretrained``."""
        from nvae_lightning.serialization import hub

        return hub.from_pretrained(cls, source, **kwargs)

    def push_to_hub(self, name: str, **kwargs: Any) -> str:
        """Upload the model; see ``serialization.hub.push_to_hub``."""
        from nvae_lightning.serialization import hub

        return hub.push_to_hub(self, name, **kwargs)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Shape (channel, height, width) of every latent group, coarsest first."""
        return self.decoder.latent_shapes

    # Inference

    def forward(self, x: Tensor, noise: Latents | None = None) -> Inference:
        """Infer the latents of images.

        Args:
            x: Images in [0, 1], padded or not.
            noise: Standard-normal noise of every group; drawn if None.

        Raises:
            ValueError: If the images have the wrong shape or dtype, or values outside [0, 1].
        """
        self.check_images(x, on_levels=False)
        return self.infer(x, noise)

    def infer(self, x: Tensor, noise: Latents | None = None) -> Inference:
        """Infer like ``forward``, without its check of values, which synchronises the device."""
        return self._infer(self._features(x), len(x), noise)

    def check_images(
        self,
        x: object,
        *,
        on_levels: bool | None = None,
        finite: bool = True,
        name: str = "images",
    ) -> None:
        """Raise ValueError if images do not match the model in shape, dtype or values.

        Args:
            x: Batch of images.
            on_levels: Whether values must be on the image's levels; None: the likelihood's rule.
            finite: Whether values must be finite.
            name: Subject of the error message.
        """
        x = check_shape(x, self.image, name)
        if isinstance(self.likelihood, Likelihood):  # other modules define their own range
            on_levels = self.likelihood.on_levels if on_levels is None else on_levels
            check_values(x, self.image, on_levels=on_levels, finite=finite, name=name)

    def _features(self, x: Tensor) -> list[FeatureMap]:
        x, dtype = check_shape(x, self.image), next(self.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"images: got dtype {x.dtype}, but the weights have {dtype}; pass x.to({dtype})"
            )
        return self.encoder(self.image.pad(x))

    def _infer(
        self, features: Sequence[FeatureMap], batch_size: int, noise: Latents | None = None
    ) -> Inference:
        self._check_noise(noise, batch_size)
        latents, logits = self.decoder(batch_size, features=features, noise=noise)
        return Inference(self.likelihood(logits), latents)

    # Sampling

    @torch.no_grad()
    def sample(
        self, num_samples: int, temperature: Temperature = 1.0, noise: Latents | None = None
    ) -> PixelDistribution:
        """Draw all latents from the prior and return p(x | z).

        Args:
            num_samples: Number of images.
            temperature: Factor on the standard deviation of the priors; one number, or one per
                scale, coarsest first.
            noise: Standard-normal noise of every group; drawn if None.

        Raises:
            ValueError: If an argument is out of range.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        return self._decode(num_samples, (), temperature, noise)

    def encode(self, x: Tensor) -> list[FeatureMap]:
        """Draw z of every group from the posterior, coarsest first."""
        return [latent.z for latent in self(x).latents]

    def decode(
        self, latents: Latents, temperature: Temperature = 1.0, noise: Latents | None = None
    ) -> PixelDistribution:
        """Return p(x | z) given z of the first groups; draw the others from the prior.

        Args:
            latents: Values of z of at least the first group, coarsest first.
            temperature: See :meth:`sample`.
            noise: Standard-normal noise of all groups, including the given ones; drawn if None.

        Raises:
            ValueError: If the number of latents or a shape is wrong.
        """
        self._check("latents", latents, at_least=1)
        return self._decode(len(latents[0]), latents, temperature, noise)

    def noise_of(self, latents: Latents) -> list[FeatureMap]:
        r"""Return the standard-normal noise from which :meth:`sample` would draw these latents.

        .. math::
            \epsilon_l = (z_l - \mu_l(z_{<l})) / \sigma_l(z_{<l})

        The noise of latents that follow the prior is independent N(0, 1). Interpolated noise
        therefore gives latents that are likely under the prior; interpolated latents may not be.

        Args:
            latents: Values of z of every group, coarsest first.
        """
        self._check("latents", latents, at_least=self.hierarchy.num_groups)
        known, _ = self.decoder(len(latents[0]), given=latents)
        return [(latent.z - latent.prior.mean) / latent.prior.std for latent in known]

    def _decode(
        self, batch_size: int, given: Latents, temperature: Temperature, noise: Latents | None
    ) -> PixelDistribution:
        self._check_noise(noise, batch_size)
        per_group = self.temperature_of_groups(temperature)
        _, logits = self.decoder(batch_size, given=given, noise=noise, temperature=per_group)
        return self.likelihood(logits)

    def temperature_of_groups(self, temperature: Temperature) -> list[float]:
        """Return the temperature of every group; raise ValueError if one is invalid."""
        scales = self.hierarchy.scales
        is_one = isinstance(temperature, int | float)
        per_scale = [temperature] * len(scales) if is_one else temperature
        if len(per_scale) != len(scales):
            raise ValueError(
                f"temperature must be one number or one for each of {len(scales)} scales, "
                f"got {len(per_scale)}"
            )
        if not all(0.0 <= value < math.inf for value in per_scale):
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        return [float(per_scale[k]) for k, _ in self.hierarchy.groups]

    def _check(
        self, name: str, tensors: Latents, at_least: int, batch_size: int | None = None
    ) -> None:
        """Check number and shapes of tensors of the groups, coarsest first."""
        num_groups = self.hierarchy.num_groups
        if not at_least <= len(tensors) <= num_groups:
            raise ValueError(
                f"{name} must have one tensor for each of {at_least} to {num_groups} groups, got "
                f"{len(tensors)}"
            )
        batch_size = len(tensors[0]) if batch_size is None else batch_size
        for index, (tensor, shape) in enumerate(zip(tensors, self.latent_shapes, strict=False)):
            if tensor.shape != (batch_size, *shape):
                raise ValueError(
                    f"{name} of group {index} must have shape {(batch_size, *shape)}, "
                    f"got {tuple(tensor.shape)}"
                )

    def _check_noise(self, noise: Latents | None, batch_size: int) -> None:
        if noise is not None:
            self._check("noise", noise, self.hierarchy.num_groups, batch_size)

    # Likelihood of images

    @torch.no_grad()
    def log_weights(
        self,
        x: Tensor,
        num_samples: int,
        *,
        num_inferred: int | None = None,
        memory_budget: int | None = None,
    ) -> Float[Tensor, "sample batch"]:
        r"""Log importance weights of draws from the posterior, in nats.

        .. math::
            \log w_k = \log p(x | z_k) + \sum_{l \le L'} \log p(z_{kl} | z_{k,<l})
                       - \log q(z_{kl} | z_{k,<l}, x)

        Their mean over samples estimates the ELBO, and :func:`importance_weighted_bound` the
        log-likelihood. Use evaluation mode: in training mode the weights depend on the batch. Each
        image takes one bottom-up pass; each top-down pass takes as many draws as fit into memory.

        Args:
            x: Images in [0, 1].
            num_samples: Number of draws per image.
            num_inferred: Number L' of groups drawn from the posterior, coarsest first; the others
                are drawn from their priors. None for all.
            memory_budget: Maximum number of bytes of feature maps and distributions at a time;
                None for 256 MiB on a CPU and 4 GiB elsewhere, or more if one image needs it.

        Raises:
            ValueError: If a number, the budget or the images are out of range.
        """
        num_groups = self.hierarchy.num_groups
        num_inferred = num_groups if num_inferred is None else num_inferred
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if not 0 <= num_inferred <= num_groups:
            raise ValueError(f"num_inferred must be from 0 to {num_groups}, got {num_inferred}")
        self.check_images(x)
        num_images, num_draws = self._footprint(x[:1]).fitting(memory_budget, x.device)
        log_weights = []
        for images in x.split(num_images):
            features = self._features(images)[:num_inferred]
            at_once = num_draws(len(images))
            passes = []
            for start in range(0, num_samples, at_once):
                repeats = min(at_once, num_samples - start)
                latents, logits = self.decoder(repeats * len(images), features=features)
                inference = Inference(self.likelihood(logits), latents[:num_inferred])
                log_weight = inference.log_weight(images.repeat(repeats, 1, 1, 1))
                passes.append(log_weight.unflatten(0, (repeats, -1)))
                del latents, logits, inference
            log_weights.append(torch.cat(passes))
        return torch.cat(log_weights, 1)

    def log_likelihood(
        self, x: Tensor, num_samples: int, *, memory_budget: int | None = None
    ) -> Float[Tensor, " batch"]:
        """Estimate log p(x) from below by importance sampling, in nats per image.

        See :meth:`log_weights`. One sample gives the one-sample estimate of the ELBO.
        """
        log_weights = self.log_weights(x, num_samples, memory_budget=memory_budget)
        return importance_weighted_bound(log_weights)

    def _footprint(self, image: Tensor) -> Footprint:
        """Return the memory of one image, measured once for images of a kind, without draws."""
        autocast = torch.is_autocast_enabled(image.device.type)
        kind = image.shape, image.dtype, image.device, autocast
        if kind not in self._footprints:
            noise = [image.new_zeros(1, *shape) for shape in self.latent_shapes]
            self._footprints[kind] = Footprint.measure(
                lambda: self._features(image),
                lambda features: self._infer(features, 1, noise).log_weight(image),
            )
        return self._footprints[kind]
