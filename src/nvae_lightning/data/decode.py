"""Conversion of any image to a square of bytes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from nvae_lightning.data.checks import check_number
from nvae_lightning.data.eight_bits import Note, check_background, eight_bits

Pixels = UInt8[np.ndarray, "height width channel"]

INTERPOLATIONS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}

_LEAST_KEPT = 0.25  # of an image's area; the report mentions images below
_ORIENTATION = 0x0112  # in EXIF
_TURNED = range(2, 9)  # 1 is upright; some cameras write 0


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
        if self.crop is not None and not _is_box(self.crop):
            raise ValueError(
                f"dataset.crop: got {list(self.crop)}, but it must be [left, upper, right, lower] "
                "with 0 <= left < right and 0 <= upper < lower; set dataset.crop=null to crop "
                "nothing"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"dataset.interpolation: got {self.interpolation!r}, but it must be one of "
                f"{', '.join(INTERPOLATIONS)}; set for example dataset.interpolation=lanczos"
            )
        check_background(self.background)
        if self.source_bits is not None:
            rule = "a whole number from 8 to 16, or null"
            check_number("dataset.source_bits", self.source_bits, range(8, 17), rule)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the images as plain values."""
        settings = asdict(self)
        crop = None if self.crop is None else list(self.crop)
        return {"image_size": settings.pop("size"), **settings, "crop": crop}

    def __call__(self, image: Image.Image) -> tuple[Pixels, list[Note]]:
        """Return the pixels, and notes on conversions other than cropping and resizing.

        Raises:
            ValueError: If the crop does not fit into the image, or its values have no known range.
            Exception: Any error of Pillow's for a damaged image.
        """
        notes = []
        num_frames = getattr(image, "n_frames", 1)
        if num_frames > 1:
            notes.append(Note("first frame of several", f"first of {num_frames} frames"))
        raw_mode = _raw_mode(image)
        if image.getexif().get(_ORIENTATION) in _TURNED:
            turned = ImageOps.exif_transpose(image)
            image.close()  # frees the memory of a large one
            image = turned
            notes.append(Note("turned upright"))
        if image.size != (self.size, self.size):
            image = self._cropped(image)
            kept = min(image.size) / max(image.size)
            if kept < _LEAST_KEPT:
                text = f"{image.width}x{image.height}: {kept:.2%} of it kept"
                notes.append(Note("mostly cut off", text))
        mode = "L" if self.channels == 1 else "RGB"
        image, more = eight_bits(image, mode, raw_mode, self.background, self.source_bits)
        square = ImageOps.fit(image, (self.size, self.size), INTERPOLATIONS[self.interpolation])
        pixels = np.asarray(square).reshape(self.size, self.size, self.channels)
        return pixels, [*notes, *more]

    def _cropped(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        left, upper, right, lower = self.crop
        if right > image.width or lower > image.height:
            raise ValueError(
                f"dataset.crop={list(self.crop)} does not fit into the image, which is "
                f"{image.width} wide and {image.height} high"
            )
        return image.crop((left, upper, right, lower))


def _is_box(crop: Sequence[int]) -> bool:
    return (
        len(crop) == 4
        and all(type(edge) is int for edge in crop)
        and 0 <= crop[0] < crop[2]
        and 0 <= crop[1] < crop[3]
    )


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixel layout in the file, or an empty string.

    Pillow keeps the upper 8 bits of 16-bit colours, and only this name says that it did.
    """
    tile = getattr(image, "tile", ())
    arguments = tile[0][3] if tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""
