"""Malicious files, and files that only look like images."""

import io
import json
import os
import socket
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from nvae_lightning.data import MNIST, AllImages, ImageDataModule, files
from nvae_lightning.data.files import TooLargeError, open_regular, read_bounded
from nvae_lightning.data.image_formats import open_image, suffixes
from nvae_lightning.data.readers import Wanted, open_source
from nvae_lightning.data.readers.container import Folder, Tar, Zip, open_container
from nvae_lightning.data.storage import is_ours, open_images, open_prepared
from nvae_lightning.utilities.image import Image as ImageFormat

SETTINGS: dict[str, Any] = {"batch_size": 1, "image": ImageFormat(3, 8, 8)}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def encoded(file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, file_format, **options)
    return file.getvalue()


def write_splits(root: Path) -> Path:
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded())
    return root


def reasons(container: Folder | Zip | Tar) -> dict[str, str]:
    return {file.image: file.reason for file in container.listing.left_out}


# Formats.


def test_formats_of_other_programs_are_refused_under_any_name() -> None:
    placeable = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 9, 9, 96) + bytes(20)
    for content in (EPS, placeable, b"%PDF-1.4\n", b"SIMPLE  =                    T" + bytes(99)):
        with pytest.raises(UnidentifiedImageError):
            open_image(content, "x.png")
        with pytest.raises(UnidentifiedImageError):
            open_image(content)


def test_no_program_is_started_for_a_postscript_file_in_any_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    root = write_splits(tmp_path / "source")
    (root / "train" / "z.png").write_bytes(EPS)
    data = ImageDataModule(root=tmp_path / "out", num_workers=0, **SETTINGS)
    prepared = data.prepare(str(root), skip_errors=True)
    assert prepared["train"].num_skipped == 1
    with pytest.raises(
        ValueError, match=r"^images: cannot read the image 'z\.png' \(not an image"
    ):
        AllImages(root / "train" / "z.png", **SETTINGS).setup("test")


@pytest.mark.parametrize(
    ("name", "file_format"),
    [("a.avif", "AVIF"), ("a.jp2", "JPEG2000"), ("a.tga", "TGA"), ("a.JFIF", "JPEG")],
)
def test_less_common_formats_are_read(name: str, file_format: str) -> None:
    if Path(name).suffix.lower() not in suffixes():
        pytest.skip("this Pillow does not read it")
    image = open_image(encoded(file_format), name)
    assert image.format == file_format
    assert np.asarray(image)[0, 0, 0] > 250


def test_a_tga_is_recognised_only_by_its_name() -> None:
    with pytest.raises(UnidentifiedImageError):
        open_image(encoded("TGA"), "a.png")


