"""Anomaly scores and their AUROC."""

from __future__ import annotations

import pytest
import torch

from nvae_lightning.inference.anomaly import AnomalyScores, auroc
from nvae_lightning.model import NVAE


def test_ratios_are_differences_of_bounds(nvae: NVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    module = AnomalyScores(nvae, num_importance_samples=3)
    assert module.names == ["log_likelihood", "llr_1", "llr_2"]
    image = nvae.image
    x = torch.rand(5, image.channels, image.size, image.size).round()
    monkeypatch.setattr(torch, "randn", lambda shape, **kind: torch.full(shape, 0.1, **kind))
    scores = module.predict_step(x, 0)
    assert scores.shape == (5, 3)
    bounds = [nvae.log_weights(x, 3, num_inferred=n).logsumexp(0) for n in (3, 2, 1)]
    torch.testing.assert_close(scores[:, 1], bounds[0] - bounds[1], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(scores[:, 2], bounds[0] - bounds[2], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("k", [0, 3, -1])
def test_a_k_without_inferred_groups_is_refused(nvae: NVAE, k: int) -> None:
    with pytest.raises(
        ValueError, match=f"k: got {k}, but at least one of the model's 3 .* from 1 to 2"
    ):
        AnomalyScores(nvae, ks=[1, k])


def test_zero_importance_samples_are_refused(nvae: NVAE) -> None:
    with pytest.raises(
        ValueError, match="num_importance_samples must be an integer of at least 1, got 0"
    ):
        AnomalyScores(nvae, num_importance_samples=0)


def test_auroc_is_the_fraction_of_correctly_ordered_pairs() -> None:
    # A sigmoid would make values of thousands of nats, a thousandth apart, equal.
    foreign = torch.tensor([[-5000.002, 3.0], [-5000.001, 1.0], [-4999.998, 2.0]]).double()
    known = torch.tensor([[-5000.0, 0.5], [-4999.999, 2.5]]).double()
    likelihood, ratio = auroc(foreign, known)
    assert likelihood == pytest.approx(4 / 6)
    assert ratio == pytest.approx(4 / 6)
    assert auroc(foreign, foreign) == pytest.approx([0.5, 0.5])
    assert auroc(known - 10, known)[0] == 1.0
