"""A new training starts from trained weights; differences are refused or listed."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from nvae_lightning.inference.loading import initialize_from, pretrained_architecture
from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DiscretizedLogisticMixtureLikelihood,
    Image,
)

BuildNVAE = Callable[..., NVAE]


@pytest.fixture
def folder(build_nvae: BuildNVAE, tmp_path: Path) -> Path:
    """A saved model of 8x8 colour images."""
    build_nvae().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_all_weights_of_the_same_architecture_are_copied(
    build_nvae: BuildNVAE, folder: Path
) -> None:
    model, expected = build_nvae(), NVAE.from_pretrained(folder).state_dict()
    assert not torch.equal(model.decoder.initial_state, expected["decoder.initial_state"])
    assert initialize_from(model, folder) == []
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_only_weights_that_depend_on_the_image_keep_their_initial_values(folder: Path) -> None:
    image = Image(channels=1, size=16, bits=8)
    model = pretrained_architecture(
        folder,
        image=image,
        likelihood=partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=2),
    )
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    kept = initialize_from(model, folder)
    assert set(kept) == {
        "encoder.stem.weight", "decoder.initial_state",
        "decoder.head.1.weight", "decoder.head.1.log_gain", "decoder.head.1.bias",
    }  # fmt: skip
    expected = NVAE.from_pretrained(folder).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, initial[name] if name in kept else expected[name]), name


def test_another_architecture_is_refused_unless_not_strict(
    build_nvae: BuildNVAE, folder: Path
) -> None:
    model = build_nvae(num_decoder_cells=2)
    with pytest.raises(ValueError, match=r"init_from: \d+ weights .* model=pretrained"):
        initialize_from(model, folder)
    kept = initialize_from(model, folder, strict=False)
    assert kept
    assert all(name.startswith("decoder.groups.") for name in kept)


def test_another_architecture_for_other_images_is_refused_too(
    build_nvae: BuildNVAE, folder: Path
) -> None:
    model = build_nvae(Image(channels=3, size=16, bits=8), num_decoder_cells=2)
    with pytest.raises(ValueError, match=re.escape("decoder.groups")):
        initialize_from(model, folder)


def test_the_likelihood_is_kept_for_images_with_the_same_levels(folder: Path) -> None:
    for bits, kind in ((8, DiscretizedLogisticMixtureLikelihood), (1, BernoulliLikelihood)):
        image = Image(channels=3, size=16, bits=bits)
        model = pretrained_architecture(folder, image=image, likelihood=BernoulliLikelihood)
        assert type(model.likelihood) is kind


def test_the_architecture_of_no_weights_is_refused() -> None:
    image = Image(channels=1, size=16, bits=1)
    with pytest.raises(ValueError, match="set init_from"):
        pretrained_architecture(None, image=image, likelihood=BernoulliLikelihood)
