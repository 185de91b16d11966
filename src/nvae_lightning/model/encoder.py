"""Bottom-up model: one feature map per latent group."""

from __future__ import annotations

from torch import nn

from nvae_lightning.model.cells import CellConstructor, Resampling
from nvae_lightning.model.hierarchy import Hierarchy
from nvae_lightning.model.layers import WeightNormConv2d
from nvae_lightning.model.shapes import FeatureMap
from nvae_lightning.utilities.image import Image


class Encoder(nn.Module):
    """Deterministic bottom-up tower of inference (paper, Fig. 2a, left).

    Args:
        image: Image format.
        hierarchy: Scales and groups.
        cell: Constructor of the groups' cells.
        num_cells_per_group: Number of residual cells before each group's feature map.
        preprocess_cell: Constructor of the cells between the image and the finest scale.
        num_preprocess_cells: Number of these cells per halving of the resolution, the last of
            which halves it.

    Raises:
        ValueError: If the channels cannot be halved.
    """

    def __init__(
        self,
        image: Image,
        hierarchy: Hierarchy,
        *,
        cell: CellConstructor,
        num_cells_per_group: int,
        preprocess_cell: CellConstructor,
        num_preprocess_cells: int,
    ) -> None:
        super().__init__()
        finest = hierarchy.scales[-1]
        if finest.channels % finest.downsample:
            raise ValueError(
                "channels of the finest scale must be a multiple of its downsample "
                f"{finest.downsample}, got {finest.channels}"
            )
        channels = finest.channels // finest.downsample
        self.stem = WeightNormConv2d(image.channels, channels, 3, padding=1)

        cells: list[nn.Module] = []
        for _ in range(finest.num_halvings):
            cells += [preprocess_cell(channels, channels) for _ in range(num_preprocess_cells - 1)]
            cells.append(preprocess_cell(channels, 2 * channels, Resampling.DOWN))
            channels *= 2
        self.preprocess = nn.Sequential(*cells)

        # In the order of computation: finest first.
        self.groups = nn.ModuleList()
        for scale in reversed(hierarchy.scales):
            for index in range(scale.num_groups):
                cells = []
                if scale is not finest and index == 0:
                    cells.append(cell(channels, scale.channels, Resampling.DOWN))
                    channels = scale.channels
                cells += [cell(channels, channels) for _ in range(num_cells_per_group)]
                self.groups.append(nn.Sequential(*cells))
        self.top = nn.Sequential(nn.ELU(), WeightNormConv2d(channels, channels, 1), nn.ELU())

    def forward(self, image: FeatureMap) -> list[FeatureMap]:
        """Compute one feature map per latent group, coarsest first, from padded images."""
        state = self.preprocess(self.stem(2.0 * image - 1.0))
        features = []
        for group in self.groups:
            state = group(state)
            features.append(state)
        features[-1] = self.top(state)
        return features[::-1]
