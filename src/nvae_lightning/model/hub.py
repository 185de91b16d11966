"""Models in folders and on the Hugging Face hub: ``model.safetensors`` and ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from nvae_lightning.model.architecture import ForeignConstructorError, check_arguments, restore
from nvae_lightning.model.weights import build_of_weights
from nvae_lightning.utilities.plain_data import check_file, read_json, shown

Model = TypeVar("Model", bound="PretrainedMixin")

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_FORMAT, _VERSION = "nvae-lightning", 1

_CARD = """---
{{ card_data }}
---

# NVAE

A deep hierarchical variational autoencoder of images
([Vahdat & Kautz, NeurIPS 2020](https://arxiv.org/abs/2007.03898)), by nvae_lightning.

```python
from nvae_lightning.model import NVAE

model = NVAE.from_pretrained("NAME OF THIS REPOSITORY")
images = model.sample(16, temperature=0.7).mean  # (16, {{ image.channels }}, \
{{ image.size }}, {{ image.size }}), in [0, 1]
nats = model.log_likelihood(images, num_samples=100)  # images on the levels of [0, 1]
```

## Settings

| | |
|---|---|
| image | {{ image.size }}x{{ image.size }}, {{ image.channels }} channels, {{ image.bits }} bits |
| parameters | {{ num_parameters }} |
{% for scale in scales -%}
| scale {{ loop.index0 }}: {{ scale.side }}x{{ scale.side }} | \
{{ scale.num_groups }} groups, {{ scale.channels }} channels |
{% endfor -%}
| latent channels | {{ latent_channels }} |
{% for name, value in settings.items() -%}
| `{{ name }}` | {{ value }} |
{% endfor %}
## Measured
{% if measured %}
| | |
|---|---|
{% for name, value in measured.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{% else %}
Nothing has been stated.
{% endif %}"""


class PretrainedMixin(PyTorchModelHubMixin):
    """Adds ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    ``config.json`` holds the constructor's arguments. It is data: constructors are named, and only
    those of this package are known, so that reading a stranger's model runs nothing of theirs.
    """

    if TYPE_CHECKING:

        @property
        def architecture(self) -> dict[str, Any]:
            """Constructor arguments as plain data."""
            ...

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        allow_nonfinite: bool = False,
        **kwargs: Any,
    ) -> Model:
        """Read a model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder, or ``owner/name`` on the Hugging Face hub.
            allow_nonfinite: whether weights may be NaN or infinite.
            **kwargs: ``force_download``, ``token``, ``cache_dir``, ``local_files_only`` and
                ``revision``, which are the hub's; arguments of the constructor, to be taken
                instead of those in ``config.json``.

        Raises:
            ValueError: if there is no such model, or it is damaged.
        """
        options = ("force_download", "token", "cache_dir", "local_files_only", "revision")
        download = {name: kwargs.pop(name) for name in options if name in kwargs}
        name = str(pretrained_model_name_or_path)
        folder = Path(name).expanduser()
        if folder.is_dir():
            config_file, weights_file = (str(folder / file) for file in (CONFIG, WEIGHTS))
        else:
            config_file, weights_file = _download(name, download)
        try:
            config = read_json(config_file)
            check_file(weights_file)
            weights = load_file(weights_file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"'{name}' holds no model, or a damaged one ({_one_line(error)})"
            ) from error
        kind = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
        if kind != (_FORMAT, _VERSION):
            raise ValueError(
                f"'{name}': {CONFIG} is of format and version {shown(kind)}, where "
                f"{(_FORMAT, _VERSION)} "
                "is read"
            )
        try:
            return build(
                cls, config.get("model"), weights, kwargs, allow_nonfinite=allow_nonfinite
            )
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Write the model; a card that is there stays, unless figures are given for it.

        Args:
            save_directory: folder.
            model_card_kwargs: arguments of :meth:`generate_model_card`.
            **kwargs: those of ``huggingface_hub.PyTorchModelHubMixin.save_pretrained``.
        """
        address = super().save_pretrained(
            save_directory, model_card_kwargs=model_card_kwargs, **kwargs
        )
        if model_card_kwargs:
            card = self.generate_model_card(**model_card_kwargs)
            card.save(Path(save_directory) / "README.md")
        return address

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        config = {"format": _FORMAT, "version": _VERSION, "model": self.architecture}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        # Not save_file, whose files nobody else may read.
        (save_directory / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2) + "\n"
        (save_directory / CONFIG).write_text(text, encoding="utf-8")

    def generate_model_card(
        self, evaluation: Mapping[str, Any] | str | Path | None = None
    ) -> ModelCard:
        """Write the card of the model: its settings and what was measured of it.

        Args:
            evaluation: figures by name, or the ``evaluation.json`` that holds them; only single
                numbers and texts are shown.

        Raises:
            ValueError: if the file is missing or holds no figures.
        """
        assert isinstance(self, nn.Module)
        settings = dict(self.architecture)
        image, hierarchy = settings.pop("image"), settings.pop("hierarchy")
        padded_size = image["size"] + 2 * image["padding"]
        return ModelCard.from_template(
            card_data=self._hub_mixin_info.model_card_data,
            template_str=_CARD,
            image=image,
            num_parameters=f"{sum(p.numel() for p in self.parameters()):,}",
            scales=[
                {**scale, "side": padded_size // scale["downsample"]}
                for scale in hierarchy["scales"]
            ],
            latent_channels=hierarchy["latent_channels"],
            settings={name: json.dumps(value) for name, value in settings.items()},
            measured=_figures(evaluation or {}),
        )


def _figures(evaluation: Mapping[str, Any] | str | Path) -> dict[str, str]:
    """Give the rows of the table of figures."""
    if isinstance(evaluation, Mapping):
        measured = evaluation
    else:
        try:
            measured = read_json(evaluation)
        except (OSError, ValueError) as error:
            raise ValueError(f"'{evaluation}' holds no figures ({_one_line(error)})") from error
        if not isinstance(measured, dict):
            raise ValueError(f"'{evaluation}' holds no figures by name")
    figures = {}
    for name, value in measured.items():
        value = value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
        if isinstance(value, Real | str):
            is_whole = isinstance(value, Integral | str)
            text = str(value) if is_whole else f"{value:.5g}"
            figures[_cell(name)] = _cell(text)
    return figures


def _cell(text: str) -> str:
    """Write what may stand in a table."""
    return " ".join(text.split()).replace("|", r"\|")


def _download(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """Give the paths of a model's files from the Hugging Face hub."""
    no_name = f"'{name}' is no folder here and no owner/name"
    if not is_hub_name(name):
        raise ValueError(no_name)
    try:
        config_file, weights_file = (
            hf_hub_download(name, file, **options) for file in (CONFIG, WEIGHTS)
        )
    except HFValidationError as error:
        raise ValueError(no_name) from error
    except Exception as error:  # the network's are of many kinds
        raise ValueError(
            f"'{name}' is no folder here, and the Hugging Face hub did not give it "
            f"({_one_line(error)})"
        ) from error
    return config_file, weights_file


def _one_line(error: Exception) -> str:
    """Say what happened; without the end, where a model's every weight would be named."""
    is_text = isinstance(error, OSError | RuntimeError | TypeError | ValueError | SafetensorError)
    return shorten(str(error) if is_text else repr(error), 500, placeholder=" ...") or repr(error)


def is_hub_name(name: str) -> bool:
    """Whether it can be ``owner/name``, rather than a path that is not there."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and not Path(name).parent.exists()


def build(
    kind: type[Any],
    description: object,
    weights: Mapping[str, Any],
    given: Mapping[str, object],
    *,
    allow_nonfinite: bool = False,
) -> Any:  # noqa: ANN401
    """Build a model of a description and load its weights, in evaluation mode.

    Raises:
        ValueError: if the description is none, or the weights are of another model.
    """
    try:
        arguments = restore(description, given)
        check_arguments("", kind, arguments)
        model = build_of_weights(
            kind,
            arguments,
            weights,
            has_foreign=bool(given),
            allow_nonfinite=allow_nonfinite,
        )
    except ForeignConstructorError:
        raise
    except Exception as error:  # what data can be wrong in is of many kinds
        raise ValueError(_one_line(error)) from error
    return model.eval()
