"""All images of a source in order, as the input of a trained model."""

from collections.abc import Sequence
from functools import cached_property

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.checks import naming
from nvae_lightning.data.chunks import decode_all
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.data.readers import Source, Splits, every_image


class AllImages(ImageDataModule):
    """All images of a folder, an archive or a file as one test split.

    See `ImageDataModule` for the arguments.
    """

    @cached_property
    def _sources(self) -> Splits:
        with naming("images"):
            return every_image(self.folder)

    @property
    def source(self) -> Source:
        """The images.

        Raises:
            ValueError: If there are none.
        """
        return self._sources.sources["test"]

    @property
    def is_prepared(self) -> bool:
        """False, because the images are always decoded."""
        return False

    @property
    def names(self) -> Sequence[str]:
        """Names of the images."""
        return self.source.names

    def setup(self, stage: str) -> None:
        """Decode the images.

        Raises:
            ValueError: If one cannot be read.
        """
        _ = self.test_set

    @cached_property
    def test_set(self) -> ImageDataset:
        """The images, decoded at first use."""
        self.check_memory(len(self.source))
        with naming("images"):
            images, summary = decode_all(self.source, self.decoder, self.num_decoders)
        self._decoded.add(summary)
        return ImageDataset(images)
