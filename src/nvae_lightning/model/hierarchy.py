"""Scales and latent groups of a model, as frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvae_lightning.utilities.image import Image, require_int


@dataclass(frozen=True)
class Scale:
    """The latent groups that share one resolution.

    Args:
        downsample: Ratio of the (padded) image's size to this scale's size, a power of two.
        channels: Channels of the encoder's residual cells.
        num_groups: Number of latent groups.
        decoder_channels: Channels of the decoder's cells; None for the encoder's.

    Raises:
        ValueError: If a field is out of range.
    """

    downsample: int
    channels: int
    num_groups: int
    decoder_channels: int | None = None

    def __post_init__(self) -> None:
        require_int("downsample", self.downsample, 1)
        require_int("channels", self.channels, 1)
        require_int("num_groups of every scale", self.num_groups, 1)
        if self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample must be a power of two, got {self.downsample}")

    @property
    def num_halvings(self) -> int:
        """Number of halvings of the resolution between the image and this scale."""
        return self.downsample.bit_length() - 1

    @property
    def top_down_channels(self) -> int:
        """Channels of the decoder's cells."""
        return self.channels if self.decoder_channels is None else self.decoder_channels


@dataclass(frozen=True)
class Hierarchy:
    """Scales of latent groups, coarsest first, each with twice the resolution of the one before.

    Args:
        scales: Scales, coarsest first.
        latent_channels: Channels of each latent group.

    Raises:
        ValueError: If ``scales`` is empty, or neighbours do not differ by a factor of two.
    """

    scales: tuple[Scale, ...]
    latent_channels: int

    def __post_init__(self) -> None:
        require_int("latent_channels", self.latent_channels, 1)
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales:
            raise ValueError("num_groups must list at least one scale, got none")
        for coarse, fine in zip(self.scales, self.scales[1:], strict=False):
            if coarse.downsample != 2 * fine.downsample:
                raise ValueError(
                    "scales must be coarsest first, each with twice the resolution of the one "
                    f"before, got downsample {coarse.downsample} before {fine.downsample}"
                )

    @classmethod
    def doubling(
        cls,
        *,
        channels: int,
        num_groups: Sequence[int],
        downsample: int,
        latent_channels: int,
        width: float = 1.0,
        max_groups_per_scale: int | None = None,
        decoder_channels: int | None = None,
    ) -> Hierarchy:
        """Build the published layout: each halving of the resolution doubles the channels.

        Args:
            channels: Channels at full resolution; a scale has ``channels * downsample``.
            num_groups: Number of groups per scale, coarsest first.
            downsample: Downsample of the finest scale.
            latent_channels: Channels of each latent group.
            width: Factor on the channels, for wider or narrower models.
            max_groups_per_scale: Upper limit of ``num_groups``, for smaller models.
            decoder_channels: The decoder's ``channels``; None for the encoder's.

        Raises:
            ValueError: If a number is out of range.

        >>> Hierarchy.doubling(channels=32, num_groups=[5, 10], downsample=4, latent_channels=20)
        ... # doctest: +NORMALIZE_WHITESPACE
        Hierarchy(scales=(Scale(downsample=8, channels=256, num_groups=5, decoder_channels=None),
                          Scale(downsample=4, channels=128, num_groups=10, decoder_channels=None)),
                  latent_channels=20)
        """
        require_int("channels", channels, 1)
        require_int("downsample", downsample, 1)
        for name, value in (("channels", channels), ("decoder_channels", decoder_channels)):
            if value is not None and (value * width < 1 or value * width % 1):
                raise ValueError(
                    f"width * {name} must be a positive integer, got {width} * {value}"
                )
        if max_groups_per_scale is not None:
            require_int("max_groups_per_scale", max_groups_per_scale, 1)
            num_groups = [min(count, max_groups_per_scale) for count in num_groups]
        scales = []
        for height, count in enumerate(reversed(num_groups)):
            factor = downsample * 2**height
            other = None if decoder_channels is None else int(decoder_channels * width) * factor
            scales.append(Scale(factor, int(channels * width) * factor, count, other))
        return cls(scales=tuple(reversed(scales)), latent_channels=latent_channels)

    @property
    def num_groups(self) -> int:
        """Number of latent groups over all scales."""
        return sum(scale.num_groups for scale in self.scales)

    @property
    def groups(self) -> list[tuple[int, Scale]]:
        """Scale index and scale of every latent group, coarsest first."""
        return [(k, scale) for k, scale in enumerate(self.scales) for _ in range(scale.num_groups)]

    def check(self, image: Image) -> None:
        """Raise ValueError if the coarsest scale does not divide ``image``."""
        coarsest = self.scales[0].downsample
        if image.padded_size % coarsest:
            below = image.size - image.padded_size % coarsest
            nearest = f"{below} or {below + coarsest}" if below > 0 else f"{below + coarsest}"
            raise ValueError(
                f"image.size {image.size} (padded to {image.padded_size}) must be a multiple of "
                f"{coarsest} for {len(self.scales)} scales with a finest downsample of "
                f"{self.scales[-1].downsample}; set image.size to {nearest}, change image.padding "
                "or use fewer scales"
            )
