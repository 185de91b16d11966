"""A custom LightningDataModule with the default callbacks and in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.setting_types import build_datamodule, check_types
from nvae_lightning.model import NVAE
from nvae_lightning.training.checkpoints import AtomicCheckpointIO
from nvae_lightning.training.csv_logger import ResumableCSVLogger
from nvae_lightning.training.module import NVAEModule

WARNING = "does not save its place in an epoch"


class Own(LightningDataModule):
    """Two batches of labelled images per epoch; uses nothing from this package."""

    def __init__(self, data_dir: str = "", num_images: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (num_images, 3, 8, 8), generator=generator) / 255
        self.images = TensorDataset(images, torch.arange(num_images))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, batch_size=4, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.images, batch_size=4)] * 2

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.val_dataloader()


class Without(LightningDataModule):
    """A data module without a constructor."""


def _compose(*overrides: str) -> Any:
    name = f"dataset._target_={__name__}.Own"
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        config = compose("train", [name, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    config.run_dir = "run"
    return config


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Compose the settings of a training on these classes, as a command does."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules[Own.__module__])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    return _compose


def _train(
    folder: Path, model: NVAE, config: Any, *, resume: str | None = None
) -> tuple[Trainer, NVAEModule]:
    config.run_dir = str(folder)
    callbacks = list(instantiate(config.callbacks, _convert_="all").values())
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=3, log_every_n_steps=1, callbacks=callbacks,
        logger=ResumableCSVLogger(str(folder)), default_root_dir=folder,
        plugins=[AtomicCheckpointIO()], num_sanity_val_steps=0, enable_model_summary=False,
    )  # fmt: skip
    module = NVAEModule(model)
    checkpoint = None if resume is None else folder / "checkpoints" / resume
    with pytest.warns(UserWarning, match=f"^Own {WARNING}"):
        trainer.fit(module, Own(), ckpt_path=checkpoint, weights_only=True)
    return trainer, module


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resume_from_the_end_of_an_epoch_is_exact(
    composed: Callable[..., Any], build_nvae: Callable[..., NVAE], tmp_path: Path
) -> None:
    config = composed(
        "callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.keep=9",
        "callbacks.pictures.num_images=4",
    )  # fmt: skip
    torch.manual_seed(1)
    whole, module = _train(tmp_path, build_nvae(), config)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    torch.manual_seed(2)
    resumed, again = _train(tmp_path, build_nvae(), config, resume="step0000004.ckpt")
    assert resumed.global_step == whole.global_step == 6
    for expected, found in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == len(rows)
    within, _ = _train(tmp_path, build_nvae(), config, resume="step0000003.ckpt")
    assert within.global_step == 6
    resumed.test(again, Own(), verbose=False)  # on two loaders, as in each validation
    assert (tmp_path / "reconstructions.png").exists()


def test_settings_that_the_class_does_not_accept_are_dropped(composed: Callable[..., Any]) -> None:
    config = composed("+dataset.num_images=5", "dataset.image.size=8", "seed=3")
    check_types(config)
    assert len(build_datamodule(config).images) == 5
    with pytest.raises(ValueError, match="must be a ImageDataModule"):
        build_datamodule(config, ours=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "dataset.batch_size=4",
            "^dataset.batch_size: .*Own does not take it; choose from data_dir, num_images",
        ),
        ("dataset.flip=false", "^dataset.flip: .*does not take it"),
        ("+dataset.foo=1", "^dataset.foo: .* choose from data_dir, num_images"),
    ],
)
def test_unknown_settings_of_a_data_module_are_refused(
    override: str, message: str, composed: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        check_types(composed(override))


def test_a_class_without_a_constructor_takes_no_settings(composed: Callable[..., Any]) -> None:
    target = f"dataset._target_={__name__}.Without"
    config = composed(target)
    check_types(config)
    assert isinstance(build_datamodule(config), Without)
    with pytest.raises(
        ValueError, match=r"^dataset.batch_size: .*Without does not take it; choose from"
    ):
        check_types(composed(target, "dataset.batch_size=4"))


def test_a_class_that_is_not_a_data_module_is_refused(composed: Callable[..., Any]) -> None:
    config = composed("dataset._target_=collections.Counter")
    with pytest.raises(ValueError, match="got Counter, but it must be a LightningDataModule"):
        build_datamodule(config)
