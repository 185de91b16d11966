"""The summary and the report of a source, and the names of its images."""

import csv
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.messages import escaped, printable
from nvae_lightning.data.summary import REPORT, Outcome, Summary, merged, to_csv
from nvae_lightning.utilities.image import Image as ImageFormat

SETTINGS: dict[str, Any] = {"batch_size": 1, "image": ImageFormat(3, 8, 8)}

NAMES = [
    "plain.png",
    "line\nbreak.png",
    "return\r.png",
    "both\r\n.png",
    "tab\t.png",
    "back\\slash\\n.png",
    "separators\x85\u2028\u2029\x1c.png",
    'quotes".png',
    "comma,.png",
    "größe 😀.png",
    os.fsdecode(b"caf\xe9\xff.png"),
    " leading and trailing .png",
]


@pytest.mark.parametrize("name", [*NAMES, "nul\0.png"])
def test_a_name_becomes_one_line_of_its_own(name: str) -> None:
    line = escaped(name)
    assert line.splitlines() == [line]
    assert len({*map(escaped, NAMES)}) == len(NAMES)
    printable(name).encode()
    text = to_csv([Outcome("train", name, "converted", "because")])
    assert [*csv.reader(text.splitlines())][1:] == [["train", line, "converted", "because"]]


def test_names_of_prepared_images_are_listed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "source" / split).mkdir(parents=True)
        for name in NAMES:
            Image.new("L", (8, 8)).save(tmp_path / "source" / split / name)
    data = ImageDataModule(root=tmp_path / "p", num_workers=0, **SETTINGS)
    data.prepare(str(tmp_path / "source"))
    expected = [escaped(name) for name in sorted(f"train/{name}" for name in NAMES)]
    text = (tmp_path / "p" / "train.txt").read_bytes()
    assert len(text.splitlines()) == text.count(b"\n") == len(NAMES)
    lines = text.decode("utf-8", "surrogateescape").split("\n")
    assert lines[:-1] == expected
    assert [row["image"] for row in report(tmp_path / "p") if row["split"] == "train"] == expected


def report(folder: Path) -> list[dict[str, str]]:
    text = (folder / REPORT).read_bytes().decode("utf-8", "surrogateescape")
    return [*csv.DictReader(text.splitlines())]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images of many kinds, some outside the splits, and other files."""
    root = tmp_path / "source"
    for split in ("train", "test", "extra"):
        (root / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / split / "rgb.png")
    train = root / "train"
    Image.new("L", (8, 8)).save(train / "grey.jpg")
    Image.new("RGBA", (8, 8)).save(train / "clear.png")
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(train / "deep.png")
    Image.new("RGB", (8, 8)).save(
        train / "pages.tif", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    for name in ("a.heic", "b.psd", "c.svg", "d.CR2", "readme", ".DS_Store"):
        (train / name).write_bytes(b"x")
    return root


IGNORED = {
    "extra/rgb.png": "image beside the splits",
    "train/a.heic": "with suffix .heic",
    "train/b.psd": "with suffix .psd",
    "train/c.svg": "with suffix .svg",
    "train/d.CR2": "with suffix .cr2",
    "train/readme": "without a suffix",
    "train/.DS_Store": "hidden",
}
LINES = [
    "6 read: 4 PNG, 1 JPEG, 1 TIFF",
    "4 converted: ",
    "7 ignored: ",
]


@pytest.mark.parametrize("is_zip", [False, True])
def test_the_summary_is_the_same_prepared_or_not(
    mixed: Path, tmp_path: Path, is_zip: bool
) -> None:
    source = mixed
    if is_zip:
        source = tmp_path / "source.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in mixed.rglob("*.*"):
                archive.write(path, path.relative_to(mixed))
            archive.writestr("train/readme", b"x")
    data = ImageDataModule(root=tmp_path / "p", num_workers=0, **SETTINGS)
    data.prepare(str(source))
    rows = report(tmp_path / "p")
    assert {row["image"]: row["reason"] for row in rows if row["outcome"] == "ignored"} == IGNORED
    converted = {row["image"]: row["reason"] for row in rows if row["outcome"] == "converted"}
    assert converted["train/grey.jpg"] == "grey repeated to colour"
    assert converted["train/clear.png"] == "entirely transparent, all white"
    assert converted["train/pages.tif"] == "first frame of several: 2 frames"
    assert (
        "nearly black, see dataset.source_bits: the values only reach 200"
        in converted["train/deep.png"]
    )
    directly = ImageDataModule(root=source, num_workers=0, **SETTINGS)
    directly.setup("fit")
    directly.setup("test")
    prepared = ImageDataModule(root=tmp_path / "p", **SETTINGS)
    assert prepared.summary == directly.summary
    lines = directly.summary.lines()
    assert len(lines) == len(LINES)
    assert all(line.startswith(start) for line, start in zip(lines, LINES, strict=True)), lines


def test_colour_on_a_grey_model_is_in_the_summary(mixed: Path) -> None:
    data = ImageDataModule(
        root=mixed, num_workers=0, **{**SETTINGS, "image": ImageFormat(1, 8, 8)}
    )
    data.setup("fit")
    data.setup("test")
    assert data.summary.counts["converted"]["colour turned grey"] == 4


def test_the_bits_of_the_source_are_one_scale_for_all_images(mixed: Path) -> None:
    data = ImageDataModule(root=mixed, num_workers=0, source_bits=8, **SETTINGS)
    data.setup("fit")
    [deep] = [image for image in data.train_set.images if (image == 200).all()]
    assert deep.shape == (8, 8, 3)


def test_settings_that_change_images_are_part_of_a_preparation(
    mixed: Path, tmp_path: Path
) -> None:
    ImageDataModule(root=tmp_path / "p", num_workers=0, **SETTINGS).prepare(str(mixed))
    other = ImageDataModule(root=tmp_path / "p", background="black", **SETTINGS)
    with pytest.raises(ValueError, match="prepared with background=white, not black"):
        other.prepare(str(mixed))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("background", "snow white", r"^dataset\.background: got 'snow white', .* colour such as"),
        ("source_bits", 7, r"^dataset\.source_bits: got 7, .* from 8 to 16, or null"),
        ("source_bits", 17, r"^dataset\.source_bits: got 17"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule(root="here", **{**SETTINGS, setting: value})


def test_warnings_of_pillow_are_counted_instead_of_printed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a" * 50
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "TIFF")
        content = bytearray(file.getvalue())
        count = content[4] and int.from_bytes(content[content[4] : content[4] + 2], "little")
        content[content[4] : content[4] + 2] = (count + 9).to_bytes(2, "little")
        (tmp_path / split / "x.tif").write_bytes(content)
    data = ImageDataModule(root=tmp_path, num_workers=0, **SETTINGS)
    data.setup("fit")
    data.setup("test")
    assert data.summary.counts["read"]["all"] == 2


def test_a_summary_names_the_commonest_kinds_and_adds_up() -> None:
    summary = Summary()
    for number in range(12):
        summary.count("ignored", f"with suffix .{number}", files=12 - number)
    summary.count("converted", "turned upright", "first frame of several: 2 frames")
    total = merged([summary, Summary.model_validate_json(summary.model_dump_json())])
    converted, ignored = total.lines()
    assert converted == "2 converted: 2 turned upright, 2 first frame of several"
    assert ignored.startswith("156 ignored: 24 with suffix .0, 22 with suffix .1, ")
    assert ignored.endswith(", and more")
