"""Our networks reproduce the published ones' numbers, given the same weights and noise."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from nvae_lightning.backends import Compute
from nvae_lightning.model import NVAE, Inference, likelihood
from nvae_lightning.model.layers import stack_weights
from nvae_lightning.objective import (
    ELBO,
    SpectralPenalty,
    balance_kl,
    balancing_factors,
    bn_scale_penalty,
    elbo,
    size_factor,
)
from nvae_lightning.published import load_published, published_names

if TYPE_CHECKING:
    from .conftest import Recorded


@pytest.fixture
def model(checkpoint: Path) -> NVAE:
    """The network with the backends of `load_model` and of a training."""
    model = load_published(checkpoint)
    Compute(recompute="activation").apply(model)
    return model


def _infer(model: NVAE, recorded: Recorded) -> tuple[Inference, ELBO]:
    x = model.image.crop(recorded["x"])
    inference = model(x, recorded.series("eps/"))
    return inference, elbo(inference, x)


def _convolutions(model: NVAE) -> dict[str, nn.Conv2d]:
    """Convolutions by their published names."""
    modules = dict(model.named_modules())
    return {
        published.removesuffix(".weight"): module
        for name, published in published_names(model).items()
        if isinstance(module := modules[name.rpartition(".")[0]], nn.Conv2d)
        and name.endswith(".weight")
    }


def _exact(convolution: nn.Conv2d) -> Tensor:
    return torch.linalg.matrix_norm(stack_weights([convolution])[0].flatten(1), ord=2)


def _recorded_spectral_penalty(model: NVAE, recorded: Recorded) -> SpectralPenalty:
    """Penalty that starts from the recorded vectors and runs the published 40 iterations."""
    convolutions = _convolutions(model)
    vectors = {shape: list(rows) for shape, rows in recorded.under("train/sr_u_init/").items()}
    start = {}
    for name in recorded.facts["conv_names"]:
        rows, columns = convolutions[name].weight.flatten(1).shape
        start[convolutions[name]] = vectors[f"{rows}x{columns}"].pop(0)
    assert not any(vectors.values())

    penalty = SpectralPenalty(model, first_iterations=40)
    stacks = defaultdict(list)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            stacks[type(module), module.weight.shape].append(start[module])
    for index, left in enumerate(stacks.values()):
        penalty.get_buffer(f"left_{index}").copy_(torch.stack(left)[:, :, None])
    return penalty


def _total(model: NVAE, recorded: Recorded, spectral: Tensor, terms: ELBO) -> Tensor:
    scalars = recorded.facts["scalars_train"]
    kl = balance_kl(terms.rate, size_factor(model.hierarchy), scalars["kl_coeff"])
    penalties = spectral + bn_scale_penalty(model)
    return (terms.distortion + kl).mean() + scalars["wdn_coeff"] * penalties


def _gradients(model: NVAE, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by the parameters' published names; zero where there is none."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, materialize_grads=True
    )
    names = published_names(model)
    return {names[name]: g for name, g in zip(parameters, gradients, strict=True)}


def test_parameters_match_the_published_network(model: NVAE, network: Recorded) -> None:
    names = published_names(model)
    parameters = {names[name]: parameter for name, parameter in model.named_parameters()}
    assert parameters.keys() == set(network.facts["param_names"])
    assert sum(p.numel() for p in parameters.values()) == network.facts["num_params"]
    assert _convolutions(model).keys() == set(network.facts["conv_names"])
    batch_norms = {name.rpartition(".")[0] for name in names.values() if "running_mean" in name}
    assert batch_norms == set(network.facts["bn_names"])
    assert [list(shape) for shape in model.latent_shapes] == network.facts[
        "latent_shapes_top_down"
    ]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_inference_by_the_plain_layers(checkpoint: Path, network: Recorded, mode: str) -> None:
    model = load_published(checkpoint).train(mode == "train")
    with torch.no_grad():
        inference, terms = _infer(model, network)
    network.check(f"{mode}/logits", inference.likelihood.logits)
    network.check(f"{mode}/kl", terms.rate.T)
    network.check(f"{mode}/recon", terms.distortion)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_inference(model: NVAE, network: Recorded, mode: str) -> None:
    model.train(mode == "train")
    with torch.no_grad():
        inference, terms = _infer(model, network)
    network.check(f"{mode}/logits", inference.likelihood.logits)
    network.check(f"{mode}/kl", terms.rate.T)
    network.check(f"{mode}/log_q", sum((z.log_q for z in inference.latents), torch.zeros(())))
    network.check(f"{mode}/log_p", sum((z.log_p for z in inference.latents), torch.zeros(())))
    network.check(f"{mode}/recon", terms.distortion)
    network.check(f"{mode}/log_iw", inference.log_weight(model.image.crop(network["x"])))
    network.check(f"{mode}/nelbo_unbalanced", -terms.value)


def test_balanced_objective(model: NVAE, network: Recorded) -> None:
    with torch.no_grad():
        _, terms = _infer(model.train(), network)
    factors = size_factor(model.hierarchy)
    kl = balance_kl(terms.rate, factors, network.facts["scalars_train"]["kl_coeff"])
    network.check("train/kl_vals", terms.rate.mean(1))
    network.check("train/alpha_i", factors)
    network.check("train/kl_coeffs", balancing_factors(terms.rate, factors))
    network.check("train/balanced_kl", kl)
    network.check("train/nelbo", terms.distortion + kl)


def test_penalties(model: NVAE, network: Recorded) -> None:
    scalars = network.facts["scalars_train"]
    convolutions = _convolutions(model)
    exact = torch.stack([_exact(convolutions[name]) for name in network.facts["conv_names"]])
    network.check("train/sigma_exact", exact)
    assert bn_scale_penalty(model).item() == pytest.approx(scalars["bn_loss"], rel=1e-5)
    spectral = _recorded_spectral_penalty(model, network)()
    assert spectral.item() == pytest.approx(scalars["spectral"], rel=1e-5)


def test_spectral_penalty_is_right_after_the_first_call(model: NVAE, network: Recorded) -> None:
    exact = network["train/sigma_exact"].sum().item()
    for seed in range(5):
        torch.manual_seed(seed)
        estimate = SpectralPenalty(model)().item()
        assert exact * (1 - 1e-3) <= estimate <= exact * (1 + 1e-5)


def test_total_and_its_gradients(model: NVAE, network: Recorded) -> None:
    scalars = network.facts["scalars_train"]
    _, terms = _infer(model.train(), network)
    total = _total(model, network, _recorded_spectral_penalty(model, network)(), terms)
    exact = torch.stack([_exact(c) for c in _convolutions(model).values()]).sum()
    total_exact = _total(model, network, exact, terms)
    kl = balance_kl(terms.rate, size_factor(model.hierarchy), scalars["kl_coeff"])
    nelbo = (terms.distortion + kl).mean()
    assert total.item() == pytest.approx(scalars["total"], rel=1e-5)
    assert total_exact.item() == pytest.approx(scalars["total_exact_sr"], rel=1e-5)
    assert nelbo.item() == pytest.approx(scalars["loss_mean_nelbo"], rel=1e-5)

    gradients = _gradients(model, total)
    for name, expected in network.under("train/grad/").items():
        assert gradients[name].shape == expected.shape
        network.check(f"train/grad/{name}", gradients[name])
    for name, loss in (("nelbo", nelbo), ("total", total), ("total_exact_sr", total_exact)):
        gradients = _gradients(model, loss)
        got = torch.stack([gradients[key].norm() for key in network.facts["param_names"]])
        expected = network[f"train/grad_norm_{name}"]
        # Gains and biases before a batch normalisation have tiny gradients, because large terms
        # cancel: 0.0011 is 2e-6 off in the recording, 9e-6 here.
        assert ((got - expected).abs() <= 1e-3 * expected + 2e-5).all(), name


def test_one_step_of_training(model: NVAE, network: Recorded) -> None:
    config = network.facts["config"]
    optimizer = torch.optim.Adamax(
        model.parameters(),
        lr=config["learning_rate"],
        eps=1e-3,
        weight_decay=config["weight_decay"],
    )
    _, terms = _infer(model.train(), network)
    _total(model, network, _recorded_spectral_penalty(model, network)(), terms).backward()
    optimizer.step()
    state = model.state_dict()
    after = {published: state[name] for name, published in published_names(model).items()}
    for name in network.under("train/after_step/"):
        network.check(f"train/after_step/{name}", after[name])
    _check_statistics(network, "train/bn_after/", after)


def _check_statistics(recorded: Recorded, prefix: str, got: dict[str, Tensor]) -> None:
    """Compare running means absolutely, because many are near 0, and variances relatively."""
    expected = recorded.under(prefix)
    assert expected
    for name, value in expected.items():
        if name.endswith("running_mean"):
            assert (got[name] - value).abs().max() <= 1e-6, name
        else:
            recorded.check(f"{prefix}{name}", got[name])


def test_samples(model: NVAE, network: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = network.series("sample/eps/")
    drawn = model.sample(len(noise[0]), network.facts["temperature"], noise)
    network.check("sample/logits", drawn.logits)
    mean = model.image.crop(network["sample/image_mean"])
    assert (drawn.mean - mean).abs().max() <= 1e-5 * mean.abs().max()
    if "sample/image" in network.tensors:
        uniforms = iter([network["sample/u_gumbel"], network["sample/u_logistic"]])
        monkeypatch.setattr(likelihood, "_open_uniform", lambda like: next(uniforms))
        network.check("sample/image", drawn.sample())


def test_sampling_in_training_mode_moves_statistics(model: NVAE, network: Recorded) -> None:
    if not network.under("sample_train/"):
        pytest.skip("not recorded for this network")
    noise = network.series("sample/eps/")
    drawn = model.train().sample(len(noise[0]), network.facts["temperature"], noise)
    network.check("sample_train/logits", drawn.logits)
    state = model.state_dict()
    after = {published: state[name] for name, published in published_names(model).items()}
    _check_statistics(network, "sample_train/bn_after/", after)
