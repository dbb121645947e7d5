"""The ``detail`` of a picture to the resolution mode that it is looked at in."""

from __future__ import annotations

from mm1_mlx.config import ImageConfig, MM1Config
from mm1_mlx.image import Viewed
from mm1_mlx.resolution import high_resolution, name_mode

from .replies import Modes

DETAILS = ("low", "auto", "high")


class Views:
    """How a model looks at pictures of each ``detail``.

    ``low`` is one tile, ``auto`` the model's own mode, ``high`` its own where that has
    several tiles, else MM1's high resolution if the encoder is of the paper's size.

    Args:
        config: the model's.
    """

    def __init__(self, config: MM1Config) -> None:
        own = config.image if config.sees else None
        self._configs: dict[str, tuple[ImageConfig, bool]] = {}
        if own is None:
            return
        high = None if own.tiling else high_resolution(config)
        # A tile is as many image tokens at every size, or the prompt's count is wrong.
        same = high is not None and high.num_image_tokens == config.num_image_tokens
        finest = high.image if same and high is not None and high.image else own
        self._configs = {
            "low": (own, False),
            "auto": (own, True),
            "high": (finest, True),
        }

    @property
    def modes(self) -> Modes | None:
        """Their names, None for a model without eyes."""
        if not self._configs:
            return None
        low, auto, high = (self._configs[detail][0] for detail in DETAILS)
        return Modes(low=str(low.size), auto=name_mode(auto), high=name_mode(high))

    def show(self, picture: str | bytes, detail: str | None) -> str | bytes | Viewed:
        """The picture as ``stream`` takes it, to be looked at so closely."""
        if not self._configs:
            return picture
        config, split = self._configs[detail or "auto"]
        return Viewed(picture, config, split)
