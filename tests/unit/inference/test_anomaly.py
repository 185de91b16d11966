from __future__ import annotations

import pytest
import torch

from nvae_lightning.inference.anomaly import AnomalyScores, auroc
from nvae_lightning.model import NVAE


def test_ratios_are_what_the_finest_groups_add_to_the_bound(
    nvae: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_k_leaves_a_group_to_infer(nvae: NVAE, k: int) -> None:
    with pytest.raises(ValueError, match=f"k: got {k}, but the model has 3 groups.* from 1 to 2"):
        AnomalyScores(nvae, ks=[1, k])


def test_there_is_at_least_one_sample(nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="num_importance_samples must be at least 1, got 0"):
        AnomalyScores(nvae, num_importance_samples=0)


def test_areas_count_the_pairs_in_the_right_order() -> None:
    # Likelihoods of thousands of nats, a thousandth apart: a sigmoid would see them all alike.
    foreign = torch.tensor([[-5000.002, 3.0], [-5000.001, 1.0], [-4999.998, 2.0]]).double()
    known = torch.tensor([[-5000.0, 0.5], [-4999.999, 2.5]]).double()
    likelihood, ratio = auroc(foreign, known)
    assert likelihood == pytest.approx(4 / 6)
    assert ratio == pytest.approx(4 / 6)
    assert auroc(foreign, foreign) == pytest.approx([0.5, 0.5])
    assert auroc(known - 10, known)[0] == 1.0
