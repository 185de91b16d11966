from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    Inference,
    Normal,
    RegularCell,
    Scale,
)
from nvae_lightning.model.decoder import ConditionalGroup
from nvae_lightning.model.layers import (
    DataDependentConv2d,
    SqueezeExcitation,
)
from nvae_lightning.model.memory import Footprint
from nvae_lightning.utilities.live_bytes import peak_bytes

BuildNVAE = Callable[..., NVAE]


def _images(image: Image, num: int = 3) -> Tensor:
    top = 2**image.bits - 1
    return torch.randint(0, top + 1, (num, image.channels, image.size, image.size)).float() / top


def _noise(model: NVAE, num: int = 3) -> list[Tensor]:
    return [torch.randn(num, *shape) for shape in model.latent_shapes]


def _prior_draws(model: NVAE, noise: list[Tensor], temperature: float) -> list[Tensor]:
    with torch.no_grad():
        latents, _ = model.decoder(len(noise[0]), noise=noise, temperature=temperature)
    return [latent.z for latent in latents]


# --- shapes ----------------------------------------------------------------------------------


def test_latent_shapes_are_coarsest_first(colour_nvae: NVAE) -> None:
    assert colour_nvae.latent_shapes == [(2, 2, 2), (2, 4, 4), (2, 4, 4)]


def test_latent_shapes_follow_the_padded_image(grey_nvae: NVAE) -> None:
    assert grey_nvae.latent_shapes == [(2, 2, 2), (2, 4, 4), (2, 4, 4)]


def test_inference_has_one_latent_per_group_and_a_likelihood_of_the_images(nvae: NVAE) -> None:
    x = _images(nvae.image)
    inference = nvae(x)
    assert [tuple(latent.z.shape[1:]) for latent in inference.latents] == nvae.latent_shapes
    assert inference.likelihood.log_prob(x).shape == (3,)
    assert (inference.likelihood.log_prob(x) < 0).all()
    assert inference.likelihood.mean.shape == x.shape


def test_draws_have_the_shape_of_the_images(nvae: NVAE) -> None:
    distribution = nvae.sample(5, temperature=0.7)
    image = nvae.image
    for drawn in (distribution.mean, distribution.sample()):
        assert drawn.shape == (5, image.channels, image.size, image.size)
        assert drawn.min() >= 0.0
        assert drawn.max() <= 1.0


def test_encoding_has_the_latent_shapes_and_the_mean_that_is_inferred(nvae: NVAE) -> None:
    x = _images(nvae.image)
    torch.manual_seed(3)
    encoded = nvae.encode(x)
    torch.manual_seed(3)
    inference = nvae(x)
    for z, latent in zip(encoded, inference.latents, strict=True):
        assert torch.equal(z, latent.z)


# --- agreement of inference, decoding and sampling -------------------------------------------


def test_decoding_all_inferred_latents_gives_the_inferred_likelihood(nvae: NVAE) -> None:
    x = _images(nvae.image)
    with torch.no_grad():
        inference = nvae(x)
        decoded = nvae.decode([latent.z for latent in inference.latents])
    torch.testing.assert_close(decoded.logits, inference.likelihood.logits)
    torch.testing.assert_close(decoded.log_prob(x), inference.likelihood.log_prob(x))


@pytest.mark.parametrize("num_given", [1, 2, 3])
def test_decoding_the_draws_of_sampling_gives_the_sample(nvae: NVAE, num_given: int) -> None:
    noise = _noise(nvae)
    sampled = nvae.sample(3, temperature=0.8, noise=noise)
    given = _prior_draws(nvae, noise, temperature=0.8)[:num_given]
    decoded = nvae.decode(given, temperature=0.8, noise=noise)
    torch.testing.assert_close(decoded.logits, sampled.logits)


