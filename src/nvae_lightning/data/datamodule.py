"""What all data sets share: splits of bytes, loaders, and the way to the model's input."""

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from nvae_lightning.data.checks import check_number, naming, num_cores
from nvae_lightning.data.chunks import decode_all
from nvae_lightning.data.dataset import ImageDataset
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.loaders import make_loader
from nvae_lightning.data.prepare import PARTIAL, prepare
from nvae_lightning.data.readers import HUB_PREFIX, SeededSplit, Splits, Wanted, open_source
from nvae_lightning.data.sampler import ResumableLoader
from nvae_lightning.data.storage import (
    Prepared,
    check_prepared,
    is_prepared,
    open_images,
    open_prepared,
    read_summary,
    verify,
)
from nvae_lightning.data.summary import Outcome, Summary, left_out
from nvae_lightning.data.transforms import binarize, quantize, random_horizontal_flip

_MOST_MEMORY = 4 << 30  # bytes of a data set that is not prepared, in each process


class ImageDataModule(LightningDataModule):
    """Splits of images, as batches of float32 images in [0, 1].

    `root` holds prepared images, which are memory mapped, or any source of images that
    `open_source` knows, which are decoded into memory. They stay uint8 there and through the
    loaders; flips and quantisation (or binarisation) follow on the device.

    A subclass may know another way to its images: see `sources`.

    Args:
        root: Folder of prepared images or any source (``dataset.root``); None where none is read.
        batch_size: Images per batch and per device.
        image_size: Height and width of the images.
        channels: 1 (grey) or 3 (colour).
        bits: Bits kept per pixel channel, 1 to 8; 1 if images are binarised.
        binarize: Draw binary pixels with the intensity as their probability, again at every use.
        flip: Mirror training images left to right with probability 1/2.
        num_workers: Processes that assemble batches; 0 or None leaves it to a thread. Also
            processes that decode, where None takes one per core.
        seed: Seed of the order of training images.
        crop: See `Decoder`.
        interpolation: See `Decoder`.
        background: See `Decoder`.
        source_bits: See `Decoder`.
        test_fraction: See `SeededSplit`.
        split_seed: See `SeededSplit`.
        counts: Images per split that a source must have, or None for any number.
        verify: Compare prepared images with their checksum before a training.
        download_hint: How to get the data, for the error that says that they are missing.

    Attributes:
        num_train_images: Size of the training split, known after ``setup("fit")``.
        num_test_images: Size of the test split, known after any ``setup``.

    Raises:
        ValueError: If a setting is out of its range.
    """

    num_train_images: int
    num_test_images: int

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        batch_size: int,
        image_size: int,
        channels: int,
        bits: int,
        binarize: bool = False,
        flip: bool = False,
        num_workers: int | None = None,
        seed: int = 0,
        crop: Sequence[int] | None = None,
        interpolation: str = "lanczos",
        background: str = "white",
        source_bits: int | None = None,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        counts: Mapping[str, int] | None = None,
        verify: bool = True,
        download_hint: str = "",
    ) -> None:
        super().__init__()
        whole = range(1, sys.maxsize)
        check_number("dataset.batch_size", batch_size, whole, "a whole number, at least 1")
        check_number("dataset.image.size", image_size, whole, "a whole number, at least 1")
        check_number("dataset.image.channels", channels, (1, 3), "1 (grey) or 3 (colour)")
        check_number("dataset.image.bits", bits, range(1, 9), "a whole number from 1 to 8")
        if binarize and bits != 1:
            raise ValueError(
                f"dataset.image.bits: got {bits}, but binarised images have 1; set "
                "dataset.image.bits=1, or dataset.datamodule.binarize=false for grey levels"
            )
        if num_workers is not None:
            rule = "a whole number, at least 0, or null"
            check_number("dataset.num_workers", num_workers, range(sys.maxsize), rule)
        # Absolute from the start: a command may change its working folder later.
        self.root = None if root is None else Path(root).expanduser().absolute()
        self.batch_size = batch_size
        self.image_size = image_size
        self.channels = channels
        self.bits = bits
        self.binarize = binarize
        self.flip = flip
        self.num_workers = num_workers
        self.seed = seed
        box = None if crop is None else tuple(crop)
        self.decoder = Decoder(image_size, channels, box, interpolation, background, source_bits)
        self.split = SeededSplit(test_fraction, split_seed)
        self.counts = counts
        self.verify = verify
        self.download_hint = download_hint
        self._decoded = Summary()

    @property
    def folder(self) -> Path:
        """`root`, for data that cannot do without.

        Raises:
            ValueError: If no root was given.
        """
        if self.root is None:
            raise ValueError(
                "dataset.root: got None, but this dataset is read from a folder; "
                "set dataset.root=FOLDER"
            )
        return self.root

    def sources(self, source: str | Path) -> Splits:
        """Find the images of a source.

        Raises:
            ValueError: If there are none, or not as many as there should be.
        """
        splits = open_source(source, Wanted(self.image_size, self.split))
        for name, count in (self.counts or {}).items():
            found = len(splits.sources.get(name, ()))
            if found != count:
                raise ValueError(
                    f"dataset.counts: {count:,} images are expected in the split '{name}', but "
                    f"'{source}' has {found:,}; complete it, or set dataset.counts=null to take "
                    "what is there"
                )
        return splits

    def prepare(
        self, source: str, *, skip_errors: bool = False, overwrite: bool = False
    ) -> tuple[dict[str, Prepared], list[Outcome]]:
        """Prepare a source in `root`, by all cores: see `nvae_lightning.data.prepare`.

        Raises:
            ValueError: If the source has no images as configured, or `root` cannot be written to.
        """
        if not source.startswith(HUB_PREFIX):
            source = str(Path(source).expanduser().absolute())
        decoder = self.decoder
        with naming("source"):
            splits = self.sources(source)
        with naming("dataset.root"):
            return prepare(
                splits,
                decoder,
                self.folder,
                source=source,
                settings={
                    **decoder.settings(),
                    "test_fraction": self.split.test_fraction,
                    "split_seed": self.split.seed,
                },
                skip_errors=skip_errors,
                overwrite=overwrite,
                num_workers=self.num_decoders,
            )

    def prepare_data(self) -> None:
        """Look for the images, so that a wrong folder fails before anything is built.

        Raises:
            ValueError: If they are missing, damaged, or not as configured.
        """
        if self.is_prepared:
            if self.verify:
                with naming("dataset.root"):
                    verify(self.folder, self.prepared)
        else:
            _ = self._sources

    @property
    def is_prepared(self) -> bool:
        """Whether `root` holds prepared images."""
        with naming("dataset.root"):
            return self.root is not None and is_prepared(self.root)

    @cached_property
    def prepared(self) -> dict[str, Prepared]:
        """What is known of the prepared splits.

        Raises:
            ValueError: If they are not whole, or prepared for another size or number of channels.
        """
        with naming("dataset.root"):
            splits = open_prepared(self.folder)
            check_prepared(self.folder, splits, self.image_size, self.channels)
        return splits

    @cached_property
    def _sources(self) -> Splits:
        with naming("dataset.root"):
            if not self.folder.exists():
                remedy = self.download_hint or "set dataset.root to a folder of images"
                raise ValueError(f"dataset.root: '{self.folder}' does not exist; {remedy}")
            if (self.folder / PARTIAL).exists():
                raise ValueError(
                    f"dataset.root: the preparation of '{self.folder}' was interrupted; give the "
                    "same prepare command again, which resumes it"
                )
            splits = self.sources(self.folder)
        self.check_memory(sum(len(source) for source in splits.sources.values()))
        return splits

    def check_memory(self, num_images: int) -> None:
        """Look whether so many images may be decoded into memory.

        Raises:
            ValueError: If they are too many.
        """
        size = num_images * self.image_size**2 * self.channels
        if size > _MOST_MEMORY:
            raise ValueError(
                f"dataset.root: the {num_images:,} images in '{self.folder}' would take "
                f"{size / 1e9:.1f} GB of memory in every process; prepare them once, with "
                "python -m nvae_lightning.prepare dataset=NAME source="
                f"{self.folder} dataset.root=FOLDER, and train with that dataset.root"
            )

    def images(self, split: str) -> UInt8[np.ndarray, "count height width channel"]:
        """Return all images of a split, as a memory map or in memory.

        Raises:
            ValueError: If an image cannot be read.
        """
        with naming("dataset.root"):
            if self.is_prepared:
                return open_images(self.folder, self.prepared[split])
            source = self._sources.sources[split]
            images, summary = decode_all(source, self.decoder, self.num_decoders)
            self._decoded.add(summary)
            return images

    @property
    def summary(self) -> Summary:
        """What became of the files of the source, by kind: of the splits that have been loaded."""
        if self.is_prepared:
            return read_summary(self.prepared)
        summary = left_out(self._sources.left_out)
        summary.add(self._decoded)
        return summary

    @property
    def num_decoders(self) -> int:
        """Processes that decode images."""
        return num_cores() if self.num_workers is None else self.num_workers

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits."""
        return list(self.prepared if self.is_prepared else self._sources.sources)

    @cached_property
    def train_set(self) -> ImageDataset:
        """The training split, loaded at first use."""
        return ImageDataset(self.images("train"))

    @cached_property
    def validation_set(self) -> ImageDataset:
        """The validation split, loaded at first use; where there is none, the test split."""
        if "validation" not in self.splits:
            return self.test_set
        return ImageDataset(self.images("validation"))

    @cached_property
    def test_set(self) -> ImageDataset:
        """The test split, loaded at first use."""
        return ImageDataset(self.images("test"))

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` reads, once: all to fit, else the test split only.

        Raises:
            ValueError: If the data are missing or not as configured.
        """
        if stage == "fit":
            self.num_train_images = len(self.train_set)
            _ = self.validation_set
        self.num_test_images = len(self.test_set)

    def train_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return shuffled training batches, all of them full.

        Raises:
            ValueError: If there are too few images for one batch.
        """
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return the validation split in its order, or the test split where there is none."""
        return self._loader(self.validation_set, train=False)

    def test_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return the test split in its order."""
        return self._loader(self.test_set, train=False)

    def predict_dataloader(self) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        """Return the test split in its order."""
        return self.test_dataloader()

    def on_after_batch_transfer(
        self, batch: UInt8[Tensor, "batch channel height width"], dataloader_idx: int
    ) -> Float[Tensor, "batch channel height width"]:
        """Make a batch what the model sees, on the batch's device."""
        return self.to_input(batch, train=self.trainer is not None and self.trainer.training)

    def to_input(
        self, batch: UInt8[Tensor, "batch channel height width"], *, train: bool
    ) -> Float[Tensor, "batch channel height width"]:
        """Flip (in training only), then binarise or quantise."""
        if self.flip and train:
            batch = random_horizontal_flip(batch)
        return binarize(batch) if self.binarize else quantize(batch, self.bits)

    def _loader(
        self, dataset: ImageDataset, train: bool
    ) -> DataLoader[UInt8[Tensor, "channel height width"]]:
        loader = make_loader(
            dataset,
            train=train,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers or 0,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            num_ranks=1 if self.trainer is None else self.trainer.world_size,
        )
        if isinstance(loader, ResumableLoader) and self.trainer is not None:
            limit = self.trainer.limit_train_batches
            loader.limit = limit if isinstance(limit, int) else int(limit * len(loader))
        return loader
