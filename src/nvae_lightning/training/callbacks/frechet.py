"""Fréchet distance between the samples of a model and its training images."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.storage import checksum
from nvae_lightning.inference.batches import fork_torch, seed_torch
from nvae_lightning.inference.evaluation import EvaluationModule
from nvae_lightning.inference.tensor_cache import TensorCache, hash_of
from nvae_lightning.model.nvae import Temperature
from nvae_lightning.utilities.image import require_int
from nvae_lightning.utilities.images import as_bytes

_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_REMEDY = (
    f"set fid.weights to {_WEIGHTS} from torch-fidelity's releases, which is never downloaded "
    "here, or give another network as fid.feature_extractor"
)
_REAL = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")
_NUM_FINGERPRINTED = 256  # images
_LAYOUT = 2  # version of cached files; a new number invalidates earlier ones


class FrechetDistance(Callback):
    r"""Compare samples with the training images at the end of a test.

    .. math::
        d^2 = \|\mu - \mu'\|^2 + \mathrm{tr}(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2})

    with the means and covariances of the features of both. With the Inception network that
    defines the FID it is logged as ``test/fid``. Values of any other network are not comparable
    with a published FID and are logged as ``test/frechet_distance_<class of the network>``.

    Samples are the means of p(x | z), as in pictures and in the published evaluation. They and the
    training images, in the model's bit depth but not flipped, are rounded to 8 bits. The
    statistics of the training images are cached under a fingerprint of images and network, which
    covers the network's parameters, buffers and ``repr`` only.

    Source: Heusel et al. 2017, Eq. 6.

    Args:
        weights: File with torch-fidelity's weights of the Inception network (extra ``fid``).
        feature_extractor: Other network to use instead; it maps uint8 images (batch, 3, height,
            width) to features (batch, feature).
        num_samples: Number of samples on all devices together.
        batch_size: Number of images per batch on each device.
        temperature: Factor on the standard deviation of every prior; one number, or one per
            scale, coarsest first.
        cache: Folder of the statistics of training images.
        seed: Seed of the samples.

    Attributes:
        name: Name of the logged distance.

    Raises:
        ValueError: If a number is out of range, there is not exactly one network, or its weights
            or torch-fidelity are missing.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        feature_extractor: nn.Module | None = None,
        num_samples: int = 50_000,
        batch_size: int = 64,
        temperature: Temperature = 1.0,
        cache: str | Path = "~/.cache/nvae_lightning/frechet",
        seed: int = 0,
    ) -> None:
        require_int("fid.num_samples", num_samples, 2)
        require_int("fid.batch_size", batch_size, 1)
        require_int("fid.seed", seed, 0)
        # Absolute from the start: a command may change its working directory later.
        self.weights = None if weights is None else Path(weights).expanduser().absolute()
        self.feature_extractor = feature_extractor
        if (weights is None) == (feature_extractor is None):
            raise ValueError(
                f"fid.weights: got {weights} with fid.feature_extractor={feature_extractor}, but "
                f"the distance requires one of the two; {_REMEDY}"
            )
        if self.weights is not None and not self.weights.is_file():
            raise ValueError(f"fid.weights: '{self.weights}' is not a file; {_REMEDY}")
        if self.weights is not None and importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError(
                f"fid.weights: got '{self.weights}', which requires torch-fidelity; "
                'pip install "nvae-lightning[fid]", or set fid.feature_extractor'
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.temperature = temperature
        self.cache = Path(cache).expanduser().absolute()
        self.seed = seed
        self._metric: FrechetInceptionDistance | None = None

    @property
    def name(self) -> str:
        """Name of the logged distance."""
        if self.feature_extractor is None:
            return "test/fid"
        return f"test/frechet_distance_{type(self.feature_extractor).__name__}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check all settings before a training or test starts.

        Raises:
            ValueError: If the data module is not one of images, there are fewer samples than
                devices, or the temperature, the network's weights or its features are unsuitable.
        """
        if stage not in ("fit", "test"):
            return
        data = _images_of(trainer)
        if self.num_samples < trainer.world_size:
            raise ValueError(
                f"fid.num_samples: got {self.num_samples}, but each of {trainer.world_size} "
                f"devices draws at least one; set fid.num_samples={trainer.world_size} or more"
            )
        assert isinstance(pl_module, EvaluationModule)
        try:
            pl_module.model.temperature_of_groups(self.temperature)
        except ValueError as error:
            raise ValueError(f"fid.{error}") from error
        device: torch.device = trainer.strategy.root_device
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        # The network draws random weights before it loads the file.
        with fork_torch(), torch.no_grad():
            metric = self._build(data.image.size, device)
        if stage == "test":
            self._metric = metric

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the distance.

        Raises:
            ValueError: If samples are not finite.
        """
        metric = self._metric
        assert metric is not None
        metric.reset()
        with fork_torch(metric.device, pl_module.device), torch.no_grad():
            self._add_training_images(metric, trainer)
            self._add_samples(metric, trainer, pl_module)
            distance = metric.compute()  # over all ranks
        pl_module.log(self.name, distance.float().to(pl_module.device), sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory."""
        self._metric = None
        if self.feature_extractor is not None:
            self.feature_extractor.cpu()

    def _build(self, image_size: int, device: torch.device) -> FrechetInceptionDistance:
        if self.feature_extractor is not None:
            network = self.feature_extractor.eval().to(device)
            images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=device)
            features = network(images)
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features)
                raise ValueError(
                    f"fid.feature_extractor must map images of shape {tuple(images.shape)} to "
                    f"features of shape (2, number of features), got {got}"
                )
            return FrechetInceptionDistance(_Features(network, features.shape[1])).to(device)
        assert self.weights is not None
        try:
            # torch-fidelity would unpickle, and so run, any code in the file.
            torch.load(self.weights, map_location="cpu", weights_only=True)
            # Without antialiasing, like the network of the original FID.
            metric = FrechetInceptionDistance(
                2048, feature_extractor_weights_path=str(self.weights), antialias=False
            )
        except Exception as error:  # of many types, with long messages
            raise ValueError(
                f"fid.weights: '{self.weights}' does not hold the weights of torch-fidelity's "
                f"Inception network ({type(error).__name__}); {_REMEDY}"
            ) from error
        found = checksum(self.weights, "Verifying the Inception network")
        if found != _WEIGHTS_SHA256:
            rank_zero_warn(
                f"fid.weights: '{self.weights}' is not the published {_WEIGHTS} (its SHA-256 is "
                f"{found}): test/fid is comparable with published values only if its weights are"
            )
        return metric.to(device)

    def _add_training_images(self, metric: FrechetInceptionDistance, trainer: Trainer) -> None:
        """Read the training images' statistics from the cache, or compute and cache them."""
        data = _images_of(trainer)
        num_images = len(data.train_set)
        cache, known = None, None
        if trainer.is_global_zero:  # nodes may have different caches
            fingerprint = self._fingerprint(data, metric.inception)
            cache = TensorCache(self.cache / f"{fingerprint}.safetensors", fingerprint)
            known = cache.read()
        if trainer.strategy.broadcast(known is not None):
            # On the first rank only: the statistics of all ranks are summed.
            for name, value in (known or {}).items():
                setattr(metric, name, value.to(metric.device))
            return
        step = self.batch_size * trainer.world_size
        starts = range(self.batch_size * trainer.global_rank, num_images, step)
        for start in tqdm(starts, "Training images", **_bar_options(trainer)):
            indices = range(start, min(start + self.batch_size, num_images))
            batch = data.train_set.__getitems__(indices).to(metric.device)
            # Binary pixels are drawn: the same on any number of ranks.
            torch.manual_seed(start)
            metric.update(_as_colour(data.to_input(batch, train=False)), real=True)
        with metric.sync_context():
            totals = {name: getattr(metric, name).cpu() for name in _REAL}
        if cache is not None:
            cache.write(totals)

    def _add_samples(
        self, metric: FrechetInceptionDistance, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Draw this rank's share."""
        assert isinstance(pl_module, EvaluationModule)
        model = pl_module.model
        share = len(range(trainer.global_rank, self.num_samples, trainer.world_size))
        seed_torch(self.seed, trainer.global_rank)
        starts = range(0, share, self.batch_size)
        for start in tqdm(starts, "Samples", **_bar_options(trainer)):
            likelihood = model.sample(min(self.batch_size, share - start), self.temperature)
            pixels = likelihood.mean.to(metric.device)
            if not pixels.isfinite().all():
                raise ValueError(
                    f"fid: samples at fid.temperature={self.temperature} are not finite; lower "
                    "it, or use a checkpoint from before the training diverged"
                )
            metric.update(_as_colour(pixels), real=False)

    def _fingerprint(self, data: ImageDataModule, network: nn.Module) -> str:
        """Return a hash of all that determines the training images' statistics."""
        num_images = len(data.train_set)
        settings = {
            "layout": _LAYOUT,
            "num_images": num_images,
            "size": data.image.size,
            "channels": data.image.channels,
            "bits": data.image.bits,
            "binarize": data.binarize,
            "sha256": data.prepared["train"].sha256 if data.is_prepared else None,
            "network": repr(network),
        }
        spread = torch.linspace(0, num_images - 1, min(num_images, _NUM_FINGERPRINTED)).round()
        images = data.train_set.__getitems__(spread.int().tolist())
        # Including the buffers that the state dict leaves out.
        tensors = (*network.named_parameters(), *network.named_buffers(), ("images", images))
        return hash_of(settings, tensors)


class _Features(nn.Module):
    """A network with its number of features, which torchmetrics would otherwise infer."""

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network = network
        self.num_features = num_features

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch d"]:
        # In float64: the result has the dtype of the features.
        return self.network(images).double()


def _images_of(trainer: Trainer) -> ImageDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise ValueError(
            f"fid: got {type(data).__name__} as data, but samples are compared with the training "
            "images of an ImageDataModule; give the trainer one as datamodule"
        )
    return data


def _as_colour(
    pixels: Float[Tensor, "batch channel height width"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Round to 8 bits; repeat grey for three channels."""
    return as_bytes(pixels).expand(-1, 3, -1, -1).contiguous()


def _bar_options(trainer: Trainer) -> dict[str, Any]:
    disable = None if trainer.is_global_zero else True  # None: only on a terminal
    return {"unit": "batch", "leave": False, "disable": disable, "delay": 1.0}
