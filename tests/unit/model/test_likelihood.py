import pytest

from nvae_lightning.model import (
    BernoulliLikelihood,
    DiscretizedLogisticMixtureLikelihood,
    Image,
)


def test_bernoulli_likelihood_of_more_than_two_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image\.bits"):
        BernoulliLikelihood(Image(channels=1, size=8, bits=2))


def test_mixture_without_components_is_refused() -> None:
    with pytest.raises(ValueError, match="num_mixtures"):
        DiscretizedLogisticMixtureLikelihood(Image(channels=3, size=8, bits=8), num_mixtures=0)


@pytest.mark.parametrize(("channels", "num_logits"), [(1, 30), (3, 100)])
def test_mixture_has_three_parameters_per_grey_and_ten_per_colour_component(
    channels: int, num_logits: int
) -> None:
    image = Image(channels=channels, size=8, bits=8)
    assert DiscretizedLogisticMixtureLikelihood(image, num_mixtures=10).num_logits == num_logits