def test_decoding_draws_the_missing_groups(colour_nvae: NVAE) -> None:
    z = colour_nvae.encode(_images(colour_nvae.image))
    first, second = (colour_nvae.decode(z[:2]).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-4
    assert torch.equal(colour_nvae.decode(z).logits, colour_nvae.decode(z).logits)


def test_first_group_is_drawn_from_its_fixed_prior(colour_nvae: NVAE) -> None:
    noise = _noise(colour_nvae)
    drawn = _prior_draws(colour_nvae, noise, temperature=0.6)
    torch.testing.assert_close(drawn[0], 0.6 * noise[0])


def test_same_noise_gives_the_same_inference_and_other_noise_a_different_one(nvae: NVAE) -> None:
    x, noise = _images(nvae.image), _noise(nvae)
    with torch.no_grad():
        first, again, other = nvae(x, noise), nvae(x, noise), nvae(x, _noise(nvae))
    assert torch.equal(first.likelihood.logits, again.likelihood.logits)
    for one, two, three in zip(first.latents, again.latents, other.latents, strict=True):
        assert torch.equal(one.z, two.z)
        assert not torch.equal(one.z, three.z)


def test_draws_before_any_flow_are_posterior_mean_plus_noise(nvae: NVAE) -> None:
    noise = _noise(nvae)
    with torch.no_grad():
        latents = nvae(_images(nvae.image), noise).latents
    for latent, epsilon in zip(latents, noise, strict=True):
        drawn = latent.z if latent.base is None else latent.base
        torch.testing.assert_close(
            drawn, latent.posterior.mean + latent.posterior.std * epsilon, rtol=1e-5, atol=1e-5
        )


def test_sampling_at_temperature_zero_is_deterministic_and_warmer_is_not(nvae: NVAE) -> None:
    cold = [nvae.sample(2, temperature=0.0).logits for _ in range(2)]
    warm = [nvae.sample(2, temperature=1.0).logits for _ in range(2)]
    assert torch.equal(*cold)
    assert torch.equal(cold[0][0], cold[0][1])
    assert cold[0].isfinite().all()
    assert (warm[0] - warm[1]).abs().max() > 1e-4


def test_images_of_a_batch_do_not_influence_each_other_in_evaluation(nvae: NVAE) -> None:
    x, noise = _images(nvae.image), _noise(nvae)
    with torch.no_grad():
        batch = nvae(x, noise)
        alone = nvae(x[:1], [epsilon[:1] for epsilon in noise])
    torch.testing.assert_close(
        batch.likelihood.logits[:1], alone.likelihood.logits, rtol=1e-4, atol=1e-4
    )


def test_the_network_reads_black_as_minus_one_and_white_as_one(grey_nvae: NVAE) -> None:
    seen: list[Tensor] = []
    grey_nvae.encoder.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.ones(1, 1, 6, 6)
    x[0, 0, 2, 3] = 0.0
    grey_nvae(x)
    black = torch.nn.functional.pad(1 - x, (1, 1, 1, 1), value=1.0)
    assert torch.equal(seen[0], 1 - 2 * black)  # the padding is also black


# --- log-likelihood ---------------------------------------------------------------------------


def test_log_likelihood_of_one_sample_is_its_log_weight(nvae: NVAE) -> None:
    x = _images(nvae.image)
    torch.manual_seed(5)
    log_likelihood = nvae.log_likelihood(x, num_samples=1)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = nvae(x).log_weight(x)
    torch.testing.assert_close(log_likelihood, expected)


def test_log_likelihood_of_many_samples_is_the_logarithm_of_their_mean_weight(nvae: NVAE) -> None:
    x = _images(nvae.image)
    torch.manual_seed(5)
    log_likelihood = nvae.log_likelihood(x, num_samples=4)
    torch.manual_seed(5)
    weights = nvae.log_weights(x, num_samples=4).double()
    assert weights.shape == (4, 3)
    assert (weights[1:] != weights[:1]).all()
    shift = weights.max(0).values
    expected = shift + (weights - shift).exp().mean(0).log()
    torch.testing.assert_close(log_likelihood.double(), expected, rtol=1e-5, atol=1e-4)


def test_sharing_the_bottom_up_pass_does_not_change_the_weights(nvae: NVAE) -> None:
    x = _images(nvae.image)
    noise = [torch.randn(4 * len(x), *shape) for shape in nvae.latent_shapes]
    with torch.no_grad():
        latents, logits = nvae.decoder(4 * len(x), features=nvae._features(x), noise=noise)
        shared = Inference(nvae.likelihood(logits), latents).log_weight(x.repeat(4, 1, 1, 1))
        passes = [nvae(x, [n.split(len(x))[k] for n in noise]).log_weight(x) for k in range(4)]
    torch.testing.assert_close(shared, torch.cat(passes), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("budget", ["least", 2_000_000, 1 << 30])
def test_memory_is_bounded_by_the_budget_and_the_results_do_not_depend_on_it(
    nvae: NVAE, budget: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = _images(nvae.image)
    if isinstance(budget, str):
        with pytest.raises(ValueError, match=r"memory_budget must be at least .* got 1$") as error:
            nvae.log_weights(x, 1, memory_budget=1)
        budget = int(str(error.value).split()[5].replace(",", ""))
    monkeypatch.setattr(torch, "randn", lambda shape, **kind: torch.full(shape, 0.3, **kind))
    weights: list[Tensor] = []
    peak = peak_bytes(lambda: weights.append(nvae.log_weights(x, 9, memory_budget=budget)))
    slack = x.nbytes + 9 * 3 * 64  # the images and the returned weights
    assert peak <= budget + slack
    noise = [torch.full((len(x), *shape), 0.3) for shape in nvae.latent_shapes]
    with torch.no_grad():
        expected = nvae(x, noise).log_weight(x).expand(9, -1)
    torch.testing.assert_close(weights[0], expected, rtol=1e-5, atol=1e-3)


def test_memory_is_measured_once_for_images_of_a_kind(
    nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = Footprint.measure
    monkeypatch.setattr(Footprint, "measure", lambda *p: measured.append(1) or measure(*p))
    x = _images(nvae.image)
    for _ in range(2):
        nvae.log_weights(x, 2)
    assert len(measured) == 1
    nvae.double().log_weights(x.double(), 2)
    assert len(measured) == 2


def test_without_a_budget_one_image_is_always_allowed(
    nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvae_lightning.model.memory._CPU_MEMORY_BUDGET", 1)
    assert nvae.log_weights(_images(nvae.image), 2).isfinite().all()


def test_groups_that_are_not_inferred_are_drawn_from_their_prior(
    nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = _images(nvae.image)
    monkeypatch.setattr(torch, "randn", lambda shape, **kind: torch.full(shape, 0.3, **kind))
    noise = [torch.full((len(x), *shape), 0.3) for shape in nvae.latent_shapes]
    with torch.no_grad():
        inference = nvae(x, noise)
    for num_inferred in range(len(noise) + 1):
        kept = inference.latents[:num_inferred]
        decoded = nvae._decode(len(x), [latent.z for latent in kept], 1.0, noise)
        expected = decoded.log_prob(x) + sum(latent.log_p - latent.log_q for latent in kept)
        found = nvae.log_weights(x, 2, num_inferred=num_inferred)
        torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("num_inferred", [-1, 4])
def test_number_of_inferred_groups_is_checked(nvae: NVAE, num_inferred: int) -> None:
    with pytest.raises(ValueError, match=f"num_inferred must be from 0 .* 3, got {num_inferred}"):
        nvae.log_weights(_images(nvae.image), 1, num_inferred=num_inferred)


# --- noise and temperature -------------------------------------------------------------------


def test_noise_of_latents_reproduces_them(nvae: NVAE) -> None:
    x = _images(nvae.image)
    with torch.no_grad():
        latents = nvae.encode(x)
        noise = nvae.noise_of(latents)
    sampled = nvae.sample(len(x), noise=noise).logits
    torch.testing.assert_close(sampled, nvae.decode(latents).logits, rtol=1e-4, atol=1e-4)


def test_noise_of_prior_draws_is_the_noise_that_made_them(nvae: NVAE) -> None:
    noise = _noise(nvae)
    with torch.no_grad():
        found = nvae.noise_of(_prior_draws(nvae, noise, 1.0))
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-4)


def test_temperature_per_scale_applies_to_the_groups_of_that_scale(nvae: NVAE) -> None:
    noise = _noise(nvae)
    assert torch.equal(nvae.sample(3, [0.6, 0.6], noise).logits, nvae.sample(3, 0.6, noise).logits)
    with torch.no_grad():
        latents, _ = nvae.decoder(
            3, noise=noise, temperature=nvae.temperature_of_groups([0.0, 1.0])
        )
        first, *finer = nvae.noise_of([latent.z for latent in latents])
    assert (first == 0.0).all()
    torch.testing.assert_close(finer, noise[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        ([0.5], "one for each of 2 scales, got 1"),
        ([0.5, -1.0], "not negative"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
    ],
)
def test_temperatures_are_checked(
    nvae: NVAE, temperature: float | list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nvae.sample(1, temperature)


# --- distributions of the groups --------------------------------------------------------------


@pytest.mark.parametrize("std", [1.0, 1.01])
def test_prior_of_the_first_group_is_fixed(build_nvae: BuildNVAE, std: float) -> None:
    model = build_nvae(first_prior_std=std).eval()
    prior = model(_images(model.image)).latents[0].prior
    assert (prior.mean == 0.0).all()
    torch.testing.assert_close(prior.std, torch.full_like(prior.std, std))
    noise = _noise(model)
    torch.testing.assert_close(_prior_draws(model, noise, 1.0)[0], std * noise[0])


def test_default_prior_of_the_first_group_is_standard_normal(colour_nvae: NVAE) -> None:
    prior = colour_nvae(_images(colour_nvae.image)).latents[0].prior
    assert (prior.mean == 0.0).all()
    assert (prior.std == 1.0).all()


def _silence_posteriors(model: NVAE) -> None:
    with torch.no_grad():
        for group in model.decoder.groups:
            if isinstance(group, ConditionalGroup):
                group.posterior.log_gain.fill_(-1e3)
                assert group.posterior.bias is not None
                group.posterior.bias.zero_()


def test_residual_posterior_that_adds_nothing_is_the_prior(build_nvae: BuildNVAE) -> None:
    model = build_nvae(residual_posterior=True).eval()
    _silence_posteriors(model)
    latents = model(_images(model.image)).latents
    for latent in latents[1:]:
        assert torch.equal(latent.posterior.mean, latent.prior.mean)
        assert torch.equal(latent.posterior.std, latent.prior.std)
        assert latent.kl.abs().max() == 0.0
    assert latents[0].kl.min() > 0.0


def test_absolute_posterior_does_not_depend_on_the_prior(build_nvae: BuildNVAE) -> None:
    model = build_nvae(residual_posterior=False).eval()
    _silence_posteriors(model)
    for latent in model(_images(model.image)).latents[1:]:
        assert (latent.posterior.mean == 0.0).all()
        torch.testing.assert_close(latent.posterior.std, torch.full_like(latent.z, 1.01))
        assert latent.kl.min() > 0.0


def test_residual_posterior_adds_the_networks_output_to_the_raw_prior(
    build_nvae: BuildNVAE,
) -> None:
    residual = build_nvae(residual_posterior=True).eval()
    absolute = build_nvae(residual_posterior=False).eval()
    absolute.load_state_dict(residual.state_dict())
    x, noise = _images(residual.image), _noise(residual)
    with torch.no_grad():
        relative, plain = residual(x, noise).latents[1], absolute(x, noise).latents[1]
    # Undo the soft clamps: the raw means and log standard deviations must add up.
    assert torch.equal(relative.prior.mean, plain.prior.mean)
    raw = [
        (5 * torch.atanh(n.mean / 5), 5 * torch.atanh((n.std - 0.01).log() / 5))
        for n in (relative.posterior, plain.posterior, plain.prior)
    ]
    for kind in range(2):
        torch.testing.assert_close(raw[0][kind], raw[1][kind] + raw[2][kind], rtol=1e-3, atol=1e-3)
    assert (relative.posterior.mean - plain.posterior.mean).abs().max() > 1e-3


def test_inference_with_flows_keeps_the_base_draw_for_the_density(
    flow_nvae: NVAE,
) -> None:
    for latent in flow_nvae(_images(flow_nvae.image)).latents:
        assert latent.base is not None
        assert (latent.base - latent.z).abs().max() > 1e-4
        torch.testing.assert_close(latent.kl, latent.log_q - latent.log_p)


def test_inference_without_flows_has_no_base_draw(colour_nvae: NVAE) -> None:
    assert all(latent.base is None for latent in colour_nvae(_images(colour_nvae.image)).latents)


# --- errors -----------------------------------------------------------------------------------


def test_images_of_a_wrong_shape_are_refused(colour_nvae: NVAE) -> None:
    for shape in ((2, 1, 8, 8), (2, 3, 16, 16), (2, 3, 8, 4)):
        with pytest.raises(ValueError, match=r"channel, height, width"):
            colour_nvae(torch.rand(shape))
        with pytest.raises(ValueError, match=r"channel, height, width"):
            colour_nvae.log_likelihood(torch.rand(shape), num_samples=1)


def test_zero_samples_are_refused(colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="num_samples"):
        colour_nvae.sample(0)
    with pytest.raises(ValueError, match="num_samples"):
        colour_nvae.log_likelihood(_images(colour_nvae.image), num_samples=0)


def test_negative_temperature_is_refused(colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="temperature"):
        colour_nvae.sample(1, temperature=-0.1)
    with pytest.raises(ValueError, match="temperature"):
        colour_nvae.decode([torch.zeros(1, 2, 2, 2)], temperature=-0.1)


def test_wrong_numbers_of_latents_are_refused(colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="3 groups, got 0"):
        colour_nvae.decode([])
    z = [torch.zeros(1, *shape) for shape in colour_nvae.latent_shapes]
    with pytest.raises(ValueError, match="3 groups, got 4"):
        colour_nvae.decode([*z, z[-1]])


def test_latents_of_a_wrong_shape_are_refused(colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="latents of group 0"):
        colour_nvae.decode([torch.zeros(1, 2, 4, 4)])
    with pytest.raises(ValueError, match="latents of group 1"):
        colour_nvae.decode([torch.zeros(2, 2, 2, 2), torch.zeros(3, 2, 4, 4)])


@pytest.mark.parametrize("num", [2, 4])
def test_noise_for_another_number_of_groups_is_refused(colour_nvae: NVAE, num: int) -> None:
    noise = [*_noise(colour_nvae), torch.randn(3, 2, 4, 4)][:num]
    with pytest.raises(ValueError, match="noise"):
        colour_nvae(_images(colour_nvae.image), noise)
    with pytest.raises(ValueError, match="noise"):
        colour_nvae.sample(3, noise=noise)


def test_noise_for_another_number_of_images_is_refused(colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="noise"):
        colour_nvae.sample(3, noise=_noise(colour_nvae, num=1))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"num_encoder_cells": 0}, "num_encoder_cells"),
        ({"num_decoder_cells": 0}, "num_decoder_cells"),
        ({"num_preprocess_cells": 0}, "num_preprocess_cells"),
        ({"num_postprocess_cells": 0}, "num_postprocess_cells"),
        ({"num_flows": -1}, "num_flows"),
        ({"first_prior_std": 0.0}, "first_prior_std"),
        ({"first_prior_std": -1.0}, "first_prior_std"),
        ({"hierarchy": Hierarchy((Scale(8, 8, 1), Scale(4, 6, 1)), 2)}, "channels"),
        ({"hierarchy": Hierarchy((Scale(4, 8, 1, decoder_channels=6),), 2)}, "channels"),
        ({"hierarchy": Hierarchy((Scale(16, 16, 1),), 2)}, r"image\.size"),
    ],
)
def test_settings_out_of_range_are_refused(
    build_nvae: BuildNVAE, overrides: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        build_nvae(**overrides)


def test_too_few_channels_for_the_skip_of_a_down_cell_are_refused(build_nvae: BuildNVAE) -> None:
    hierarchy = Hierarchy.doubling(channels=1, num_groups=[1, 1], downsample=2, latent_channels=2)
    with pytest.raises(ValueError, match="channels"):
        build_nvae(hierarchy=hierarchy)


def test_likelihood_that_does_not_fit_the_image_is_refused(build_nvae: BuildNVAE) -> None:
    with pytest.raises(ValueError, match=r"image\.bits"):
        build_nvae(likelihood=BernoulliLikelihood)


# --- every variant trains all of its parameters ---------------------------------------------

BN_ELU = partial(RegularCell, activation=nn.ELU)
WN_ELU = partial(
    RegularCell,
    normalization=nn.Identity,
    activation=nn.ELU,
    convolution=DataDependentConv2d,
)
DEPTHWISE = partial(DepthwiseCell, expansion=2.0)
DILATED = partial(RegularCell, dilations=(2, 1))


def _all_cells(cell: Callable[..., nn.Module]) -> dict[str, Any]:
    return {f"{place}_cell": cell for place in ("encoder", "decoder", "preprocess", "postprocess")}


VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "two cells": {f"num_{place}_cells": 2 for place in ("encoder", "decoder", "preprocess")},
    "two scales of postprocessing": {
        "hierarchy": Hierarchy.doubling(
            channels=4, num_groups=[1, 1], downsample=4, latent_channels=2
        ),
        "num_postprocess_cells": 2,
    },
    "decoder of another width": {
        "hierarchy": Hierarchy.doubling(
            channels=4, decoder_channels=6, num_groups=[1, 2], downsample=2, latent_channels=2
        )
    },
    "scale at full resolution": {
        "hierarchy": Hierarchy.doubling(
            channels=4, num_groups=[1, 2], downsample=1, latent_channels=2
        )
    },
    "BN-ELU": _all_cells(BN_ELU),
    "WN-ELU": _all_cells(WN_ELU),
    "depthwise encoder": {"encoder_cell": DEPTHWISE, "preprocess_cell": DEPTHWISE},
    "regular decoder": {"decoder_cell": RegularCell, "postprocess_cell": RegularCell},
    "grouped decoder": {"decoder_cell": partial(DEPTHWISE, num_groups=2)},
    "dilated encoder": {"encoder_cell": DILATED, "preprocess_cell": DILATED},
    "absolute posterior": {"residual_posterior": False},
    "no squeeze-excitation": {"squeeze_excitation": False},
    "flows": {"num_flows": 2},
    "flows and absolute posterior": {"num_flows": 1, "residual_posterior": False},
    "5 bits": {"image": Image(channels=3, size=8, bits=5)},
    "grey mixture": {"image": Image(channels=1, size=8, bits=8)},
    "padded grey Bernoulli": {
        "image": Image(channels=1, size=6, bits=1, padding=1),
        "likelihood": BernoulliLikelihood,
    },
    "one component": {"likelihood": partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=1)},
}


def _loss(inference: Inference, x: Tensor) -> Tensor:
    kl = torch.stack([latent.kl for latent in inference.latents]).sum(0)
    return (kl - inference.likelihood.log_prob(x)).mean()


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest, build_nvae: BuildNVAE) -> NVAE:
    return build_nvae(**request.param)


def test_every_parameter_gets_a_finite_gradient_that_is_not_all_zero(variant: NVAE) -> None:
    model = variant.double().train()
    x = _images(model.image, num=4).double()
    with torch.no_grad():
        model(x)  # data-dependent initialisation
        for module in model.modules():
            if isinstance(module, SqueezeExcitation):
                module.squeeze.bias.fill_(1.0)  # so that no gate has all its hidden units off
    for mode in (True, False):
        # In evaluation, batch normalisation does not cancel the biases before it.
        model.train(mode)
        model.zero_grad()
        for _ in range(3):
            _loss(model(x), x).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or parameter.grad.abs().max() < 1e-9
    ]
    assert unused == []


