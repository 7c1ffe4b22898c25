"""A network whose IR is an image's class and whose EF is the transformation, and the images on which it is."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clever.models.heads import Split

STATS = (0, 0, 0), (1, 1, 1)  # the network reads pixels in 0..1


def write_ramps(folder: Path, count: int, side: int, classes: int = 4) -> list[str]:
    """Images in which red rises from left to right, green from top to bottom, and blue is one of `classes` values."""
    folder.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, side)
    paths = []
    for number in range(count):
        blue = np.full((side, side), 40 + 50 * (number * 7 % 11 % classes))
        pixels = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), blue], axis=-1)
        paths.append(str(folder / f"{number:03}.png"))
        Image.fromarray(pixels.round().astype(np.uint8)).save(paths[-1])
    return paths


class PixelReader(torch.nn.Module):
    """Images [B, 3, S, S] -> [B, 30]: IR, 24 columns, is a function of the blue; EF, 6 columns, of red and green.

    EF holds the moments of red about the centre, which are proportional to cosine and sine of an angle of rotation, and mean
    and logarithmic spread of red and green, which are linear in centre and logarithmic size of a crop.
    """

    embed_dim, hp1 = 30, 0.8
    split = Split(embed_dim, hp1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        centre = images.shape[-1] // 2
        red, green, blue = images.double().unbind(1)  # B, S, S
        place = torch.linspace(-1, 1, images.shape[-1], dtype=torch.double)
        level = blue[:, centre, centre].round(decimals=1)
        ir = torch.stack([(level * k).cos() for k in range(1, 25)], dim=1)
        inside = (place[:, None].square() + place.square() <= 1).double()
        moments = [(inside * red * place).mean((1, 2)), (inside * red * place[:, None]).mean((1, 2))]
        boxes = [f(colour) for colour in (red, green) for f in (lambda c: c.mean((1, 2)), lambda c: c.std((1, 2)).log())]
        return torch.cat([ir, torch.stack([*moments, *boxes], dim=1)], dim=1).float()
