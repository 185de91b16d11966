"""Faces of celebrities: CelebA at 64×64 and CelebA-HQ at 256×256, colour."""

from types import MappingProxyType

from nvae_lightning.data.base import ImageDataModule
from nvae_lightning.utilities.image import Image


class CelebA64(ImageDataModule):
    """CelebA 64×64: 162,770 training, 19,867 validation and 19,962 test images.

    The aligned 178×218 images are cropped to a central square before resizing. See
    `ImageDataModule` for the arguments.
    """

    citation = "Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015"
    default_root = "data/celeba64"
    default_image = Image(channels=3, size=64, bits=8)
    default_batch_size = 16
    default_flip = True
    default_crop = (15, 40, 163, 188)
    default_interpolation = "bilinear"
    counts = MappingProxyType({"train": 162_770, "validation": 19_867, "test": 19_962})
    how_to_get = (
        "fetch CelebA from mmlab.ie.cuhk.edu.hk/projects/CelebA.html and prepare your copy "
        "(torchvision's folder, img_align_celeba.zip with list_eval_partition.txt, LMDB or "
        "parquet) with python -m nvae_lightning.prepare dataset=celeba64 source=PATH"
    )


class CelebAHQ(ImageDataModule):
    """CelebA-HQ 256×256 with 5 bits: 27,000 training and 3,000 test images.

    Without a split of the source, 10 % of the images are held out for testing; these are not
    the test images of Glow. See `ImageDataModule` for the arguments.
    """

    citation = "Karras et al., Progressive Growing of GANs, ICLR 2018"
    default_root = "data/celeba_hq"
    default_image = Image(channels=3, size=256, bits=5)
    default_batch_size = 4
    default_flip = True
    counts = MappingProxyType({"train": 27_000, "test": 3_000})
    how_to_get = (
        "fetch CelebA HQ as described at github.com/openai/glow or "
        "github.com/tkarras/progressive_growing_of_gans and prepare your copy (Glow's "
        "celeba-tfr.tar, a folder or zip of images, LMDB or parquet) with python -m "
        "nvae_lightning.prepare dataset=celeba_hq source=PATH"
    )