@pytest.mark.parametrize(("mode", "side"), [("1", 13_000), ("RGB", 7_500), ("L", 8_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(mode: str, side: int) -> None:
    header = struct.pack(
        ">IIBBBBB", side, side, 1 if mode == "1" else 8, 2 * (mode == "RGB"), 0, 0, 0
    )
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    with pytest.raises(TooLargeError, match=rf"it has {side:,} by {side:,} pixels, .* shrink it"):
        open_image(content)


def test_a_tile_larger_than_its_image_is_refused() -> None:
    side = 1 << 15
    tags = [(256, 16), (257, 16), (258, 1), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    entries += struct.pack("<HHII", 324, 4, 1, 200) + struct.pack("<HHII", 325, 4, 1, 10)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags) + 2) + entries + bytes(100)
    with pytest.raises(
        TooLargeError, match="it has 16 by 16 pixels, and decoding them takes more"
    ):
        open_image(content)


# Sizes.


def test_a_file_is_not_read_beyond_the_bound() -> None:
    assert read_bounded(io.BytesIO(bytes(10)), 10) == bytes(10)
    with pytest.raises(TooLargeError, match="larger than 10 bytes"):
        read_bounded(io.BytesIO(bytes(11)), 10)


@pytest.mark.parametrize("claim", ["true", "lie"])
def test_decompression_stops_at_the_bound(
    claim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", encoded() + bytes(200 << 20))
    if claim == "lie":
        size = struct.pack("<I", len(encoded()) + (200 << 20))
        path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 1 << 24)))
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 23)
    container = Zip(path)
    assert container.names
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        container.read("x.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


def test_a_file_that_is_too_large_is_refused_in_every_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", bytes(1000))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.zip", "x.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(bytes(1000))
    monkeypatch.setattr(files, "MAX_BYTES", 999)
    for name in ("a.zip", "a.tar", "a"):
        with pytest.raises(TooLargeError, match="larger than 999 bytes"):
            open_container(tmp_path / name).read("x.png")


def test_an_unbounded_compression_method_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.png", bytes(1000))
    with pytest.raises(ValueError, match=r"compressed by method 12, .* deflate"):
        Zip(tmp_path / "a.zip").read("x.png")


# Links, pipes, devices and sockets.


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(ValueError, match=r"x' is not a regular file; remove it"):
        open_regular(tmp_path / "x")


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder of splits with links, pipes and sockets of all kinds."""
    root = write_splits(tmp_path / "source")
    (tmp_path / "outside.png").write_bytes(encoded())
    (root / "shared").mkdir()
    (root / "shared" / "2.png").write_bytes(encoded())
    for name, target in {
        "train/inside.png": "0.png",
        "train/inside": "../shared",
        "train/out.png": "../../outside.png",
        "train/absolute": "/etc",
        "train/self": ".",
        "train/up": "..",
        "train/loop.png": "loop.png",
        "train/gone.png": "nowhere.png",
        "shared/back": "../train",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "train" / "pipe.png")
    os.mkfifo(root / "labels.csv")
    return root


def test_links_inside_a_folder_are_followed_and_no_others(crowded: Path) -> None:
    left_out = reasons(Folder(crowded))
    names = Folder(crowded).names
    assert {"train/inside.png", "train/inside/2.png", "shared/2.png"} <= {*names}
    assert left_out["train/out.png"] == left_out["train/absolute"] == "link to outside"
    assert left_out["train/loop.png"] == left_out["train/gone.png"] == "link to nothing"
    for name in ("train/self", "train/up", "train/inside/back"):
        assert left_out[name] == "link to a folder, in a linked folder or above itself"
    for name in ("train/pipe.png", "labels.csv"):
        assert left_out[name] == "pipe, device or socket"
    assert not [name for name in names if "out" in name or "pipe" in name]


def test_a_summary_counts_links_that_are_not_followed(crowded: Path) -> None:
    data = ImageDataModule(root=crowded, num_workers=0, **SETTINGS)
    data.setup("fit")
    skipped = data.summary.counts["skipped"]
    assert skipped["link to outside"] == 4  # two of them also through shared/back
    assert skipped["pipe, device or socket"] == 3
    assert any("4 link to outside" in line for line in data.summary.lines())


def test_a_root_that_is_itself_a_link_is_followed(tmp_path: Path, wanted: Wanted) -> None:
    write_splits(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    splits = open_source(tmp_path / "link", wanted)
    assert len(splits.sources["train"]) == 2
    assert splits.left_out == []


def test_folders_that_all_link_to_each_other_are_walked_once_each(tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}").mkdir()
        (tmp_path / f"{index}" / "x.png").touch()
        for other in range(9):
            (tmp_path / f"{index}" / f"to_{other}").symlink_to(f"../{other}")
    start = time.process_time()
    assert len(Folder(tmp_path).names) == 9 + 9 * 8
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.png", "x.parquet", "x"])
def test_a_pipe_is_refused_as_a_source(name: str, tmp_path: Path, wanted: Wanted) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="neither a folder nor a regular file"):
        open_source(tmp_path / name, wanted)


def test_a_socket_is_left_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "x.png"))
        assert reasons(Folder(tmp_path)) == {"x.png": "pipe, device or socket"}


def test_special_members_of_a_tar_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:

        def add(name: str, content: bytes = b"", **fields: Any) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))

        add("a/x.png", b"old")
        add("a/x.png", b"new")
        add("a/link.png", type=tarfile.SYMTYPE, linkname="x.png")
        add("a/out.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("a/up.png", type=tarfile.SYMTYPE, linkname="../../x.png")
        add("a/self.png", type=tarfile.SYMTYPE, linkname="self.png")
        add("a/hard.png", type=tarfile.LNKTYPE, linkname="a/x.png")
        add("a/nowhere.png", type=tarfile.LNKTYPE, linkname="nowhere")
        add("a/device.png", type=tarfile.CHRTYPE)
        add("../escaped.png", b"x")
        add("/absolute.png", b"y")
    container = Tar(tmp_path / "a.tar")
    assert container.read("a/link.png") == container.read("a/hard.png") == b"new"
    assert container.read("absolute.png") == b"y"
    assert reasons(container) == {
        "a/x.png": "replaced by a later file of the same name",
        "a/out.png": "link to outside",
        "a/up.png": "link to outside",
        "a/self.png": "link to nothing in the archive",
        "a/nowhere.png": "link to nothing in the archive",
        "a/device.png": "pipe, device or socket",
        "../escaped.png": "name outside the archive",
    }


def test_a_negative_size_in_a_tar_does_not_loop(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "b.png"):
            archive.addfile(tarfile.TarInfo(name))
    content = bytearray(path.read_bytes())
    content[512 + 124 : 512 + 136] = b"\xff" * 8 + struct.pack(">i", -1024)
    content[512 + 148 : 512 + 156] = b" " * 8
    content[512 + 148 : 512 + 156] = b"%06o\0 " % sum(content[512:1024])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is a damaged archive \("):
        _ = Tar(path).names


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_special_members_of_a_zip_are_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        for name in ("../escaped.png", "x.png", "x.png", "/absolute.png"):
            archive.writestr(name, b"x")
    container = Zip(tmp_path / "a.zip")
    assert container.names == ["absolute.png", "x.png"]
    assert reasons(container) == {
        "link.png": "link in a zip",
        "../escaped.png": "name outside the archive",
        "x.png": "replaced by a later file of the same name",
    }


def test_digits_that_are_a_pipe_or_an_outward_link_are_not_read(tmp_path: Path) -> None:
    raw = tmp_path / "a" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    os.mkfifo(raw / "train-images-idx3-ubyte")
    with pytest.raises(ValueError, match=r"^dataset\.root: .*ubyte' is not a regular file"):
        MNIST(root=tmp_path / "a", **SETTINGS).prepare_data()
    (raw / "train-images-idx3-ubyte").unlink()
    (raw / "train-images-idx3-ubyte").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"^dataset\.root: .*ubyte' is a link to a file outside"):
        MNIST(root=tmp_path / "a", **SETTINGS).prepare_data()


# Prepared folders.


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    source = write_splits(tmp_path / "source")
    ImageDataModule(root=tmp_path / "p", num_workers=0, **SETTINGS).prepare(str(source))
    return tmp_path / "p"


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": "abcd"},
        {"shape": [2, 8]},
        {"splits": None},
        {"splits": ["../train"]},
        {"split": "../p/train"},
        {"summary": [1]},
        {"summary": {"counts": {"read": {"all": "many"}}}},
    ],
)
def test_a_description_with_wrong_types_is_damaged(prepared: Path, fields: dict[str, Any]) -> None:
    path = prepared / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=r"^dataset\.root: '.*train\.json' is damaged") as error:
        open_prepared(prepared)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", ["(2**70, 8, 8, 3)", f"({2**70}, 8, 8, 3)", "(-2, 8, 8, 3)"])
def test_an_array_with_an_invalid_header_is_damaged(prepared: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    known = open_prepared(prepared)["train"]
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(500)
    (prepared / "train.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"^dataset\.root: '.*train\.npy' is damaged") as error:
        open_images(prepared, known)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train.npy", "train.json"])
def test_a_pipe_in_a_prepared_folder_is_reported(prepared: Path, name: str) -> None:
    (prepared / name).unlink()
    os.mkfifo(prepared / name)
    data = ImageDataModule(root=prepared, num_workers=0, **SETTINGS)
    with pytest.raises(ValueError, match=r"^dataset\.root: '.*' is damaged"):
        data.prepare(str(prepared.parent / "source"))


def test_other_json_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.json").write_bytes(bytes(2 << 20))
    assert not any(is_ours(path) for path in tmp_path.iterdir())


# System errors.


def test_a_too_long_name_is_reported_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / ("a" * 300)
    for data in (ImageDataModule(root=root, **SETTINGS), MNIST(root=root, **SETTINGS)):
        with pytest.raises(ValueError, match=r"^dataset\.root: .*\(File name too long\)$"):
            data.prepare_data()
    with pytest.raises(ValueError, match=r"^source: .*\(File name too long\)$"):
        ImageDataModule(root=tmp_path / "p", **SETTINGS).prepare(str(root))
    source = write_splits(tmp_path / "source")
    with pytest.raises(ValueError, match=r"^dataset\.root: .*\(File name too long\)"):
        ImageDataModule(root=root, **SETTINGS).prepare(str(source))


def test_an_unreadable_folder_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_splits(tmp_path / "source")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("train"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = rf"^dataset\.root: cannot read '{root / 'train'}' \(Permission denied\)$"
    with pytest.raises(ValueError, match=message):
        ImageDataModule(root=root, **SETTINGS).prepare_data()
