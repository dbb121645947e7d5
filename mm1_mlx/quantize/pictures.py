"""Pictures drawn from a seed, for who has none at hand: shapes before a soft background.

They teach a model nothing; they only take it through states that pictures bring.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIZE = 336
MAX_SHAPES = 6


def draw_picture(seed: int) -> Image.Image:
    """One to six shapes before blurred noise; the same for the same seed."""
    rng = np.random.default_rng([0x4D4D31, seed])
    # Few random pixels, enlarged: clouds as smooth as a sky or as rough as a lawn.
    coarse = int(rng.integers(2, 24))
    noise = rng.integers(0, 256, (coarse, coarse, 3), np.uint8)
    picture = Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    drawing = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        x, y = rng.integers(0, SIZE - 40, 2).tolist()
        w, h = rng.integers(24, SIZE // 2, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        corners = [(x, y), (x + w, y), (x + w // 2, y + h)]
        match int(rng.integers(4)):
            case 0:
                drawing.rectangle((x, y, x + w, y + h), fill=colour)
            case 1:
                drawing.ellipse((x, y, x + w, y + h), fill=colour)
            case 2:
                drawing.polygon(corners, fill=colour)
            case _:
                drawing.line((x, y, x + w, y + h), fill=colour, width=8)
    return picture
