"""Restoration of damaged images with a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nvae_lightning.inference.batches import Images, fork_torch
from nvae_lightning.model import NVAE
from nvae_lightning.utilities.image import require_int


@dataclass(frozen=True)
class Restoration:
    """Completions of one image in [0, 1].

    Args:
        images: Completions.
        std: Standard deviation of every pixel over the completions; 0 where it is known.
    """

    images: Images
    std: Float[Tensor, "channel height width"]


@torch.no_grad()
def inpaint(
    model: NVAE,
    x: Float[Tensor, "1 channel height width"],
    known: Bool[Tensor, "height width"],
    *,
    num_completions: int = 4,
    num_rounds: int = 50,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Restoration:
    """Fill in missing pixels by pseudo-Gibbs sampling.

    The missing pixels begin as uniform noise. Each round draws z from q(z | x), then the missing
    pixels from p(x | z). If q is the exact posterior, the chain converges to
    p(missing | known). The last round returns the means of p(x | z) instead of draws.

    Source: Rezende et al. 2014, Appendix F; Mattei & Frellsen 2018.

    Args:
        model: Model in evaluation mode.
        x: Image in [0, 1] without padding; its missing pixels are ignored.
        known: Whether a pixel is known.
        num_completions: Number of independent chains.
        num_rounds: Number of rounds.
        temperature: Factor on the standard deviation of the posteriors.
        generator: Source of all random numbers; None for PyTorch's own.

    Raises:
        ValueError: If a number is out of range.
    """
    require_int("task.num_completions", num_completions, 1)
    require_int("task.num_rounds", num_rounds, 1)
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(
            f"task.temperature: got {temperature}, but it must be finite and not negative; set "
            "for example task.temperature=1"
        )
    top = 2**model.image.bits - 1
    seed = int(torch.randint(2**62, (), generator=generator))
    with fork_torch(x.device):
        torch.manual_seed(seed)
        x = x.expand(num_completions, -1, -1, -1)
        noise = (torch.rand_like(x) * top).round() / top

        def encode_and_decode(images: Images) -> tuple[Images, Images]:
            shapes = model.latent_shapes
            draws = [torch.randn(len(x), *s, device=x.device) * temperature for s in shapes]
            likelihood = model(images, draws).likelihood
            return likelihood.sample(), likelihood.mean

        completions = pseudo_gibbs(encode_and_decode, x, noise, known, num_rounds)
    std = completions.std(0, correction=0)
    return Restoration(completions, torch.where(known, 0.0, std))


def pseudo_gibbs(
    encode_and_decode: Callable[[Images], tuple[Images, Images]],
    x: Images,
    start: Images,
    known: Bool[Tensor, "height width"],
    num_rounds: int,
) -> Images:
    """Repeat: encode, decode, put the known pixels back.

    Args:
        encode_and_decode: Function that returns draws from p(x | z), and their means, for z drawn
            from q(z | x).
        x: Images whose known pixels are used.
        start: Images whose other pixels are used at first.
        known: Whether a pixel is known.
        num_rounds: Number of rounds; the last one uses the means.
    """
    means = images = torch.where(known, x, start)
    for _ in range(num_rounds):
        draws, means = encode_and_decode(images)
        images = torch.where(known, x, draws)
    return torch.where(known, x, means)