# --- precision --------------------------------------------------------------------------------


@pytest.fixture(
    params=["published", "WN-ELU", "grouped decoder", "flows", "padded grey Bernoulli"]
)
def few(request: pytest.FixtureRequest, build_nvae: BuildNVAE) -> NVAE:
    """The variants whose operations differ."""
    return build_nvae(**VARIANTS[request.param])


def _tensors(normals: list[Normal]) -> list[Tensor]:
    return [tensor for normal in normals for tensor in (normal.mean, normal.log_std)]


def test_float64_is_kept_throughout(few: NVAE) -> None:
    model = few.double().train()
    rounded: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            del module, inputs
            if isinstance(output, Tensor):
                # A float32 step inside would leave only values that float32 represents.
                lossless = output.float().double() == output
                if output.dtype != torch.float64 or lossless.float().mean() > 0.6:
                    rounded.append(name)

        return hook

    x = _images(model.image).double()
    with torch.no_grad():
        model(x)
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)  # no longer representable in float32
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Identity, nn.Sequential)):
                module.register_forward_hook(watch(name))
        model.eval()
        inference = model(x)
    assert rounded == []
    for latent in inference.latents:
        for tensor in (latent.z, latent.kl, *_tensors([latent.prior, latent.posterior])):
            assert tensor.dtype == torch.float64
    assert inference.likelihood.log_prob(x).dtype == torch.float64
    assert model.sample(2).sample().dtype == torch.float64
    assert model.log_likelihood(x, 2).dtype == torch.float64


