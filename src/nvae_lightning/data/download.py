"""Datasets that torchvision downloads."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.messages import naming, one_line
from nvae_lightning.data.readers.torchvision_files import check_files, torchvision_root


class DownloadedDataModule(ImageDataModule):
    """Base class of the datasets whose missing files torchvision downloads."""

    #: Name of the dataset.
    title: ClassVar[str]
    #: Folder of the files below torchvision's root.
    place: ClassVar[str]
    #: The files and the page that publishes them.
    files: ClassVar[str]

    @abstractmethod
    def fetch(self, root: Path) -> None:
        """Download what is missing to torchvision's root."""

    def prepare_data(self) -> None:
        """Download the files if `root` is empty or contains some of them.

        Raises:
            ValueError: If that fails, for example without a network.
        """
        with naming("dataset.root"):
            root = torchvision_root(self.folder, self.place)
            folder = root / self.place
            if folder.is_dir() or not root.exists() or (root.is_dir() and not any(root.iterdir())):
                check_files(root, self.place)
                try:
                    self.fetch(root)
                except Exception as error:  # torchvision asserts and unpickles
                    raise ValueError(
                        f"no readable {self.title} in '{folder}' and no download "
                        f"({one_line(error)}); put {self.files} there"
                    ) from error
        super().prepare_data()
