"""Conversion of any image to a square of bytes, with notes on losses."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from nvae_lightning.data.image_formats import open_image

Pixels = UInt8[np.ndarray, "height width channel"]

INTERPOLATIONS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}

_LEAST_KEPT = 0.25  # of an image's area; the report mentions images below
_ORIENTATION = 0x0112  # in EXIF
_TURNED = range(2, 9)  # 1 is upright; some cameras write 0

_BLOCK = 1 << 20  # pixels that are converted together
_NEARLY_BLACK = 1 << 14  # 16-bit images whose values are all below a quarter of their range
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA")
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # of greys with fewer bits, which Pillow scales


@dataclass(frozen=True)
class Decoder:
    """Crop, convert and resize images to squares of one size.

    The first frame or page of an image is turned upright according to its EXIF data, cropped to
    `crop`, placed on `background` where it is transparent, converted to grey or colour with 8
    bits, resized so that its shorter side is `size`, and cut to its central square. An image of
    `size` by `size` pixels is neither cropped nor resized.

    Args:
        size: Height and width of the result.
        channels: 1 (grey) or 3 (colour).
        crop: Box (left, upper, right, lower) in pixels to cut out before resizing, or None.
        interpolation: Name of one of Pillow's filters, in lower case.
        background: Colour behind transparent pixels: a name, or ``#rrggbb``.
        source_bits: Number of bits used by the values of 16-bit files, 8 to 16; None for 16.
            Values are divided by 2^(source_bits - 8).

    Raises:
        ValueError: If an argument is out of its range.
    """

    size: int
    channels: int
    crop: tuple[int, ...] | None = None
    interpolation: str = "lanczos"
    background: str = "white"
    source_bits: int | None = None

    def __post_init__(self) -> None:
        box = (0, 0, 1, 1) if self.crop is None else self.crop
        if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise ValueError(
                f"dataset.crop: got {[*box]}, but it must be [left, upper, right, lower] "
                "with 0 <= left < right and 0 <= upper < lower; set dataset.crop=null to crop "
                "nothing"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"dataset.interpolation: got {self.interpolation!r}, but it must be one of "
                f"{', '.join(INTERPOLATIONS)}; set for example dataset.interpolation=lanczos"
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"dataset.background: got {self.background!r}, but it must be a colour such as "
                "white, black or '#808080'; set for example dataset.background=white"
            ) from error
        if self.source_bits not in (None, *range(8, 17)):
            raise ValueError(
                f"dataset.source_bits: got {self.source_bits!r}, but it must be a whole number "
                "from 8 to 16, or null; set for example dataset.source_bits=12"
            )

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the images as plain values."""
        settings = asdict(self)
        crop = None if self.crop is None else list(self.crop)
        return {"image_size": settings.pop("size"), **settings, "crop": crop}

    def __call__(self, image: Image.Image) -> tuple[Pixels, list[str]]:
        """Return the pixels, and notes on conversions other than cropping and resizing.

        Raises:
            ValueError: If the crop does not fit into the image, or its values have no known range.
            Exception: Any error of Pillow's for a damaged image.
        """
        notes = []
        num_frames = getattr(image, "n_frames", 1)
        if num_frames > 1:
            notes.append(f"first frame of several: {num_frames} frames")
        raw_mode = _raw_mode(image)
        if image.getexif().get(_ORIENTATION) in _TURNED:
            turned = ImageOps.exif_transpose(image)
            image.close()  # frees the memory of a large one
            image = turned
            notes.append("turned upright")
        if image.size != (self.size, self.size):
            if self.crop is not None:
                if self.crop[2] > image.width or self.crop[3] > image.height:
                    raise ValueError(
                        f"dataset.crop={list(self.crop)} does not fit into the image, which is "
                        f"{image.width} wide and {image.height} high"
                    )
                image = image.crop(self.crop)  # pyright: ignore[reportArgumentType] -- of four
            kept = min(image.size) / max(image.size)
            if kept < _LEAST_KEPT:
                notes.append(f"mostly cut off: {kept:.2%} of {image.width}x{image.height} kept")
        mode = "L" if self.channels == 1 else "RGB"
        image, more = _eight_bits(image, mode, raw_mode, self.background, self.source_bits)
        square = ImageOps.fit(image, (self.size, self.size), INTERPOLATIONS[self.interpolation])
        pixels = np.asarray(square).reshape(self.size, self.size, self.channels)
        return pixels, [*notes, *more]


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixel layout in the file, or an empty string.

    Pillow keeps the upper 8 bits of 16-bit colours, and only this name says that it did.
    """
    tile = getattr(image, "tile", ())
    arguments = tile[0][3] if tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _eight_bits(
    image: Image.Image, mode: str, raw_mode: str, background: str, source_bits: int | None
) -> tuple[Image.Image, list[str]]:
    """Convert to a mode with 8 bits, on a background where the image is transparent.

    Args:
        image: Image to convert.
        mode: L or RGB.
        raw_mode: Pillow's name of the pixel layout in the file.
        background: Colour behind transparent pixels.
        source_bits: Bits that the values of 16-bit files use; None for all 16.

    Raises:
        ValueError: If the values have no known range, or exceed that of `source_bits`.
    """
    notes = []
    if image.mode == "F":
        raise ValueError("its floating-point values have no known range; save it with 8 bits")
    is_grey = image.mode in _GREY_MODES or (image.mode == "P" and _has_grey_palette(image))
    if image.mode == "P":
        notes.append("converted from a palette")
    if image.mode.startswith("I"):  # `convert` would clip at 255 instead of scaling
        image, largest = _scaled(image, source_bits or 16)
        notes += _notes_on_depth(largest)
    elif ";16" in raw_mode:
        if (source_bits or 16) < 16:
            raise ValueError(
                "only the upper 8 bits of its 16-bit colours are read, for which "
                f"dataset.source_bits={source_bits} leaves too few; save it with 8 bits"
            )
        if isinstance(color := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in color)
        extrema = np.reshape(image.getextrema(), (-1, 2))[: 1 if is_grey else 3, 1]
        notes += _notes_on_depth(int(extrema.max()) << 8 | 0xFF)
    elif image.mode not in (*_PLAIN_MODES, "P"):
        notes.append(f"converted from {image.mode}")
    if raw_mode in _GREY_STEPS and isinstance(grey := image.info.get("transparency"), int):
        image.info["transparency"] = grey * _GREY_STEPS[raw_mode]
    if _may_be_transparent(image):
        image, lowest, highest = _on_background(image, background)
        if highest == 0:
            notes.append(f"entirely transparent, all {background}")
        elif lowest < 255:
            notes.append(f"transparent, placed on {background}")
    if is_grey != (mode == "L"):
        notes.append("grey repeated to colour" if is_grey else "colour turned grey")
    return image if image.mode == mode else image.convert(mode), notes


def _has_grey_palette(image: Image.Image) -> bool:
    colors = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    return bool((colors == colors[:, :1]).all())


def _may_be_transparent(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _notes_on_depth(largest: int) -> list[str]:
    notes = ["converted from 16 bits"]
    if largest < _NEARLY_BLACK:
        bits = max(8, largest.bit_length())
        notes.append(
            f"nearly black, see dataset.source_bits: the values only reach {largest:,} of 65,535; "
            f"if {bits} bits are their range, set dataset.source_bits={bits}"
        )
    return notes


def _blocks(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Cover an image with boxes, to bound the memory of intermediate results."""
    step = max(1, _BLOCK // image.width)
    for upper in range(0, image.height, step):
        yield 0, upper, image.width, min(upper + step, image.height)


def _scaled(image: Image.Image, bits: int) -> tuple[Image.Image, int]:
    """Return the upper 8 bits with the file's transparency, and the largest value."""
    key = image.info.get("transparency")
    scaled = Image.new("L" if key is None else "LA", image.size)
    largest = 0
    for box in _blocks(image):
        values = np.asarray(image.crop(box))
        largest = max(largest, int(values.max()))
        if values.min() < 0 or largest > 0xFFFF:
            raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
        if largest >> bits:
            raise ValueError(
                f"its values reach {largest:,}, but the largest with dataset.source_bits={bits} "
                f"is {2**bits - 1:,}; raise it for all images"
            )
        pixels = (values >> (bits - 8)).astype(np.uint8)
        if key is not None:
            pixels = np.dstack([pixels, np.where(values == key, 0, 255).astype(np.uint8)])
        scaled.paste(Image.fromarray(pixels), box)
    return scaled, largest


def _on_background(image: Image.Image, background: str) -> tuple[Image.Image, int, int]:
    """Return an image on a colour, and its lowest and highest opacity."""
    canvas = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    lowest, highest = 255, 0
    for box in _blocks(image):
        part = image.crop(box)
        part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
        alpha = part.getchannel("A").getextrema()
        lowest, highest = min(lowest, int(alpha[0])), max(highest, int(alpha[1]))  # pyright: ignore
        canvas.paste(part, box, part)
    return canvas, lowest, highest


def decode_file(content: bytes, name: str, decoder: Decoder) -> UInt8[Tensor, "1 c h w"]:
    """Decode the contents of one image file to a batch of one.

    Args:
        content: Contents of the file.
        name: Name of the file.
        decoder: Conversion of the image.

    Raises:
        ValueError: If it is damaged, too large or in an unsupported format.
    """
    try:
        with open_image(content, name) as image:
            pixels, _ = decoder(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"'{name}' is not an image of a supported format; give one") from error
    except Exception as error:
        raise ValueError(f"'{name}' cannot be decoded: {error}") from error
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
