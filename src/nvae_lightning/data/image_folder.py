"""Any folder of images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from nvae_lightning.data.datamodule import ImageDataModule

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)


class ImageFolder(ImageDataModule):
    """All images below a folder, of any size, grey or colour.

    Images are cropped (if asked), converted to `channels`, resized so that the shorter side is
    `image_size`, cut to the central square, and kept in memory.

    The folders ``root/train`` and ``root/test`` (or ``val``, or ``valid``) are the splits where
    they exist. Otherwise a fraction of the images, drawn with a seed, is the test split; it
    depends on the relative paths only, so that all machines agree.

    Args:
        root: Folder of images, with any subfolders.
        batch_size: See `ImageDataModule`, as for all arguments that are not explained here.
        image_size: Side to which the images are resized.
        channels: 1 or 3, to which the images are converted.
        bits: See `ImageDataModule`.
        binarize: See `ImageDataModule`.
        flip: See `ImageDataModule`.
        num_workers: See `ImageDataModule`.
        download_hint: See `ImageDataModule`.
        crop: Box (left, upper, right, lower) in pixels to cut out of each image before it is
            resized; None takes the whole image.
        test_fraction: Part of the images that is the test split, where no folders say so.
        split_seed: Seed of that draw.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        batch_size: int,
        image_size: int,
        channels: int,
        bits: int,
        binarize: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        download_hint: str = "",
        crop: Sequence[int] | None = None,
        test_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            batch_size=batch_size,
            image_size=image_size,
            channels=channels,
            bits=bits,
            binarize=binarize,
            flip=flip,
            num_workers=num_workers,
            download_hint=download_hint,
        )
        if not 0 < test_fraction < 1:
            raise ValueError(
                f"dataset.test_fraction: got {test_fraction}, but it must lie between 0 and 1, "
                "both excluded; set for example dataset.test_fraction=0.1"
            )
        if crop is not None and not _is_box(crop):
            raise ValueError(
                f"dataset.crop: got {list(crop)}, but it must be [left, upper, right, lower] with "
                "0 <= left < right and 0 <= upper < lower; set dataset.crop=null to crop nothing"
            )
        self.crop = None if crop is None else tuple(crop)
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self._to_square = transforms.Compose(
            [
                transforms.Resize(image_size, transforms.InterpolationMode.LANCZOS),
                transforms.CenterCrop(image_size),
            ]
        )

    def prepare_data(self) -> None:
        """List the images of both splits, so that a wrong folder fails before anything is built.

        Raises:
            ValueError: If the folder is missing, or holds no images or half a split.
        """
        self._split(train=True)
        self._split(train=False)

    def load(self, train: bool) -> UInt8[Tensor, "count channel height width"]:
        """Decode all images of a split.

        Raises:
            ValueError: If the folder is missing, holds no images or half a split, or if an image
                cannot be read.
        """
        paths = self._split(train)
        shape = (len(paths), self.channels, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # PIL decodes outside of Python's global lock
            decoded = pool.map(self._decode, paths)
            for index, image in enumerate(
                tqdm(decoded, "Reading images", len(paths), leave=False, disable=None)
            ):
                images[index] = image
        return images

    def _split(self, train: bool) -> list[Path]:
        root = self.folder
        if not root.exists():
            remedy = self.download_hint or "set dataset.root to a folder of images"
            raise ValueError(f"dataset.root: '{root}' does not exist; {remedy}")
        held_out = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
        has_train = (root / "train").is_dir()
        if has_train != bool(held_out):
            present, absent = ("train", "test") if has_train else (held_out[0].name, "train")
            raise ValueError(
                f"dataset.root: '{root}' has a folder '{present}' but no folder '{absent}'; "
                f"add '{absent}', or rename '{present}' for a random split"
            )
        if has_train:
            return _images_below(root / "train" if train else held_out[0])
        paths = _images_below(root)
        if len(paths) == 1:
            raise ValueError(
                f"dataset.root: '{root}' holds one image only, but a split takes two; add images"
            )
        num_test = min(max(1, round(self.test_fraction * len(paths))), len(paths) - 1)
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(len(paths), generator=generator).tolist()
        chosen = order[num_test:] if train else order[:num_test]
        return [paths[index] for index in sorted(chosen)]

    def _decode(self, path: Path) -> UInt8[Tensor, "channel height width"]:
        image = _read(path, "L" if self.channels == 1 else "RGB")
        if self.crop is not None:
            left, upper, right, lower = self.crop
            if right > image.width or lower > image.height:
                raise ValueError(
                    f"dataset.crop: got {list(self.crop)}, but '{path}' is {image.width} wide and "
                    f"{image.height} high; set dataset.crop to a box within every image"
                )
            image = image.crop((left, upper, right, lower))
        return pil_to_tensor(self._to_square(image))


def _is_box(crop: Sequence[int]) -> bool:
    return (
        len(crop) == 4
        and all(type(edge) is int for edge in crop)
        and 0 <= crop[0] < crop[2]
        and 0 <= crop[1] < crop[3]
    )


def _images_below(folder: Path) -> list[Path]:
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"dataset.root: no images in '{folder}'; "
            f"put some there, with a suffix out of {', '.join(sorted(SUFFIXES))}"
        )
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _read(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits: `convert` would clip at 255, not scale
                high_bytes = np.asarray(image) >> 8
                return Image.fromarray(high_bytes.astype(np.uint8)).convert(mode)
            if image.mode == "P":  # a palette with transparency warns unless it goes through RGBA
                return image.convert("RGBA").convert(mode)
            return image.convert(mode)
    except Exception as error:  # PIL's decoders raise nearly anything, SyntaxError included
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset.root: cannot read the image '{path}' ({reason}); replace or remove it"
        ) from error
