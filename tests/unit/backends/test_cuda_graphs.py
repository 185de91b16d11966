"""Training and sampling agree with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nvae_lightning.backends import Compute, GraphedLoss, GraphedSampler
from nvae_lightning.benchmarking import RandomImages
from nvae_lightning.model import NVAE
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.objective import KL, Penalty
from nvae_lightning.objective.kl import size_factor
from nvae_lightning.objective.schedules import kl_warmup
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.image import Image as ImageFormat

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
NUM_STEPS = 6
Train = Callable[..., "Losses"]


class Losses(Callback):
    """Keep loss and metrics of each step and the final state."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.state: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        self.values.append(float(outputs["loss"]))
        self.metrics.append({k: float(v) for k, v in trainer.logged_metrics.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = pl_module.state_dict()
        self.state = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}


@pytest.fixture
def train(build_nvae: Callable[..., NVAE], tmp_path: Path) -> Train:
    """Train for a few steps, in which β and λ change and balancing ends."""

    def run(*, cuda_graphs: bool, **settings: Any) -> Losses:
        torch.manual_seed(0)
        module = NVAEModule(
            build_nvae(num_flows=1),
            kl=KL(beta=partial(kl_warmup, fraction=0.7), size_factor=size_factor),
            penalty=Penalty(weight=0.01, initial_weight=1.0),
            optimizer=partial(torch.optim.Adamax, lr=1e-3, eps=1e-3),
            final_learning_rate=1e-3,
            warmup_epochs=0,
            cuda_graphs=cuda_graphs,
        )
        Compute(recompute="activation").apply(module.model)
        assert module.spectral_penalty is not None
        module.spectral_penalty()
        losses = Losses()
        trainer = Trainer(
            accelerator="auto", devices=1, max_steps=NUM_STEPS, logger=False,
            log_every_n_steps=2, callbacks=[losses], precision="64-true", limit_val_batches=0,
            default_root_dir=tmp_path, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **settings,
        )  # fmt: skip
        images = RandomImages(num_batches=NUM_STEPS, batch_size=4, image=ImageFormat(3, 8, 8))
        torch.manual_seed(1)
        trainer.fit(module, images)
        return losses

    return run


@on_gpu
def test_training_with_graphs_equals_training_without(train: Train) -> None:
    found, expected = train(cuda_graphs=True), train(cuda_graphs=False)
    assert len(set(found.values)) == NUM_STEPS
    torch.testing.assert_close(found.values, expected.values)
    assert found.metrics[-1]["train/beta"] == 1.0
    assert found.metrics[-1]["train/spectral"] > 0.0
    torch.testing.assert_close(found.metrics, expected.metrics)
    torch.testing.assert_close(found.state, expected.state)


@on_gpu
def test_other_shapes_bypass_the_graph() -> None:
    weight = torch.tensor([2.0, 3.0], device="cuda", requires_grad=True)
    calls = []

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return (x @ weight).square().mean(), x.sum()

    graphed = GraphedLoss(function, [weight], [])
    for size, is_called in ((4, True), (4, False), (3, True), (4, False)):
        calls.clear()
        x = torch.randn(size, 2, device="cuda")
        loss, total = graphed(x)
        assert bool(calls) is is_called
        expected = (x @ weight).square().mean()
        torch.testing.assert_close((loss, total), (expected, x.sum()))
        torch.testing.assert_close(
            torch.autograd.grad(3.0 * loss, weight), torch.autograd.grad(3.0 * expected, weight)
        )


@on_gpu
def test_a_graph_requires_one_batch_per_step(train: Train) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=2, but a step in graphs"):
        train(cuda_graphs=True, accumulate_grad_batches=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without CUDA")
def test_a_graph_requires_a_cuda_device(train: Train, colour_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: got true, but the model is on 'cpu'"):
        train(cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs: got true, but the model is on 'cpu'"):
        GraphedSampler(colour_nvae.eval(), 4)


@on_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graph_draws_the_same_images_as_the_model(nvae: NVAE, dtype: torch.dtype | None) -> None:
    nvae.cuda().eval()
    graphed = GraphedSampler(nvae, 4, 0.7)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        torch.manual_seed(3)
        expected = [nvae.sample(4, 0.7).mean for _ in range(3)]
        torch.manual_seed(3)
        found = [graphed() for _ in range(3)]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], found[1])


@on_gpu
def test_a_graph_sees_in_place_changes(nvae: NVAE) -> None:
    nvae.cuda().eval()
    graphed = GraphedSampler(nvae, 4)
    torch.manual_seed(3)
    before = graphed()
    for module in nvae.decoder.modules():
        if isinstance(module, BatchNorm):
            module.get_buffer("running_mean").add_(0.5)
    torch.manual_seed(3)
    expected = nvae.sample(4).mean
    torch.manual_seed(3)
    torch.testing.assert_close(graphed(), expected)
    assert not torch.allclose(before, expected)
