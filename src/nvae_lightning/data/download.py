"""Datasets that torchvision downloads."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.data.checks import naming
from nvae_lightning.data.names import one_line
from nvae_lightning.data.readers.torchvision_files import check_files


class DownloadedDataModule(ImageDataModule):
    """Base class of the datasets whose missing files torchvision downloads."""

    #: Name of the dataset.
    title: ClassVar[str]
    #: Folder of the files below torchvision's root.
    subfolder: ClassVar[str]
    #: The files and the page that publishes them.
    files: ClassVar[str]

    @property
    def torchvision_root(self) -> Path:
        """The folder that torchvision calls root."""
        return self.folder

    @abstractmethod
    def fetch(self) -> None:
        """Download what is missing, and check what is there."""

    def prepare_data(self) -> None:
        """Download the files if `root` is empty, or holds some of them.

        Raises:
            ValueError: If that fails, for example without a network.
        """
        with naming("dataset.root"):
            root = self.torchvision_root
            folder = root / self.subfolder
            if folder.is_dir() or not root.exists() or (root.is_dir() and not any(root.iterdir())):
                check_files(root, self.subfolder)
                self._download(folder)
        super().prepare_data()

    def _download(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            self.fetch()
        except Exception as error:  # torchvision asserts and unpickles
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise ValueError(
                f"dataset.root: no readable {self.title} in '{folder}' and no download "
                f"({one_line(error)}); put {self.files} there"
            ) from error
