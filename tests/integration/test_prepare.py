"""The commands `prepare` and `preview`, run as by a user."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from warm_python import run_python

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.storage import is_prepared
from nvae_lightning.utilities.image import Image as ImageFormat

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PREPARE = ("nvae_lightning.prepare", "dataset=image_folder", "dataset.image.size=16")

SPLITS = ("train", "test")

Prepared = tuple[Path, subprocess.CompletedProcess[str]]

CONVERTED = {
    "cmyk.jpg": "CMYK",
    "palette.png": "palette",
    "16_bit.png": "16 bits",
    "animated.gif": "first frame of several: 3 frames",
    "1x5000.png": "0.02% of 1x5000 kept",
}
SKIPPED = {"truncated.jpg": "truncated", "empty.png": "not an image"}


def run(cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", *command, cwd=cwd)


def files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def noise(generator: np.random.Generator, height: int = 18, width: int = 20) -> Image.Image:
    base = generator.integers(40, 200, 3)
    pixels = base + generator.integers(0, 20, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand images in two classes, seven of which are odd or damaged."""
    folder = tmp_path_factory.mktemp("source") / "images"
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for index in range(993):
        suffix = "jpg" if index % 3 else "png"
        noise(generator).save(folder / "ab"[index % 2] / f"{index:03d}.{suffix}")
    noise(generator).convert("CMYK").save(folder / "a" / "cmyk.jpg")
    noise(generator).quantize(16).save(folder / "a" / "palette.png")
    deep = generator.integers(1 << 16, size=(18, 20), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "b" / "16_bit.png")
    frames = [noise(generator) for _ in range(3)]
    frames[0].save(folder / "b" / "animated.gif", save_all=True, append_images=frames[1:])
    noise(generator, 5000, 1).save(folder / "b" / "1x5000.png")
    noise(generator, 60, 60).save(folder / "b" / "truncated.jpg")
    size = (folder / "b" / "truncated.jpg").stat().st_size
    os.truncate(folder / "b" / "truncated.jpg", size - 200)
    (folder / "a" / "empty.png").touch()
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path) -> Prepared:
    """The folder that the command wrote, without the unreadable images."""
    arguments = (*PREPARE, f"source={source}", "dataset.root=prepared", "on_error=skip")
    result = run(source.parent, *arguments)
    assert result.returncode == 0, result.stderr
    return source.parent / "prepared", result


