"""Images of the user's own."""

from nvae_lightning.data.base import ImageDataModule


class ImageFolder(ImageDataModule):
    """Any folder, zip or tar of images, with ``train/`` and ``test/`` in it or split here.

    See `ImageDataModule` for the arguments.
    """

    default_root = "data/images"
    default_flip = True
    how_to_get = "give a folder, zip or tar of images as dataset.root=PATH"
