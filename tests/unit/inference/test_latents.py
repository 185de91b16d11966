"""Groups are kept, redrawn and mixed in the space of standardised latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvae_lightning.inference.latents import draw_noise, mix, redraw, slerp, standardise
from nvae_lightning.model import NVAE


def _images(model: NVAE, count: int = 1) -> Tensor:
    image = model.image
    levels = torch.randint(0, 2**image.bits, (count, image.channels, image.size, image.size))
    return levels / (2**image.bits - 1)


@torch.no_grad()
def _inferred(model: NVAE, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Reconstruct an image; return it, its latents and its standardised latents."""
    noise = draw_noise(model, 1, torch.Generator().manual_seed(seed))
    inference = model(_images(model), noise)
    z = [latent.z for latent in inference.latents]
    return inference.likelihood.mean, z, standardise(model, inference)


def test_keeping_all_groups_reconstructs_the_image(nvae: NVAE) -> None:
    reconstruction, z, latents = _inferred(nvae)
    noise = draw_noise(nvae, 2, torch.Generator().manual_seed(1))
    kept = redraw(nvae, latents, noise, range(len(z)))
    torch.testing.assert_close(kept, reconstruction.expand_as(kept), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_keeping_the_top_groups_decodes_their_latents(nvae: NVAE, count: int) -> None:
    _, z, latents = _inferred(nvae)
    noise = draw_noise(nvae, 3, torch.Generator().manual_seed(1))
    given = [each.expand(3, -1, -1, -1) for each in z[:count]]
    expected = nvae.decode(given, [0.5, 0.8], noise).mean
    kept = redraw(nvae, latents, noise, range(count), [0.5, 0.8])
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4)


def test_redrawing_one_group_replaces_its_noise_only(colour_nvae: NVAE) -> None:
    _, _, latents = _inferred(colour_nvae)
    noise = draw_noise(colour_nvae, 1, torch.Generator().manual_seed(1))
    expected = colour_nvae.sample(1, noise=[latents[0], 0.7 * noise[1], latents[2]]).mean
    assert torch.equal(redraw(colour_nvae, latents, noise, [0, 2], 0.7), expected)


def test_keeping_no_group_samples_from_the_prior(colour_nvae: NVAE) -> None:
    _, _, latents = _inferred(colour_nvae)
    noise = draw_noise(colour_nvae, 2, torch.Generator().manual_seed(1))
    expected = colour_nvae.sample(2, noise=noise).mean
    assert torch.equal(redraw(colour_nvae, latents, noise, []), expected)


def test_a_group_that_does_not_exist_is_refused(colour_nvae: NVAE) -> None:
    _, _, latents = _inferred(colour_nvae)
    with pytest.raises(ValueError, match="frozen: got 3, but the model has 3 groups"):
        redraw(colour_nvae, latents, latents, [0, 3])


def test_mixtures_begin_and_end_at_the_images_and_keep_the_other_scales(nvae: NVAE) -> None:
    (first, _, one), (second, _, other) = _inferred(nvae, 0), _inferred(nvae, 1)
    for weight, expected in ((0.0, first), (1.0, second)):
        found = mix(nvae, one, other, weight, [0, 1])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mix(nvae, one, other, 0.5, []), first, rtol=1e-3, atol=1e-4)
    crossed = nvae.sample(1, noise=[one[0], other[1], other[2]]).mean
    torch.testing.assert_close(mix(nvae, one, other, 1.0, [1]), crossed)


def test_noise_depends_on_the_generator_only(colour_nvae: NVAE) -> None:
    torch.manual_seed(1)
    one = draw_noise(colour_nvae, 2, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    other = draw_noise(colour_nvae, 2, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [tuple(each.shape[1:]) for each in one] == colour_nvae.latent_shapes


def test_spherical_interpolation_keeps_the_length_of_noise() -> None:
    first, second = torch.randn(2, 400, dtype=torch.float64)
    path = slerp(first, second, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(path[0], first)
    torch.testing.assert_close(path[-1], second)
    expected = torch.linspace(float(first.norm()), float(second.norm()), 5, dtype=torch.float64)
    torch.testing.assert_close(path.norm(dim=1), expected)
    angles = (path[:-1] * path[1:]).sum(1) / path[:-1].norm(dim=1) / path[1:].norm(dim=1)
    torch.testing.assert_close(angles.acos(), angles.acos()[:1].expand(4))


def test_interpolation_between_equal_images_is_finite() -> None:
    noise = torch.randn(10)
    path = slerp(noise, noise, torch.linspace(0, 1, 3))
    torch.testing.assert_close(path, noise.expand(3, -1))
