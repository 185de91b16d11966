import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.prepare import prepare
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.data.storage import (
    LAYOUT,
    checksum,
    is_ours,
    is_prepared,
    open_images,
    open_prepared,
    verify,
)

SHAPES = {"train": (7, 4, 4, 3), "validation": (2, 4, 4, 3), "test": (3, 4, 4, 3)}


@pytest.fixture
def pixels() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {split: generator.integers(256, size=s, dtype=np.uint8) for split, s in SHAPES.items()}


@pytest.fixture
def folder(tmp_path: Path, pixels: dict[str, np.ndarray]) -> Path:
    sources = {split: ArraySource(images) for split, images in pixels.items()}
    prepare(Splits("made", sources), Decoder(4, 3), tmp_path / "p", source="here", settings={})
    return tmp_path / "p"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_prepared_images_are_a_read_only_memory_map(
    folder: Path, pixels: dict[str, np.ndarray]
) -> None:
    prepared = open_prepared(folder)
    assert list(prepared) == list(SHAPES)
    for split, known in prepared.items():
        images = open_images(folder, known)
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
        assert np.array_equal(images, pixels[split])


def test_any_program_can_read_the_arrays(folder: Path, pixels: dict[str, np.ndarray]) -> None:
    for split, expected in pixels.items():
        assert np.array_equal(np.load(folder / f"{split}.npy"), expected)


def test_a_folder_without_descriptions_contains_nothing_prepared(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "train.json").write_text('{"shape": [2, 4, 4, 3]}')
    (tmp_path / "test.json").write_text("no JSON")
    (tmp_path / "list.json").write_text(f'["{LAYOUT}"]')
    assert not is_prepared(tmp_path)
    assert not is_prepared(tmp_path / "nowhere")
    assert not is_prepared(tmp_path / "train.npy")
    assert open_prepared(tmp_path) == {}


def test_files_of_other_programs_are_ignored(folder: Path) -> None:
    (folder / "labels.json").write_text('{"split": "train"}')
    assert is_prepared(folder)
    assert is_ours(folder / "train.json")
    assert not is_ours(folder / "labels.json")
    assert list(open_prepared(folder)) == list(SHAPES)


@pytest.mark.parametrize("lost", ["test.npy", "test.json", "validation.npy", "train.json"])
def test_a_missing_part_is_named(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    assert is_prepared(folder)
    split = lost.split(".")[0]
    message = rf"^dataset\.root: '.*{split}\.npy' is damaged \(it is missing.*overwrite=true$"
    with pytest.raises(ValueError, match=message):
        open_prepared(folder)


@pytest.mark.parametrize("size", [0, 5, 128, 200])
def test_a_truncated_array_is_not_opened(folder: Path, size: int) -> None:
    with (folder / "test.npy").open("r+b") as file:
        file.truncate(size)
    known = open_prepared(folder)["test"]
    message = r"^dataset\.root: '.*test\.npy' is damaged \(.+\); .* overwrite=true$"
    with pytest.raises(ValueError, match=message) as error:
        open_images(folder, known)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other", [np.zeros((4, 4, 4, 3), np.uint8), np.zeros((3, 4, 4, 3), np.int16)]
)
def test_an_array_of_another_shape_is_not_opened(folder: Path, other: np.ndarray) -> None:
    np.save(folder / "test.npy", other)
    with pytest.raises(ValueError, match=r"is damaged \(.*instead of uint8 \(3, 4, 4, 3\)"):
        open_images(folder, open_prepared(folder)["test"])


def test_a_description_of_another_split_is_damaged(folder: Path) -> None:
    change(folder / "test.json", split="train")
    with pytest.raises(ValueError, match=r"^dataset\.root: '.*test\.json' is damaged .*'train'"):
        open_prepared(folder)


@pytest.mark.parametrize("position", [0, 128, -1])
def test_one_flipped_bit_is_found(folder: Path, position: int) -> None:
    prepared = open_prepared(folder)
    verify(folder, prepared)
    content = bytearray((folder / "validation.npy").read_bytes())
    content[position] ^= 1
    (folder / "validation.npy").write_bytes(content)
    message = r"^dataset\.root: '.*validation\.npy' is damaged \(its checksum .*overwrite=true$"
    with pytest.raises(ValueError, match=message):
        verify(folder, prepared)


def test_the_checksum_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert checksum(tmp_path / "file", "Reading") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
