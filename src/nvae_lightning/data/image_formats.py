"""Supported image formats: an explicit list, because some of Pillow's formats run programs."""

import io
import warnings
from functools import cache
from pathlib import PurePosixPath

from PIL import Image, TiffImagePlugin, features

from nvae_lightning.data.files import TooLargeError

# Suffixes by Pillow's name of the format, which Pillow recognises by the first bytes.
_SUFFIXES = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # parts of Pillow
_UNMARKED = "TGA"  # has no signature, so the suffix decides

# Memory to decode and convert an image, in all and per pixel: 4 bytes twice in Pillow, and several
# copies in some libraries.
MAX_DECODED_BYTES = 400 << 20
_BYTES_PER_PIXEL = {"AVIF": 12, "JPEG2000": 20, "WEBP": 16}
_BYTES_PER_USUAL_PIXEL = 8
_BYTES_PER_PROGRESSIVE_PIXEL = 14  # with all coefficients of a JPEG


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that the installed Pillow reads."""
    Image.init()
    return tuple(
        name
        for name in _SUFFIXES
        if name in Image.OPEN and (name not in _OPTIONAL or features.check(_OPTIONAL[name]))
    )


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of image files, in lower case."""
    return frozenset(suffix for name in _formats() for suffix in _SUFFIXES[name])


def is_image(name: str) -> bool:
    """Whether a file is an image, by its suffix."""
    return PurePosixPath(name).suffix.lower() in suffixes()


def open_image(content: bytes, name: str = "") -> Image.Image:
    """Open an image without decoding it.

    Args:
        content: The contents of its file.
        name: Name of the file, if it has one.

    Raises:
        TooLargeError: If decoding it would take more than 400 MiB.
        PIL.UnidentifiedImageError: If it is in none of the supported formats.
    """
    is_tga = PurePosixPath(name).suffix.lower() in _SUFFIXES[_UNMARKED]
    formats = [one for one in _formats() if one != _UNMARKED or is_tga]
    with warnings.catch_warnings():  # Pillow's limit, which is laxer than ours
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=formats)
    width, height = image.size
    num_pixels = width * height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Whole tiles are decoded, even if the image covers only a part of them.
        tile_width, tile_height = (image.tag_v2.get(tag, 0) for tag in (322, 323))
        if isinstance(tile_width, int) and isinstance(tile_height, int):
            num_pixels += tile_width * tile_height
    each = _BYTES_PER_PIXEL.get(image.format or "", _BYTES_PER_USUAL_PIXEL)
    if image.info.get("progressive"):
        each = _BYTES_PER_PROGRESSIVE_PIXEL
    if num_pixels * each > MAX_DECODED_BYTES:
        image.close()
        raise TooLargeError(
            f"it has {width:,} by {height:,} pixels, and decoding them takes more than "
            f"{MAX_DECODED_BYTES / 2**20:.0f} MiB; shrink it to {MAX_DECODED_BYTES // each:,} "
            "pixels or fewer"
        )
    return image
