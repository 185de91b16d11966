from typing import Any

import pytest
import torch

from nvae_lightning.model import Hierarchy, Image, Scale


def _doubling(**overrides: Any) -> Hierarchy:
    settings: dict[str, Any] = {
        "channels": 4,
        "num_groups": [1, 2],
        "downsample": 2,
        "latent_channels": 3,
    }
    return Hierarchy.doubling(**{**settings, **overrides})


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"channels": 2}, "image.channels"),
        ({"channels": 0}, "image.channels"),
        ({"bits": 9}, "image.bits"),
        ({"bits": 0}, "image.bits"),
        ({"size": 0}, "image.size"),
        ({"padding": -1}, "image.padding"),
    ],
)
def test_image_out_of_range_is_refused(fields: dict[str, int], setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        Image(**{"channels": 3, "size": 8, "bits": 8, **fields})


def test_dims_count_the_true_pixels_of_all_colours() -> None:
    assert Image(channels=3, size=32, bits=8).num_dims == 3072
    assert Image(channels=1, size=28, bits=1, padding=2).num_dims == 784


def test_crop_undoes_pad_and_the_border_is_zero() -> None:
    image = Image(channels=1, size=6, bits=1, padding=1)
    x = torch.rand(2, 1, 6, 6) + 1
    padded = image.pad(x)
    assert padded.shape == (2, 1, 8, 8)
    assert image.padded_size == 8
    assert torch.equal(image.crop(padded), x)
    assert padded.sum().item() == pytest.approx(x.sum().item())


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"downsample": 3}, "downsample"),
        ({"downsample": 0}, "downsample"),
        ({"channels": 0}, "channels"),
        ({"num_groups": 0}, "num_groups"),
    ],
)
def test_scale_out_of_range_is_refused(fields: dict[str, int], setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        Scale(**{"downsample": 2, "channels": 8, "num_groups": 1, **fields})


def test_scales_must_be_listed_coarsest_first() -> None:
    fine, coarse = Scale(2, 8, 1), Scale(4, 16, 1)
    assert Hierarchy((coarse, fine), 4).scales == (coarse, fine)
    with pytest.raises(ValueError, match="coarsest first"):
        Hierarchy((fine, coarse), 4)


@pytest.mark.parametrize("downsample", [2, 8])
def test_neighbouring_scales_must_be_a_factor_of_two_apart(downsample: int) -> None:
    with pytest.raises(ValueError, match="downsample"):
        Hierarchy((Scale(downsample, 16, 1), Scale(2, 8, 1)), 4)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_groups": [1, 0]}, "num_groups"),
        ({"num_groups": []}, "num_groups"),
        ({"downsample": 3}, "downsample"),
        ({"downsample": 0}, "downsample"),
        ({"channels": 0}, "channels"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"max_groups_per_scale": 0}, "max_groups_per_scale"),
        ({"channels": 5, "width": 0.5}, "width"),
        ({"channels": 4, "width": 0.1}, "width"),
        ({"channels": 4, "width": 0.0}, "width"),
        ({"channels": 4, "decoder_channels": 3, "width": 0.5}, "decoder_channels"),
    ],
)
def test_layout_out_of_range_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        _doubling(**settings)


def test_channels_double_whenever_the_resolution_halves() -> None:
    hierarchy = Hierarchy.doubling(
        channels=30, num_groups=[4, 4, 4, 8, 16], downsample=2, latent_channels=20
    )
    assert [scale.downsample for scale in hierarchy.scales] == [32, 16, 8, 4, 2]
    assert [scale.channels for scale in hierarchy.scales] == [960, 480, 240, 120, 60]
    assert [scale.num_groups for scale in hierarchy.scales] == [4, 4, 4, 8, 16]
    assert hierarchy.num_groups == 36


def test_width_scales_the_channels_and_the_maximum_caps_the_groups() -> None:
    hierarchy = _doubling(
        channels=8, decoder_channels=16, width=0.5, num_groups=[1, 9], max_groups_per_scale=2
    )
    assert [scale.channels for scale in hierarchy.scales] == [16, 8]
    assert [scale.top_down_channels for scale in hierarchy.scales] == [32, 16]
    assert [scale.num_groups for scale in hierarchy.scales] == [1, 2]


@pytest.mark.parametrize(("width", "channels"), [(0.1, 30), (0.3, 10), (0.7, 10), (0.55, 20)])
def test_widths_that_give_whole_channels_up_to_rounding_are_accepted(
    width: float, channels: int
) -> None:
    hierarchy = _doubling(channels=channels, width=width)
    assert hierarchy.scales[-1].channels == 2 * round(width * channels)


def test_groups_are_listed_with_their_scale_coarsest_first() -> None:
    hierarchy = _doubling()
    assert [k for k, _ in hierarchy.groups] == [0, 1, 1]
    assert [scale.downsample for _, scale in hierarchy.groups] == [4, 2, 2]


def test_scales_that_do_not_divide_the_image_are_refused() -> None:
    hierarchy = _doubling()
    hierarchy.check(Image(channels=1, size=6, bits=1, padding=1))
    with pytest.raises(ValueError, match=r"image\.size"):
        hierarchy.check(Image(channels=1, size=6, bits=1))


@pytest.mark.parametrize(
    ("image", "nearest"),
    [
        (Image(channels=1, size=30, bits=1), "set image.size to 28 or 32"),
        (Image(channels=1, size=30, bits=1, padding=2), "set image.size to 28 or 32"),
        (Image(channels=1, size=2, bits=1), "set image.size to 4,"),
    ],
)
def test_the_nearest_sizes_that_the_scales_divide_are_named(image: Image, nearest: str) -> None:
    hierarchy = Hierarchy.doubling(channels=4, num_groups=[1, 1], downsample=2, latent_channels=2)
    with pytest.raises(ValueError, match=nearest):
        hierarchy.check(image)


def test_number_of_halvings_is_the_binary_logarithm() -> None:
    assert [Scale(d, 1, 1).num_halvings for d in (1, 2, 4, 32)] == [0, 1, 2, 5]
