import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvae_lightning.data import chunks
from nvae_lightning.data import prepare as module
from nvae_lightning.data.chunks import decode_all
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.prepare import prepare
from nvae_lightning.data.readers import ArraySource, Source, Splits
from nvae_lightning.data.storage import (
    LAYOUT,
    Prepared,
    checksum,
    is_prepared,
    open_images,
    open_prepared,
)
from nvae_lightning.data.summary import REPORT

NUM_TRAIN, NUM_TEST = 7, 3
ALL_SPLITS = {"train": NUM_TRAIN, "validation": 2, "test": NUM_TEST}


@pytest.fixture(autouse=True)
def _two_images_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 4 * 4 * 3)


class Pictures(ArraySource):
    """Random images, some unreadable, and one that raises KeyboardInterrupt."""

    def __init__(
        self,
        count: int,
        broken: Collection[int] = (),
        interrupt_at: int | None = None,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng([seed, count])
        super().__init__(generator.integers(256, size=(count, 4, 4, 3), dtype=np.uint8))
        self.broken = set(broken)
        self.interrupt_at = interrupt_at
        self.asked: list[int] = []

    def image(self, index: int) -> Image.Image:
        self.asked.append(index)
        if index == self.interrupt_at:
            raise KeyboardInterrupt
        if index in self.broken:
            raise OSError(f"image {index} is\ntruncated")
        return super().image(index)


class Encoded(Source):
    """Images as encoded files."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        super().__init__(list(contents))
        self.contents = contents

    def image(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.contents[self.names[index]]))


def pictures(broken: Collection[int] = (), interrupt_at: int | None = None) -> Splits:
    train = Pictures(NUM_TRAIN, broken, interrupt_at)
    return Splits("made", {"train": train, "test": Pictures(NUM_TEST)})


def made(
    folder: Path, splits: Splits, *, source: str = "here", seed: int = 0, **options: Any
) -> dict[str, Prepared]:
    settings = {"seed": seed, "crop": None}
    return prepare(splits, Decoder(4, 3), folder, source=source, settings=settings, **options)


def report(folder: Path) -> list[dict[str, str]]:
    text = (folder / REPORT).read_bytes().decode("utf-8", "surrogateescape")
    return [*csv.DictReader(text.splitlines())]


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def pixels(splits: Splits, split: str) -> np.ndarray:
    source = splits.sources[split]
    assert isinstance(source, ArraySource)
    return source.pixels


def undisturbed(tmp_path: Path, splits: Splits, **options: Any) -> dict[str, bytes]:
    made(tmp_path / "undisturbed", splits, **options)
    return files(tmp_path / "undisturbed")


# Written files.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_and_names_are_written_in_order(tmp_path: Path, num_workers: int) -> None:
    splits = pictures()
    prepared = made(tmp_path / "a" / "b", splits, num_workers=num_workers)
    assert report(tmp_path / "a" / "b") == []
    assert list(prepared) == ["train", "test"]
    for split, known in prepared.items():
        images = open_images(tmp_path / "a" / "b", known)
        assert isinstance(images, np.memmap)
        assert np.array_equal(images, pixels(splits, split))
        names = (tmp_path / "a" / "b" / f"{split}.txt").read_text().splitlines()
        assert names == splits.sources[split].names
    written = [f"{split}.{suffix}" for split in prepared for suffix in ("json", "npy", "txt")]
    assert sorted(files(tmp_path)) == sorted(f"a/b/{n}" for n in (*written, "report.csv"))


def test_the_number_of_workers_does_not_change_the_files(tmp_path: Path) -> None:
    made(tmp_path / "0", pictures({1, 4}), skip_errors=True, num_workers=0)
    made(tmp_path / "2", pictures({1, 4}), skip_errors=True, num_workers=2)
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_the_json_describes_the_preparation(tmp_path: Path) -> None:
    made(tmp_path, pictures({0, 5}), skip_errors=True)
    assert json.loads((tmp_path / "train.json").read_text()) == {
        "split": "train",
        "splits": ["train", "test"],
        "num_images": NUM_TRAIN - 2,
        "shape": [NUM_TRAIN - 2, 4, 4, 3],
        "layout": LAYOUT,
        "sha256": checksum(tmp_path / "train.npy", "train"),
        "source": "here",
        "format": "made",
        "settings": {"seed": 0, "crop": None},
        "num_skipped": 2,
        "summary": {
            "counts": {
                "read": {"all": NUM_TRAIN - 2, "bare pixels": NUM_TRAIN - 2},
                "skipped": {"all": 2, "damaged or unreadable": 2},
            },
        },
    }


def test_images_are_decoded_and_conversions_are_reported(tmp_path: Path) -> None:
    contents = {}
    for name, mode, size in (("a", "RGB", (4, 4)), ("b", "CMYK", (9, 8)), ("c", "L", (1, 50))):
        buffer = io.BytesIO()
        Image.new(mode, size, 0 if mode != "L" else 99).save(buffer, "TIFF")
        contents[f'{name}, "of" größe.tif'] = buffer.getvalue()
    contents["empty.tif"] = b""
    contents["short.tif"] = contents['b, "of" größe.tif'][:50]
    splits = Splits("made", {"train": Encoded(contents), "test": Pictures(2)})
    prepared = made(tmp_path, splits, skip_errors=True)
    rows = report(tmp_path)
    assert [(row["image"], row["outcome"]) for row in rows] == [
        ('b, "of" größe.tif', "converted"),
        ('c, "of" größe.tif', "converted"),
        ("empty.tif", "skipped"),
        ("short.tif", "skipped"),
    ]
    assert rows[0]["reason"] == "converted from CMYK"
    assert rows[1]["reason"] == "mostly cut off: 2.00% of 1x50 kept, grey repeated to colour"
    assert rows[2]["reason"] == "not an image of a known format"
    assert all(row["split"] == "train" and row["reason"] for row in rows)
    known = prepared["train"]
    assert (known.num_images, known.summary.total("converted"), known.num_skipped) == (3, 2, 2)
    assert open_images(tmp_path, known)[:, 0, 0, 0].tolist() == [0, 255, 99]


def test_names_that_are_not_unicode_are_kept(tmp_path: Path) -> None:
    splits = pictures({1})
    splits.sources["train"].names = [os.fsdecode(b"\xff%d" % i) for i in range(NUM_TRAIN)]
    made(tmp_path, splits, skip_errors=True)
    assert [row["image"] for row in report(tmp_path)] == [os.fsdecode(b"\xff1")]
    assert (tmp_path / "train.txt").read_bytes().startswith(b"\xff0\n\xff2\n")


def test_preparing_again_neither_changes_files_nor_decodes_images(tmp_path: Path) -> None:
    first = made(tmp_path / "p", pictures({2}), skip_errors=True)
    before = files(tmp_path / "p")
    splits = pictures({2}, interrupt_at=0)
    assert made(tmp_path / "p", splits, skip_errors=True) == first
    assert files(tmp_path / "p") == before


# Unreadable images.


def test_skipping_leaves_out_exactly_the_rows_and_names_of_unreadable_images(
    tmp_path: Path,
) -> None:
    broken = {0, 2, 3, 6}  # including a whole chunk
    splits = pictures(broken)
    prepared = made(tmp_path, splits, skip_errors=True)
    kept = [index for index in range(NUM_TRAIN) if index not in broken]
    images = open_images(tmp_path, prepared["train"])
    assert np.array_equal(images, pixels(splits, "train")[kept])
    names = (tmp_path / "train.txt").read_text().splitlines()
    assert names == [f"{index:08d}" for index in kept]
    reasons = {f"{i:08d}": f"damaged or unreadable: image {i} is truncated" for i in broken}
    assert {row["image"]: row["reason"] for row in report(tmp_path)} == reasons
    assert {(row["split"], row["outcome"]) for row in report(tmp_path)} == {("train", "skipped")}


def test_stopping_names_the_images_in_one_line_and_prepares_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read") as error:
        made(tmp_path, pictures({4, 5}))
    message = str(error.value)
    assert message.startswith("source: cannot read the images '00000004' (damaged or unr")
    assert "'00000005'" in message
    assert "replace or remove them" in message
    assert "on_error=skip" in message
    assert "\n" not in message
    assert not is_prepared(tmp_path)


def test_skipping_resumes_where_an_error_stopped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'00000005'"):
        made(tmp_path / "p", pictures({5}))
    splits = pictures({5})
    made(tmp_path / "p", splits, skip_errors=True)
    train = splits.sources["train"]
    assert isinstance(train, Pictures)
    assert train.asked == [4, 5, 6]
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures({5}), skip_errors=True)


def test_after_an_error_a_repaired_image_is_prepared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'00000005'"):
        made(tmp_path / "p", pictures({5}))
    made(tmp_path / "p", pictures())
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


def test_an_image_skipped_before_an_interruption_stops_a_resume_without_skipping(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "p", pictures({1}, interrupt_at=6), skip_errors=True)
    with pytest.raises(ValueError, match=r"^source: cannot read the image '00000001'"):
        made(tmp_path / "p", pictures({1}))
    made(tmp_path / "p", pictures())
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


def test_images_prepared_with_skipping_are_refused_without_it(tmp_path: Path) -> None:
    made(tmp_path, pictures({1, 2}), skip_errors=True)
    message = r"^dataset\.root: .* without 2 of the images, which report.csv names; "
    with pytest.raises(ValueError, match=message):
        made(tmp_path, pictures({1, 2}))


def test_skipping_has_no_effect_if_all_images_are_readable(tmp_path: Path) -> None:
    made(tmp_path / "p", pictures(), skip_errors=True)
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())
    made(tmp_path / "p", pictures())


def test_a_split_without_any_readable_image_is_an_error_until_it_is_repaired(
    tmp_path: Path,
) -> None:
    message = r"^source: no image of the split 'train' .* '00000000' \(.*image 0 is truncated\)"
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "p", pictures(set(range(NUM_TRAIN))), skip_errors=True)
    assert not is_prepared(tmp_path / "p")
    made(tmp_path / "p", pictures({3}), skip_errors=True)
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures({3}), skip_errors=True)


# Interruptions.


class Crash:
    """Interrupt before the n-th step that reaches the disk.

    Folders are deleted in the order of names, instead of the file system's order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps_left: int | None = None
        for name in ("fsync", "replace", "unlink", "truncate", "rmdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", self._rmtree)

    @staticmethod
    def _rmtree(folder: Path, ignore_errors: bool) -> None:
        assert ignore_errors
        for path in sorted(folder.glob("*")):
            path.unlink()
        with suppress(FileNotFoundError):
            folder.rmdir()

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.steps_left is not None:
                if self.steps_left == 0:
                    self.steps_left = None
                    raise KeyboardInterrupt
                self.steps_left -= 1
            return step(*args, **kwargs)

        return counted


def images_in(folder: Path) -> dict[str, np.ndarray]:
    return {k: np.array(open_images(folder, v)) for k, v in open_prepared(folder).items()}


def handed_out(folder: Path, **known: dict[str, np.ndarray]) -> str:
    """Return which of the known images a training would read, or nothing, or an error."""
    if not is_prepared(folder):
        return "nothing"
    try:
        found = images_in(folder)
    except ValueError:
        return "error"
    for name, images in known.items():
        same = [np.array_equal(found[split], images[split]) for split in found if split in images]
        if found.keys() == images.keys() and all(same):
            return name
    return "something else"


def test_an_interruption_before_any_step_is_resumed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(tmp_path, pictures({3}), skip_errors=True)
    new = images_in(tmp_path / "undisturbed")
    crash = Crash(monkeypatch)
    seen = []
    for step in range(1000):
        folder = tmp_path / str(step)
        crash.steps_left = step
        try:
            made(folder, pictures({3}), skip_errors=True)
        except KeyboardInterrupt:
            seen.append(handed_out(folder, new=new))
            made(folder, pictures({3}), skip_errors=True)
            assert files(folder) == expected, step
            assert not (folder / module.PARTIAL).exists(), step
        else:
            break
    crash.steps_left = None
    assert len(seen) > 30
    assert set(seen) == {"nothing", "error", "new"}


def test_an_interrupted_replacement_leaves_either_version_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replacement has two splits instead of three: the old files must be deleted."""
    sources = {split: Pictures(count, seed=1) for split, count in ALL_SPLITS.items()}
    made(tmp_path / "old", Splits("made", sources), source="there")
    old = images_in(tmp_path / "old")
    expected = undisturbed(tmp_path, pictures())
    new = images_in(tmp_path / "undisturbed")
    crash = Crash(monkeypatch)
    seen = []
    for step in range(1000):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", folder)
        crash.steps_left = step
        try:
            made(folder, pictures(), overwrite=True)
        except KeyboardInterrupt:
            seen.append(handed_out(folder, old=old, new=new))
            made(folder, pictures(), overwrite=True)
            assert files(folder) == expected, step
            assert not (folder / module.PARTIAL).exists(), step
        else:
            break
    crash.steps_left = None
    assert len(seen) > 30
    assert set(seen) == {"old", "nothing", "error", "new"}


@pytest.mark.parametrize("interrupt_at", range(NUM_TRAIN))
def test_an_interruption_in_any_chunk_loses_only_that_chunk(
    tmp_path: Path, interrupt_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "p", pictures(interrupt_at=interrupt_at))
    splits = pictures()
    made(tmp_path / "p", splits)
    train = splits.sources["train"]
    assert isinstance(train, Pictures)
    assert train.asked == list(range(interrupt_at // 2 * 2, NUM_TRAIN))
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


@pytest.mark.parametrize("tail", [b'{"num_im', b'{"num_images": 6, "outcomes": []}'])
def test_data_after_the_last_complete_note_are_rewritten(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "p", pictures(interrupt_at=4))
    partial = tmp_path / "p" / module.PARTIAL
    with (partial / "train.npy").open("ab") as data, (partial / "train.journal").open("ab") as log:
        data.write(b"half a chunk")
        log.write(tail)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "p", pictures(interrupt_at=6))
    made(tmp_path / "p", pictures())
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


def test_an_unfinished_array_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, pictures(interrupt_at=6))
    half_written = tmp_path / module.PARTIAL / "train.npy"
    assert half_written.stat().st_size == 128 + 6 * 4 * 4 * 3
    with pytest.raises(ValueError, match="magic"):
        np.lib.format.open_memmap(half_written, mode="r")


@pytest.mark.parametrize("other", [{"source": "there"}, {"seed": 1}])
def test_an_interrupted_preparation_of_another_source_is_discarded(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "p", pictures(interrupt_at=6), **other)
    splits = pictures()
    made(tmp_path / "p", splits)
    train = splits.sources["train"]
    assert isinstance(train, Pictures)
    assert train.asked == list(range(NUM_TRAIN))
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


def test_a_half_discarded_preparation_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(tmp_path, pictures())
    crash = Crash(monkeypatch)
    for step in range(6):
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            made(folder, pictures(interrupt_at=6))
        crash.steps_left = step
        with pytest.raises(KeyboardInterrupt):
            made(folder, pictures(), seed=1)
        made(folder, pictures())
        assert files(folder) == expected, step


# Folders that are not empty.


def test_another_preparation_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    made(folder, pictures())
    before = files(folder)
    more = Splits("made", {"train": Pictures(NUM_TRAIN + 1), "test": Pictures(NUM_TEST)})
    third = Splits("made", {split: Pictures(count) for split, count in ALL_SPLITS.items()})
    cases: list[tuple[Splits, dict[str, Any], str]] = [
        (pictures(), {"source": "there"}, "source=here, not there"),
        (pictures(), {"seed": 1}, "seed=0, not 1"),
        (more, {}, "train images=7, not 8"),
        (third, {}, "validation images=None, not 2"),
    ]
    for splits, options, difference in cases:
        message = rf"^dataset\.root: '.*' holds .* with {difference}; set .*overwrite=true$"
        with pytest.raises(ValueError, match=message):
            made(folder, splits, **options)
        assert files(folder) == before


@pytest.mark.parametrize("old", [{"train": 3, "test": 2}, ALL_SPLITS])
def test_overwriting_deletes_the_earlier_preparation(tmp_path: Path, old: dict[str, int]) -> None:
    sources = {split: Pictures(count, seed=1) for split, count in old.items()}
    made(tmp_path / "p", Splits("made", sources), source="there")
    made(tmp_path / "p", pictures(), overwrite=True)
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


@pytest.mark.parametrize("name", ["train.txt", "test.npy", "train.json", "report.csv"])
def test_existing_files_are_not_replaced(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"^dataset\.root: '.*' holds {name} already.*overwrite"):
        made(folder, pictures())
    assert files(folder) == {name: b"mine"}
    assert list(folder.iterdir()) == [folder / name]
    made(folder, pictures(), overwrite=True)
    assert files(folder) == undisturbed(tmp_path, pictures())


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "photo.png").write_text("mine")
    made(tmp_path / "p", pictures())
    made(tmp_path / "p", pictures(), overwrite=True, seed=1)
    assert files(tmp_path / "p")["photo.png"] == b"mine"


def test_a_second_process_is_locked_out(tmp_path: Path) -> None:
    errors = []

    class Nested(Pictures):
        def image(self, index: int) -> Image.Image:
            if not errors:
                with pytest.raises(ValueError, match="another process") as error:
                    made(tmp_path / "p", pictures())
                errors.append(str(error.value))
            return super().image(index)

    first = Splits("made", {"train": Nested(NUM_TRAIN), "test": Pictures(NUM_TEST)})
    made(tmp_path / "p", first)
    assert errors[0].startswith("dataset.root: ")
    assert files(tmp_path / "p") == undisturbed(tmp_path, pictures())


def damage_bit(folder: Path) -> None:
    content = bytearray((folder / "train.npy").read_bytes())
    content[200] ^= 1
    (folder / "train.npy").write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "test.npy", 150)


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("damage", [damage_bit, truncate, lose("test.npy"), lose("test.json")])
def test_damage_is_found_and_repaired_by_overwriting(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "p"
    made(folder, pictures())
    expected = files(folder)
    damage(folder)
    message = r"^dataset\.root: '.*' is damaged \(.+\); prepare it again with overwrite=true$"
    with pytest.raises(ValueError, match=message):
        made(folder, pictures())
    made(folder, pictures(), overwrite=True)
    assert files(folder) == expected


# Disks that are full or not writable.


class FullDisk(Crash):
    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        counted = super()._counted(step)

        def full(*args: Any, **kwargs: Any) -> Any:
            try:
                return counted(*args, **kwargs)
            except KeyboardInterrupt:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None

        return full


@pytest.mark.parametrize("step", range(0, 24, 3))
def test_a_preparation_resumes_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected = undisturbed(tmp_path, pictures())
    disk = FullDisk(monkeypatch)
    disk.steps_left = step
    message = r"^dataset\.root: cannot write to '.*' \(No space left on device\); make room and"
    with pytest.raises(ValueError, match=message) as error:
        made(tmp_path / "p", pictures())
    assert "\n" not in str(error.value)
    made(tmp_path / "p", pictures())
    assert files(tmp_path / "p") == expected


def test_a_full_disk_keeps_the_earlier_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, pictures())
    before = files(tmp_path)
    disk = FullDisk(monkeypatch)
    disk.steps_left = 9
    with pytest.raises(ValueError, match="No space left"):
        made(tmp_path, pictures(), seed=1, overwrite=True)
    made(tmp_path, pictures())
    assert files(tmp_path) == before


def test_a_target_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "p"):
        message = r"^dataset\.root: cannot write to '.*' \(.+\); make room .*$"
        with pytest.raises(ValueError, match=message):
            made(folder, pictures())
    assert files(tmp_path) == {"file": b"mine"}


# Without preparation.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoding_all_into_memory_gives_the_prepared_images(
    tmp_path: Path, num_workers: int
) -> None:
    buffer = io.BytesIO()
    contents = {}
    for index in range(9):
        Image.new("RGB", (5, 6), (index, 10 * index, 255)).save(buffer, "PNG")
        contents[f"{index}.png"] = buffer.getvalue()
        buffer = io.BytesIO()
    source = Encoded(contents)
    splits = Splits("made", {"train": source, "test": Pictures(2)})
    prepared = made(tmp_path, splits)
    before = torch.get_rng_state()
    images, summary = decode_all(source, Decoder(4, 3), num_workers)
    assert summary.counts == {"read": {"all": 9, "PNG": 9}}
    assert torch.equal(torch.get_rng_state(), before)
    assert images[:, 0, 0, 1].tolist() == [10 * index for index in range(9)]
    assert np.array_equal(images, open_images(tmp_path, prepared["train"]))


def test_arrays_of_the_right_size_are_not_copied() -> None:
    source = ArraySource(np.zeros((2, 4, 4, 3), np.uint8))
    images, summary = decode_all(source, Decoder(4, 3), 0)
    assert images is source.pixels
    assert summary.lines() == ["2 read: 2 bare pixels"]
    assert decode_all(source, Decoder(2, 1), 0)[0].shape == (2, 2, 2, 1)


def test_an_unreadable_image_in_memory_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"^cannot read the image 'bad' .*on_error=skip$"):
        decode_all(Encoded({"bad": b"\x89PNG, but no more"}), Decoder(4, 3), 0)
