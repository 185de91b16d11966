"""Models in folders and on the Hugging Face hub: ``model.safetensors`` and ``config.json``.

``config.json`` holds the constructor's arguments as plain data. Constructors are named, and only
those of this package are known, so that reading a stranger's model runs none of its code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from nvae_lightning.model import NVAE
from nvae_lightning.serialization.card import model_card
from nvae_lightning.serialization.weights import build, one_line
from nvae_lightning.utilities.plain_data import check_file, read_json, shown

Model = TypeVar("Model", bound=NVAE)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

_FORMAT, _VERSION = "nvae-lightning", 1
_SHIPPED = Path(__file__).parents[1] / "weights"
_DOWNLOAD_OPTIONS = ("force_download", "token", "cache_dir", "local_files_only", "revision")


def save_pretrained(
    model: NVAE,
    folder: str | Path,
    *,
    evaluation: Mapping[str, Any] | str | Path | None = None,
) -> None:
    """Write weights, config and card; an existing card stays unless figures are given.

    Args:
        model: Model to save.
        folder: Folder to write to, created if needed.
        evaluation: Measured figures for the card; see :func:`model_card`.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": _FORMAT, "version": _VERSION, "model": model.architecture}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    (folder / CONFIG).unlink(missing_ok=True)  # never beside the weights of another model
    # save_file would create a file that only its owner can read.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if evaluation or not (folder / CARD).exists():
        (folder / CARD).write_text(model_card(model, evaluation), encoding="utf-8")


def push_to_hub(
    model: NVAE,
    name: str,
    *,
    evaluation: Mapping[str, Any] | str | Path | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload NVAE",
) -> str:
    """Upload a model to the Hugging Face hub.

    Args:
        model: Model to upload.
        name: ``owner/name`` of the repository, created if needed.
        evaluation: Measured figures for the card; see :func:`model_card`.
        private: Whether a new repository is private; None for the owner's default.
        token: Access token; None for the one of ``hf auth login``.
        commit_message: Message of the commit.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id=name, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, evaluation=evaluation)
        return str(
            api.upload_folder(
                repo_id=name, repo_type="model", folder_path=folder, commit_message=commit_message
            )
        )


def from_pretrained(
    kind: type[Model], source: str | Path, *, allow_nonfinite: bool = False, **kwargs: Any
) -> Model:
    """Read a model, in evaluation mode.

    Args:
        kind: Class of the model.
        source: Folder, name of a model in this package, or ``owner/name`` on the Hugging Face hub.
        allow_nonfinite: Whether weights may be NaN or infinite.
        **kwargs: Download options of the hub (``force_download``, ``token``, ``cache_dir``,
            ``local_files_only``, ``revision``), and constructor arguments that replace those in
            ``config.json``.

    Raises:
        ValueError: If the model does not exist or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    options = {name: kwargs.pop(name) for name in _DOWNLOAD_OPTIONS if name in kwargs}
    name = str(source)
    folder = local_path(source)
    if folder.is_dir():
        config_file, weights_file = (str(folder / file) for file in (CONFIG, WEIGHTS))
    else:
        config_file, weights_file = _download(name, options)
    try:
        config = read_json(config_file)
        check_file(weights_file)
        weights = load_file(weights_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"'{name}' holds no model or a damaged one ({one_line(error)})"
        ) from error
    found = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
    if found != (_FORMAT, _VERSION):
        raise ValueError(
            f"'{name}': {CONFIG} has format and version {shown(found)}, but only "
            f"{(_FORMAT, _VERSION)} can be read"
        )
    try:
        return build(kind, config.get("model"), weights, kwargs, allow_nonfinite=allow_nonfinite)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error


def local_path(source: str | Path) -> Path:
    """Return the path of a source; the names of :func:`shipped_models` stand for their folders."""
    if source in shipped_models():
        return _SHIPPED / source
    return Path(source).expanduser()


def shipped_models() -> list[str]:
    """Return the names of the trained models in this package.

    A folder of the same name is reached as ``./name``.
    """
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG}"))


def _download(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """Return the paths of a model's files from the Hugging Face hub."""
    from huggingface_hub import hf_hub_download

    if not is_hub_name(name):
        raise ValueError(f"'{name}' is neither a folder nor an owner/name on the Hugging Face hub")
    try:
        config_file, weights_file = (
            hf_hub_download(name, file, **options) for file in (CONFIG, WEIGHTS)
        )
    except Exception as error:  # network libraries raise errors of many classes
        raise ValueError(
            f"'{name}' is not a folder, and its download from the Hugging Face hub failed "
            f"({one_line(error)})"
        ) from error
    return config_file, weights_file


def is_hub_name(name: str) -> bool:
    """Whether a name can be ``owner/name``, rather than a missing path."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and not Path(name).parent.exists()
