"""Every combination of configs composes and builds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.model import NVAE, FlowPair

from .conftest import Compose, build_on_meta


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_ROOT / "conf" / group).glob("*.yaml"))


DATASETS = _options("dataset")
MODELS = [name for name in _options("model") if name != "pretrained"]  # which needs weights
EXPERIMENTS = sorted(path.stem for path in (CONFIG_ROOT / "experiments").glob("*.yaml"))


def _build(config: Any) -> NVAE:
    return build_on_meta(config.model)


def test_groups_have_the_documented_options() -> None:
    assert set(MODELS) == {"tiny", "small", "base", "large"}
    assert {"mnist", "cifar10", "imagenet32", "celeba64", "celeba_hq", "ffhq"} < set(DATASETS)
    assert set(_options("kl")) == {"balanced", "warmup", "constant"}
    assert set(_options("trainer")) == {"auto", "cpu", "gpu", "ddp", "multinode"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_model_builds_for_every_dataset(
    compose_config: Compose, dataset: str, model: str
) -> None:
    config = compose_config(f"dataset={dataset}", f"model={model}")
    nvae = _build(config)
    recipe = config.recipe
    assert len(nvae.hierarchy.scales) == len(recipe.num_groups)
    assert nvae.image.size == config.dataset.image.size
    width = {"large": 1.0, "base": 1.0, "small": 0.5}.get(model)
    if width is not None:
        assert nvae.encoder.stem.out_channels == recipe.channels * width
        assert [s.num_groups for s in nvae.hierarchy.scales] == list(recipe.num_groups)
    num_flows = sum(isinstance(module, FlowPair) for module in nvae.modules())
    expected = recipe.num_flows if model == "large" else 0
    assert num_flows == expected * nvae.hierarchy.num_groups


@pytest.mark.parametrize("kl", _options("kl"))
@pytest.mark.parametrize("dataset", ["mnist", "celeba_hq"])
def test_every_kl_config_weights_the_groups(
    compose_config: Compose, dataset: str, kl: str
) -> None:
    config = compose_config(f"dataset={dataset}", f"kl={kl}")
    term = instantiate(config.kl, _convert_="all")
    hierarchy = instantiate(config.model.hierarchy, _convert_="all")
    assert term.beta(1000, 1000) == 1.0
    assert term.beta(0, 1000) == (1.0 if kl == "constant" else 1e-4)
    if kl == "balanced":
        factors = term.size_factor(hierarchy)
        assert factors.shape == (hierarchy.num_groups,)
        assert factors.min() == 1.0
    else:
        assert term.size_factor is None


@pytest.mark.parametrize(
    ("dataset", "model", "parameters"),
    [
        ("mnist", "base", 33_363_134),
        ("cifar10", "base", 129_215_680),
        ("cifar10", "large", 130_852_480),
        ("imagenet32", "large", 268_509_444),
        ("celeba64", "large", 153_281_364),
        ("celeba_hq", "large", 330_798_664),
        ("ffhq", "large", 330_798_664),
    ],
)
def test_published_models_have_the_published_number_of_parameters(
    compose_config: Compose, dataset: str, model: str, parameters: int
) -> None:
    nvae = _build(compose_config(f"dataset={dataset}", f"model={model}"))
    assert sum(parameter.numel() for parameter in nvae.parameters()) == parameters


# Rows of the paper's Table 6, and the numbers of importance samples.
TABLE_6 = {
    "recipe.epochs": (400, 400, 45, 90, 300, 200),
    "batch_size": (200, 32, 24, 16, 4, 4),
    "recipe.num_flows": (1, 1, 1, 1, 2, 2),
    "recipe.num_groups": ([5, 10], [30], [28], [5, 10, 20], [4, 4, 4, 8, 16], [4, 4, 4, 8, 16]),
    "recipe.latent_channels": (20,) * 6,
    "recipe.channels": (32, 128, 192, 64, 30, 30),
    "recipe.num_cells_per_group": (2,) * 6,
    "recipe.num_preprocess_cells": (3, 2, 2, 2, 2, 2),
    "recipe.num_postprocess_cells": (3, 2, 2, 2, 2, 2),
    "recipe.downsample": (4, 2, 2, 2, 2, 2),
    "recipe.penalty_weight": (0.01, 0.01, 0.01, 0.1, 0.01, 0.1),
    "recipe.initial_penalty_weight": (None, None, 1.0, None, 1.0, 1.0),
    "recipe.learning_rate": (1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 8e-3),
    "recipe.final_learning_rate": (1e-4,) * 6,
    "recipe.warmup_epochs": (5, 5, 1, 5, 5, 5),
    "recipe.num_importance_samples": (1000, 100, 100, 100, 100, 100),
    "image.bits": (1, 8, 8, 8, 5, 5),
    "image.size": (28, 32, 32, 64, 256, 256),
}


@pytest.mark.parametrize("row", TABLE_6)
def test_dataset_configs_match_table_6(compose_config: Compose, row: str) -> None:
    datasets = ("mnist", "cifar10", "imagenet32", "celeba64", "celeba_hq", "ffhq")
    setting = row if row.startswith("recipe.") else f"dataset.{row}"
    found = tuple(
        OmegaConf.select(compose_config(f"dataset={dataset}"), setting) for dataset in datasets
    )
    assert found == TABLE_6[row]


@pytest.mark.parametrize(
    ("dataset", "sides"),
    [
        ("mnist", [4, 8]),
        ("cifar10", [16]),
        ("celeba64", [8, 16, 32]),
        ("celeba_hq", [8, 16, 32, 64, 128]),
    ],
)
def test_latents_have_the_published_sizes(
    compose_config: Compose, dataset: str, sides: list[int]
) -> None:
    nvae = _build(compose_config(f"dataset={dataset}", "model=large"))
    assert sorted({shape[1] for shape in nvae.latent_shapes}) == sides
    assert [shape[1] for shape in nvae.latent_shapes] == sorted(s[1] for s in nvae.latent_shapes)


@pytest.mark.parametrize("cell", _options("model/cell"))
@pytest.mark.parametrize("place", ["encoder", "decoder", "preprocess", "postprocess"])
def test_every_cell_builds_in_every_place(compose_config: Compose, place: str, cell: str) -> None:
    config = compose_config(f"model/cell@model.{place}_cell={cell}")
    assert sum(p.numel() for p in _build(config).parameters()) > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(
    compose_config: Compose, name: str, tmp_path: Path
) -> None:
    config = compose_config(f"experiment={name}", "logger=csv", f"run_dir={tmp_path}")
    with torch.device("meta"):
        module = instantiate(config.module, _convert_="all")
    assert module.model.hierarchy.num_groups > 1
    assert instantiate(config.optimizer)(module.parameters()).defaults["eps"] == 1e-3


def test_max_steps_removes_the_limit_on_epochs(compose_config: Compose) -> None:
    for overrides, epochs in (([], 12), (["trainer.max_steps=5000"], -1)):
        assert compose_config(*overrides).trainer.max_epochs == epochs
    both = compose_config("trainer.max_steps=5000", "trainer.max_epochs=3").trainer
    assert (both.max_steps, both.max_epochs) == (5000, 3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer=auto"], False),
        (["trainer=cpu"], False),
        (["trainer=gpu"], True),
        (["trainer=ddp"], True),
        (["trainer=multinode"], True),
        (["trainer=ddp", "trainer.accelerator=cpu"], False),
        (["trainer=gpu", "compile=false"], False),
    ],
)
def test_models_are_compiled_for_trainers_of_gpus(
    compose_config: Compose, overrides: list[str], expected: bool
) -> None:
    assert compose_config(*overrides).compile is expected


@pytest.mark.parametrize("trainer", ["gpu", "ddp", "multinode"])
def test_trainers_for_gpus_compose(compose_config: Compose, trainer: str) -> None:
    config = compose_config(f"trainer={trainer}").trainer
    assert config.accelerator == "gpu"
    assert config.strategy == ("auto" if trainer == "gpu" else "ddp")
    assert config.num_nodes == (2 if trainer == "multinode" else 1)


@pytest.mark.parametrize("logger", ["default", "wandb"])
def test_wandb_is_offline_by_default(compose_config: Compose, logger: str) -> None:
    assert compose_config(f"logger={logger}").logger.wandb.offline is (logger == "default")


@pytest.mark.parametrize("trainer", ["auto", "cpu"])
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_trainers_and_loggers_instantiate(
    compose_config: Compose, trainer: str, logger: str, tmp_path: Path
) -> None:
    config = compose_config(f"trainer={trainer}", f"logger={logger}", f"run_dir={tmp_path}")
    loggers = list(instantiate(config.logger, _convert_="all").values())
    built = instantiate(config.trainer, logger=loggers, _convert_="all")
    assert built.max_epochs == config.recipe.epochs
    assert len(built.loggers) == len(loggers)
    assert (built.precision == "32-true") is (trainer == "cpu" or not torch.cuda.is_available())


@pytest.mark.parametrize("penalty", _options("penalty"))
def test_penalties_have_the_weights_of_the_recipe(compose_config: Compose, penalty: str) -> None:
    config = compose_config("dataset=celeba_hq", f"penalty={penalty}")
    built = instantiate(config.penalty)
    expected = (0.01, 1.0, True) if penalty == "spectral" else (0.0, None, False)
    assert (built.weight, built.initial_weight, built.spectral) == expected
