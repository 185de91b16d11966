"""Tensor shapes shared by several files."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

#: Only the batch size is checked, because layers change channels and resolution.
FeatureMap = Float[Tensor, "batch _channel _height _width"]
PerChannel = Float[Tensor, " channel"]
