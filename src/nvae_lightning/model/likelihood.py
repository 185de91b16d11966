"""Distributions of the pixels given the decoder's output.

A likelihood is a module, built once for an image format. Its ``forward`` turns the network's raw
parameters into a distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nvae_lightning.model.distributions import Normal
from nvae_lightning.utilities.image import Image

Pixels = Float[Tensor, "batch channel height width"]


@runtime_checkable
class PixelDistribution(Protocol):
    """p(x | z) over images in [0, 1], without their padding."""

    @property
    def logits(self) -> Tensor:
        """Raw parameters from the network, with padding."""
        ...

    @property
    def mean(self) -> Pixels:
        """Expected image."""
        ...

    def log_prob(self, image: Pixels) -> Float[Tensor, " batch"]:
        """Log probability in nats per image."""
        ...

    def sample(self) -> Pixels:
        """Draw images."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Independent binary pixels.

    Args:
        logits: Log odds of a one, with padding.
        image: Image format.
    """

    logits: Pixels
    image: Image

    @property
    def mean(self) -> Pixels:
        """Probability of a one."""
        return torch.sigmoid(self.image.crop(self.logits))

    def log_prob(self, image: Pixels) -> Float[Tensor, " batch"]:
        """Log probability of binary pixels: the sum of ``x * l - softplus(l)``, nats."""
        logits = self.image.crop(self.logits)
        return (self.image.crop(image) * logits - F.softplus(logits)).flatten(1).sum(1)

    def sample(self) -> Pixels:
        """Draw zeros and ones."""
        return torch.bernoulli(self.mean)


class Likelihood(nn.Module, ABC):
    """Base of the likelihoods: raw parameters in, distribution of the pixels out.

    Args:
        image: Image format.
        num_logits: Number of raw parameters per pixel, the channels of the network's output.

    Attributes:
        on_levels: Whether p(x | z) is defined only on the image's levels, so that other values
            in [0, 1] are refused.
    """

    on_levels = False

    def __init__(self, image: Image, num_logits: int) -> None:
        super().__init__()
        self.image = image
        self.num_logits = num_logits

    @abstractmethod
    def forward(
        self, logits: Float[Tensor, "batch parameter height width"]
    ) -> PixelDistribution: ...


class BernoulliLikelihood(Likelihood):
    """Bernoulli likelihood of binary images (dynamically binarised MNIST in the paper).

    Args:
        image: Image format, of 1 bit.

    Raises:
        ValueError: If the image has more than two levels.
    """

    on_levels = True

    def __init__(self, image: Image) -> None:
        if image.bits != 1:
            raise ValueError(
                f"a Bernoulli likelihood requires image.bits=1, got {image.bits}; "
                "set model.likelihood._target_="
                "nvae_lightning.model.DiscretizedLogisticMixtureLikelihood"
            )
        super().__init__(image, num_logits=image.channels)

    def forward(self, logits: Pixels) -> Bernoulli:
        return Bernoulli(logits, self.image)


def mixture_log_prob(
    x: Pixels,
    mixture: Float[Tensor, "batch component height width"],
    means: Float[Tensor, "batch channel component height width"],
    log_scales: Float[Tensor, "batch channel component height width"],
    coefficients: Float[Tensor, "batch channel component height width"],
    top_level: int,
    published_tails: bool,
) -> Float[Tensor, " batch"]:
    """Log probability of pixels in [-1, 1] under a mixture of logistics."""
    x = x.unsqueeze(2)
    if x.shape[1] == 3:
        red, green, _ = x.unbind(1)
        to_green, to_blue, green_to_blue = coefficients.unbind(1)
        shifts = [
            torch.zeros_like(to_green),
            to_green * red,
            to_blue * red + green_to_blue * green,
        ]
        means = means + torch.stack(shifts, 1)
    per_channel = _log_prob_of_levels(x, means, log_scales, top_level, published_tails)
    per_component = F.log_softmax(mixture, 1) + per_channel.sum(1)
    return torch.logsumexp(per_component, 1).flatten(1).sum(1)


def _log_prob_of_levels(
    x: Tensor, means: Tensor, log_scales: Tensor, top_level: int, published_tails: bool
) -> Tensor:
    inverse_scale = torch.exp(-log_scales)
    centred = x - means
    upper = inverse_scale * (centred + 1.0 / top_level)
    lower = inverse_scale * (centred - 1.0 / top_level)
    if published_tails:
        middle = inverse_scale * centred
        log_density = middle - log_scales - 2.0 * F.softplus(middle)
        difference = torch.sigmoid(upper) - torch.sigmoid(lower)
        inside = torch.where(
            difference > 1e-5,
            difference.clamp_min(1e-10).log(),
            log_density - math.log(top_level / 2),
        )
        inside = torch.where(x < -0.999, F.logsigmoid(upper), inside)
        return torch.where(x > 0.99, F.logsigmoid(-lower), inside)
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) stays accurate where the
    # difference of two sigmoids underflows.
    width = (2.0 / top_level) * inverse_scale
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
    half_a_level = 0.5 / top_level
    inside = torch.where(x < -1.0 + half_a_level, F.logsigmoid(upper), inside)
    return torch.where(x > 1.0 - half_a_level, F.logsigmoid(-lower), inside)


@dataclass(frozen=True)
class DiscretizedLogisticMixture:
    r"""Mixture of logistics over the levels of a pixel, with autoregressively coupled colours.

    With pixel values scaled to [-1, 1], half a level :math:`h = 1 / (2^{bits} - 1)` and the
    mixture component k shared by the colours of a pixel,

    .. math::
        P(x) = \sum_k \pi_k \prod_c \left[\sigma\!\left(\frac{x_c + h - m_{kc}}{s_{kc}}\right)
               - \sigma\!\left(\frac{x_c - h - m_{kc}}{s_{kc}}\right)\right]

    where the lowest level extends to :math:`-\infty` and the highest to :math:`\infty`, so that
    the levels' probabilities sum to one. The means of green and blue are shifted by the preceding
    colours.

    Source: Salimans et al. 2017 (PixelCNN++), Sec. 2; the paper's Table 6 (10 components).

    Args:
        logits: Raw parameters, ``10 * components`` channels for colour: logits of the components,
            then means, log scales and coefficients of each colour; ``3 * components`` for grey.
        image: Image format.
        published_tails: See :class:`DiscretizedLogisticMixtureLikelihood`.
        published_temperature: See :class:`DiscretizedLogisticMixtureLikelihood`.
    """

    logits: Float[Tensor, "batch parameter height width"]
    image: Image
    published_tails: bool = False
    published_temperature: bool = False

    log_prob_of_levels = staticmethod(mixture_log_prob)

    @property
    def _parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mixture logits (batch, component, h, w); means, log scales and coefficients.

        The last three have shape (batch, colour, component, h, w). Grey has zero coefficients.
        """
        logits = self.image.crop(self.logits)
        channels = self.image.channels
        kinds = 3 if channels == 3 else 2
        num_mixtures = logits.shape[1] // (1 + channels * kinds)
        mixture = logits[:, :num_mixtures]
        rest = logits[:, num_mixtures:].unflatten(1, (channels, kinds, num_mixtures))
        # The lower bound is published; the upper one keeps gradients finite.
        means, log_scales = rest[:, :, 0], rest[:, :, 1].clamp(-7.0, 20.0)
        coefficients = rest[:, :, 2].tanh() if kinds == 3 else torch.zeros_like(means)
        return mixture, means, log_scales, coefficients

    def log_prob(self, image: Pixels) -> Float[Tensor, " batch"]:
        """Log probability in nats per image of pixels on the levels of [0, 1]."""
        x = 2.0 * self.image.crop(image) - 1.0
        top_level = 2**self.image.bits - 1
        return self.log_prob_of_levels(x, *self._parameters, top_level, self.published_tails)

    @property
    def mean(self) -> Pixels:
        """Expected colours: components averaged, then coupled and clamped in order."""
        mixture, means, _, coefficients = self._parameters
        weights = F.softmax(mixture, 1).unsqueeze(1)
        return self._couple((weights * means).sum(2), (weights * coefficients).sum(2))

    def sample(self, temperature: float = 1.0) -> Pixels:
        """Draw images; ``temperature`` scales the logistics and sharpens the choice of component.

        As published, draws are continuous and couple the colours before rounding; :meth:`log_prob`
        requires levels and couples the colours by their levels.

        Raises:
            ValueError: If the temperature is 0 with ``published_temperature``.
        """
        if self.published_temperature and temperature <= 0.0:
            raise ValueError(
                f"temperature must be positive with published_temperature, got {temperature}; "
                "build the likelihood with published_temperature=False"
            )
        width = 1.0 / temperature if self.published_temperature else temperature
        mixture, means, log_scales, coefficients = self._parameters
        gumbel = -torch.log(-torch.log(_open_uniform(mixture)))
        chosen = (mixture + temperature * gumbel).argmax(1)
        index = chosen[:, None, None]
        mean = torch.take_along_dim(means, index, 2).squeeze(2)
        log_scale = torch.take_along_dim(log_scales, index, 2).squeeze(2)
        coefficient = torch.take_along_dim(coefficients, index, 2).squeeze(2)
        logistic = torch.logit(_open_uniform(mean))
        return self._couple(mean + width * log_scale.exp() * logistic, coefficient)

    def _couple(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Shift each colour by the preceding ones, clamp it and scale it to [0, 1]."""
        colours = [values[:, 0].clamp(-1.0, 1.0)]
        if self.image.channels == 3:
            to_green, to_blue, green_to_blue = coefficients.unbind(1)
            colours.append((values[:, 1] + to_green * colours[0]).clamp(-1.0, 1.0))
            blue = values[:, 2] + to_blue * colours[0] + green_to_blue * colours[1]
            colours.append(blue.clamp(-1.0, 1.0))
        return 0.5 * torch.stack(colours, 1) + 0.5


def _open_uniform(like: Tensor) -> Tensor:
    """Draw from the open interval (0, 1), at whose ends logarithms are infinite."""
    eps = torch.finfo(like.dtype).eps
    return torch.rand_like(like).clamp(eps, 1.0 - eps)


class DiscretizedLogisticMixtureLikelihood(Likelihood):
    """Discretised mixture of logistics for grey or colour images of 1 to 8 bits.

    Args:
        image: Image format.
        num_mixtures: Number of mixture components.
        published_tails: Whether to use the probabilities of the published weights: the upper tail
            starts at 0.99 in [-1, 1], which includes level 254 of 8 bits, so that the levels'
            probabilities sum to more than 1 and bright images seem too likely; probabilities
            below 1e-5 are approximated by the density.
        published_temperature: Whether sampling divides the logistics' scale by the temperature,
            as published, so that temperatures below 1 give *noisier* pixels.

    Raises:
        ValueError: If ``num_mixtures`` is below 1.
    """

    on_levels = True
    distribution = DiscretizedLogisticMixture

    def __init__(
        self,
        image: Image,
        num_mixtures: int = 10,
        *,
        published_tails: bool = False,
        published_temperature: bool = False,
    ) -> None:
        if num_mixtures < 1:
            raise ValueError(f"num_mixtures must be at least 1, got {num_mixtures}")
        parameters_per_mixture = 10 if image.channels == 3 else 3
        super().__init__(image, num_logits=num_mixtures * parameters_per_mixture)
        self.published_tails = published_tails
        self.published_temperature = published_temperature

    def forward(
        self, logits: Float[Tensor, "batch parameter height width"]
    ) -> DiscretizedLogisticMixture:
        return self.distribution(
            logits, self.image, self.published_tails, self.published_temperature
        )


@dataclass(frozen=True)
class NormalPixels:
    """Independent normal distributions of pixel values scaled to [-1, 1].

    Args:
        logits: Raw means, then raw log standard deviations, with padding; bounded by
            :meth:`Normal.soft_clamped`.
        image: Image format.
    """

    logits: Float[Tensor, "batch parameter height width"]
    image: Image

    @property
    def _normal(self) -> Normal:
        return Normal.soft_clamped(*self.image.crop(self.logits).chunk(2, 1))

    @property
    def mean(self) -> Pixels:
        """Means of the pixels, clamped to [0, 1]."""
        return (0.5 * self._normal.mean + 0.5).clamp(0.0, 1.0)

    def log_prob(self, image: Pixels) -> Float[Tensor, " batch"]:
        """Log *density* in [-1, 1], nats per image; not a probability, so not bits."""
        return self._normal.log_prob(2.0 * self.image.crop(image) - 1.0).flatten(1).sum(1)

    def sample(self, temperature: float = 1.0) -> Pixels:
        """Draw images, clamped to [0, 1]; ``temperature`` scales the standard deviation."""
        return (0.5 * self._normal.tempered(temperature).sample() + 0.5).clamp(0.0, 1.0)


class NormalLikelihood(Likelihood):
    """Normal likelihood, which published settings with one mixture component select.

    Args:
        image: Image format.
    """

    def __init__(self, image: Image) -> None:
        super().__init__(image, num_logits=2 * image.channels)

    def forward(self, logits: Float[Tensor, "batch parameter height width"]) -> NormalPixels:
        return NormalPixels(logits, self.image)
