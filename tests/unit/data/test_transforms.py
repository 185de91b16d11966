import pytest
import torch

from nvae_lightning.data.transforms import binarize, quantize, random_horizontal_flip

ALL_VALUES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_five_bit_levels_match_the_published_formula() -> None:
    levels = quantize(ALL_VALUES, 5)
    expected = torch.floor(torch.arange(256) / 8) / 31
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels.flatten(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_n_bits_give_two_to_the_n_equidistant_levels_from_zero_to_one(bits: int) -> None:
    levels = quantize(ALL_VALUES, bits).unique()
    torch.testing.assert_close(levels, torch.linspace(0, 1, 2**bits), rtol=0, atol=1e-6)


def test_eight_bits_are_lossless() -> None:
    restored = (quantize(ALL_VALUES, 8) * 255).round().to(torch.uint8)
    assert torch.equal(restored, ALL_VALUES)


def test_binary_pixels_are_zero_or_one_and_their_mean_is_the_intensity() -> None:
    torch.manual_seed(0)
    draws = binarize(ALL_VALUES.expand(4000, 1, 16, 16))
    assert draws.dtype == torch.float32
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # The standard error is at most 0.5 / sqrt(4000) = 0.008; 256 means stay within five.
    torch.testing.assert_close(draws.mean(0), ALL_VALUES[0] / 255, rtol=0, atol=0.04)


def test_black_and_white_pixels_are_never_changed_by_binarisation() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).repeat(1000, 1, 1, 1)
    assert torch.equal(binarize(images), images / 255)


def test_binarisation_is_random_at_every_call() -> None:
    torch.manual_seed(0)
    assert not torch.equal(binarize(ALL_VALUES), binarize(ALL_VALUES))


def test_each_image_is_flipped_as_a_whole_and_about_half_of_them_are() -> None:
    torch.manual_seed(0)
    images = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2).repeat(4000, 1, 1, 1)
    flipped = random_horizontal_flip(images)
    is_same = (flipped == images).flatten(1).all(1)
    is_mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(is_same, ~is_mirrored)
    assert is_mirrored.float().mean().item() == pytest.approx(0.5, abs=0.04)
