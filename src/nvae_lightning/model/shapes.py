"""Shapes of tensors that several files share."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

#: Only the batch size is checked: a layer may change channels and resolution.
FeatureMap = Float[Tensor, "batch _channel _height _width"]
PerChannel = Float[Tensor, " channel"]
