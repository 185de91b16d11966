"""Trained models and their data, for the commands that use them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nvae_lightning import data
from nvae_lightning.cli.plain_yaml import read_yaml
from nvae_lightning.cli.setting_types import build_datamodule, check_taken, check_type
from nvae_lightning.data import AllImages, ImageDataModule
from nvae_lightning.inference.loading import find_checkpoint, load_models
from nvae_lightning.model import NVAE
from nvae_lightning.serialization.hub import local_path
from nvae_lightning.utilities.plain_data import shown

#: Datasets that a run's config.yaml may name; names are looked up here and never imported.
_DATASETS: dict[str, type[ImageDataModule]] = {
    f"nvae_lightning.data.{name}": getattr(data, name)
    for name in data.__all__
    if name not in ("AllImages", "Datasets", "Image", "ImageDataModule")
}

#: Settings of this machine and this command, which the run does not determine.
_OURS = ("_target_", "seed", "num_workers")


def trained_model(config: Any) -> NVAE:  # noqa: ANN401 -- beartype warns of DictConfig's own bases
    """Load the model of ``ckpt_path``, as :func:`trained_models`."""
    return next(trained_models(config))


def trained_models(config: Any) -> Iterator[NVAE]:  # noqa: ANN401
    """Load the models of ``ckpt_path``, and set ``ckpt_path`` to the checkpoint found there.

    Constructors under ``model`` replace those in the checkpoint.

    Raises:
        ValueError: As :func:`load_models`.
    """
    given = {}
    for name, settings in config.model.items():
        if settings["_target_"] is not None:
            given[name] = instantiate(settings, _convert_="all")
        elif set(settings) - {"_target_", "_partial_"}:
            raise ValueError(
                f"model.{name}: got settings without a class; "
                f"add model.{name}._target_=MODULE.CLASS"
            )
    found = find_checkpoint(config.ckpt_path)
    if found is not None:
        config.ckpt_path = str(found)
    nonfinite = config.allow_nonfinite
    return load_models(config.ckpt_path, allow_nonfinite=nonfinite, **given)


def training_settings(ckpt_path: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the config.yaml of a model's training and the settings of its dataset.

    Return None if the model has none. Nothing in it is resolved or executed, because the file
    may come from a stranger.

    Raises:
        ValueError: If it does not contain the settings of a dataset.
    """
    checkpoint = find_checkpoint(ckpt_path)
    folder = local_path(ckpt_path) if checkpoint is None else checkpoint.parent.parent
    if not os.path.lexists(path := folder / "config.yaml"):
        return None
    try:
        settings = read_yaml(path).get("dataset")
    except ValueError as error:
        raise ValueError(f"dataset: {error}; add dataset=NAME") from error
    if not isinstance(settings, dict):
        raise ValueError(f"dataset: '{path}' names no dataset; add dataset=NAME")
    return path, settings


def training_data(config: Any, model: NVAE, *, ours: bool = True) -> Any:  # noqa: ANN401
    """Return the named dataset, or else the one that the model was trained on.

    Settings under ``dataset`` that are not null replace those of the training.

    Args:
        config: All settings.
        model: Trained model.
        ours: Whether it must be a data module of this package, which has single images.

    Raises:
        ValueError: If no dataset is named and the training's is unknown, or if the format of its
            images is not the model's.
    """
    if not _is_dataset_named():
        return _data_of_run(config, model)
    image = instantiate(config.dataset.get("image", model.image))
    if image != model.image:
        raise ValueError(
            f"dataset.image: the model is for {model.image}, the dataset has {image}; choose the "
            "dataset that it was trained on, or set dataset.image.size, .channels, .bits and "
            ".padding as the model's"
        )
    return build_datamodule(config, ours=ours)


def images_for(config: Any, model: NVAE, name: str, batch_size: int = 64) -> AllImages:  # noqa: ANN401
    """Return the images that a setting names, in a model's format, cropped as in its training."""
    check_type(name, config[name], str)
    settings: Any = {}
    if _is_dataset_named():
        settings = OmegaConf.to_container(config.dataset, resolve=True)
    elif (found := training_settings(config.ckpt_path)) is not None:
        settings = found[1]
    kind = _DATASETS.get(str(settings.get("_target_")), ImageDataModule)
    kept = {"crop": kind.default_crop, "interpolation": kind.default_interpolation}
    for key in ("crop", "interpolation", "background", "source_bits"):
        if settings.get(key) is not None:
            kept[key] = settings[key]
    _check(kept, AllImages)
    return AllImages(
        config[name], batch_size=batch_size, image=model.image, seed=config.seed, **kept
    )


def _is_dataset_named() -> bool:
    return HydraConfig.get().runtime.choices.get("dataset") is not None


def _data_of_run(config: Any, model: NVAE) -> ImageDataModule:  # noqa: ANN401
    """Build the dataset that a run's config.yaml names, which must be of this package."""
    found = training_settings(config.ckpt_path)
    if found is None:
        raise ValueError(
            f"dataset: no config.yaml of a training beside '{config.ckpt_path}' names it; add "
            "dataset=NAME"
        )
    path, settings = found
    target = settings.get("_target_")
    if not isinstance(target, str) or target not in _DATASETS:
        raise ValueError(
            f"dataset: '{path}' names the class {shown(target)}, which is not a dataset of this "
            "package and is not imported because a file names it; add dataset=NAME, and for a "
            "class of your own dataset._target_=MODULE.CLASS"
        )
    kind = _DATASETS[target]
    image = asdict(model.image)
    found_image = settings.get("image")
    if not isinstance(found_image, dict) or any(
        found_image.get(name) != value for name, value in image.items()
    ):
        raise ValueError(
            f"dataset.image: the model is for {image}, but '{path}' has {shown(found_image)}; "
            "choose the dataset that it was trained on: add dataset=NAME"
        )
    parameters = {k: v for k, v in settings.items() if k not in (*_OURS, "image")}
    given: Any = OmegaConf.to_container(config.dataset, resolve=True)
    given = {name: value for name, value in given.items() if value is not None}
    parameters |= given
    _check(parameters, kind)
    return kind(image=model.image, seed=config.seed, **parameters)


def _check(parameters: dict[str, Any], kind: type[ImageDataModule]) -> None:
    """Check settings of a dataset, which may come from a file, before they are used.

    Raises:
        ValueError: If a setting is unknown to the class, of another type, or an interpolation.
    """
    known = inspect.signature(kind, eval_str=True).parameters
    check_taken("dataset", parameters, kind.__name__, known)
    for name, value in parameters.items():
        if "${" in str(value):
            raise ValueError(
                f"dataset.{name}: got {shown(value)}, which is not resolved; set dataset.{name}"
            )
        check_type(f"dataset.{name}", value, known[name].annotation)
