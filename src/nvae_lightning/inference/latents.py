r"""Images in the space of standardised latents, where groups can be kept, redrawn and mixed.

.. math::
    \epsilon_l = (z_l - \mu_l(z_{<l})) / \sigma_l(z_{<l})

Under the prior they are independent N(0, 1), so that any group can be replaced without making the
finer ones unlikely.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nvae_lightning.inference.batches import Images
from nvae_lightning.model import NVAE, Inference
from nvae_lightning.model.nvae import Latents, Temperature


def draw_noise(model: NVAE, count: int, generator: torch.Generator) -> list[Tensor]:
    """Draw the standard-normal noise of every group, coarsest first, on the model's device."""
    device = next(model.parameters()).device
    return [torch.randn(count, *s, generator=generator).to(device) for s in model.latent_shapes]


def standardise(model: NVAE, inference: Inference) -> list[Tensor]:
    """Return the standardised latents of inferred images, coarsest first."""
    return model.noise_of([latent.z for latent in inference.latents])


@torch.no_grad()
def redraw(
    model: NVAE,
    latents: Sequence[Tensor],
    noise: Latents,
    frozen: Collection[int],
    temperature: Temperature = 1.0,
) -> Images:
    """Keep some groups of an image and redraw the others: means of p(x | z).

    Args:
        model: Model in evaluation mode.
        latents: Standardised latents of one image.
        noise: Standard-normal noise of as many images as to draw.
        frozen: Groups to keep, where 0 is the coarsest. With the first k, the others are drawn
            from their priors given the z of these.
        temperature: Factor on the redrawn noise, one or one per scale, coarsest first.

    Raises:
        ValueError: If a group does not exist or the temperature is invalid.
    """
    num_groups = model.hierarchy.num_groups
    if wrong := [group for group in frozen if not 0 <= group < num_groups]:
        raise ValueError(
            f"frozen: got {wrong[0]}, but the model has {num_groups} groups; give numbers from 0 "
            f"to {num_groups - 1}"
        )
    factors = model.temperature_of_groups(temperature)
    mixed = [
        own.expand_as(new) if group in frozen else factor * new
        for group, (own, new, factor) in enumerate(zip(latents, noise, factors, strict=True))
    ]
    return model.sample(len(noise[0]), noise=mixed).mean


@torch.no_grad()
def mix(
    model: NVAE, first: Latents, second: Latents, weight: float, scales: Collection[int]
) -> Images:
    """Interpolate some scales of two images and keep the others of the first.

    Args:
        model: Model in evaluation mode.
        first: Standardised latents of one image.
        second: Standardised latents of another.
        weight: Weight of the second image, 0 to 1. With 1 and the finest scale, for example, fine
            structure of the second is drawn on coarse structure of the first.
        scales: Scales to interpolate, where 0 is the coarsest.
    """
    weights = torch.tensor([weight], device=first[0].device)
    mixed = [
        slerp(one[0], other[0], weights) if scale in scales else one
        for one, other, (scale, _) in zip(first, second, model.hierarchy.groups, strict=True)
    ]
    return model.sample(1, noise=mixed).mean


def slerp(first: Tensor, second: Tensor, weights: Float[Tensor, " step"]) -> Tensor:
    r"""Interpolate noise spherically: linear interpolation would come closer to 0 than samples do.

    .. math::
        \epsilon(w) = \left((1 - w) \|\epsilon_0\| + w \|\epsilon_1\|\right)
        \frac{\sin((1 - w) \omega) e_0 + \sin(w \omega) e_1}{\sin \omega}, \quad
        e_i = \epsilon_i / \|\epsilon_i\|

    Source: Shoemake 1985, for the direction; lengths are interpolated linearly.
    """
    by_step = weights.view(-1, *[1] * first.dim())
    lengths = first.norm(), second.norm()
    directions = first / lengths[0], second / lengths[1]
    angle = (directions[0] * directions[1]).sum().clamp(-1.0, 1.0).acos()
    length = torch.lerp(lengths[0], lengths[1], by_step)
    if angle.sin() < 1e-4:  # nearly equal or opposite directions
        return torch.lerp(first, second, by_step)
    from_first = torch.sin((1.0 - by_step) * angle) * directions[0]
    return length * (from_first + torch.sin(by_step * angle) * directions[1]) / angle.sin()
