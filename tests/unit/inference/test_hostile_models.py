"""Malicious model files are refused within seconds, with a one-line reason."""

from __future__ import annotations

import argparse
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvae_lightning.inference.loading import load_model
from nvae_lightning.model import NVAE, RegularCell
from nvae_lightning.published import PublishedSettings, load_published, published_names
from nvae_lightning.serialization.architecture import ARCHITECTURE
from nvae_lightning.serialization.checkpoints import damage, last_checkpoint, read_checkpoint

BuildNVAE = Callable[..., NVAE]

PUBLISHED: dict[str, Any] = {
    "dataset": "toy_8", "arch_instance": "res_mbconv", "num_x_bits": 8, "num_latent_scales": 1,
    "num_groups_per_scale": 2, "num_latent_per_group": 2, "num_channels_enc": 4,
    "num_channels_dec": 4, "num_preprocess_blocks": 1, "num_preprocess_cells": 1,
    "num_postprocess_blocks": 1, "num_postprocess_cells": 1, "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1, "num_mixture_dec": 2, "num_nf": 0, "use_se": True,
    "res_dist": True,
}  # fmt: skip


def build_published(settings: dict[str, Any]) -> NVAE:
    return NVAE(**PublishedSettings.of(settings).arguments)


@pytest.fixture
def folder(build_nvae: BuildNVAE, tmp_path: Path) -> Path:
    """A folder of save_pretrained."""
    build_nvae(encoder_cell=partial(RegularCell, dilations=(1, 1))).save_pretrained(
        tmp_path / "saved"
    )
    return tmp_path / "saved"


def refusal(path: Path, load: Callable[[Path], object] = load_model) -> str:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"^[^\n]{20,3000}$") as error:
        load(path)
    assert time.process_time() - started < 15
    assert str(error.value).isprintable()
    assert "weights_only" not in str(error.value)
    return str(error.value)


def change_config(folder: Path, path: tuple[str | int, ...], value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    place = config["model"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def checkpoint_of(model: NVAE, path: Path, **changes: Any) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {
        "pytorch-lightning_version": "2.6", ARCHITECTURE: model.architecture,
        "state_dict": weights, **changes,
    }  # fmt: skip
    torch.save(content, path)
    return path


HUGE = 10**9
SIZES: list[tuple[tuple[str | int, ...], object]] = [
    (("hierarchy", "scales", 0, "num_groups"), HUGE),
    (("hierarchy", "scales", 1, "num_groups"), HUGE),
    (("hierarchy", "scales", 0, "channels"), HUGE),
    (("hierarchy", "scales", 0, "decoder_channels"), HUGE),
    (("hierarchy", "scales"), [{"downsample": 2**k, "channels": 2**k, "num_groups": 1}
                               for k in range(60, 0, -1)]),
    (("hierarchy", "latent_channels"), HUGE),
    (("num_flows",), HUGE),
    (("num_encoder_cells",), HUGE),
    (("num_decoder_cells",), HUGE),
    (("num_preprocess_cells",), HUGE),
    (("num_postprocess_cells",), HUGE),
    (("image", "size"), 2**30),
    (("image", "padding"), 2**30),
    (("likelihood", "num_mixtures"), HUGE),
    (("encoder_cell", "dilations"), [HUGE, HUGE]),
    (("encoder_cell", "dilations"), [1] * 19_000),
    (("decoder_cell", "expansion"), 1e9),
    (("decoder_cell", "kernel_size"), HUGE + 1),
    (("first_prior_std",), 10**4000),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), SIZES, ids=lambda value: str(value)[:30])
def test_huge_sizes_are_refused_quickly(
    path: tuple[str | int, ...], value: object, folder: Path
) -> None:
    change_config(folder, path, value)
    assert f"'{folder}': " in refusal(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("squeeze_excitation",), "false"),
        (("residual_posterior",), 0),
        (("num_flows",), False),
        (("first_prior_std",), "1.0"),
        (("image", "channels"), 3.0),
        (("image", "padding"), False),
        (("likelihood", "published_tails"), "false"),
        (("encoder_cell", "dilations"), [1.5, 1.5]),
        (("encoder_cell", "dilations"), "11"),
        (("encoder_cell", "convolution"), {"constructor": "WeightNormConv2d", "device": "meta"}),
        (("encoder_cell", "convolution"), {"constructor": "Conv2d", "dtype": None}),
        (("encoder_cell", "convolution"), {"constructor": "Conv2d", "bias": "x"}),
    ],
    ids=str,
)
def test_values_of_wrong_types_are_refused(
    path: tuple[str | int, ...], value: object, folder: Path
) -> None:
    change_config(folder, path, value)
    assert str(path[-1]) in refusal(folder) or path[-1] == "convolution"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": ' + "[" * 200_000, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (" " * 300_000, "more than 262,144 bytes"),
        ('{"format": "nvae-lightning", "format": "x"}', "names 'format' twice"),
        ('{"format": "nvae-lightning", "version": 1, "model": {"a": NaN}}', "number nan"),
        ('{"format": "nvae-lightning", "version": 1, "model": {"a": 1e999}}', "number inf"),
        (
            '{"format": "nvae-lightning", "version": 1, "model": {"a": [' + "1," * 50_000 + "1]}}",
            "more than 20,000 values",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_json_bombs_are_refused(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "sparse"])
def test_special_files_are_not_opened(kind: str, file: str, folder: Path) -> None:
    path = folder / file
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 42)
    message = refusal(folder)
    if kind != "sparse" and file == "model.safetensors":
        assert "not a regular file" in message


