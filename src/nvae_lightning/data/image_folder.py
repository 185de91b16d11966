"""Custom images in files."""

from nvae_lightning.data.base import ImageDataModule


class ImageFolder(ImageDataModule):
    """Any folder, zip or tar of images, with folders ``train/`` and ``test/`` or split here.

    See `ImageDataModule` for the arguments.
    """

    default_root = "data/images"
    default_flip = True
    how_to_get = "give a folder, zip or tar of images as dataset.root=PATH"
