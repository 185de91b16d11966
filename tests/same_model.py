"""Comparison of models, for the tests of saving and loading."""

import torch

from nvae_lightning.backends import Compute
from nvae_lightning.model import NVAE


def assert_same(one: NVAE, other: NVAE) -> None:
    """Compare weights, and outputs from the same noise, exactly."""
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    image = one.image
    x = torch.rand(2, image.channels, image.size, image.size).round()
    noise = [torch.randn(2, *shape) for shape in one.latent_shapes]
    # Another layout, or unfolded layers, would round differently.
    for model in (one, other):
        Compute(recompute="activation").apply(model)
        model.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        weights = [model(x, noise).log_weight(x) for model in (one, other)]
        images = [model.sample(2, 0.7, noise).mean for model in (one, other)]
    assert weights[0].isfinite().all()
    assert torch.equal(*weights)
    assert torch.equal(*images)
