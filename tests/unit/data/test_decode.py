import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.image_formats import open_image

COLOURS = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0].copy()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=shape, dtype=np.uint8)


def decoded(image: Image.Image, **settings: Any) -> tuple[np.ndarray, str]:
    pixels, notes = Decoder(**{"size": 8, "channels": 3, **settings})(image)
    return pixels, ", ".join(map(str, notes))


def reopened(image: Image.Image, file_format: str, **options: Any) -> Image.Image:
    """Write an image in a format and open that file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(file)


@pytest.mark.parametrize("crop", [None, (0, 0, 4, 4), (0, 0, 100, 100)])
def test_an_image_of_the_right_size_is_not_changed(crop: tuple[int, ...] | None) -> None:
    pixels, notes = decoded(Image.fromarray(COLOURS), crop=crop)
    assert np.array_equal(pixels, COLOURS)
    assert notes == ""


def test_grey_images_become_colour_images_by_repetition() -> None:
    pixels, notes = decoded(Image.fromarray(GREYS))
    assert np.array_equal(pixels, np.dstack([GREYS] * 3))
    assert notes == "grey repeated to colour"


def test_colour_images_become_grey_by_their_luma() -> None:
    pixels, notes = decoded(Image.fromarray(COLOURS), channels=1)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert pixels.shape == (8, 8, 1)
    np.testing.assert_allclose(pixels[..., 0], luma, rtol=0, atol=1)
    assert notes == "colour turned grey"


def test_images_of_one_bit_become_black_and_white() -> None:
    pixels, notes = decoded(Image.fromarray(GREYS > 127))
    assert np.array_equal(pixels, np.dstack([255 * (GREYS > 127)] * 3))
    assert notes == "grey repeated to colour"


@pytest.mark.parametrize(
    ("background", "behind"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))]
)
@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_transparent_colours_are_placed_on_the_background(
    alpha: int, background: str, behind: tuple[int, ...]
) -> None:
    rgba = np.dstack([COLOURS, np.full((8, 8), alpha, dtype=np.uint8)])
    pixels, notes = decoded(Image.fromarray(rgba), background=background)
    expected = (COLOURS * float(alpha) + np.array(behind) * (255.0 - alpha)) / 255
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1)
    kinds = {0: "entirely transparent, all ", 100: "transparent, placed on ", 255: ""}
    assert notes == (kinds[alpha] + background if alpha < 255 else "")


def hidden(mode: str, pixels: np.ndarray) -> Image.Image:
    """Return an image, possibly with a palette, in which only the first pixel is visible."""
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[0, 0] = 255
    image = Image.fromarray(np.dstack([pixels, alpha]))
    if mode == "PA":
        image, alpha_channel = image.convert("RGB").quantize(64), image.getchannel("A")
        image = image.convert("PA")
        image.putalpha(alpha_channel)
    return image if image.mode == mode else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_hidden_colours_do_not_matter(mode: str, channels: int) -> None:
    first, second = (np.full((8, 8, 3), value, np.uint8) for value in (90, 200))
    second[0, 0] = 90
    if mode in ("LA", "La"):
        first, second = first[..., 0], second[..., 0]
    images = [decoded(hidden(mode, pixels), channels=channels)[0] for pixels in (first, second)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0][0, 0], 90)
    np.testing.assert_array_equal(images[0][1:], 255)


def write_png(path: Any, pixels: np.ndarray, depth: int, transparent: bytes) -> None:
    """Write a PNG of any depth with a transparent colour of that depth; Pillow cannot."""
    rows = pixels.reshape(len(pixels), -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(len(rows), -1), axis=1)
    filtered = np.concatenate([np.zeros((len(rows), 1), np.uint8), packed], axis=1)
    kind = {2: 0, 3: 2}[pixels.ndim]
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), depth, kind, 0, 0, 0)
    path.write(b"\x89PNG\r\n\x1a\n")
    chunks = [(b"IHDR", header), (b"tRNS", transparent)]
    for name, content in (*chunks, (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")):
        path.write(struct.pack(">I", len(content)) + name + content)
        path.write(struct.pack(">I", zlib.crc32(name + content)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_placed_on_the_background(depth: int) -> None:
    values = np.arange(64).reshape(8, 8) * 1021 % 2**depth
    file = io.BytesIO()
    write_png(file, values, depth, struct.pack(">H", values[0, 1]))
    pixels, notes = decoded(open_image(file.getvalue()), channels=1, background="black")
    expected = values * 255 // (2**depth - 1) if depth < 16 else values >> 8
    np.testing.assert_array_equal(pixels[..., 0], np.where(values == values[0, 1], 0, expected))
    assert "transparent, placed on black" in notes


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_is_placed_on_the_background(depth: int) -> None:
    values = COLOURS.astype(np.uint16) << (depth - 8)
    file = io.BytesIO()
    write_png(file, values, depth, struct.pack(">HHH", *values[0, 0].tolist()))
    pixels, notes = decoded(open_image(file.getvalue()))
    expected = COLOURS.copy()
    expected[0, 0] = 255
    assert np.array_equal(pixels, expected)
    assert "transparent, placed on white" in notes


def test_sixteen_bits_with_transparency_are_placed_on_the_background() -> None:
    image = Image.fromarray(np.dstack([COLOURS, GREYS]))
    file = io.BytesIO()
    image.save(file, "PNG")
    pixels, _ = decoded(open_image(file.getvalue()), background="black")
    expected = COLOURS * (GREYS[..., None] / 255)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1)


@pytest.mark.parametrize(
    ("transparency", "notes"),
    [
        (None, "converted from a palette"),
        (GREYS[0, 0].item(), "converted from a palette, transparent, placed on white"),
        (bytes(range(256)), "converted from a palette, transparent, placed on white"),
        (bytes([255] * 256), "converted from a palette"),
    ],
)
def test_palettes_are_looked_up(transparency: int | bytes | None, notes: str) -> None:
    image = Image.fromarray(GREYS).convert("P")
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    options = {} if transparency is None else {"transparency": transparency}
    pixels, got = decoded(reopened(image, "PNG", **options))
    colours = np.dstack([GREYS, 255 - GREYS, np.full_like(GREYS, 7)])
    alpha = np.full(256, 255)
    if isinstance(transparency, int):
        alpha[transparency] = 0
    elif transparency is not None:
        alpha = np.frombuffer(transparency, np.uint8)
    share = alpha[GREYS][..., None] / 255.0
    np.testing.assert_allclose(pixels, colours * share + 255 * (1 - share), rtol=0, atol=1)
    assert got == notes


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_images_are_scaled_to_eight_bits(channels: int, file_format: str) -> None:
    image = Image.fromarray(GREYS.astype(np.uint16) * 256 + 17)
    pixels, notes = decoded(reopened(image, file_format), channels=channels)
    assert np.array_equal(pixels, np.dstack([GREYS] * channels))
    assert notes == "converted from 16 bits" + ", grey repeated to colour" * (channels == 3)


@pytest.mark.parametrize(("largest", "bits"), [(99, 8), (255, 8), (4095, 12), (16383, 14)])
def test_nearly_black_sixteen_bit_images_are_noted_with_the_remedy(
    largest: int, bits: int
) -> None:
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    pixels, notes = decoded(Image.fromarray(values), channels=1)
    assert pixels.max() < 64
    assert f"nearly black, see dataset.source_bits: the values only reach {largest:,} of" in notes
    assert notes.endswith(f"set dataset.source_bits={bits}")
    assert f"set dataset.source_bits={bits}" in notes
    pixels, _ = decoded(Image.fromarray(values), channels=1, source_bits=bits)
    np.testing.assert_array_equal(pixels[..., 0], values >> (bits - 8))


def test_sixteen_bit_images_of_the_usual_range_are_not_called_black() -> None:
    values = np.full((8, 8), 16384, np.uint16)
    assert decoded(Image.fromarray(values), channels=1)[1] == "converted from 16 bits"


def test_values_beyond_the_bits_of_the_source_are_refused() -> None:
    values = np.full((8, 8), 4096, np.uint16)
    with pytest.raises(
        ValueError, match=r"reach 4,096, but the largest with dataset\.source_bits=12 is 4,095"
    ):
        decoded(Image.fromarray(values), source_bits=12)


def test_colour_with_sixteen_bits_is_noted_and_refuses_source_bits() -> None:
    file = io.BytesIO()
    write_png(file, COLOURS.astype(np.uint16) << 4, 16, struct.pack(">HHH", 1, 1, 1))
    _, notes = decoded(open_image(file.getvalue()))
    assert "nearly black, see dataset.source_bits: the values only reach 4,095" in notes
    with pytest.raises(ValueError, match=r"upper 8 bits .* dataset\.source_bits=12 leaves"):
        decoded(open_image(file.getvalue()), source_bits=12)


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_values_of_thirty_two_bits_are_refused(value: int) -> None:
    image = Image.fromarray(np.full((8, 8), value, dtype=np.int32))
    with pytest.raises(ValueError, match=r"32-bit values have no known range; save it with 8 or"):
        decoded(image)


def test_floating_point_values_are_refused() -> None:
    image = reopened(Image.fromarray(GREYS.astype(np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"floating-point values have no known range; save it"):
        decoded(image)


def test_printing_colours_become_light() -> None:
    cmyk = np.dstack([255 - COLOURS, np.zeros_like(GREYS)])
    image = reopened(Image.frombytes("CMYK", (8, 8), cmyk.tobytes()), "TIFF")
    pixels, notes = decoded(image)
    assert np.array_equal(pixels, COLOURS)
    assert notes == "converted from CMYK"


def test_the_first_frame_of_an_animation_is_read() -> None:
    first, second = (Image.fromarray(greys).convert("P") for greys in (GREYS, 255 - GREYS))
    image = reopened(first, "GIF", save_all=True, append_images=[second])
    pixels, notes = decoded(image)
    assert np.array_equal(pixels, np.dstack([GREYS] * 3))
    assert notes.startswith("first frame of several: 2 frames")


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, lambda pixels: pixels[::-1, ::-1]), (6, lambda pixels: np.rot90(pixels, -1))],
)
def test_images_are_turned_upright(orientation: int, turn: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, notes = decoded(reopened(Image.fromarray(noise(8, 8, 3)), "PNG", exif=exif))
    assert np.array_equal(pixels, turn(noise(8, 8, 3)))
    assert notes == "turned upright"


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_images_that_are_upright_or_of_unknown_orientation_stay(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, notes = decoded(reopened(Image.fromarray(COLOURS), "PNG", exif=exif))
    assert np.array_equal(pixels, COLOURS)
    assert notes == ""


def test_images_are_turned_before_they_are_cropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: 8 wide and 12 high when turned
    image = reopened(Image.fromarray(noise(8, 12, 3)), "PNG", exif=exif)
    pixels, _ = decoded(image, crop=(0, 4, 8, 12))
    assert np.array_equal(pixels, np.rot90(noise(8, 12, 3), -1)[4:12])


@pytest.mark.parametrize(
    ("width", "height", "centre"),
    [(16, 8, np.s_[:, 4:12]), (8, 16, np.s_[4:12, :])],
)
def test_the_centre_square_is_kept_of_images_that_are_not_square(
    width: int, height: int, centre: tuple[slice, slice]
) -> None:
    pixels, notes = decoded(Image.fromarray(noise(height, width)), channels=1)
    assert np.array_equal(pixels[..., 0], noise(height, width)[centre])
    assert notes == ""


def test_the_shorter_side_is_resized_to_the_image_size() -> None:
    steps = np.repeat(np.arange(6, dtype=np.uint8) * 40, 8)  # six grey bars, each 8 pixels wide
    pixels, _ = decoded(Image.fromarray(np.tile(steps, (32, 1))), channels=1)
    # 48x32 becomes 12x8, whose central eight columns are the inner four bars, two columns each.
    expected = np.tile(np.repeat([40, 80, 120, 160], 2), (8, 1))
    np.testing.assert_allclose(pixels[..., 0], expected, rtol=0, atol=8)


@pytest.mark.parametrize("interpolation", ["box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_shrinking_averages_instead_of_skipping_pixels(interpolation: str) -> None:
    checkerboard = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(checkerboard.astype(np.uint8))
    pixels, _ = decoded(image, interpolation=interpolation)
    np.testing.assert_allclose(pixels, 127.5, rtol=0, atol=5)


@pytest.mark.parametrize(("height", "width"), [(48, 32), (32, 48)])
def test_an_uncropped_image_agrees_with_torchvision(height: int, width: int) -> None:
    image = Image.fromarray(noise(height, width, 3))
    expected = CenterCrop(8)(Resize(8, InterpolationMode.BILINEAR, antialias=True)(image))
    pixels, _ = decoded(image, interpolation="bilinear")
    np.testing.assert_allclose(pixels.astype(int), np.asarray(expected), rtol=0, atol=1)


def test_the_crop_box_is_cut_out_before_resizing() -> None:
    pixels, _ = decoded(Image.fromarray(noise(20, 30, 3)), crop=(3, 5, 11, 13))
    assert np.array_equal(pixels, noise(20, 30, 3)[5:13, 3:11])


def test_the_box_of_celeba_is_cropped_and_resized_as_pillow_does() -> None:
    image = Image.fromarray(noise(218, 178, 3))
    box = (15, 40, 163, 188)
    expected = image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    pixels, notes = decoded(image, size=64, crop=box, interpolation="bilinear")
    assert np.array_equal(pixels, np.asarray(expected))
    assert notes == ""


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1)])
def test_a_very_thin_image_is_noted_and_needs_little_memory(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), "red")
    before = Image.core.get_stats()["allocated_blocks"]  # blocks of at most 16 MiB
    pixels, notes = decoded(image, size=256)
    blocks = Image.core.get_stats()["allocated_blocks"] - before
    assert np.array_equal(pixels, np.full((256, 256, 3), (255, 0, 0)))
    assert notes == f"mostly cut off: 0.02% of {width}x{height} kept"
    assert blocks < 10


def test_every_conversion_is_noted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = reopened(Image.new("P", (64, 8)), "PNG", exif=exif, transparency=0)
    expected = "turned upright, mostly cut off: 12.50% of 8x64 kept, converted from a palette"
    expected += ", entirely transparent, all white, grey repeated to colour"
    assert decoded(image)[1] == expected


def test_a_crop_beyond_an_image_is_reported_with_its_size() -> None:
    with pytest.raises(
        ValueError, match=r"dataset\.crop=\[0, 0, 10, 9\] does not fit .* 9 wide and 9 high"
    ):
        decoded(Image.new("L", (9, 9)), crop=(0, 0, 10, 9))


@pytest.mark.parametrize(
    "crop", [(0, 0, 8), (8, 0, 8, 8), (0, 8, 8, 4), (-1, 0, 8, 8), (0, -1, 8, 8)]
)
def test_an_invalid_crop_is_refused(crop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^dataset\.crop: got \[.* left < right .*crop=null"):
        Decoder(size=8, channels=3, crop=crop)


def test_an_unknown_filter_is_refused() -> None:
    message = (
        r"^dataset\.interpolation: got 'cubic', .* bicubic, .* dataset\.interpolation=lanczos$"
    )
    with pytest.raises(ValueError, match=message):
        Decoder(size=8, channels=3, interpolation="cubic")