def test_float32_is_close_to_float64(few: NVAE) -> None:
    x, noise = _images(few.image), _noise(few)
    with torch.no_grad():
        few.train()(x)
        single = few.eval()(x, noise)
        double = few.double()(x.double(), [epsilon.double() for epsilon in noise])
    torch.testing.assert_close(
        single.log_weight(x).double(), double.log_weight(x.double()), rtol=1e-4, atol=1e-2
    )


def test_distributions_stay_in_float32_under_autocast(few: NVAE) -> None:
    x, noise = _images(few.image), _noise(few)
    with torch.no_grad():
        few.train()(x)
        exact = few.eval()(x, noise).log_weight(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inference = few(x, noise)
            log_weight = inference.log_weight(x)
            sampled = few.sample(2, temperature=0.7)
    for latent in inference.latents:
        for tensor in (latent.z, latent.kl, *_tensors([latent.prior, latent.posterior])):
            assert tensor.dtype == torch.float32
    assert inference.likelihood.logits.dtype == torch.float32
    assert sampled.logits.dtype == torch.float32
    assert log_weight.dtype == torch.float32
    torch.testing.assert_close(log_weight, exact, rtol=0.05, atol=5.0)


def test_gradients_under_autocast_are_finite(colour_nvae: NVAE) -> None:
    x = _images(colour_nvae.image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _loss(colour_nvae.train()(x), x)
    loss.backward()
    for name, parameter in colour_nvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_padded_images_are_accepted(grey_nvae: NVAE) -> None:
    x = torch.bernoulli(torch.full((3, 1, 6, 6), 0.5))
    noise = [torch.randn(3, *shape) for shape in grey_nvae.latent_shapes]
    padded = grey_nvae.image.pad(x)
    assert padded.shape == (3, 1, 8, 8)
    true, same = grey_nvae(x, noise), grey_nvae(padded, noise)
    assert torch.equal(true.likelihood.logits, same.likelihood.logits)
    assert torch.equal(true.log_weight(x), same.log_weight(padded))
    with pytest.raises(ValueError, match="the model is for images"):
        grey_nvae(torch.zeros(3, 1, 7, 7))
