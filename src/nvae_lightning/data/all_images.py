"""All images of a folder, in their order: what a trained model is asked about."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from nvae_lightning.data.checks import naming
from nvae_lightning.data.chunks import decode_all
from nvae_lightning.data.datamodule import ImageDataModule
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.data.readers import Source, Splits, every_image


class AllImages(ImageDataModule):
    """All images of a folder, an archive or a file, whatever splits they are in.

    Args:
        root: Where they are (``images``).
        batch_size: Images per batch and per device.
        image_size: Height and width that they are brought to.
        channels: 1 (grey) or 3 (colour).
        bits: Bits kept per pixel channel; 1 draws binary pixels.
        seed: Seed of what is drawn for each batch.
        crop: See `Decoder`.
        interpolation: See `Decoder`.
        background: See `Decoder`.
        source_bits: See `Decoder`.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int,
        image_size: int,
        channels: int,
        bits: int,
        seed: int = 0,
        crop: Sequence[int] | None = None,
        interpolation: str = "lanczos",
        background: str = "white",
        source_bits: int | None = None,
    ) -> None:
        super().__init__(
            root=root,
            batch_size=batch_size,
            image_size=image_size,
            channels=channels,
            bits=bits,
            binarize=bits == 1,
            seed=seed,
            crop=crop,
            interpolation=interpolation,
            background=background,
            source_bits=source_bits,
        )

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
        """Images are asked about as they are."""
        return False

    @property
    def names(self) -> Sequence[str]:
        """Their names."""
        return self.source.names

    def prepare_data(self) -> None:
        """Look for them.

        Raises:
            ValueError: If there are none.
        """
        _ = self._sources

    def setup(self, stage: str) -> None:
        """Decode them.

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
