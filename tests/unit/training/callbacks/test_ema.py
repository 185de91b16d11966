"""Averaged weights replace the latest ones in validation and test."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.training.callbacks import EMA

DECAY = 0.2  # reached in the third step


def _weights(module: LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


class Spy(Callback):
    """Compute the average by its formula; record the weights in validation and test."""

    def __init__(self) -> None:
        self.average = torch.empty(0)
        self.latest = torch.empty(0)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.latest = _weights(pl_module)
        t = trainer.global_step - 1
        decay = min(DECAY, (1 + t) / (10 + t)) if t > 0 else 0.0
        self.average = self.average.lerp(self.latest, 1 - decay) if t > 0 else self.latest

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["validation"] = _weights(pl_module), self.average

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["training"] = _weights(pl_module), self.latest

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen["test"] = _weights(pl_module), self.average


def test_validation_and_test_use_the_average_and_training_the_latest(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["dataset.batch_size=8", "num_importance_samples=1"])
    spy = Spy()
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=1, logger=False,
        callbacks=[spy, EMA(decay=DECAY)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=4, limit_val_batches=1,
        limit_test_batches=1, num_sanity_val_steps=0,
        precision="64-true",  # to which Lightning converts the module after the callback's setup
    )  # fmt: skip
    module = instantiate(config.module, _convert_="all")
    datamodule = instantiate(config.dataset)
    trainer.fit(module, datamodule)
    trainer.test(module, datamodule, verbose=False)
    assert set(spy.seen) == {"validation", "training", "test"}
    for stage, (weights, expected) in spy.seen.items():
        torch.testing.assert_close(weights, expected, msg=stage)
    assert (spy.average - spy.latest).abs().max() > 1e-4


def test_the_saved_average_has_the_extra_state_of_the_latest_model(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["dataset.batch_size=8"])
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, max_steps=1, logger=False,
        callbacks=[EMA(decay=DECAY)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    module = instantiate(config.module, _convert_="all")
    trainer.fit(module, instantiate(config.dataset))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert "current_model_state" in saved
    extra = [n for n in saved["state_dict"] if n.endswith("_extra_state")]
    assert extra
    assert all(saved["state_dict"][name] for name in extra)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay .* got"):
        EMA(decay)
