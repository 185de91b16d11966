"""Loading of trained models from files, folders and the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nvae_lightning.backends import Compute
from nvae_lightning.model import NVAE, Image
from nvae_lightning.model.likelihood import Likelihood
from nvae_lightning.published import build_checkpoint
from nvae_lightning.serialization.architecture import ARCHITECTURE, restore
from nvae_lightning.serialization.checkpoints import (
    LATEST_WEIGHTS,
    last_checkpoint,
    read_torch_file,
)
from nvae_lightning.serialization.hub import CONFIG, is_hub_name, local_path, shipped_models
from nvae_lightning.serialization.weights import build, weights_of

_PREFIX = "model."


def find_checkpoint(source: str | Path) -> Path | None:
    """Return the checkpoint to read: the given file, or the latest intact one of a run's folder.

    None for a folder of :meth:`NVAE.save_pretrained`, a model in this package or on the hub.

    Raises:
        ValueError: If the source does not exist, or the folder contains no checkpoint.
    """
    path = local_path(source).absolute()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / CONFIG).is_file():
            return None
        found = last_checkpoint(path / "checkpoints") or last_checkpoint(path)
        if found is None:
            raise ValueError(
                f"'{path}' contains no intact checkpoint and no {CONFIG}; give a run's folder, "
                "its checkpoint, or the folder of save_pretrained"
            )
        return found
    if not is_hub_name(str(source)):
        raise ValueError(
            f"'{source}' does not exist; give a checkpoint, the folder of a run, or one of "
            f"{', '.join(shipped_models())}"
        )
    return None


def load_model(
    source: str | Path, *, averaged: bool = True, allow_nonfinite: bool = False, **given: Any
) -> NVAE:
    """Load a model in evaluation mode.

    Args:
        source: Name of a model in this package (``mnist``), checkpoint of a training, folder of
            its run, folder of :meth:`NVAE.save_pretrained`, ``owner/name`` on the Hugging Face
            hub, or checkpoint of the published code.
        averaged: Whether to prefer the averaged weights of a checkpoint that also has the latest.
        allow_nonfinite: Whether weights may be NaN or infinite.
        **given: Arguments of :class:`NVAE` that replace the described ones, such as constructors
            from outside this package; not available for checkpoints of the published code.

    Raises:
        ValueError: If the model is missing, damaged or not an NVAE, or would run code.
    """
    models = load_models(source, allow_nonfinite=allow_nonfinite, **given)
    preferred = next(models)
    return preferred if averaged else next(models, preferred)


def load_models(
    source: str | Path, *, allow_nonfinite: bool = False, **given: Any
) -> Iterator[NVAE]:
    """Yield the model of :func:`load_model`, then its latest weights if those are averages.

    The source is read once.
    """
    for model in _load(source, given, allow_nonfinite):
        Compute().apply(model)
        yield model


def _load(source: str | Path, given: dict[str, Any], allow_nonfinite: bool) -> Iterator[NVAE]:
    path = find_checkpoint(source)
    if path is None:
        yield NVAE.from_pretrained(source, allow_nonfinite=allow_nonfinite, **given)
        return
    content = read_torch_file(path)
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        if given:
            raise ValueError(
                f"'{path}' is a checkpoint of the published code, which accepts no "
                f"{', '.join(given)}; leave them out"
            )
        yield build_checkpoint(path, content, allow_nonfinite=allow_nonfinite)
        return
    if ARCHITECTURE not in content or not isinstance(content.get("state_dict"), dict):
        raise ValueError(
            f"'{path}' is a Lightning checkpoint, but not of an NVAE; give one that is"
        )
    architecture = content[ARCHITECTURE]
    for key in ("state_dict", LATEST_WEIGHTS):
        if key in content:
            weights = weights_of(_PREFIX, content[key])
            try:
                yield build(NVAE, architecture, weights, given, allow_nonfinite=allow_nonfinite)
            except ValueError as error:
                raise ValueError(f"'{path}': {error}") from error


def initialize_from(model: NVAE, source: str | Path, *, strict: bool = True) -> list[str]:
    """Copy the weights of a trained model into a new one, by name.

    Where the image formats differ, the few weights whose shapes follow from the image (stem,
    initial state, output) keep their initial values.

    Args:
        model: Model to initialise.
        source: See :func:`load_model`.
        strict: Whether to refuse other differences.

    Returns:
        Names of the weights of ``model`` that keep their initial values.

    Raises:
        ValueError: If the weights cannot be loaded, or belong to another architecture.
    """
    trained = load_model(source)
    weights, own = trained.state_dict(), model.state_dict()
    fitting = {
        name: value
        for name, value in weights.items()
        if name in own and value.shape == own[name].shape
    }
    kept = [name for name in own if name not in fitting]
    if trained.image == model.image:
        wrong = sorted({*own, *weights} - fitting.keys())
    else:
        wrong = sorted(own.keys() ^ weights.keys())
    if strict and wrong:
        raise ValueError(
            f"init_from: {len(wrong)} weights of the model differ from those of '{source}', for "
            f"example {wrong[0]}; choose model=pretrained, which has its architecture, or set "
            "init_strict=false to keep the initial values of these"
        )
    if not fitting:
        raise ValueError(f"init_from: no weight of '{source}' has the name and shape of one here")
    model.load_state_dict(fitting, strict=False)
    return kept


def pretrained_architecture(
    source: str | Path | None, *, image: Image, likelihood: Callable[[Image], Likelihood]
) -> NVAE:
    """Build an untrained model with the architecture of a trained one.

    Args:
        source: See :func:`load_model`.
        image: Image format.
        likelihood: Constructor of p(x | z) for images with another number of channels or bits;
            else the trained model's is kept.

    Raises:
        ValueError: If there is no source, or the model cannot be built.
    """
    if source is None:
        raise ValueError("model=pretrained takes the architecture of init_from; set init_from")
    trained = load_model(source)
    given: dict[str, Any] = {"image": image}
    if (image.channels, image.bits) != (trained.image.channels, trained.image.bits):
        given["likelihood"] = likelihood
    return NVAE(**restore(trained.architecture, given))
