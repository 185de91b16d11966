"""Custom images in files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.readers import Splits, every_image


class ImageFolder(ImageDataModule):
    """Any folder, zip or tar of images, with folders ``train/`` and ``test/`` or split here.

    See `ImageDataModule` for the arguments.
    """

    default_root = "data/images"
    default_flip = True
    how_to_get = "give a folder, zip or tar of images as dataset.root=PATH"


class AllImages(ImageDataModule):
    """All images of a folder, an archive or a file as one test split.

    See `ImageDataModule` for the arguments.
    """

    setting = "images"
    how_to_get = "give a folder, a zip, a tar or an image"

    def sources(self, source: str | Path) -> Splits:
        """Find the images of a source.

        Raises:
            ValueError: If there are none.
        """
        splits = every_image(source)
        return replace(splits, sources={"test": splits.sources["test"]})

    @property
    def is_prepared(self) -> bool:
        """False, because the images are always decoded."""
        return False

    @property
    def names(self) -> Sequence[str]:
        """Names of the images."""
        return self._sources.sources["test"].names
