"""The base class of all datasets: splits, loaders and the model's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from nvae_lightning.data.chunks import decode_all
from nvae_lightning.data.dataset import ImageDataset, already_a_batch
from nvae_lightning.data.decode import Decoder
from nvae_lightning.data.messages import naming
from nvae_lightning.data.prepare import PARTIAL, prepare
from nvae_lightning.data.readers import HUB_PREFIX, ArraySource, Splits, Wanted, open_source
from nvae_lightning.data.sampler import ReadingAhead, ResumableLoader, ShardedSampler
from nvae_lightning.data.storage import Prepared, is_prepared, open_images, open_prepared, verify
from nvae_lightning.data.summary import Summary, left_out, merged
from nvae_lightning.data.transforms import binarize, quantize, random_horizontal_flip
from nvae_lightning.utilities.image import Image, require_int

Loader = DataLoader[UInt8[Tensor, "channel height width"]]

_MOST_MEMORY = 4 << 30  # bytes of an unprepared dataset in each process


class ImageDataModule(LightningDataModule):
    """Base class of the datasets: splits of images as batches of float32 images in [0, 1].

    A subclass states the facts of its dataset as class attributes. Images are read from `root`,
    which contains prepared images (memory mapped) or any source that `open_source` supports
    (decoded into memory). They stay uint8 until they are on the device, where they are flipped and
    quantised, or binarised if they have one bit.

    Only ``setup("test")`` reads the test split. Validation uses the dataset's own validation
    split, or else a seeded hold-out of the training split.

    Args:
        root: Folder of prepared images or any source of images; by default `default_root`.
        batch_size: Number of images per batch and device; by default `default_batch_size`.
        image: Format of the images; by default `default_image`.
        num_workers: Number of processes that assemble batches, where 0 and None use a thread, and
            that decode images, where None stands for one per core.
        seed: Seed of the order of the training images.
        validation_fraction: Part of the training split that is held out for validation if the
            dataset has no validation split; 0 disables validation. By default
            `default_validation_fraction`.
        test_fraction: Part of the images that is held out for testing if the source has no splits.
        split_seed: Seed of both hold-outs, independent of `seed`.
        crop: Box (left, upper, right, lower) to cut out before resizing; by default the dataset's.
        interpolation: Name of Pillow's resampling filter; by default the dataset's.
        background: Colour behind transparent pixels: a name, or ``#rrggbb``.
        source_bits: Number of bits used by the values of 16-bit files, 8 to 16; None for 16.
        flip: Whether to mirror training images with probability 1/2; by default the dataset's.
        verify: Whether to compare prepared images with their checksum before a training.
        check_counts: Whether a source must have the official number of images.

    Raises:
        ValueError: If a setting is out of range.
    """

    #: Setting that gives the images, for error messages.
    setting: ClassVar[str] = "dataset.root"
    #: Publication to cite.
    citation: ClassVar[str] = ""
    #: Default folder of the images; None if they are in no folder.
    default_root: ClassVar[str | None] = None
    default_image: ClassVar[Image] = Image(channels=3, size=64, bits=8)
    default_batch_size: ClassVar[int] = 32
    default_validation_fraction: ClassVar[float] = 0.05
    #: Official numbers of images of the splits whose numbers are checked.
    counts: ClassVar[Mapping[str, int]] = {}
    default_crop: ClassVar[tuple[int, int, int, int] | None] = None
    default_interpolation: ClassVar[str] = "lanczos"
    default_flip: ClassVar[bool] = False
    #: Remedy if the images are missing, for an error message.
    how_to_get: ClassVar[str] = "set dataset.root to a folder of images"

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        batch_size: int | None = None,
        image: Image | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        validation_fraction: float | int | None = None,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        crop: Sequence[int] | None = None,
        interpolation: str | None = None,
        background: str = "white",
        source_bits: int | None = None,
        flip: bool | None = None,
        verify: bool = True,
        check_counts: bool = True,
    ) -> None:
        super().__init__()
        root = self.default_root if root is None else root
        # Absolute from the start: a command may change its working folder later.
        self.root = None if root is None else Path(root).expanduser().absolute()
        self.batch_size = self.default_batch_size if batch_size is None else batch_size
        require_int("dataset.batch_size", self.batch_size, 1)
        require_int("dataset.num_workers", num_workers or 0, 0)
        self.image = self.default_image if image is None else image
        self.num_workers = num_workers
        self.seed = seed
        if validation_fraction is None:
            validation_fraction = self.default_validation_fraction
        self.validation_fraction = validation_fraction
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"dataset.validation_fraction: got {validation_fraction}, but it must be at least "
                "0 and below 1; set for example dataset.validation_fraction=0.05"
            )
        box = self.default_crop if crop is None else tuple(crop)
        interpolation = interpolation or self.default_interpolation
        size, channels = self.image.size, self.image.channels
        self.decoder = Decoder(size, channels, box, interpolation, background, source_bits)
        self.wanted = Wanted(size, test_fraction, split_seed)
        self.flip = self.default_flip if flip is None else flip
        self.verify = verify
        self.check_counts = check_counts
        self._decoded: list[Summary] = []

    @property
    def binarize(self) -> bool:
        """Whether pixels are drawn as zeros and ones at every use."""
        return self.image.bits == 1

    @property
    def folder(self) -> Path:
        """`root`; an error if there is none."""
        if self.root is None:
            raise ValueError("dataset.root: got None, but it must be a folder; set dataset.root")
        return self.root

    def sources(self, source: str | Path) -> Splits:
        """Find the images of a source.

        Raises:
            ValueError: If there are none, or not the official number.
        """
        splits = open_source(source, self.wanted)
        for name, count in self.counts.items() if self.check_counts else ():
            found = len(splits.sources.get(name, ()))
            if found != count:
                raise ValueError(
                    f"dataset.check_counts: {count:,} images are expected in the split '{name}', "
                    f"but '{source}' has {found:,}; complete it, or set "
                    "dataset.check_counts=false to use these images"
                )
        return splits

    def prepare(
        self, source: str, *, skip_errors: bool = False, overwrite: bool = False
    ) -> dict[str, Prepared]:
        """Prepare a source in `root` on all cores: see `nvae_lightning.data.prepare`.

        Raises:
            ValueError: If the source has no images as configured, or `root` is not writable.
        """
        if not source.startswith(HUB_PREFIX):
            source = str(Path(source).expanduser().absolute())
        with naming("source"):
            splits = self.sources(source)
        with naming("dataset.root"):
            return prepare(
                splits,
                self.decoder,
                self.folder,
                source=source,
                settings={**self.decoder.settings(), **self.wanted.settings()},
                skip_errors=skip_errors,
                overwrite=overwrite,
                num_workers=self.num_workers,
            )

    def prepare_data(self) -> None:
        """Find the images, so that a wrong folder fails before the model is built.

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
        """Descriptions of the prepared splits.

        Raises:
            ValueError: If one is incomplete, or has another size or number of channels.
        """
        with naming("dataset.root"):
            splits = open_prepared(self.folder)
        for known in splits.values():
            for name, stored in (("size", known.shape[2]), ("channels", known.shape[3])):
                if (value := getattr(self.image, name)) != stored:
                    raise ValueError(
                        f"dataset.image.{name}: got {value}, but the images in '{self.folder}' "
                        f"were prepared with {stored}; set dataset.image.{name}={stored}, or "
                        f"prepare '{known.source}' again with another dataset.root=FOLDER"
                    )
        return splits

    @cached_property
    def _sources(self) -> Splits:
        with naming(self.setting):
            if not self.folder.exists():
                raise ValueError(f"'{self.folder}' does not exist; {self.how_to_get}")
            if (self.folder / PARTIAL).exists():
                raise ValueError(
                    f"the preparation of '{self.folder}' was interrupted; run the same prepare "
                    "command again, which resumes it"
                )
            splits = self.sources(self.folder)
        decoded = [s for s in splits.sources.values() if not isinstance(s, ArraySource)]
        num_images = sum(map(len, decoded))
        size = num_images * self.image.size**2 * self.image.channels
        if size > _MOST_MEMORY:
            raise ValueError(
                f"{self.setting}: the {num_images:,} images in '{self.folder}' would take "
                f"{size / 1e9:.1f} GB of memory in every process; prepare them once, with "
                "python -m nvae_lightning.prepare dataset=NAME source="
                f"{self.folder} dataset.root=FOLDER, and train with that dataset.root"
            )
        return splits

    @property
    def summary(self) -> Summary:
        """Summary of the source's files, for the splits that have been loaded."""
        if self.is_prepared:
            return merged(known.summary for known in self.prepared.values())
        return merged([left_out(self._sources.left_out), *self._decoded])

    @property
    def splits(self) -> Sequence[str]:
        """Names of the dataset's own splits."""
        return list(self.prepared if self.is_prepared else self._sources.sources)

    @cached_property
    def _fit_sets(self) -> tuple[ImageDataset, ImageDataset | None]:
        """Images for training and for validation."""
        images = self.load("train")
        if "validation" in self.splits:
            return images, self.load("validation")
        if self.validation_fraction == 0 or len(images) == 1:
            return images, None
        return images.hold_out(self.validation_fraction, self.wanted.split_seed)

    @property
    def train_set(self) -> ImageDataset:
        """Training images, loaded at first use."""
        return self._fit_sets[0]

    @property
    def validation_set(self) -> ImageDataset | None:
        """Validation images, loaded at first use; None if there are none."""
        return self._fit_sets[1]

    @cached_property
    def test_set(self) -> ImageDataset:
        """Test images, loaded at first use."""
        return self.load("test")

    def load(self, split: str) -> ImageDataset:
        """Return one of `splits`, as a memory map or in memory.

        Raises:
            ValueError: If an image is unreadable.
        """
        with naming(self.setting):
            if self.is_prepared:
                return ImageDataset(open_images(self.folder, self.prepared[split]))
            images, summary = decode_all(
                self._sources.sources[split], self.decoder, self.num_workers
            )
            self._decoded.append(summary)
            return ImageDataset(images)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage: training and validation, or the test split.

        Raises:
            ValueError: If the data are missing or not as configured.
        """
        _ = self.train_set if stage in ("fit", "validate") else self.test_set

    def train_dataloader(self) -> Loader:
        """Return shuffled training batches, all of them full.

        Raises:
            ValueError: If there are too few images for one batch.
        """
        return self._loader(self.train_set, train=True)

    def val_dataloader(self) -> Loader | list[DataLoader]:
        """Return the validation images in order, or an empty list if there are none."""
        if self.validation_set is None:
            return []
        return self._loader(self.validation_set, train=False)

    def test_dataloader(self) -> Loader:
        """Return the test images in order."""
        return self._loader(self.test_set, train=False)

    def predict_dataloader(self) -> Loader:
        """Return the test images in order."""
        return self.test_dataloader()

    def on_after_batch_transfer(
        self, batch: UInt8[Tensor, "batch channel height width"], dataloader_idx: int
    ) -> Float[Tensor, "batch channel height width"]:
        """Turn a batch into the model's input, on the batch's device."""
        return self.to_input(batch, train=self.trainer is not None and self.trainer.training)

    def to_input(
        self, batch: UInt8[Tensor, "batch channel height width"], *, train: bool
    ) -> Float[Tensor, "batch channel height width"]:
        """Flip (in training only), then binarise or quantise."""
        if self.flip and train:
            batch = random_horizontal_flip(batch)
        return binarize(batch) if self.binarize else quantize(batch, self.image.bits)

    def _loader(self, dataset: ImageDataset, train: bool) -> Loader:
        trainer = self.trainer
        num_ranks = 1 if trainer is None else trainer.world_size
        if train and len(dataset) < self.batch_size * num_ranks:
            raise ValueError(
                f"dataset.batch_size: got {self.batch_size} on each of {num_ranks} devices, but "
                f"there are only {len(dataset)} images and training takes full batches; set "
                f"dataset.batch_size={len(dataset) // num_ranks} or less"
            )
        if len(dataset) < num_ranks:
            raise ValueError(
                f"trainer.devices: got {num_ranks}, but there are only {len(dataset)} images to "
                f"evaluate; set trainer.devices={len(dataset)} or less"
            )
        sampler = ShardedSampler(
            len(dataset),
            batch_size=self.batch_size,
            train=train,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            num_ranks=num_ranks,
        )
        num_workers = self.num_workers or 0
        loader = (ResumableLoader if train else ReadingAhead)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=train,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=already_a_batch,
            generator=torch.Generator(),  # leaves the global random numbers to a resume
        )
        if isinstance(loader, ResumableLoader) and trainer is not None:
            limit = trainer.limit_train_batches
            loader.limit = limit if isinstance(limit, int) else int(limit * len(loader))
        return loader
