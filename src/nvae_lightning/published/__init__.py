"""Weights trained by the published code, read into a model of this package.

A published checkpoint is a ``torch.save`` file of a dict with the weights (``state_dict``) and the
settings of the training (``args``, an ``argparse.Namespace``). Only tensors, plain containers and
that namespace are read. A pickle with anything else is refused, and nothing in it is run.

Converted models keep the numerics with which their weights were trained and their published
results computed. Each of these that is not correct has an option, which is off in other models:

* ``first_prior_std=1.01`` of :class:`~nvae_lightning.model.NVAE`: the prior of the coarsest group
  is N(0, 1.01²), because the bound on standard deviations also applied to it;
* ``published_tails=True`` of
  :class:`~nvae_lightning.model.DiscretizedLogisticMixtureLikelihood`: level 254 of 8 bits has the
  upper tail's probability as well as level 255;
* ``published_temperature=True``, there: sampling divides the logistics' scale by the temperature.
"""

from nvae_lightning.published.checkpoint import build_checkpoint, load_published
from nvae_lightning.published.names import published_duplicates, published_names
from nvae_lightning.published.settings import PublishedSettings

__all__ = [
    "PublishedSettings",
    "build_checkpoint",
    "load_published",
    "published_duplicates",
    "published_names",
]
