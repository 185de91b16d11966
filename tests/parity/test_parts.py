"""Optimiser, flows, likelihood and schedules reproduce the published ones' numbers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from nvae_lightning.model import (
    DiscretizedLogisticMixtureLikelihood,
    FlowPair,
    Hierarchy,
    Image,
    likelihood,
)
from nvae_lightning.model.flows import AutoregressiveFlow
from nvae_lightning.objective import (
    annealed_penalty_weight,
    kl_warmup,
    size_factor,
    warmup_cosine,
)

if TYPE_CHECKING:
    from .conftest import Recorded


@pytest.mark.parametrize("variant", ["fast", "torch"])
def test_adamax(adamax: Recorded, variant: str) -> None:
    initial = adamax.under("init/")
    parameters = {name: nn.Parameter(value.clone()) for name, value in initial.items()}
    optimizer = torch.optim.Adamax(parameters.values(), lr=1e-2, eps=1e-3, weight_decay=3e-4)
    for step in range(4):
        for name, parameter in parameters.items():
            parameter.grad = adamax[f"grad/step{step}/{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            adamax.check(f"{variant}/step{step}/{name}", parameter)


def test_flow_pair(flow: Recorded) -> None:
    pair = FlowPair(flow["z"].shape[1])
    paths = {"expand": "conv.convz.0", "mix": "conv.convz.2", "project": "mu.conv_0"}
    state = {
        name: flow[
            f"state/cell{int(step) + 1}.{paths[convolution]}."
            + leaf.replace("log_gain", "log_weight_norm")
        ]
        for name in pair.state_dict()
        for step, convolution, leaf in [name.split(".")]
    }
    pair.load_state_dict(state)
    assert len(state) == len(flow.under("state/"))
    for number, step in enumerate(pair, start=1):
        assert isinstance(step, AutoregressiveFlow)
        for name, path in paths.items():
            mask = step.get_submodule(name).get_buffer("mask")
            assert torch.equal(mask, flow[f"mask/cell{number}.{path}"])
    flow.check("after_cell1", pair[0](flow["z"]))
    flow.check("new_z", pair(flow["z"]))
    assert (flow["log_det"] == 0).all()


@pytest.mark.parametrize("bits", [5, 8])
def test_mixture_at_every_level(
    mixture: Recorded, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The levels form one column; a likelihood of square images takes each as an image.
    def pixels(name: str) -> torch.Tensor:
        return mixture[f"dml{bits}/{name}"].transpose(0, 2)

    published = DiscretizedLogisticMixtureLikelihood(
        Image(channels=3, size=1, bits=bits),
        num_mixtures=3,
        published_tails=True,
        published_temperature=True,
    )
    distribution = published(pixels("logits"))

    def check(name: str, got: torch.Tensor) -> None:
        mixture.check(f"dml{bits}/{name}", got.transpose(0, 2))

    log_prob = distribution.log_prob(pixels("x"))
    mixture.check(f"dml{bits}/log_prob", log_prob[None, :, None])
    check("mean", distribution.mean)
    for temperature in (0.7, 1.0):
        uniforms = iter([pixels("u_gumbel"), pixels("u_logistic")])
        monkeypatch.setattr(likelihood, "_open_uniform", lambda like, u=uniforms: next(u))
        check(f"sample_t{temperature}", distribution.sample(temperature))


def test_learning_rate(schedules: dict[str, Any]) -> None:
    recorded = schedules["lr"]
    per_epoch, warmup = recorded["iters_per_epoch"], recorded["warmup_epochs"]
    rate = partial(
        warmup_cosine,
        peak=recorded["base"],
        final=recorded["min"],
        warmup_steps=warmup * per_epoch,
        total_steps=recorded["epochs"] * per_epoch,
        interval=per_epoch,
    )
    got = [rate(step) for step in range(len(recorded["values"]))]
    assert got == pytest.approx(recorded["values"], rel=1e-5)


def test_kl_weight(schedules: dict[str, Any]) -> None:
    recorded = schedules["kl_coeff"]
    beta = partial(
        kl_warmup,
        total_steps=recorded["total_iter"],
        fraction=recorded["anneal"],
        constant_fraction=recorded["const"],
        floor=recorded["min"],
    )
    got = [beta(step) for step in range(len(recorded["values"]))]
    assert got == pytest.approx(recorded["values"], rel=1e-5)


def test_penalty_weight(schedules: dict[str, Any]) -> None:
    recorded = schedules["wdn"]
    weight = partial(annealed_penalty_weight, initial=recorded["init"], final=recorded["final"])
    got = [weight(beta) for beta in schedules["kl_coeff"]["values"]]
    assert got == pytest.approx(recorded["values"], rel=1e-5)


def test_size_factors(schedules: dict[str, Any]) -> None:
    for name, recorded in schedules["kl_balancer_alpha"].items():
        hierarchy = Hierarchy.doubling(
            channels=4, num_groups=recorded["groups"][::-1], downsample=2, latent_channels=1
        )
        assert size_factor(hierarchy).tolist() == pytest.approx(recorded["alpha"], rel=1e-5), name
