"""Models in folders and on the hub: loading returns what was saved, or fails with one line."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from same_model import assert_same
from torch import Tensor, nn

from nvae_lightning.model import NVAE, BernoulliLikelihood, Image, RegularCell
from nvae_lightning.model.layers import DataDependentConv2d
from nvae_lightning.serialization.card import model_card
from nvae_lightning.serialization.hub import is_hub_name

BuildNVAE = Callable[..., NVAE]

FILES = ["README.md", "config.json", "model.safetensors"]
HUB = "huggingface_hub.hf_hub_download"


def refusal(name: str | Path, **kwargs: Any) -> str:
    """Return the one-line error of loading a model, which names it."""
    with pytest.raises(ValueError, match=re.escape(f"'{name}'")) as error:
        NVAE.from_pretrained(name, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < len(str(name)) + 700
    return message


@pytest.fixture
def folder(colour_nvae: NVAE, tmp_path: Path) -> Path:
    """Folder of an intact model."""
    colour_nvae.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any request to the hub."""

    def download(*args: Any, **kwargs: Any) -> str:
        pytest.fail(f"asked the hub for {args}")

    monkeypatch.setattr(HUB, download)


# ----------------------------------------------------------------------------- saving and loading


def test_a_saved_model_is_loaded_unchanged(nvae: NVAE, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "saved"
    nvae.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config == {"format": "nvae-lightning", "version": 1, "model": nvae.architecture}
    for name in (folder, str(folder)):
        assert_same(NVAE.from_pretrained(name), nvae)


def test_a_model_is_loaded_in_evaluation_mode_and_saving_keeps_the_mode(
    colour_nvae: NVAE, tmp_path: Path
) -> None:
    colour_nvae.train()
    colour_nvae.save_pretrained(tmp_path)
    assert all(module.training for module in colour_nvae.modules())
    model = NVAE.from_pretrained(tmp_path)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_the_file_does_not_depend_on_the_memory_format(colour_nvae: NVAE, tmp_path: Path) -> None:
    colour_nvae.save_pretrained(tmp_path / "plain")
    colour_nvae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    colour_nvae.save_pretrained(tmp_path / "channels_last")
    assert not all(tensor.is_contiguous() for tensor in colour_nvae.state_dict().values())
    files = [tmp_path / kind / "model.safetensors" for kind in ("plain", "channels_last")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("initialized", [True, False])
def test_the_state_of_data_dependent_initialisation_is_saved(
    initialized: bool, build_nvae: BuildNVAE, tmp_path: Path
) -> None:
    cell = partial(
        RegularCell,
        normalization=nn.Identity,
        activation=nn.ELU,
        convolution=DataDependentConv2d,
    )
    model = build_nvae(encoder_cell=cell).train()
    if initialized:
        model(torch.rand(4, 3, 8, 8))
    model.save_pretrained(tmp_path)
    again = NVAE.from_pretrained(tmp_path)
    convolutions = [m for m in again.modules() if isinstance(m, DataDependentConv2d)]
    assert len(convolutions) == 8
    assert all(convolution.initialized is initialized for convolution in convolutions)
    gains = [convolution.log_gain.clone() for convolution in convolutions]
    again.train()(torch.rand(4, 3, 8, 8))
    for convolution, gain in zip(convolutions, gains, strict=True):
        assert torch.equal(convolution.log_gain, gain) is initialized


def test_other_users_can_read_the_files(colour_nvae: NVAE, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        colour_nvae.save_pretrained(tmp_path)
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(FILES, 0o644)


def test_saving_over_a_model_replaces_all_but_its_card(
    flow_nvae: NVAE, grey_nvae: NVAE, tmp_path: Path
) -> None:
    flow_nvae.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("written by hand")
    grey_nvae.save_pretrained(tmp_path)
    loaded = NVAE.from_pretrained(tmp_path)
    assert_same(loaded, grey_nvae)
    assert (tmp_path / "README.md").read_text() == "written by hand"
    loaded.save_pretrained(tmp_path)  # over the file it was read from
    assert_same(NVAE.from_pretrained(tmp_path), grey_nvae)


def test_a_model_that_cannot_be_saved_leaves_no_config(
    colour_nvae: NVAE, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            colour_nvae.save_pretrained(folder)
    assert "config.json" in refusal(folder)  # instead of mixing weights and settings of two models


# ------------------------------------------------------------------------------------ arguments


class OwnCell(RegularCell):
    """A cell that is not part of the package."""


def test_given_arguments_replace_those_of_the_folder(
    build_nvae: BuildNVAE, tmp_path: Path
) -> None:
    model = build_nvae(encoder_cell=OwnCell)
    model.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "encoder_cell is '" in message
    assert "pass it as encoder_cell=CONSTRUCTOR" in message
    again = NVAE.from_pretrained(tmp_path, encoder_cell=OwnCell)
    assert any(isinstance(module, OwnCell) for module in again.modules())
    assert_same(again, model)
    again = NVAE.from_pretrained(tmp_path, encoder_cell=OwnCell, first_prior_std=1.01)
    assert again.architecture == {**model.architecture, "first_prior_std": 1.01}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"map_location": "cpu"}, "unexpected keyword argument 'map_location'"),
        ({"num_flows": -1}, "model.num_flows must be at least 0, got -1"),
        ({"num_flows": 1}, "decoder.groups.0.flows"),
        ({"likelihood": BernoulliLikelihood}, "image.bits=1"),
    ],
)
def test_given_arguments_that_do_not_fit_are_refused(
    given: dict[str, Any], message: str, folder: Path
) -> None:
    assert message in refusal(folder, **given)