def test_each_of_a_thousand_images_is_prepared_converted_or_named(
    source: Path, prepared: Prepared
) -> None:
    folder, result = prepared
    with (folder / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for outcome, expected in (("converted", CONVERTED), ("skipped", SKIPPED)):
        found = {Path(r["image"]).name: r["reason"] for r in rows if r["outcome"] == outcome}
        assert found.keys() == expected.keys()
        assert all(expected[name] in reason for name, reason in found.items()), found
    names = {split: (folder / f"{split}.txt").read_text().splitlines() for split in SPLITS}
    for split, listed in names.items():
        description = json.loads((folder / f"{split}.json").read_text())
        assert description["num_images"] == description["shape"][0] == len(listed)
        assert np.load(folder / f"{split}.npy", mmap_mode="r").shape == (len(listed), 16, 16, 3)
        assert f"{len(listed):,} images of 16x16x3" in result.stdout
    kept = [name for listed in names.values() for name in listed]
    skipped = [row["image"] for row in rows if row["outcome"] == "skipped"]
    everything = [p.relative_to(source).as_posix() for p in source.rglob("*.*")]
    assert len(everything) == 1000
    assert sorted(kept + skipped) == sorted(everything)
    for phrase in ("5 converted", "2 skipped", str(folder / "report.csv")):
        assert phrase in result.stdout


# One process forks and kills the others, so that torch is imported once.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from nvae_lightning.data import Image as ImageFormat, ImageDataModule, chunks
from nvae_lightning.data.decode import Decoder

source, target = sys.argv[1:]
decode = Decoder.__call__

def slowly(self, image):
    time.sleep(0.005)
    return decode(self, image)

Decoder.__call__ = slowly

def start(root, chunk_size):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        status = 1
        try:
            chunks.CHUNK_BYTES = chunk_size * 16 * 16 * 3
            data = ImageDataModule(
                root=root, batch_size=1, image=ImageFormat(3, 16, 8), num_workers=2
            )
            data.prepare(source, skip_errors=True)
            status = 0
        finally:
            os._exit(status)
    return pid

def num_notes(root):
    journals = Path(root).glob(".partial/*.journal")
    return sum(journal.read_bytes().count(b"\\n") for journal in journals)

def kill(pid, root, wanted):
    while num_notes(root) < wanted:
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the preparation ended before the kill"
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

def is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True

chance = random.Random(0)
wanted, found = 0, []
for _ in range(10):
    wanted += chance.randint(0, 9)
    is_killed = kill(start(target, 8), target, wanted)
    is_there = any(Path(target).glob("*.json"))
    found.append([is_killed, wanted, num_notes(target), is_there])
    wanted = num_notes(target)
_, status = os.waitpid(start(target, 8), 0)

# Chunks larger than the buffer of a pipe: a worker blocks when nobody reads.
other = target + "_in_large_chunks"
group = start(other, 100)
kill(group, other, 1)
deadline = time.monotonic() + 10
while is_alive(group) and time.monotonic() < deadline:
    time.sleep(0.02)
stays = is_alive(group)
if stays:
    os.killpg(group, signal.SIGKILL)
print("FOUND" + json.dumps([found, status, stays]))
"""


def test_ten_kills_during_preparation_do_not_change_the_result_and_leave_no_process(
    source: Path,
    prepared: Prepared,
    tmp_path: Path,
) -> None:
    result = run_python("-c", KILLER, str(source), str(tmp_path / "killed"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found, status, workers_stay = json.loads(result.stdout.partition("FOUND")[2])
    assert len(found) == 10
    for is_killed, num_wanted, num_notes, is_there in found:
        assert is_killed
        assert num_wanted <= num_notes < 126  # whole chunks: it resumes instead of starting over
        assert not is_there
    assert found[-1][2] > 20
    assert status == 0, result.stderr
    assert not workers_stay
    assert files(tmp_path / "killed") == files(prepared[0])


def test_preview_shows_the_prepared_images(prepared: Prepared, tmp_path: Path) -> None:
    result = run(
        tmp_path, "nvae_lightning.preview", "dataset=image_folder",
        f"dataset.root={prepared[0]}", "dataset.image.size=16", "dataset.image.bits=5",
        "dataset.validation_fraction=0",
        "output=seen.png",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    counts = [json.loads((prepared[0] / f"{s}.json").read_text())["num_images"] for s in SPLITS]
    assert f"{counts[0]} train, {counts[1]} test" in result.stdout
    assert "16x16x3, 32 levels (5 bits)" in result.stdout
    assert "checksums verified" in result.stdout
    with Image.open(tmp_path / "seen.png") as picture:
        assert min(picture.size) >= 800
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["seen.png"]


def test_training_reads_the_prepared_images(prepared: Prepared, tmp_path: Path) -> None:
    before = files(prepared[0])
    result = run(
        tmp_path, "nvae_lightning.train", "dataset=image_folder", f"dataset.root={prepared[0]}",
        "dataset.image.size=16", "model=tiny", "trainer=cpu", "logger=csv", "trainer.max_steps=2",
        "dataset.batch_size=8", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert files(prepared[0]) == before


FOLDER = "dataset=image_folder dataset.image.size=16"
TRAIN = f"train {FOLDER} trainer=cpu logger=csv"

# Settings and error messages.
BAD_SETTINGS = [
    (
        f"prepare {FOLDER} source=images dataset.root=new/stopped",
        ["source: cannot read the image", "a/empty.png", "on_error=skip"],
    ),
    (f"prepare {FOLDER} source=images on_error=go", ["on_error", "'go'", "stop or skip"]),
    (
        f"prepare {FOLDER} source=images dataset.root=prepared overwrite=flase",
        ["overwrite", "'flase'", "a valid boolean"],
    ),
    (f"prepare {FOLDER} dataset.root=new/missing", ["source"]),
    (f"prepare {FOLDER} source=nowhere dataset.root=new/a", ["source: ", "nowhere' does not"]),
    (f"prepare {FOLDER} source=half dataset.root=new/b", ["source: ", "'train'", "no split"]),
    (f"prepare {FOLDER} source=texts dataset.root=new/c", ["source: ", "no images", "notes.txt"]),
    (
        "prepare dataset=celeba_hq dataset.image.size=16 source=good dataset.root=new/d",
        ["dataset.check_counts: 27,000", "has 3", "dataset.check_counts=false"],
    ),
    (
        f"prepare {FOLDER} source=good dataset.root=good/a.png/b",
        ["dataset.root: cannot write", "Not a directory", "another dataset.root"],
    ),
    (
        f"prepare {FOLDER} source=good dataset.root=prepared",
        ["dataset.root: ", "source=", "images, not", "overwrite=true"],
    ),
    (
        f"prepare {FOLDER} source=images dataset.root=prepared",
        ["dataset.root: ", "without 2 of the images", "on_error=skip"],
    ),
    (
        f"prepare {FOLDER} source=images dataset.root=prepared dataset.interpolation=box",
        ["dataset.root: ", "interpolation=lanczos, not box", "overwrite=true"],
    ),
    (f"prepare {FOLDER} source=images dataset.root=flipped", ["dataset.root: ", "checksum"]),
    (f"{TRAIN} dataset.root=flipped", ["dataset.root: ", "checksum", "overwrite=true"]),
    (f"{TRAIN} dataset.root=short", ["dataset.root: ", "train.npy", "damaged"]),
    (f"{TRAIN} dataset.root=short dataset.verify=false", ["dataset.root: ", "train.npy"]),
    (f"{TRAIN} dataset.root=one_split", ["dataset.root: ", "test.npy", "missing"]),
    (f"{TRAIN} dataset.root=nowhere", ["dataset.root: ", "nowhere' does not exist"]),
    (
        f"{TRAIN} dataset.root=prepared dataset.image.size=64",
        ["dataset.image.size: got 64", "16", "prepare"],
    ),
    (
        f"preview {FOLDER} dataset.root=prepared dataset.image.channels=1",
        ["dataset.image.channels: got 1", "3", "prepare"],
    ),
    (f"preview {FOLDER} dataset.root=flipped", ["dataset.root: ", "checksum"]),
    (
        f"preview {FOLDER} dataset.root=prepared output=no/no.png",
        ["cannot use 'no/no.png' (No such file"],
    ),
]

DRIVER = """
import contextlib, importlib, io, json, sys
from nvae_lightning.cli.command import run
found = []
for line in json.loads(sys.argv[1]):
    command, *overrides = line.split()
    sys.argv = [command, *overrides]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run(importlib.import_module(f"nvae_lightning.{command}").main)
        status = 0
    except SystemExit as exit:
        status = exit.code
    except BaseException as error:
        status = repr(error)
    found.append((status, errors.getvalue()))
print("FOUND" + json.dumps(found))
"""


@pytest.fixture
def bad_folders(source: Path, prepared: Prepared) -> Iterator[Path]:
    """Sources and targets with one fault each, beside the good ones."""
    folder = source.parent
    made = ["half/train", "texts", "good", "flipped", "short", "one_split"]
    for name in made[:3]:
        (folder / name).mkdir(parents=True)
    for index in "abcd":
        Image.new("RGB", (16, 16)).save(folder / "good" / f"{index}.png")
    shutil.copy(folder / "good" / "a.png", folder / "half" / "train")
    (folder / "texts" / "notes.txt").write_text("no image")
    for name in made[3:]:
        shutil.copytree(prepared[0], folder / name)
    content = bytearray((folder / "flipped" / "train.npy").read_bytes())
    content[1000] ^= 4
    (folder / "flipped" / "train.npy").write_bytes(content)
    os.truncate(folder / "short" / "train.npy", 100_000)
    (folder / "one_split" / "test.npy").unlink()
    yield folder
    for name in made:
        shutil.rmtree(folder / name.split("/")[0])


def test_bad_data_gives_one_line_each_and_leaves_no_files(bad_folders: Path) -> None:
    before = files(bad_folders)
    lines = json.dumps([line for line, _ in BAD_SETTINGS])
    result = run_python("-c", DRIVER, lines, cwd=bad_folders, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.partition("FOUND")[2])
    for (line, words), (status, errors) in zip(BAD_SETTINGS, found, strict=True):
        assert isinstance(status, str), line
        assert status.startswith("error: "), (line, status)
        assert "\n" not in status
        assert "Traceback" not in errors
        for word in words:
            assert word in status, (line, status)
    # After an unreadable image, the same command resumes.
    assert not is_prepared(bad_folders / "new" / "stopped")
    assert [p.name for p in (bad_folders / "new" / "stopped").iterdir()] == [".partial"]
    shutil.rmtree(bad_folders / "new" / "stopped")
    assert list((bad_folders / "new").iterdir()) == []
    shutil.rmtree(bad_folders / "new")
    shutil.rmtree(bad_folders / "outputs", ignore_errors=True)
    assert files(bad_folders) == before


@pytest.mark.parametrize("size", [32, 64, 256])
def test_real_images_are_prepared_at_any_size_and_read_at_any_depth(
    tmp_path: Path, size: int
) -> None:
    real = SHARED_DATA / "cifar10_jpeg"
    if not real.is_dir():
        pytest.skip("requires the real images beside the checkout")
    originals = {
        split: sorted((real / split).rglob("*.jpg"))[::count]
        for split, count in (("train", 60), ("test", 50))
    }
    for split, paths in originals.items():
        (tmp_path / "source" / split).mkdir(parents=True)
        for index, path in enumerate(paths):
            shutil.copy(path, tmp_path / "source" / split / f"{index:03d}.jpg")
    settings = {
        "root": tmp_path / "p",
        "batch_size": 10,
    }
    data = ImageDataModule(**settings, image=ImageFormat(3, size, 8), num_workers=0)
    prepared = data.prepare(str(tmp_path / "source"))
    assert {s: known.num_images for s, known in prepared.items()} == {"train": 167, "test": 40}
    for bits in (5, 8):
        data = ImageDataModule(**settings, image=ImageFormat(3, size, bits), num_workers=0)
        data.prepare_data()
        data.setup("fit")
        assert isinstance(data.test_set.images, np.memmap)
        batches = [data.to_input(batch, train=False) for batch in data.test_dataloader()]
        images = torch.cat(batches)
        assert images.shape == (40, 3, size, size)
        levels = images * (2**bits - 1)
        assert torch.equal(levels.round().unique(), torch.arange(2.0**bits))
        assert (levels - levels.round()).abs().max() < 1e-4
        for image, path in zip(images, originals["test"], strict=True):
            with Image.open(path) as file:
                thumbnail = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
            shrunk = torch.nn.functional.adaptive_avg_pool2d(image, 32) * 255
            assert (shrunk - thumbnail).abs().mean() < 8
