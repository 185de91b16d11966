from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvae_lightning.data import ImageFolder

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "cifar10_jpeg"
SETTINGS: dict[str, Any] = {"batch_size": 2, "image_size": 8, "channels": 3, "bits": 8}


def folder(root: Path, **settings: Any) -> ImageFolder:
    return ImageFolder(root=root, **{**SETTINGS, **settings})


def write(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_greys(root: Path, *names: str) -> None:
    """Write one 8x8 image per name, each of its own grey: 0, 10, 20, ..."""
    for index, name in enumerate(names):
        write(root / name, Image.new("L", (8, 8), 10 * index))


def greys(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def decoded(tmp_path: Path, image: Image.Image, **settings: Any) -> np.ndarray:
    """Write an image as the only training PNG and return its (channel, height, width) pixels."""
    write(tmp_path / "train" / "image.png", image)
    write_greys(tmp_path / "test", "other.png")
    return folder(tmp_path, **settings).load(train=True)[0].numpy()


COLOURS = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0].copy()


def test_an_image_of_the_right_size_is_not_changed(tmp_path: Path) -> None:
    assert np.array_equal(decoded(tmp_path, Image.fromarray(COLOURS)), COLOURS.transpose(2, 0, 1))


def test_grey_images_become_colour_images_by_repetition(tmp_path: Path) -> None:
    image = decoded(tmp_path, Image.fromarray(GREYS))
    assert np.array_equal(image, np.stack([GREYS] * 3))


def test_colour_images_become_grey_by_their_luma(tmp_path: Path) -> None:
    image = decoded(tmp_path, Image.fromarray(COLOURS), channels=1)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(image[0], luma, rtol=0, atol=1)


def test_the_colours_below_transparency_are_read(tmp_path: Path) -> None:
    rgba = np.dstack([COLOURS, np.full((8, 8), 100, dtype=np.uint8)])
    assert np.array_equal(decoded(tmp_path, Image.fromarray(rgba)), COLOURS.transpose(2, 0, 1))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palettes_are_looked_up(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.fromarray(GREYS).convert("P")
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    if transparency is not None:
        image.info["transparency"] = transparency
    expected = np.stack([GREYS, 255 - GREYS, np.full_like(GREYS, 7)])
    assert np.array_equal(decoded(tmp_path, image), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_images_are_scaled_to_eight_bits(tmp_path: Path, channels: int) -> None:
    sixteen_bits = GREYS.astype(np.uint16) * 256 + 17
    image = decoded(tmp_path, Image.fromarray(sixteen_bits), channels=channels)
    assert np.array_equal(image, np.stack([GREYS] * channels))


@pytest.mark.parametrize(
    ("width", "height", "centre"),
    [(16, 8, np.s_[:, 4:12]), (8, 16, np.s_[4:12, :])],
)
def test_the_centre_square_is_kept_of_images_that_are_not_square(
    tmp_path: Path, width: int, height: int, centre: tuple[slice, slice]
) -> None:
    pixels = np.random.default_rng(1).integers(256, size=(height, width), dtype=np.uint8)
    image = decoded(tmp_path, Image.fromarray(pixels), channels=1)
    assert np.array_equal(image[0], pixels[centre])


def test_the_shorter_side_is_resized_to_the_image_size(tmp_path: Path) -> None:
    steps = np.repeat(np.arange(6, dtype=np.uint8) * 40, 8)  # six grey bars, each 8 pixels wide
    image = decoded(tmp_path, Image.fromarray(np.tile(steps, (32, 1))), channels=1)
    # 48x32 becomes 12x8, whose central eight columns are the inner four bars, two columns each.
    expected = np.tile(np.repeat([40, 80, 120, 160], 2), (8, 1))
    np.testing.assert_allclose(image[0], expected, rtol=0, atol=8)


def test_shrinking_averages_instead_of_skipping_pixels(tmp_path: Path) -> None:
    checkerboard = np.indices((64, 64)).sum(0) % 2 * 255
    image = decoded(tmp_path, Image.fromarray(checkerboard.astype(np.uint8)))
    np.testing.assert_allclose(image, 127.5, rtol=0, atol=5)


def test_the_crop_box_is_cut_out_before_resizing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(256, size=(20, 30, 3), dtype=np.uint8)
    image = decoded(tmp_path, Image.fromarray(pixels), crop=[3, 5, 11, 13])
    assert np.array_equal(image, pixels[5:13, 3:11].transpose(2, 0, 1))


def test_all_suffixes_are_found_in_all_subfolders_and_other_files_ignored(tmp_path: Path) -> None:
    names = [
        *("a.jpg", "b.JPEG", "c/d.png", "c/e.bmp", "c/f/g.gif", "h.tif", "i.tiff", "j.webp"),
        *("k.ppm", "l.pgm"),
    ]
    for name in names:
        mode = "L" if name.endswith("pgm") else "RGB"
        write(tmp_path / name, Image.new(mode, (9, 9), "white"))
    (tmp_path / "labels.csv").write_text("no image")
    data = folder(tmp_path)
    data.setup("fit")
    assert data.num_train_images + data.num_test_images == len(names)
    assert data.train_set.images.min() > 250


@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_train_and_test_folders_are_the_splits_in_the_order_of_their_paths(
    tmp_path: Path, test: str
) -> None:
    write_greys(tmp_path, "train/cat/2.png", "train/cat/1.png", "train/ant/3.png", f"{test}/x.png")
    data = folder(tmp_path)
    assert greys(data.load(train=True)) == [20, 10, 0]
    assert greys(data.load(train=False)) == [30]


def test_a_validation_folder_is_left_alone_beside_a_test_folder(tmp_path: Path) -> None:
    write_greys(tmp_path, "train/a.png", "test/b.png", "val/c.png")
    assert greys(folder(tmp_path).load(train=False)) == [10]


def test_a_seeded_split_is_disjoint_and_complete_and_depends_on_the_seed(tmp_path: Path) -> None:
    write_greys(tmp_path, *(f"{index:02}.png" for index in range(20)))

    def split(seed: int) -> tuple[list[int], list[int]]:
        data = folder(tmp_path, test_fraction=0.3, split_seed=seed)
        return greys(data.load(train=True)), greys(data.load(train=False))

    train, test = split(0)
    assert (len(train), len(test)) == (14, 6)
    assert sorted(train + test) == [10 * index for index in range(20)]
    assert split(0) == (train, test)
    assert split(1) != (train, test)


def test_a_seeded_split_is_the_same_on_two_machines(tmp_path: Path) -> None:
    names = [f"{index % 3}/{index}.png" for index in range(20)]
    write_greys(tmp_path / "here", *names)
    for index, name in reversed(list(enumerate(names))):  # other order of creation, other root
        write(tmp_path / "there" / name, Image.new("L", (8, 8), 10 * index))
    here, there = (folder(tmp_path / name, test_fraction=0.3) for name in ("here", "there"))
    assert torch.equal(here.load(train=False), there.load(train=False))


@pytest.mark.parametrize("test_fraction", [0.01, 0.99])
def test_neither_part_of_a_seeded_split_is_empty(tmp_path: Path, test_fraction: float) -> None:
    write_greys(tmp_path, "a.png", "b.png", "c.png")
    data = folder(tmp_path, test_fraction=test_fraction)
    data.setup("fit")
    assert min(data.num_train_images, data.num_test_images) == 1


def test_a_missing_root_is_reported_with_the_hint(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    message = rf"^dataset\.root: '{missing}' does not exist; fetch the images$"
    with pytest.raises(ValueError, match=message):
        folder(missing, download_hint="fetch the images").prepare_data()
    with pytest.raises(ValueError, match=r"does not exist; set dataset\.root to a folder of"):
        folder(missing).setup("fit")


def test_a_relative_root_is_reported_as_an_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^dataset\.root: '{tmp_path / 'nowhere'}' does not"):
        folder(Path("nowhere")).prepare_data()


def test_a_root_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^dataset\.root: got None"):
        ImageFolder(root=None, **SETTINGS).prepare_data()


def test_a_folder_without_images_is_reported(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"^dataset\.root: no images in '{tmp_path}'; .*\.jpg"):
        folder(tmp_path).prepare_data()


def test_an_empty_split_is_reported(tmp_path: Path) -> None:
    write_greys(tmp_path, "train/a.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=rf"no images in '{tmp_path / 'test'}'"):
        folder(tmp_path).prepare_data()


@pytest.mark.parametrize(("present", "absent"), [("train", "test"), ("test", "train")])
def test_half_a_split_is_reported(tmp_path: Path, present: str, absent: str) -> None:
    write_greys(tmp_path, f"{present}/a.png", "other/b.png")
    message = rf"^dataset\.root: .* folder '{present}' but no folder '{absent}'; add '{absent}'"
    with pytest.raises(ValueError, match=message):
        folder(tmp_path).prepare_data()


def test_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    write_greys(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"^dataset\.root: .* one image only"):
        folder(tmp_path).prepare_data()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_unreadable_image_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    write_greys(tmp_path, "a.png", "b.png")
    path = tmp_path / f"broken.{suffix}"
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    write(path, Image.fromarray(noise))
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"^dataset\.root: .* '{path}' \(.*remove it$"):
        folder(tmp_path).setup("fit")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\.test_fraction: got {fraction}, .* 0 and 1"):
        folder(tmp_path, test_fraction=fraction)


@pytest.mark.parametrize("crop", [[0, 0, 8], [8, 0, 8, 8], [0, 8, 8, 4], [-1, 0, 8, 8]])
def test_a_crop_that_is_no_box_is_refused(tmp_path: Path, crop: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^dataset\.crop: got \[.* left < right"):
        folder(tmp_path, crop=crop)


def test_a_crop_beyond_an_image_names_the_image(tmp_path: Path) -> None:
    write_greys(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError, match=r"^dataset\.crop: .*[ab]\.png' is 8 wide and 8 high"):
        folder(tmp_path, crop=(0, 0, 9, 8), test_fraction=0.5).setup("fit")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of CIFAR-10 JPEGs is not here")
def test_a_real_folder_of_photographs_is_read() -> None:
    data = folder(SHARED, image_size=32)
    data.setup("test")
    mean = data.test_set.images.float().mean((0, 2, 3)) / 255
    # The published means of CIFAR-10's channels; this folder holds a sample of its images.
    torch.testing.assert_close(mean, torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=0.02)
