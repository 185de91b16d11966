"""A training by CUDA graphs, against one without.

Without a CUDA device, a tape of operations takes a graph's place. As a graph it knows no Python:
what was a number at the capture stays that number, and what was a tensor stays where it lay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_lightning.backends import Compute, GraphedLoss
from nvae_lightning.benchmarking import RandomImages
from nvae_lightning.model import NVAE
from nvae_lightning.objective import KL, Penalty
from nvae_lightning.objective.kl import size_factor
from nvae_lightning.objective.schedules import kl_warmup
from nvae_lightning.training.module import NVAEModule
from nvae_lightning.utilities.image import Image as ImageFormat

GRAPH = "nvae_lightning.backends.cuda_graphs"
NUM_STEPS = 6
Train = Callable[..., "Losses"]


class Tape(TorchDispatchMode):
    """Records operations, to make them anew on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.changed: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.changed += [(one, one.clone()) for one in tree_leaves(value)]
        outputs = func(*args, **kwargs)
        if not func.is_view:  # which stays one of the same memory
            tensors = [one for one in tree_leaves(outputs) if isinstance(one, Tensor)]
            self.operations.append((func, args, kwargs, tensors))
        return outputs

    def pool(self) -> None:
        """Nothing: memory is not pooled."""

    def replay(self) -> None:
        """Write where the capture has written."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self.operations:
                found = [o for o in tree_leaves(func(*args, **kwargs)) if isinstance(o, Tensor)]
                for output, value in zip(outputs, found, strict=True):
                    if output is not value:
                        output.copy_(value)


@contextmanager
def record(tape: Tape, **settings: Any) -> Iterator[None]:
    """Capture; what a capture does not compute is undone."""
    with torch.random.fork_rng([]), tape:
        yield
    for tensor, value in reversed(tape.changed):
        tensor.detach().copy_(value)
    tape.changed.clear()


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tape take a graph's place where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(f"{GRAPH}.check_device", lambda device: None)
    monkeypatch.setattr(f"{GRAPH}._capturable", lambda device: nullcontext())
    monkeypatch.setattr(f"{GRAPH}._warming_up", lambda device: torch.random.fork_rng([]))


class Losses(Callback):
    """Keeps the loss of each step, and how many of them a graph has computed."""

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
    """Train for a few steps, over which β and λ change and balancing ends."""

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
        # A tape does not see the statistics that F.batch_norm moves, which a graph does.
        Compute().apply(module.model)
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


@pytest.mark.usefixtures("taped")
def test_a_training_by_graphs_is_the_one_without(train: Train) -> None:
    found, expected = train(cuda_graphs=True), train(cuda_graphs=False)
    assert len(set(found.values)) == NUM_STEPS
    torch.testing.assert_close(found.values, expected.values)
    assert found.metrics[-1]["train/beta"] == 1.0
    assert found.metrics[-1]["train/spectral"] > 0.0
    torch.testing.assert_close(found.metrics, expected.metrics)
    torch.testing.assert_close(found.state, expected.state)


@pytest.mark.usefixtures("taped")
def test_other_shapes_are_computed_without_a_graph() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    calls = []

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return (x @ weight).square().mean(), x.sum()

    graphed = GraphedLoss(function, [weight], [])
    for size, is_called in ((4, True), (4, False), (3, True), (4, False)):
        calls.clear()
        x = torch.randn(size, 2)
        loss, total = graphed(x)
        assert bool(calls) is is_called
        expected = (x @ weight).square().mean()
        torch.testing.assert_close((loss, total), (expected, x.sum()))
        torch.testing.assert_close(
            torch.autograd.grad(3.0 * loss, weight), torch.autograd.grad(3.0 * expected, weight)
        )


@pytest.mark.usefixtures("taped")
def test_a_graph_takes_one_batch_a_step(train: Train) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=2, but a step in graphs"):
        train(cuda_graphs=True, accumulate_grad_batches=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_graph_takes_a_cuda_device(train: Train) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: got true, but the model is on 'cpu'"):
        train(cuda_graphs=True)
