"""Conversion from any of Pillow's modes to grey or colour with 8 bits, with notes on losses."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor

_BLOCK = 1 << 20  # pixels that are converted together
NEARLY_BLACK = 1 << 14  # 16-bit images whose values are all below a quarter of their range
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA")
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # of greys with fewer bits, which Pillow scales


class Note(NamedTuple):
    """A conversion of an image.

    Args:
        kind: Description that a summary counts.
        text: Description for the report; empty if it is `kind`.
        largest: Largest value of a 16-bit image.
    """

    kind: str
    text: str = ""
    largest: int | None = None

    def __str__(self) -> str:
        return self.text or self.kind


def check_background(background: str) -> None:
    """Check the name of a colour.

    Raises:
        ValueError: If it is unknown.
    """
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise ValueError(
            f"dataset.background: got {background!r}, but it must be a colour such as white, "
            "black or '#808080'; set for example dataset.background=white"
        ) from error


def eight_bits(
    image: Image.Image, mode: str, raw_mode: str, background: str, source_bits: int | None
) -> tuple[Image.Image, list[Note]]:
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
        notes.append(Note("converted from a palette"))
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
        notes.append(Note(f"converted from {image.mode}"))
    if raw_mode in _GREY_STEPS and isinstance(grey := image.info.get("transparency"), int):
        image.info["transparency"] = grey * _GREY_STEPS[raw_mode]
    if _may_be_transparent(image):
        image, lowest, highest = _on_background(image, background)
        if highest == 0:
            notes.append(Note(f"entirely transparent, all {background}"))
        elif lowest < 255:
            notes.append(Note(f"transparent, placed on {background}"))
    if is_grey != (mode == "L"):
        notes.append(Note("grey repeated to colour" if is_grey else "colour turned grey"))
    return image if image.mode == mode else image.convert(mode), notes


def _has_grey_palette(image: Image.Image) -> bool:
    colors = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    return bool((colors == colors[:, :1]).all())


def _may_be_transparent(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _notes_on_depth(largest: int) -> list[Note]:
    notes = [Note("converted from 16 bits", largest=largest)]
    if largest < NEARLY_BLACK:
        bits = max(8, largest.bit_length())
        text = (
            f"nearly black, as its 16-bit values only reach {largest:,}; if {bits} bits are their "
            f"range, set dataset.source_bits={bits}"
        )
        notes.append(Note("nearly black with 16 bits", text))
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
