"""The models in the package are intact, described truthfully, and found by name."""

import hashlib
from pathlib import Path

import pytest

import nvae_lightning
from nvae_lightning import load_model
from nvae_lightning.cli.plain_yaml import read_yaml
from nvae_lightning.cli.trained import training_settings
from nvae_lightning.inference.loading import find_checkpoint
from nvae_lightning.model import NVAE
from nvae_lightning.serialization.hub import local_path, shipped_models

FOLDER = Path(nvae_lightning.__file__).parent / "weights"


def test_models_are_found() -> None:
    assert "mnist" in shipped_models()
    assert set(shipped_models()) == {path.name for path in FOLDER.iterdir() if path.is_dir()}


def test_checksums_match() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    recorded = {name: digest for digest, name in map(str.split, lines)}
    assert set(recorded) == {f"{name}/model.safetensors" for name in shipped_models()}
    for name, digest in recorded.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", shipped_models())
def test_a_model_loads_by_name_and_knows_its_dataset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()  # for example of data
    monkeypatch.chdir(tmp_path)
    model = load_model(name)
    assert not model.training
    assert model.architecture == NVAE.from_pretrained(FOLDER / name).architecture
    assert model.image.channels == (1 if name == "mnist" else 3)
    assert find_checkpoint(name) is None
    found = training_settings(name)
    assert found is not None
    settings = read_yaml(FOLDER / name / "config.yaml")
    assert found[1] == settings["dataset"]
    assert not Path(str(found[1]["root"])).is_absolute()
    assert sum(p.numel() for p in model.parameters()) * 4 < 8e6


def test_a_folder_of_the_same_name_is_reached_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("mnist") == FOLDER / "mnist"
    assert local_path("./mnist") == Path("mnist")
    (tmp_path / "mnist").mkdir()
    with pytest.raises(ValueError, match="contains no intact checkpoint"):
        load_model("./mnist")


def test_a_missing_model_names_those_in_the_package() -> None:
    with pytest.raises(ValueError, match=r"'mnits' does not exist; .* or one of mnist"):
        load_model("mnits")
