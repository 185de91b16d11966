"""The works that a benchmark's config describes, for one or two settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from nvae_lightning.backends import GraphedSampler
from nvae_lightning.benchmarking import (
    Loading,
    RandomImages,
    Repetition,
    Rounds,
    Training,
    Work,
    alternate,
    largest_batch,
)
from nvae_lightning.cli.building import build_module, build_trainer, check_single
from nvae_lightning.cli.known_settings import check_known
from nvae_lightning.cli.setting_types import check_type, check_types, plain
from nvae_lightning.data import ImageDataModule

#: Settings that apply to both settings of a comparison.
SHARED = (
    "what", "compare", "images", "num_steps", "num_warmup_steps", "num_rounds", "find_batch",
    "trace",
)  # fmt: skip
_COUNTS = ("num_steps", "num_warmup_steps", "num_rounds", "num_importance_samples")


def check(config: DictConfig) -> None:
    """Check the settings of a benchmark.

    Raises:
        ValueError: If a setting has the wrong type or is out of range.
    """
    check_type("what", config.what, Literal["train", "sample", "evaluate", "data"])
    check_type("images", config.images, Literal["random", "dataset"])
    check_type("compare", config.compare, dict | None)
    for name in _COUNTS:
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if config.cuda_graphs and config.what not in ("train", "sample"):
        raise ValueError(
            f"cuda_graphs: got true, which what={config.what} does not support; set "
            "what=train or sample, or leave it out"
        )
    for name, unset in (("fast_dev_run", False), ("max_steps", -1)):
        if config.trainer[name] != unset:
            raise ValueError(
                f"trainer.{name}: got {config.trainer[name]}, but num_steps and num_rounds "
                "determine the length of a benchmark; set these instead"
            )


def as_overrides(settings: DictConfig, prefix: str = "") -> list[str]:
    """Write a mapping as Hydra overrides.

    >>> from omegaconf import OmegaConf
    >>> as_overrides(OmegaConf.create({"compile": True, "model": {"num_flows": 1}}))
    ['compile=true', 'model.num_flows=1']
    """
    found = []
    for key, value in settings.items():
        if isinstance(value, DictConfig):
            found += as_overrides(value, f"{prefix}{key}.")
        else:
            is_name = isinstance(value, str)
            written = value if is_name else json.dumps(plain(value), separators=(",", ":"))
            found.append(f"{prefix}{key}={written}")
    return found


def second_setting(config: DictConfig) -> DictConfig:
    """Compose the setting to compare with: this job's overrides, then those of ``compare``.

    Raises:
        ValueError: If it changes a setting that both share.
    """
    job = HydraConfig.get()
    name = job.job.config_name
    assert name is not None
    other = compose(name, [*job.overrides.task, *as_overrides(config.compare)])
    check_known(other, name)
    check_types(other)
    for name in SHARED:
        if other[name] != config[name]:
            raise ValueError(
                f"compare: got {name}={other[name]}, but both settings share {name}; set it "
                "outside of compare"
            )
    return other


def _build_data(config: DictConfig) -> ImageDataModule:
    """Build the images, at least enough for the two passes of a training's round."""
    num_batches = config.num_warmup_steps + 2 * config.num_steps
    if config.images == "random" and config.what != "data":
        target = f"{RandomImages.__module__}.{RandomImages.__name__}"
        return instantiate(config.dataset, _target_=target, num_batches=num_batches)
    datamodule = instantiate(config.dataset, verify=False)
    datamodule.prepare_data()
    datamodule.setup("fit")
    available = len(datamodule.train_dataloader())
    if config.what == "train" and available < num_batches:
        raise ValueError(
            f"num_steps: got {config.num_steps}, which requires {num_batches} batches per epoch, "
            f"but there are {available}; set a smaller one, or images=random"
        )
    return datamodule


def build_work(config: DictConfig, run_dir: Path) -> Work:
    """Build the work to measure.

    Raises:
        ValueError: If this machine does not support a setting, or there are too few images.
    """
    trainer = build_trainer(config, run_dir)
    check_single(trainer)
    datamodule = _build_data(config)
    if config.what == "data":
        return Loading(datamodule.train_dataloader())
    module = build_module(config)
    if config.what == "train":
        return Training(trainer, module, datamodule)
    model, batch_size = module.model, config.dataset.batch_size
    if config.what == "sample":
        temperature = plain(config.temperature)

        def build_sampler() -> Callable[[], torch.Tensor]:
            if config.cuda_graphs:
                return GraphedSampler(model, batch_size, temperature)
            return lambda: model.sample(batch_size, temperature).mean

        return Repetition(trainer, module, "sample", build_sampler)
    x = datamodule.to_input(next(iter(datamodule.train_dataloader())), train=False)

    def evaluate() -> torch.Tensor:
        images = x.to(next(model.parameters()), memory_format=torch.channels_last)
        return model.log_weights(images, config.num_importance_samples)

    return Repetition(trainer, module, "evaluate", lambda: evaluate)


def find_batch(config: DictConfig, run_dir: Path) -> int | None:
    """Find the largest batch size that fits in memory, if ``find_batch`` is set.

    Raises:
        ValueError: If the device is a CPU, where the system kills a process out of memory.
    """
    if not config.find_batch:
        return None
    device = build_trainer(config, run_dir).strategy.root_device
    if device.type == "cpu" or config.what == "data":
        raise ValueError("find_batch: got true, which requires a GPU and a model; leave it out")
    config = copy.deepcopy(config)
    config.num_steps = config.num_warmup_steps = 1

    def attempt(batch_size: int) -> None:
        config.dataset.batch_size = batch_size
        build_work(config, run_dir).run(num_warmup_steps=1, num_steps=1)

    return largest_batch(attempt, config.dataset.batch_size)


def run_rounds(works: list[Work], config: DictConfig) -> list[Rounds]:
    """Run rounds of all works.

    Raises:
        ValueError: If the device has too little memory.
    """
    counts = {name: config[name] for name in ("num_rounds", "num_warmup_steps", "num_steps")}
    try:
        return alternate(works, **counts)
    except torch.OutOfMemoryError:
        size = config.dataset.batch_size
    raise ValueError(  # outside the handler, in which the error keeps tensors in memory
        f"dataset.batch_size: got {size}, for which the device's memory does not suffice; set a "
        "smaller one"
    )
