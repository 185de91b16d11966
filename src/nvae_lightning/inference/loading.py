"""Loading of trained models from files, folders and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvae_lightning.backends import Compute
from nvae_lightning.model import NVAE
from nvae_lightning.published import build_checkpoint
from nvae_lightning.serialization.architecture import ARCHITECTURE
from nvae_lightning.serialization.checkpoints import last_checkpoint, read_torch_file
from nvae_lightning.serialization.hub import CONFIG, is_hub_name
from nvae_lightning.serialization.weights import build, weights_of

_PREFIX = "model."


def find_checkpoint(source: str | Path) -> Path | None:
    """Return the checkpoint to read: the given file, or the latest intact one of a run's folder.

    None for a folder of :meth:`NVAE.save_pretrained` and for a name on the hub.

    Raises:
        ValueError: If the source does not exist, or the folder contains no checkpoint.
    """
    path = Path(source).expanduser().absolute()
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
        raise ValueError(f"'{source}' does not exist; give a checkpoint, or the folder of a run")
    return None


def load_model(source: str | Path, *, allow_nonfinite: bool = False, **given: Any) -> NVAE:
    """Load a model in evaluation mode.

    Args:
        source: Checkpoint of a training, folder of its run, folder of
            :meth:`NVAE.save_pretrained`, ``owner/name`` on the Hugging Face hub, or checkpoint
            of the published code.
        allow_nonfinite: Whether weights may be NaN or infinite.
        **given: Arguments of :class:`NVAE` that replace the described ones, such as constructors
            from outside this package; not available for checkpoints of the published code.

    Raises:
        ValueError: If the model is missing, damaged or not an NVAE, or would run code.
    """
    model = _load(source, given, allow_nonfinite)
    Compute().apply(model)
    return model


def _load(source: str | Path, given: dict[str, Any], allow_nonfinite: bool) -> NVAE:
    path = find_checkpoint(source)
    if path is None:
        return NVAE.from_pretrained(source, allow_nonfinite=allow_nonfinite, **given)
    content = read_torch_file(path)
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        if given:
            raise ValueError(
                f"'{path}' is a checkpoint of the published code, which accepts no "
                f"{', '.join(given)}; leave them out"
            )
        return build_checkpoint(path, content, allow_nonfinite=allow_nonfinite)
    weights = content.get("state_dict")
    if ARCHITECTURE not in content or not isinstance(weights, dict):
        raise ValueError(
            f"'{path}' is a Lightning checkpoint, but not of an NVAE; give one that is"
        )
    weights = weights_of(_PREFIX, weights)
    try:
        return build(NVAE, content[ARCHITECTURE], weights, given, allow_nonfinite=allow_nonfinite)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