# ----------------------------------------------------------------------------------------- card


def test_the_card_describes_the_model(build_nvae: BuildNVAE) -> None:
    image = Image(channels=1, size=6, bits=1, padding=1)
    model = build_nvae(image, likelihood=BernoulliLikelihood, num_flows=1)
    text = model_card(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    for line in (
        "library_name: nvae-lightning",
        "- nvae",
        "| image | 6x6, 1 channels, 1 bits |",
        f"| parameters | {num_parameters:,} |",
        "| scale 0: 2x2 | 1 groups, 16 channels |",
        "| scale 1: 4x4 | 2 groups, 8 channels |",
        "| latent channels | 2 |",
        '| `decoder_cell` | {"constructor": "DepthwiseCell", "expansion": 2.0} |',
        '| `likelihood` | {"constructor": "BernoulliLikelihood"} |',
        "| `num_flows` | 1 |",
        "| `squeeze_excitation` | true |",
    ):
        assert line in text.splitlines()
    assert "(16, 1, 6, 6)" in text
    assert text.rstrip().endswith("## Measured\n\nNo figures were given.")


FIGURES: dict[str, Any] = {
    "test/bpd": 2.9134567,
    "test/nll": 6207.123456,
    "num_images": 10000,
    "small": 1.5e-7,
    "data": "CIFAR-10",
    "KL(q|p)": "two\nlines",
    "per_group": [1.0, 2.0],
    "nothing": None,
}
ROWS = [
    "| test/bpd | 2.9135 |",
    "| test/nll | 6207.1 |",
    "| num_images | 10000 |",
    "| small | 1.5e-07 |",
    "| data | CIFAR-10 |",
    r"| KL(q\|p) | two lines |",
]


@pytest.mark.parametrize("kind", ["dict", "str", "Path"])
def test_the_card_shows_measured_figures(kind: str, colour_nvae: NVAE, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(FIGURES))
    evaluation = {"dict": FIGURES, "str": str(path), "Path": path}[kind]
    colour_nvae.save_pretrained(tmp_path)  # figures may be added later
    colour_nvae.save_pretrained(tmp_path, evaluation=evaluation)
    measured = (tmp_path / "README.md").read_text().partition("## Measured\n")[2].splitlines()
    assert [line for line in measured if line] == ["| | |", "|---|---|", *ROWS]


def test_the_card_shows_tensors_and_numpy_numbers(colour_nvae: NVAE) -> None:
    figures = {"tensor": torch.tensor(2.5), "numpy": np.float32(0.25), "count": np.int64(7)}
    text = model_card(colour_nvae, {**figures, "vector": torch.zeros(2)})
    measured = text.partition("## Measured\n")[2]
    assert "| tensor | 2.5 |\n| numpy | 0.25 |\n| count | 7 |\n" in measured
    assert "vector" not in measured


@pytest.mark.parametrize("content", [None, "{", "[1, 2]", b"\xff\xfe\x00"])
def test_figures_that_cannot_be_read_are_refused(
    content: str | bytes | None, colour_nvae: NVAE, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=rf"^'{re.escape(str(path))}' contains no figures[^\n]*$"):
        model_card(colour_nvae, path)


# -------------------------------------------------------------------------------------- the hub


def test_a_push_uploads_weights_settings_and_a_card_with_figures(
    flow_nvae: NVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[dict[str, Any]] = []
    uploaded: list[dict[str, Any]] = []

    def create_repo(api: Any, **kwargs: Any) -> SimpleNamespace:
        created.append({**kwargs, "token": api.token})
        return SimpleNamespace(repo_id=kwargs["repo_id"])

    def upload_folder(api: Any, *, folder_path: Path, **kwargs: Any) -> str:
        del api
        for path in Path(folder_path).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        uploaded.append(kwargs)
        return "address"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    address = flow_nvae.push_to_hub(
        "owner/name", private=True, token="secret", evaluation={"test/bpd": 2.9134567}
    )
    assert address == "address"
    assert (created[0]["repo_id"], created[0]["private"]) == ("owner/name", True)
    assert created[0]["token"] == "secret"
    assert (uploaded[0]["repo_id"], uploaded[0]["repo_type"]) == ("owner/name", "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": "nvae-lightning", "tags": ["nvae", "vae"]}
    assert "| test/bpd | 2.9135 |" in card.text
    assert "secret" not in card.content
    assert_same(NVAE.from_pretrained(tmp_path), flow_nvae)


def test_a_model_is_downloaded_from_the_hub(
    colour_nvae: NVAE, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def download(name: str, file: str, **kwargs: Any) -> str:
        asked.append((name, file, kwargs))
        return str(folder / file)

    monkeypatch.setattr(HUB, download)
    options = {
        "revision": "v1",
        "token": "secret",
        "cache_dir": "cache",
        "local_files_only": True,
        "force_download": False,
    }
    assert_same(NVAE.from_pretrained("owner/name", **options), colour_nvae)
    assert asked == [("owner/name", f, options) for f in ("config.json", "model.safetensors")]
    asked.clear()
    model = NVAE.from_pretrained("owner/name", first_prior_std=1.01)
    assert model.decoder.groups[0].prior_std == 1.01
    assert [kwargs for _, _, kwargs in asked] == [{}, {}]


def test_a_folder_takes_precedence_over_the_hub(
    colour_nvae: NVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    colour_nvae.save_pretrained("owner/name")
    assert_same(NVAE.from_pretrained("owner/name"), colour_nvae)
    assert_same(NVAE.from_pretrained("~/owner/name"), colour_nvae)
    refusal("owner/other")  # taken for a missing folder, because owner/ exists


class ProxyError(Exception):
    """An error of a network library that is not an OSError."""


@pytest.mark.parametrize(
    ("failing", "error", "reason"),
    [
        (0, LocalEntryNotFoundError("Cannot find it in the cache.\nTry again."), "Try again."),
        (1, LocalEntryNotFoundError(""), "LocalEntryNotFoundError"),
        (1, EntryNotFoundError("404 Client Error.\n\nEntry not found."), "404 Client Error."),
        (0, TimeoutError(), "TimeoutError"),
        (1, ProxyError("503 Service Unavailable"), "ProxyError('503 Service Unavailable')"),
    ],
)
def test_a_failing_hub_is_a_one_line_error(
    failing: int, error: Exception, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, file: str, **kwargs: Any) -> str:
        if file == FILES[1:][failing]:
            raise error
        return str(folder / file)

    monkeypatch.setattr(HUB, download)
    message = refusal("owner/name")
    assert "its download from the Hugging Face hub failed (" in message
    assert reason in message


def test_a_missing_network_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for options in ({}, {"local_files_only": True}):
        message = refusal("owner/name", cache_dir=tmp_path, **options)
        assert "its download from the Hugging Face hub failed (" in message


def test_impossible_hub_names_are_not_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    error = "is neither a folder nor an owner/name on the Hugging Face hub"
    for name in ("own--er/name", "owner/na..me", "-owner/name", "owner/name.git"):
        assert "its download from the Hugging Face hub failed (" in refusal(
            name
        )  # the hub's check
    monkeypatch.setattr(HUB, lambda *args, **kwargs: pytest.fail("asked the hub"))
    for name in ("name", "a/b/c", "owner/", "/name", "owner/na me", "./name", "~/name", "a\\b/c"):
        assert not is_hub_name(name)
        assert refusal(name) == f"'{name}' {error}"
    assert "neither a folder" in refusal(tmp_path / "missing")
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("text")
    assert "neither a folder" in refusal(tmp_path / "file")


# --------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    message = refusal(folder)
    assert "holds no model or a damaged one" in message
    assert missing in message
    (folder / missing).mkdir()
    assert "damaged" in refusal(folder)


def test_truncated_files_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 7, 8, header // 2, header, len(content) - 1):
        path.write_bytes(content[:length])
        assert "damaged" in refusal(folder)
    path.write_bytes(content)
    path = folder / "config.json"
    text = path.read_text().rstrip()
    for length in range(0, len(text), 97):
        path.write_text(text[:length])
        assert "damaged" in refusal(folder)


def model_or_error(folder: Path) -> NVAE | str:
    try:
        return NVAE.from_pretrained(folder)
    except ValueError as error:
        return str(error)


def test_changed_bytes_in_the_header_of_the_weights_are_refused_or_harmless(
    colour_nvae: NVAE, folder: Path
) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    num_refused = 0
    for position in torch.randint(header, (20,), generator=generator).tolist():
        change = int(torch.randint(1, 256, (1,), generator=generator))
        changed = bytes([content[position] ^ change])
        path.write_bytes(content[:position] + changed + content[position + 1 :])
        model = model_or_error(folder)
        if isinstance(model, str):
            assert model.startswith(f"'{folder}'")
            assert "\n" not in model
            num_refused += 1
        else:
            assert model.state_dict().keys() == colour_nvae.state_dict().keys()
    assert num_refused > 15


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_configs_of_something_else_are_refused(folder: Path) -> None:
    for content, message in (
        ("", "damaged"),
        ("text", "damaged"),
        (b"\xff\xfe{}", "damaged"),
        ("[" * sys.getrecursionlimit(), "damaged"),
        ("1" * 10_000, "damaged"),
        ("null", "format and version None"),
        ("[]", "format and version None"),
        ("{}", "format and version (None, None)"),
        ('{"architectures": ["BertModel"], "model_type": "bert"}', "(None, None)"),
        ('{"format": "other", "version": 1, "model": {}}', "('other', 1)"),
        ('{"format": "nvae-lightning", "version": 2}', "('nvae-lightning', 2), but"),
        ('{"format": ["a"], "version": {"b": 1}}', "(['a'], {'b': 1})"),
        ('{"format": "nvae-lightning", "version": 1}', "not the description of a model"),
    ):
        data = content.encode() if isinstance(content, str) else content
        (folder / "config.json").write_bytes(data)
        assert message in refusal(folder), content


def test_a_config_that_would_run_code_is_refused_and_runs_nothing(
    colour_nvae: NVAE, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    harmful: dict[str, Any] = {"constructor": "os.system", "command": "mkdir harm"}
    inner = {"constructor": "RegularCell", "normalization": harmful}
    for place, value in (
        ("encoder_cell", harmful),
        ("likelihood", harmful),
        ("encoder_cell", inner),
    ):
        change_config(folder, model={**colour_nvae.architecture, place: value})
        assert "is 'os.system', which is not part of this package" in refusal(folder)
    assert not (folder / "harm").exists()


def test_weights_of_something_else_are_refused(folder: Path) -> None:
    # Copies, because the file that they are mapped from is overwritten.
    weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    bias = "encoder.stem.bias"
    others: list[tuple[dict[str, Tensor], str]] = [
        ({}, "Missing key(s)"),
        ({"embedding.weight": torch.zeros(3, 4)}, "Missing key(s)"),
        ({**weights, bias: torch.zeros(5)}, f"size mismatch for {bias}"),
        ({**weights, "extra": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "extra"'),
    ]
    for other, message in others:
        save_file(other, folder / "model.safetensors")
        assert message in refusal(folder)


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("harm",)

    torch.save({"state_dict": Harmful()}, folder / "model.safetensors")
    assert "damaged" in refusal(folder)
    assert not (folder / "harm").exists()
