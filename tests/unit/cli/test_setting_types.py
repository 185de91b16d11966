"""Settings are checked against the types of the arguments they are passed to."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.overrides import parse
from nvae_lightning.cli.setting_types import check_types

# A setting and expected words of the error.
BAD = [
    ("model.foo=1", "model", "foo"),
    ("+model.foo=1", "model.foo"),
    ("+optimizer.foo=1", "optimizer.foo", "weight_decay"),
    ("+callbacks.guard.foo=1", "callbacks.guard.foo", "patience"),
    ("+kl.beta.foo=1", "kl.beta.foo", "floor"),
    ("trainer.max_steps=ten", "trainer.max_steps", "'ten'"),
    ("trainer.max_steps=2.5", "trainer.max_steps", "2.5"),
    ("trainer.max_steps=null", "trainer.max_steps", "null"),
    ("trainer.max_steps=[5]", "trainer.max_steps", "[5]"),
    ("trainer.max_epochs=foo", "trainer.max_epochs", "'foo'"),
    ("trainer.devices=null", "trainer.devices", "null"),
    ("trainer.num_nodes=x", "trainer.num_nodes", "'x'"),
    ("trainer.timeout_minutes=x", "trainer.timeout_minutes", "'x'"),
    ("trainer.sync_batchnorm_scope=rack", "trainer.sync_batchnorm_scope", "rack"),
    ("trainer.precision=17", "trainer.precision", "17"),
    ("trainer.precision=half", "trainer.precision", "'half'"),
    ("trainer.accelerator=3", "trainer.accelerator", "3"),
    ("trainer.strategy=2", "trainer.strategy", "2"),
    ("trainer.accumulate_grad_batches=x", "trainer.accumulate_grad_batches", "'x'"),
    ("trainer.log_every_n_steps=x", "trainer.log_every_n_steps", "'x'"),
    ("trainer.check_val_every_n_epoch=x", "trainer.check_val_every_n_epoch", "'x'"),
    ("trainer.enable_model_summary=maybe", "trainer.enable_model_summary", "'maybe'"),
    ("trainer.plugins=foo", "trainer.plugins", "'foo'"),
    ("trainer.gradient_clip_val=x", "trainer.gradient_clip_val", "'x'"),
    ("optimizer.lr=abc", "optimizer.lr", "'abc'", "a valid number"),
    ("optimizer.lr=nan", "optimizer.lr", "nan"),
    ("optimizer.lr=inf", "optimizer.lr", "inf"),
    ("optimizer.lr=null", "optimizer.lr", "null"),
    ("optimizer.lr=[0.1]", "optimizer.lr", "[0.1]"),
    ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9]"),
    ("optimizer.betas=0.9", "optimizer.betas", "0.9"),
    ("optimizer.betas=[0.9,x]", "optimizer.betas", "'x'"),
    ("optimizer.eps=small", "optimizer.eps", "'small'"),
    ("optimizer.weight_decay=null", "optimizer.weight_decay", "null"),
    ("optimizer.foreach=maybe", "optimizer.foreach", "'maybe'"),
    ("recipe.learning_rate=fast", "recipe.learning_rate", "'fast'"),
    ("recipe.epochs=x", "'x'"),
    ("kl.beta.fraction=x", "kl.beta.fraction", "'x'"),
    ("kl.beta.fraction=null", "kl.beta.fraction", "null"),
    ("kl.beta.floor=nan", "kl.beta.floor", "nan"),
    ("kl.beta=0.5", "kl.beta", "0.5"),
    ("kl.size_factor.growth=x", "kl.size_factor.growth", "'x'"),
    ("penalty.weight=x", "penalty.weight", "'x'"),
    ("penalty.weight=inf", "penalty.weight", "inf"),
    ("penalty.spectral=maybe", "penalty.spectral", "'maybe'"),
    ("penalty.bn_scale=2", "penalty.bn_scale", "2"),
    ("logger.csv.save_dir=5", "logger.csv.save_dir", "5"),
    ("model.hierarchy.num_groups=5", "num_groups", "[5]"),
    ("model.hierarchy.num_groups=[1,x]", "model.hierarchy.num_groups", "'x'"),
    ("model.hierarchy.num_groups=null", "model.hierarchy.num_groups", "null"),
    ("model.hierarchy.channels=x", "model.hierarchy.channels", "'x'"),
    ("model.hierarchy.channels=[8,16]", "model.hierarchy.channels", "[8, 16]"),
    ("model.hierarchy.width=x", "model.hierarchy.width", "'x'"),
    ("model.hierarchy.latent_channels=null", "model.hierarchy.latent_channels", "null"),
    ("model.num_flows=x", "model.num_flows", "'x'"),
    ("model.num_decoder_cells=null", "model.num_decoder_cells", "null"),
    ("model.num_postprocess_cells=1.5", "model.num_postprocess_cells", "1.5"),
    ("model.squeeze_excitation=maybe", "model.squeeze_excitation", "'maybe'"),
    ("model.residual_posterior=2", "model.residual_posterior", "2"),
    ("model.decoder_cell.kernel_size=x", "model.decoder_cell.kernel_size", "'x'"),
    ("model.encoder_cell=foo", "model.encoder_cell", "'foo'"),
    ("model.hierarchy=null", "model.hierarchy", "null"),
    ("dataset.batch_size=foo", "dataset.batch_size", "'foo'"),
    ("dataset.batch_size=[8]", "dataset.batch_size", "[8]"),
    ("dataset.batch_size=8.0", "dataset.batch_size", "8.0"),
    ("dataset.num_workers=many", "dataset.num_workers", "'many'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Iterator[Any]:
    """Settings of a training, also set as Hydra's."""
    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        composed = compose(
            "train", ["trainer=cpu", "logger=csv", "run_dir=x"], return_hydra_config=True
        )
    HydraConfig.instance().set_config(composed)
    yield composed
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize(("setting", "words"), [(row[0], row[1:]) for row in BAD])
def test_a_bad_setting_is_named_with_its_value(
    setting: str, words: tuple[str, ...], config: Any
) -> None:
    (override,) = parse([setting])
    changed = copy.deepcopy(config)
    OmegaConf.set_struct(changed, False)
    OmegaConf.update(changed, override.key_or_group, override.value(), force_add=True)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        check_types(changed)
    for word in words:
        assert word in str(error.value)


def test_the_settings_of_a_training_pass(config: Any) -> None:
    check_types(config)
