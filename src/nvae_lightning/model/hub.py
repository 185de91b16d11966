"""Models in folders and on the Hugging Face hub: ``model.safetensors`` and ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from nvae_lightning.model.architecture import restore

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
        cls: type[Model], pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> Model:
        """Read a model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder, or ``owner/name`` on the Hugging Face hub.
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
        try:
            if folder.is_dir():
                config_file, weights_file = (str(folder / file) for file in (CONFIG, WEIGHTS))
            elif not is_hub_name(name):
                raise FileNotFoundError("there is no such folder, and it is no owner/name")
            else:
                config_file = hf_hub_download(name, CONFIG, **download)
                weights_file = hf_hub_download(name, WEIGHTS, **download)
            config = json.loads(Path(config_file).read_text(encoding="utf-8"))
            weights = load_file(weights_file)
        except HFValidationError as error:
            raise ValueError(f"'{name}' is no folder here and no owner/name") from error
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"'{name}' is no folder here, and the Hugging Face hub did not give it ({reason})"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"'{name}' holds no model, or a damaged one ({error})") from error
        kind = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
        if kind != (_FORMAT, _VERSION):
            raise ValueError(
                f"'{name}': {CONFIG} is of format and version {kind}, where {(_FORMAT, _VERSION)} "
                "is read"
            )
        try:
            return build(cls, config.get("model", {}), weights, kwargs)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error

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
            evaluation: figures by name, or the ``evaluation.json`` that holds them.
        """
        assert isinstance(self, nn.Module)
        if isinstance(evaluation, str | Path):
            measured = json.loads(Path(evaluation).read_text(encoding="utf-8"))
        else:
            measured = evaluation or {}
        settings = dict(self.architecture)
        image, hierarchy = settings.pop("image"), settings.pop("hierarchy")
        padded_size = image["size"] + 2 * image["padding"]
        figures = {
            name: f"{value:.5g}" if isinstance(value, float) else value
            for name, value in measured.items()
            if isinstance(value, int | float | str)
        }
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
            measured=figures,
        )


def is_hub_name(name: str) -> bool:
    """Whether it can be ``owner/name``, rather than a path that is not there."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and not Path(name).parent.exists()


def build(
    kind: type[Any],
    description: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    given: Mapping[str, object],
) -> Any:  # noqa: ANN401
    """Build a model of a description and load its weights, in evaluation mode.

    Raises:
        ValueError: if the description is none, or the weights are of another model.
    """
    arguments = restore(description, given)
    try:
        model = kind(**arguments)
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return model.eval()
