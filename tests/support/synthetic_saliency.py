"""Four small images with one ellipse each, and a ViT whose features are colours.

The scores of the original in test_eval_saliency.py were measured on them.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZES = [(200, 152), (160, 200), (193, 147), (176, 176)]  # width, height
COLOURS = [  # object, background: complementary
    ((230, 60, 40), (30, 170, 190)),
    ((240, 200, 30), (30, 60, 220)),
    ((200, 40, 200), (40, 200, 60)),
    ((250, 120, 20), (20, 110, 230)),
]


def write_saliency(root: Path) -> Path:
    """Write root/img/0000.jpg ..., two noisy colours, and root/gt/0000.png ..., 255 on the object."""
    rng = np.random.default_rng(0)
    for folder in ("img", "gt"):
        (root / folder).mkdir(parents=True)
    for number, ((width, height), colours) in enumerate(zip(SIZES, COLOURS, strict=True)):
        y, x = np.mgrid[:height, :width]
        centre_y, centre_x = height * rng.uniform(0.4, 0.6), width * rng.uniform(0.4, 0.6)
        axis_y, axis_x = height * rng.uniform(0.18, 0.3), width * rng.uniform(0.18, 0.3)
        mask = ((y - centre_y) / axis_y) ** 2 + ((x - centre_x) / axis_x) ** 2 <= 1
        pixels = np.where(mask[..., None], *colours) + rng.normal(0, 8, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "img" / f"{number:04}.jpg", quality=95)
        Image.fromarray((mask * 255).astype(np.uint8)).save(root / "gt" / f"{number:04}.png")
    return root


@torch.no_grad()
def colour_probe_(vit: torch.nn.Module) -> torch.nn.Module:
    """Change a ViT in place: the keys of its patches become their normalised mean colours and the negatives of these."""
    D = vit.embed_dim
    for block in vit.blocks:  # blocks that add nothing
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        block.attn.qkv.weight[D : 2 * D] = torch.eye(D)
    for parameter in (vit.pos_embed, vit.cls_token, vit.patch_embed.proj.bias):
        parameter.zero_()
    values = torch.cat([torch.eye(3), -torch.eye(3)]).repeat_interleave(D // 6, 0)  # D, 3
    weight = vit.patch_embed.proj.weight  # D, 3, p, p
    weight.copy_((values / weight[0, 0].numel())[:, :, None, None].expand_as(weight))
    return vit
