"""Pseudo-Gibbs inpainting keeps known pixels and converges to the conditional distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nvae_lightning.inference.restoration import inpaint, pseudo_gibbs
from nvae_lightning.model import NVAE


def _image(model: NVAE) -> Tensor:
    image = model.image
    levels = torch.randint(0, 2**image.bits, (1, image.channels, image.size, image.size))
    return levels / (2**image.bits - 1)


def _upper_half(model: NVAE) -> Tensor:
    return torch.arange(model.image.size)[:, None].expand(-1, model.image.size) < 3


def test_exact_posteriors_draw_from_the_conditional_distribution() -> None:
    # z ~ N(0, 1), two pixels x = a z + N(0, s²): all distributions are known.
    slopes, noise = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), 0.5
    precision = 1.0 + float(slopes.square().sum()) / noise**2

    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (slopes * x).sum(3, keepdim=True) / noise**2 / precision
        z = mean + torch.randn_like(mean) / math.sqrt(precision)
        return slopes * z + noise * torch.randn_like(x), slopes * z

    x = torch.tensor([0.8, float("nan")]).view(1, 1, 1, 2).expand(20_000, -1, -1, -1)
    known = torch.tensor([[True, False]])
    found = pseudo_gibbs(encode_and_decode, x, torch.zeros_like(x), known, num_rounds=60)
    assert torch.equal(found[..., 0], x[..., 0])
    of_z = 1.0 + 1.0 / noise**2  # precision of p(z | the known pixel)
    mean, std = 2.0 * 0.8 / noise**2 / of_z, 2.0 / math.sqrt(of_z)
    assert float(found[..., 1].mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(20_000))
    assert float(found[..., 1].std()) == pytest.approx(std, rel=0.03)


def test_known_pixels_are_kept_exactly(nvae: NVAE) -> None:
    x, known = _image(nvae), _upper_half(nvae)
    found = inpaint(nvae, x, known, num_completions=3, num_rounds=2)
    assert torch.equal(found.images[..., known], x[..., known].expand(3, -1, -1))
    assert bool((found.std[..., known] == 0).all())
    assert bool((found.std[..., ~known] > 0).all())
    expected = found.images.std(0, correction=0)[..., ~known]
    assert torch.equal(found.std[..., ~known], expected)


def test_missing_pixels_of_the_image_are_not_read(colour_nvae: NVAE) -> None:
    x, known = _image(colour_nvae), _upper_half(colour_nvae)
    one, other = (
        inpaint(
            colour_nvae, given, known, num_rounds=2, generator=torch.Generator().manual_seed(3)
        ).images
        for given in (x, torch.where(known, x, 0.0))
    )
    assert torch.equal(one, other)


def test_completions_depend_on_the_generator_and_leave_other_random_numbers(
    colour_nvae: NVAE,
) -> None:
    x, known = _image(colour_nvae), _upper_half(colour_nvae)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return inpaint(colour_nvae, x, known, num_rounds=2, generator=generator).images

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = draw(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)


def test_one_round_is_a_reconstruction_with_the_known_pixels(colour_nvae: NVAE) -> None:
    x, known = _image(colour_nvae), torch.zeros(8, 8, dtype=torch.bool)
    known[0, 0] = True
    found = inpaint(colour_nvae, x, known, num_completions=5, num_rounds=1, temperature=0.0)
    assert found.images.shape == (5, 3, 8, 8)
    assert bool((found.images[:, :, 1:].std(0) > 0).all())  # the chains start independently


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rounds": 0}, "task.num_rounds"),
        ({"num_completions": 0}, "task.num_completions"),
        ({"temperature": -1.0}, r"task\.temperature: got -1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(colour_nvae: NVAE, change: dict, message: str) -> None:
    arguments = {"known": _upper_half(colour_nvae), **change}
    with pytest.raises(ValueError, match=message):
        inpaint(colour_nvae, _image(colour_nvae), **arguments)