def test_weights_that_claim_more_bytes_than_the_file_has_are_refused(folder: Path) -> None:
    head = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    content = struct.pack("<Q", len(head)) + head.encode()
    (folder / "model.safetensors").write_bytes(content + bytes(100))
    refusal(folder)


@pytest.mark.filterwarnings("ignore:.*an older one is used:UserWarning")
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder"])
def test_checkpoints_that_are_special_files_are_not_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 42)
    refusal(path)
    refusal(path, read_checkpoint)
    refusal(tmp_path)  # a folder of checkpoints


def test_compressed_or_shared_members_are_not_unpacked(colour_nvae: NVAE, tmp_path: Path) -> None:
    path = checkpoint_of(colour_nvae, tmp_path / "last.ckpt")
    assert damage(path) is None
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(bomb, "w") as written:
        for member in archive.infolist():
            written.writestr(member.filename, archive.read(member), zipfile.ZIP_DEFLATED)
        written.writestr("archive/data/zeros", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    for load in (load_model, read_checkpoint):
        assert "its members are compressed" in refusal(bomb, load)


@pytest.mark.parametrize(
    "convert",
    [
        lambda value: value.to(torch.int32),
        lambda value: value > 0,
        lambda value: value.to(torch.complex64),
        lambda value: value.to(torch.float8_e4m3fn),
        lambda value: value.to_sparse(),
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        lambda value: value.to("meta"),
    ],
    ids=["int", "bool", "complex", "float8", "sparse", "quantised", "meta"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_of_unsuitable_dtypes_are_refused_by_name(
    convert: Callable[[Tensor], Tensor], colour_nvae: NVAE, tmp_path: Path
) -> None:
    name = "encoder.stem.weight"
    weights = {f"model.{k}": value for k, value in colour_nvae.state_dict().items()}
    weights[f"model.{name}"] = convert(weights[f"model.{name}"])
    path = checkpoint_of(colour_nvae, tmp_path / "last.ckpt", state_dict=weights)
    assert name in refusal(path)


def test_floats_of_any_precision_and_integer_counts_are_loaded(
    colour_nvae: NVAE, tmp_path: Path
) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {
            f"model.{name}": value.to(dtype)
            if value.is_floating_point()
            else value.to(torch.int32)
            for name, value in colour_nvae.state_dict().items()
        }
        loaded = load_model(checkpoint_of(colour_nvae, tmp_path / "a.ckpt", state_dict=weights))
        for name, value in loaded.state_dict().items():
            assert value.dtype == colour_nvae.state_dict()[name].dtype
            torch.testing.assert_close(value, weights[f"model.{name}"].to(value.dtype))


def test_float_counts_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("num_batches_tracked"))
    save_file({**weights, name: weights[name].float()}, folder / "model.safetensors")
    assert f"{name} has dtype torch.float32, but the model has torch.int64" in refusal(folder)


def test_expanded_tensors_are_refused(colour_nvae: NVAE, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in colour_nvae.state_dict().items()}
    name = "model.encoder.stem.weight"
    shape = state[name].shape
    repeated = {**state, name: torch.zeros(1, 1, 1, 1).expand(shape)}
    path = checkpoint_of(colour_nvae, tmp_path / "a.ckpt", state_dict=repeated)
    assert "encoder.stem.weight repeats values" in refusal(path)
    largest = max(value.numel() for value in state.values())
    tight = torch.zeros(largest)
    shared = {k: tight[: v.numel()].view(v.shape) if v.is_floating_point() else v
              for k, v in state.items()}  # fmt: skip
    path = checkpoint_of(colour_nvae, tmp_path / "a.ckpt", state_dict=shared)
    assert "share memory" in refusal(path)


def test_weights_in_another_memory_layout_are_loaded(colour_nvae: NVAE, tmp_path: Path) -> None:
    model = colour_nvae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    loaded = load_model(checkpoint_of(model, tmp_path / "a.ckpt")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_loaded_on_demand(
    value: float, colour_nvae: NVAE, tmp_path: Path
) -> None:
    with torch.no_grad():
        colour_nvae.get_parameter("decoder.initial_state")[0, 0, 0] = value
    colour_nvae.save_pretrained(tmp_path / "saved")
    path = checkpoint_of(colour_nvae, tmp_path / "a.ckpt")
    for source in (path, tmp_path / "saved"):
        message = refusal(source)
        assert "decoder.initial_state holds 1 NaN or infinite of" in message
        assert "allow_nonfinite=True" in message
        loaded = load_model(source, allow_nonfinite=True)
        assert not loaded.get_parameter("decoder.initial_state").isfinite().all()


def _cyclic() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def _laughs() -> Any:
    value: Any = [1]
    for _ in range(12):
        value = [value] * 100
    return value


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (_cyclic, "nested more than 16 levels"),
        (_laughs, "more than 20,000 values"),
        (lambda: [0] * 10**6, "more than 20,000 values"),
        (lambda: torch.zeros(2), "holds a Tensor"),
        (lambda: b"ab", "holds a bytes"),
        (lambda: {1: 2}, "the key 1, which is not text"),
        (lambda: 10**40, "beyond 64 bits"),
        (lambda: {1, 2}, "holds a set"),
        (lambda: argparse.Namespace(a=1), "holds a Namespace"),
    ],
)
def test_descriptions_in_checkpoints_are_plain_data(
    description: Callable[[], object], message: str, colour_nvae: NVAE, tmp_path: Path
) -> None:
    architecture = {**colour_nvae.architecture, "extra": description()}
    path = checkpoint_of(colour_nvae, tmp_path / "a.ckpt", architecture=architecture)
    assert message in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_groups_per_scale": HUGE},
        {"num_latent_scales": HUGE},
        {"num_latent_scales": 25, "num_groups_per_scale": 10**6, "ada_groups": True},
        {"min_groups_per_scale": HUGE, "ada_groups": True, "num_latent_scales": 2},
        {"num_nf": HUGE},
        {"num_channels_enc": HUGE},
        {"num_channels_dec": HUGE},
        {"num_latent_per_group": HUGE},
        {"num_mixture_dec": HUGE},
        {"num_preprocess_blocks": HUGE, "num_postprocess_blocks": HUGE},
        {"num_preprocess_cells": HUGE},
        {"num_cell_per_cond_enc": HUGE},
        {"dataset": "toy_1000000000"},
        {"dataset": "toy_" + "9" * 5000},
        {"dataset": "x" * 10**6},
        {"arch_instance": "\x1b[2J" * 1000},
        {"num_x_bits": HUGE},
        {"num_nf": 10**40},
        {"num_nf": "0" * 10**6},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_huge_published_settings_are_refused_quickly(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = build_published(PUBLISHED)
    names = published_names(model)
    weights = {names[name]: value for name, value in model.state_dict().items()}
    settings = argparse.Namespace(**{**PUBLISHED, **changes})
    torch.save({"state_dict": weights, "args": settings}, tmp_path / "a.pt")
    refusal(tmp_path / "a.pt")
    refusal(tmp_path / "a.pt", load_published)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_published_weights_of_unsuitable_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    model = build_published(PUBLISHED)
    names = published_names(model)
    weights = {names[name]: value for name, value in model.state_dict().items()}
    for value, message in (
        (weights["prior_ftr0"].to_sparse(), "prior_ftr0 is not a plain dense tensor"),
        (
            weights["prior_ftr0"].int(),
            "prior_ftr0 has dtype torch.int32, but",
        ),
        (weights["prior_ftr0"] * torch.nan, "NaN or infinite"),
    ):
        content = {"state_dict": {**weights, "prior_ftr0": value}, "args": PUBLISHED}
        torch.save(content, tmp_path / "a.pt")
        assert message in refusal(tmp_path / "a.pt")
    load_published(tmp_path / "a.pt", allow_nonfinite=True)


def test_torchs_advice_to_trust_a_file_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": _Harmful()}, path)
    for load in (load_model, read_checkpoint):
        assert "nothing in it was run" in refusal(path, load)
    assert last_checkpoint(tmp_path) == path.resolve()  # intact, but that reader cannot read it


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)
