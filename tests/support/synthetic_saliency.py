"""Four small images with one ellipse each, a ViT whose features are colours, and one whose features are constant.

The scores of the originals in test_eval_saliency.py and test_eval_video_segmentation.py were measured with the colour probe.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clever.models import vision_transformer

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
    """Change a ViT in place: tokens of patches and their keys become the mean colours and the negatives of these."""
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


@torch.no_grad()
def constant_network_(vit: torch.nn.Module) -> torch.nn.Module:
    """Change a ViT in place: the tokens of all patches are equal, and so are their keys."""
    colour_probe_(vit).patch_embed.proj.weight.zero_()
    vit.norm.bias.fill_(1)
    vit.blocks[-1].norm1.bias.fill_(0.5)
    return vit


# The blocks of these networks add nothing, so one block gives the same as twelve in a twelfth of the time.
shallow_vit_tiny = partial(vision_transformer.VisionTransformer, embed_dim=192, depth=1, num_heads=3)


def save_checkpoint(vit: torch.nn.Module, path: Path) -> Path:
    """Save a checkpoint as the original saves its teacher."""
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}}, path)
    return path
