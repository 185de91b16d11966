"""From an image as people keep it to a square of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

Pixels = UInt8[np.ndarray, "height width channel"]

INTERPOLATIONS = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}

_LEAST_KEPT = 0.25  # of an image's area; below, a report says so
_ORIENTATION = 0x0112  # in EXIF
_TURNED = range(2, 9)  # 1 is upright; some cameras write 0
_PLAIN_MODES = ("1", "L", "RGB")


@dataclass(frozen=True)
class Decoder:
    """Crop, convert and resize images to squares of one size.

    An image is turned upright if its EXIF data ask for it, cropped to `crop`, converted to grey or
    colour with 8 bits, resized so that its shorter side is `size`, and cut to its central square.
    One that is `size` by `size` already is neither cropped nor resized.

    Args:
        size: Height and width of the result.
        channels: 1 (grey) or 3 (colour).
        crop: Box (left, upper, right, lower) in pixels to cut out before resizing, or None.
        interpolation: Name of one of Pillow's filters, in lower case.

    Raises:
        ValueError: If the crop is no box or the filter is unknown.
    """

    size: int
    channels: int
    crop: tuple[int, ...] | None = None
    interpolation: str = "lanczos"

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

    def __call__(self, image: Image.Image) -> tuple[Pixels, str]:
        """Return the pixels and what had to be done to the image beyond cropping and resizing.

        Raises:
            ValueError: If the crop reaches beyond the image, or its values have no known range.
            Exception: Whatever Pillow raises for a damaged image.
        """
        notes = []
        num_frames = getattr(image, "n_frames", 1)
        if num_frames > 1:
            notes.append(f"first of {num_frames} frames")
        if image.getexif().get(_ORIENTATION) in _TURNED:
            image = ImageOps.exif_transpose(image)
            notes.append("turned upright")
        if image.size != (self.size, self.size):
            image = self._cropped(image)
            kept = min(image.size) / max(image.size)
            if kept < _LEAST_KEPT:
                notes.append(f"{image.width}x{image.height}: {kept:.2%} of it kept")
        image, note = _eight_bits(image, "L" if self.channels == 1 else "RGB")
        notes += [note] if note else []
        square = ImageOps.fit(image, (self.size, self.size), INTERPOLATIONS[self.interpolation])
        return np.asarray(square).reshape(self.size, self.size, self.channels), ", ".join(notes)

    def _cropped(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        left, upper, right, lower = self.crop
        if right > image.width or lower > image.height:
            raise ValueError(
                f"it is {image.width} wide and {image.height} high, which dataset.crop="
                f"{list(self.crop)} does not fit into"
            )
        return image.crop((left, upper, right, lower))


def _is_box(crop: Sequence[int]) -> bool:
    return (
        len(crop) == 4
        and all(type(edge) is int for edge in crop)
        and 0 <= crop[0] < crop[2]
        and 0 <= crop[1] < crop[3]
    )


def _eight_bits(image: Image.Image, mode: str) -> tuple[Image.Image, str]:
    """Convert to `mode`, L or RGB; also say from what, if that may have lost something."""
    if image.mode in _PLAIN_MODES and "transparency" not in image.info:
        return image.convert(mode), ""
    if image.mode.startswith("I"):  # `convert` would clip at 255 instead of scaling
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
        high_bytes = (values >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes).convert(mode), "converted from 16 bits"
    if image.mode == "F":
        raise ValueError("its floating-point values have no known range; save it with 8 bits")
    note = "" if image.mode in (*_PLAIN_MODES, "RGBA", "LA") else f"converted from {image.mode}"
    if image.mode == "P":
        note = "converted from a palette"
    if image.has_transparency_data:  # a palette would warn unless it goes through RGBA
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            note = ", ".join(filter(None, (note, "transparency dropped")))
    return image.convert(mode), note
