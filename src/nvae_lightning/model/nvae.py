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
from nvae_lightning.model.hierarchy import Hierarchy, Image
from nvae_lightning.model.images import check_dtype, check_shape, check_values
from nvae_lightning.model.likelihood import Likelihood, PixelDistribution
from nvae_lightning.model.shapes import FeatureMap
from nvae_lightning.utilities.live_bytes import Cost, peak_bytes

Model = TypeVar("Model", bound="NVAE")
Latents = Sequence[FeatureMap]
Temperature = float | Sequence[float]

#: Bytes of feature maps at one time while likelihoods are estimated; a CPU's caches like few.
_CPU_MEMORY_BUDGET = 1 << 27
_GPU_MEMORY_BUDGET = 1 << 32


class NVAE(nn.Module):
    r"""Deep hierarchical variational autoencoder of images.

    .. math::
        p(x, z) = p(x | z) \prod_l p(z_l | z_{<l}), \qquad
        q(z | x) = \prod_l q(z_l | z_{<l}, x)

    Source: Vahdat & Kautz 2020. Groups are listed coarsest first everywhere.

    Args:
        image: what is modelled.
        hierarchy: scales and latent groups.
        encoder_cell: constructor of the bottom-up cells.
        decoder_cell: constructor of the top-down cells.
        preprocess_cell: constructor of the cells between image and finest scale.
        postprocess_cell: constructor of the cells between finest scale and likelihood.
        likelihood: constructor of p(x | z), given the image.
        num_encoder_cells: bottom-up cells per group.
        num_decoder_cells: top-down cells per group.
        num_preprocess_cells: cells per halving of the resolution before the finest scale.
        num_postprocess_cells: cells per doubling of the resolution after it.
        num_flows: pairs of inverse autoregressive flows per group; 0 for none.
        squeeze_excitation: whether every cell ends in a channel-wise gate (Table 5).
        residual_posterior: whether posteriors are relative to their priors (Table 4).
        first_prior_std: standard deviation of the coarsest group's prior; 1.01 in the published
            weights, whose bounded standard deviation was applied to that group, too.

    Raises:
        ValueError: if a number is out of range or the scales cannot divide the image.
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
        for name, value, minimum in (
            ("num_encoder_cells", num_encoder_cells, 1),
            ("num_decoder_cells", num_decoder_cells, 1),
            ("num_preprocess_cells", num_preprocess_cells, 1),
            ("num_postprocess_cells", num_postprocess_cells, 1),
            ("num_flows", num_flows, 0),
        ):
            if type(value) is not int or value < minimum:
                raise ValueError(f"model.{name} must be at least {minimum}, got {value!r}")
        if not 0.0 < first_prior_std < math.inf:
            raise ValueError(f"model.first_prior_std must be positive, got {first_prior_std}")
        for name, constructor in (
            ("model.encoder_cell", encoder_cell),
            ("model.decoder_cell", decoder_cell),
            ("model.preprocess_cell", preprocess_cell),
            ("model.postprocess_cell", postprocess_cell),
            ("dataset.likelihood", likelihood),
        ):
            if not callable(constructor):
                raise ValueError(
                    f"{name} must be a constructor, got {constructor!r}: "
                    f"choose one of the files of conf/, or give _target_ and _partial_: true"
                )
        self._arguments = arguments
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
        """Constructor arguments as plain data, from which the model can be built again."""
        from nvae_lightning.serialization.architecture import describe

        return describe(self._arguments)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the model to a folder, see ``serialization.hub.save_pretrained``."""
        from nvae_lightning.serialization import hub

        hub.save_pretrained(self, folder, **kwargs)

    @classmethod
    def from_pretrained(cls: type[Model], source: str | Path, **kwargs: Any) -> Model:
        """Read a model in evaluation mode, see ``serialization.hub.from_pretrained``."""
        from nvae_lightning.serialization import hub

        return hub.from_pretrained(cls, source, **kwargs)

    def push_to_hub(self, name: str, **kwargs: Any) -> str:
        """Upload the model, see ``serialization.hub.push_to_hub``."""
        from nvae_lightning.serialization import hub

        return hub.push_to_hub(self, name, **kwargs)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(channel, height, width) of every latent group."""
        return self.decoder.latent_shapes

    def forward(self, x: Tensor, noise: Latents | None = None) -> Inference:
        """Infer the latents of images.

        Args:
            x: images in [0, 1], padded or not.
            noise: one standard-normal tensor per group, drawn if None.

        Raises:
            ValueError: if the images have another shape or dtype, or values outside [0, 1].
        """
        self.check_images(x, on_levels=False)
        return self.infer(x, noise)

    def infer(self, x: Tensor, noise: Latents | None = None) -> Inference:
        """As calling the model, without the check of the values, which waits for the device."""
        return self._infer(self._features(x), len(x), noise)

    def check_images(
        self,
        x: object,
        *,
        on_levels: bool | None = None,
        finite: bool = True,
        name: str = "images",
    ) -> None:
        """Check that images are what the model takes.

        Args:
            x: batch of images.
            on_levels: whether values must be on the levels; if None as the likelihood says.
            finite: whether values that are not finite are refused.
            name: subject of the message.

        Raises:
            ValueError: if their shape, dtype or values are others.
        """
        x = check_shape(x, self.image, name)
        if isinstance(self.likelihood, Likelihood):  # else it alone knows its range
            on_levels = self.likelihood.on_levels if on_levels is None else on_levels
            check_values(x, self.image, on_levels=on_levels, finite=finite, name=name)

    def _features(self, x: Tensor) -> list[FeatureMap]:
        check_dtype(check_shape(x, self.image), next(self.parameters()).dtype)
        return self.encoder(self.image.pad(x))

    def _infer(
        self, features: list[FeatureMap], batch_size: int, noise: Latents | None = None
    ) -> Inference:
        self._check_noise(noise, batch_size)
        latents, logits = self.decoder(batch_size, features=features, noise=noise)
        return Inference(self.likelihood(logits), latents)

    @torch.no_grad()
    def sample(
        self, num_samples: int, temperature: Temperature = 1.0, noise: Latents | None = None
    ) -> PixelDistribution:
        """Draw all latents from the prior and return the likelihood of what they show.

        Args:
            num_samples: number of images.
            temperature: factor on the standard deviation of every prior; one number, or one per
                scale, coarsest first.
            noise: one standard-normal tensor per group, drawn if None.

        Raises:
            ValueError: if there is nothing to draw, a temperature is negative or their number is
                not that of the scales.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        return self._decode(num_samples, (), temperature, noise)

    def encode(self, x: Tensor) -> list[FeatureMap]:
        """Draw z of every group from the posterior, coarsest first; takes what a call takes."""
        return [latent.z for latent in self(x).latents]

    def decode(
        self, latents: Latents, temperature: Temperature = 1.0, noise: Latents | None = None
    ) -> PixelDistribution:
        """Return the likelihood given z of the first groups; the rest is drawn from the prior.

        Args:
            latents: z of at least the first group, coarsest first.
            temperature: factor on the standard deviation of the priors drawn from; one number, or
                one per scale, coarsest first.
            noise: one standard-normal tensor per group (given or drawn), drawn if None.

        Raises:
            ValueError: if there are no or too many latents, or their shapes are wrong.
        """
        if not 1 <= len(latents) <= self.hierarchy.num_groups:
            raise ValueError(
                f"decode takes z of 1 to {self.hierarchy.num_groups} groups, got {len(latents)}; "
                "sample() draws them all"
            )
        self._check_shapes("z", latents, len(latents[0]))
        return self._decode(len(latents[0]), latents, temperature, noise)

    def noise_of(self, latents: Latents) -> list[FeatureMap]:
        r"""Return the standard-normal numbers of which :meth:`sample` makes these latents.

        .. math::
            \epsilon_l = (z_l - \mu_l(z_{<l})) / \sigma_l(z_{<l})

        Of latents that follow the prior they are independent N(0, 1), so that numbers between two
        images' lead to latents that the model knows, where latents between theirs need not.

        Args:
            latents: z of every group, coarsest first.

        Raises:
            ValueError: if their number or shapes are wrong.
        """
        if len(latents) != self.hierarchy.num_groups:
            raise ValueError(
                f"noise_of takes z of all {self.hierarchy.num_groups} groups, got {len(latents)}"
            )
        self._check_shapes("z", latents, len(latents[0]))
        known, _ = self.decoder(len(latents[0]), given=latents)
        return [(latent.z - latent.prior.mean) / latent.prior.std for latent in known]

    def _decode(
        self, batch_size: int, given: Latents, temperature: Temperature, noise: Latents | None
    ) -> PixelDistribution:
        self._check_noise(noise, batch_size)
        _, logits = self.decoder(
            batch_size,
            given=given,
            noise=noise,
            temperature=self.temperature_of_groups(temperature),
        )
        return self.likelihood(logits)

    def temperature_of_groups(self, temperature: Temperature) -> list[float]:
        """Give each group its scale's temperature.

        Raises:
            ValueError: if one is negative, or their number is not that of the scales.
        """
        scales = self.hierarchy.scales
        per_scale = (
            [temperature] * len(scales) if isinstance(temperature, int | float) else temperature
        )
        if len(per_scale) != len(scales):
            raise ValueError(
                f"temperature must be one number, or one for each of {len(scales)} scales, "
                f"got {len(per_scale)}"
            )
        if not all(0.0 <= value < math.inf for value in per_scale):
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        return [per_scale[k] for k, _ in self.hierarchy.groups]

    def _check_noise(self, noise: Latents | None, batch_size: int) -> None:
        if noise is None:
            return
        if len(noise) != self.hierarchy.num_groups:
            raise ValueError(
                f"noise must be one tensor for each of {self.hierarchy.num_groups} groups, "
                f"got {len(noise)}"
            )
        self._check_shapes("noise", noise, batch_size)

    def _check_shapes(self, name: str, tensors: Latents, batch_size: int) -> None:
        for index, (tensor, shape) in enumerate(zip(tensors, self.latent_shapes, strict=False)):
            if tensor.shape != (batch_size, *shape):
                raise ValueError(
                    f"{name} of group {index} must have shape {(batch_size, *shape)}, "
                    f"got {tuple(tensor.shape)}"
                )

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

        Their average over the samples estimates the ELBO, :func:`importance_weighted_bound` the
        log-likelihood. They are those of a model in evaluation mode: in training mode they depend
        on the batch, whose statistics are counted. The bottom-up pass is made once per image; the
        top-down passes take as many draws at once as the budget allows.

        Args:
            x: images in [0, 1].
            num_samples: number of draws per image.
            num_inferred: number L' of groups drawn from the posterior, coarsest first; the others
                are drawn from their priors. All of them if None.
            memory_budget: bytes that feature maps and distributions may take at one time; if
                None 128 MiB on a CPU and 4 GiB elsewhere, or as many as one image takes.

        Raises:
            ValueError: if a number, the budget or the images are out of range.
        """
        num_groups = self.hierarchy.num_groups
        num_inferred = num_groups if num_inferred is None else num_inferred
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if not 0 <= num_inferred <= num_groups:
            raise ValueError(
                f"num_inferred must be from 0 to the number of groups, {num_groups}, "
                f"got {num_inferred}"
            )
        self.check_images(x)
        cost = self._measure(x)
        if memory_budget is None:
            usual = _CPU_MEMORY_BUDGET if x.device.type == "cpu" else _GPU_MEMORY_BUDGET
            memory_budget = max(usual, cost.needed)
        most_images = cost.most_images(memory_budget)
        log_weights = []
        for images in x.split(most_images):
            features = self._features(images)[:num_inferred]
            at_once = cost.most_draws(memory_budget, len(images)) // len(images)
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

        See :meth:`log_weights`. With one sample it is the estimate of the ELBO.

        Raises:
            ValueError: as :meth:`log_weights`.
        """
        return importance_weighted_bound(
            self.log_weights(x, num_samples, memory_budget=memory_budget)
        )

    def _measure(self, x: Tensor) -> Cost:
        """Measure on one image what passes take, without touching random numbers."""
        image = x[:1]
        features = self._features(image)
        noise = [x.new_zeros(1, *shape) for shape in self.latent_shapes]
        return Cost(
            features=sum(feature.nbytes for feature in features),
            bottom_up=peak_bytes(lambda: self._features(image)),
            top_down=peak_bytes(lambda: self._infer(features, 1, noise).log_weight(image)),
        )
