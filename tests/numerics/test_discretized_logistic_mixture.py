"""Numerics of the mixture, one pixel at a time.

The parameters of a pixel are: the M mixture logits; then for each colour M means, M log scales
and (for colour images) M coefficients before their tanh.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nvae_lightning.model import DiscretizedLogisticMixtureLikelihood, Image

LEVELS_8 = 255


def _grey(mixture: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Raw parameters (..., 3 * M, 1, 1) of one grey pixel from (..., M) each."""
    return torch.cat([mixture, means, log_scales], -1)[..., None, None]


def _levels(bits: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return all images of one grey pixel, (level, 1, 1, 1)."""
    top = 2**bits - 1
    return (torch.arange(top + 1, dtype=dtype) / top).view(-1, 1, 1, 1)


def _grey_log_probs(bits: int, logits: Tensor) -> Tensor:
    """Log probability of each level, (setting, level), from logits (setting, 3 * M, 1, 1)."""
    likelihood = DiscretizedLogisticMixtureLikelihood(
        Image(channels=1, size=1, bits=bits), num_mixtures=logits.shape[1] // 3
    )
    levels = _levels(bits, logits.dtype)
    num_settings, num_levels = len(logits), len(levels)
    x = levels.repeat(num_settings, 1, 1, 1)
    flat = likelihood(logits.repeat_interleave(num_levels, 0)).log_prob(x)
    return flat.view(num_settings, num_levels)


def _single_component_grid(dtype: torch.dtype = torch.float64) -> Tensor:
    level_254 = 2 * 254 / 255 - 1
    means = [
        -20.0,
        -3.0,
        -1.0,
        -level_254,
        -0.3,
        0.0,
        0.97,
        0.99,
        level_254,
        0.995,
        1.0,
        1.3,
        20.0,
    ]
    log_scales = [-30.0, -7.0, -5.0, -2.0, 0.0, 2.0, 5.0]
    grid = torch.tensor(list(itertools.product(means, log_scales)), dtype=dtype)
    return _grey(torch.zeros(len(grid), 1, dtype=dtype), grid[:, :1], grid[:, 1:])


@pytest.mark.parametrize("bits", range(1, 9))
def test_pixel_probabilities_sum_to_one(bits: int) -> None:
    total = _grey_log_probs(bits, _single_component_grid()).exp().sum(1)
    assert (total - 1.0).abs().max() < 1e-9


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_pixel_probabilities_of_a_mixture_sum_to_one(bits: int) -> None:
    logits = torch.randn(50, 12, 1, 1, dtype=torch.float64) * 2
    total = _grey_log_probs(bits, logits).exp().sum(1)
    assert (total - 1.0).abs().max() < 1e-9


@pytest.mark.parametrize("bits", [5, 8])
def test_pixel_probabilities_sum_to_one_in_float32(bits: int) -> None:
    # At the sharpest scale the rounding of the pixel value alone contributes 1e-4.
    total = _grey_log_probs(bits, _single_component_grid(torch.float32)).double().exp().sum(1)
    assert (total - 1.0).abs().max() < 1e-3


def test_level_254_of_8_bits_excludes_the_upper_tail() -> None:
    logits = _grey(*(torch.tensor([[v]]).double() for v in (0.0, 1.0, -2.0)))
    probabilities = _grey_log_probs(8, logits)[0].exp()
    centre, half, scale = 2 * 254 / LEVELS_8 - 1, 1 / LEVELS_8, math.exp(-2.0)
    cell = [1 / (1 + math.exp(-(centre + s * half - 1.0) / scale)) for s in (1, -1)]
    assert probabilities[254].item() == pytest.approx(cell[0] - cell[1], rel=1e-9)
    assert probabilities[254] < 0.1 * probabilities[255]


def _naive_colour_log_prob(logits: Tensor, pixel: Tensor, num_mixtures: int, bits: int) -> float:
    """Log probability of one colour by differences of sigmoids, in plain Python floats."""
    top = 2**bits - 1
    x = [2.0 * v - 1.0 for v in pixel.tolist()]
    raw = logits.tolist()
    mixture, rest = raw[:num_mixtures], raw[num_mixtures:]

    def parameter(colour: int, kind: int, k: int) -> float:
        return rest[(colour * 3 + kind) * num_mixtures + k]

    def sigmoid(a: float) -> float:
        return 1.0 / (1.0 + math.exp(-a))

    partition = sum(math.exp(v) for v in mixture)
    total = 0.0
    for k in range(num_mixtures):
        to_green, to_blue, green_to_blue = (math.tanh(parameter(c, 2, k)) for c in range(3))
        means = [
            parameter(0, 0, k),
            parameter(1, 0, k) + to_green * x[0],
            parameter(2, 0, k) + to_blue * x[0] + green_to_blue * x[1],
        ]
        probability = math.exp(mixture[k]) / partition
        for colour in range(3):
            scale = math.exp(max(parameter(colour, 1, k), -7.0))
            level = round(pixel[colour].item() * top)
            above = (x[colour] + 1.0 / top - means[colour]) / scale
            below = (x[colour] - 1.0 / top - means[colour]) / scale
            upper = 1.0 if level == top else sigmoid(above)
            lower = 0.0 if level == 0 else sigmoid(below)
            probability *= upper - lower
        total += probability
    return math.log(total)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_log_probability_agrees_with_differences_of_sigmoids(bits: int) -> None:
    top, num_mixtures = 2**bits - 1, 3
    likelihood = DiscretizedLogisticMixtureLikelihood(
        Image(channels=3, size=1, bits=bits), num_mixtures
    )
    logits = torch.randn(60, 30, 1, 1, dtype=torch.float64)
    x = torch.randint(0, top + 1, (60, 3, 1, 1)).double() / top
    x[0], x[1] = 0.0, 1.0
    expected = [
        _naive_colour_log_prob(one[:, 0, 0], pixel[:, 0, 0], num_mixtures, bits)
        for one, pixel in zip(logits, x, strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(likelihood(logits).log_prob(x), expected, rtol=1e-8, atol=1e-8)


def test_log_probability_far_from_the_mean_is_the_logistic_tail() -> None:
    # The difference of two sigmoids is 0 here; the tail of the density is exp(-distance / scale).
    logits = _grey(*(torch.tensor([[v]]).double() for v in (0.0, -0.9, -7.0)))
    log_probs = _grey_log_probs(8, logits)[0]
    step = (2 / LEVELS_8) * math.exp(7.0)
    assert log_probs.isfinite().all()
    steps = log_probs[100:254] - log_probs[101:255]
    torch.testing.assert_close(steps, torch.full_like(steps, step), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_colour_probabilities_sum_to_one(bits: int, spread: float) -> None:
    top = 2**bits - 1
    colours = torch.tensor(list(itertools.product(range(top + 1), repeat=3))).double() / top
    likelihood = DiscretizedLogisticMixtureLikelihood(
        Image(channels=3, size=1, bits=bits), num_mixtures=2
    )
    for _ in range(10):
        logits = spread * torch.randn(1, 20, 1, 1, dtype=torch.float64)
        log_prob = likelihood(logits.expand(len(colours), -1, -1, -1)).log_prob(
            colours[:, :, None, None]
        )
        assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_pixels_are_independent_and_padding_is_not_counted() -> None:
    logits = torch.randn(2, 30, 4, 4, dtype=torch.float64)
    x = torch.randint(0, 256, (2, 3, 2, 2)).double() / 255
    whole = DiscretizedLogisticMixtureLikelihood(Image(3, 2, 8, padding=1), 3)(logits).log_prob(x)
    one_pixel = DiscretizedLogisticMixtureLikelihood(Image(3, 1, 8), 3)
    parts = [
        one_pixel(logits[:, :, i + 1, j + 1, None, None]).log_prob(x[:, :, i, j, None, None])
        for i in range(2)
        for j in range(2)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_of_the_log_probability_agrees_with_finite_differences(channels: int) -> None:
    likelihood = DiscretizedLogisticMixtureLikelihood(Image(channels, 1, 3), num_mixtures=2)
    x = torch.randint(0, 8, (4, channels, 1, 1)).double() / 7
    x[0], x[1] = 0.0, 1.0
    logits = torch.randn(4, likelihood.num_logits, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda raw: likelihood(raw).log_prob(x), (logits,))


@pytest.mark.parametrize("magnitude", [10.0, 50.0, 1000.0])
@pytest.mark.parametrize("bits", [5, 8])
def test_gradients_of_extreme_parameters_are_finite_in_float32(
    bits: int, magnitude: float
) -> None:
    ends = torch.tensor([-magnitude, 0.0, magnitude])
    grid = torch.cartesian_prod(ends, ends, ends, ends)
    logits = torch.cat(
        [grid[:, :1], torch.zeros(len(grid), 1), grid[:, 1:3], grid[:, 3:], grid[:, :1]], 1
    )[:, :, None, None].requires_grad_()
    likelihood = DiscretizedLogisticMixtureLikelihood(Image(1, 1, bits), num_mixtures=2)
    top = 2**bits - 1
    for level in (0, 1, top // 2, top - 1, top):
        log_prob = likelihood(logits).log_prob(torch.full((len(grid), 1, 1, 1), level / top))
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        assert log_prob.isfinite().all()
        assert log_prob.max() <= 1e-5
        assert gradient.isfinite().all()


def _chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_of_grey_draws_match_the_level_probabilities(seed: int) -> None:
    torch.manual_seed(seed)
    num, bits = 100_000, 3
    logits = torch.cat([torch.randn(1, 4), torch.full((1, 2), -1.0)], 1).double()[..., None, None]
    image = Image(channels=1, size=1, bits=bits)
    draws = DiscretizedLogisticMixtureLikelihood(image, 2)(logits.expand(num, -1, -1, -1)).sample()
    counts = (draws.flatten() * 7).round().long().bincount(minlength=8)
    # Seven degrees of freedom: exceeds 30 by chance once in ten thousand times.
    assert _chi_square(counts, _grey_log_probs(bits, logits)[0].exp()) < 30


def test_frequencies_of_colour_draws_match_the_octant_probabilities() -> None:
    # Draws couple colours before they are rounded, probabilities after: hence many levels.
    bits, num = 6, 200_000
    levels = torch.arange(64)
    colours = torch.cartesian_prod(levels, levels, levels)
    likelihood = DiscretizedLogisticMixtureLikelihood(Image(3, 1, bits), num_mixtures=2)
    mixture = [0.3, -0.3]
    red = [-0.2, 0.3, -1.0, -0.5, 1.0, -0.7]  # means, log scales, coefficient of red to green
    green = [0.1, -0.1, -1.0, -1.5, -2.0, 0.5]  # the same for green, coefficient of red to blue
    blue = [-0.3, 0.2, -1.2, -0.8, 1.5, 2.0]  # the same for blue, coefficient of green to blue
    logits = torch.tensor([*mixture, *red, *green, *blue]).view(1, 20, 1, 1)
    x = (colours.float() / 63)[:, :, None, None]
    probability = likelihood(logits.expand(len(x), -1, -1, -1)).log_prob(x).double().exp()
    octant_weights = torch.tensor([4, 2, 1])
    octant = ((colours >= 32) * octant_weights).sum(1)
    expected = torch.zeros(8).double().index_add(0, octant, probability)

    draws = likelihood(logits.expand(num, -1, -1, -1)).sample()[:, :, 0, 0]
    drawn = ((draws >= 0.5) * octant_weights).sum(1).bincount(minlength=8) / num

    assert expected.sum().item() == pytest.approx(1.0, abs=1e-4)
    cube = expected.view(2, 2, 2)
    marginals = cube.sum((1, 2)), cube.sum((0, 2)), cube.sum((0, 1))
    independent = torch.einsum("i,j,k->ijk", *marginals)
    assert (cube - independent).abs().max() > 0.03  # the colours are indeed coupled
    assert (drawn - expected).abs().max() < 0.005


def _two_component_colour() -> Tensor:
    half = math.atanh(0.5)
    weights = [math.log(3.0), 0.0]  # 3/4 and 1/4
    red = [0.4, -0.4, -7.0, -7.0, half, -half]
    green = [0.1, 0.5, -7.0, -7.0, half, half]
    blue = [-0.2, 0.2, -7.0, -7.0, -half, -half]
    parameters = torch.tensor([*weights, *red, *green, *blue], dtype=torch.float64)
    return parameters.view(1, 20, 1, 1)


def test_mean_averages_components_and_then_couples_the_colours() -> None:
    mean = DiscretizedLogisticMixtureLikelihood(Image(3, 1, 8), 2)(_two_component_colour()).mean
    red = 0.75 * 0.4 + 0.25 * -0.4
    green = (0.75 * 0.1 + 0.25 * 0.5) + (0.75 * 0.5 - 0.25 * 0.5) * red
    blue = (0.75 * -0.2 + 0.25 * 0.2) + 0.5 * red - 0.5 * green
    assert mean.flatten().tolist() == pytest.approx([0.5 + 0.5 * v for v in (red, green, blue)])


def test_mean_clamps_a_colour_before_the_next_depends_on_it() -> None:
    half = math.atanh(0.5)
    logits = torch.tensor([0.0, 3.0, -7.0, half, 0.0, -7.0, 0.0, -3.0, -7.0, 0.0]).double()
    mean = DiscretizedLogisticMixtureLikelihood(Image(3, 1, 8), 1)(logits.view(1, 10, 1, 1)).mean
    assert mean.flatten().tolist() == pytest.approx([1.0, 0.75, 0.0])


def test_mean_of_a_grey_mixture_is_the_average_draw() -> None:
    logits = torch.tensor([0.5, -0.5, -0.3, 0.2, -4.0, -3.5]).double().view(1, 6, 1, 1)
    distribution = DiscretizedLogisticMixtureLikelihood(Image(1, 1, 8), 2)(
        logits.expand(50_000, -1, -1, -1)
    )
    draws = distribution.sample()
    standard_error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() - distribution.mean[0]).abs() < 5 * standard_error


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_coldest_draw_is_the_likeliest_component(temperature: float) -> None:
    logits = _two_component_colour().expand(50, -1, -1, -1)
    draws = DiscretizedLogisticMixtureLikelihood(Image(3, 1, 8), 2)(logits).sample(temperature)
    red = 0.4
    green = 0.1 + 0.5 * red
    blue = -0.2 + 0.5 * red - 0.5 * green
    expected = torch.tensor([0.5 + 0.5 * v for v in (red, green, blue)]).double()
    torch.testing.assert_close(
        draws[:, :, 0, 0], expected.expand(50, 3), rtol=0.0, atol=1e-6, check_dtype=False
    )


def test_lower_temperatures_are_less_noisy() -> None:
    logits = torch.tensor([0.0, 0.0, -3.0]).double().view(1, 3, 1, 1).expand(20_000, -1, -1, -1)
    distribution = DiscretizedLogisticMixtureLikelihood(Image(1, 1, 8), 1)(logits)
    spread = [distribution.sample(t).std().item() for t in (0.25, 0.5, 1.0)]
    assert spread[0] / spread[1] == pytest.approx(0.5, rel=0.05)
    assert spread[1] / spread[2] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_and_means_lie_in_the_unit_interval(channels: int) -> None:
    likelihood = DiscretizedLogisticMixtureLikelihood(Image(channels, 4, 8), num_mixtures=3)
    distribution = likelihood(10 * torch.randn(100, likelihood.num_logits, 4, 4))
    for image in (distribution.sample(), distribution.mean):
        assert image.shape == (100, channels, 4, 4)
        assert image.min() >= 0.0
        assert image.max() <= 1.0
