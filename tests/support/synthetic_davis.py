"""Small videos in the layout of DAVIS, a ViT whose features are colours, and one whose features are constant.

The scores of the original in test_eval_video_segmentation.py were measured on these videos with this colour probe.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from PIL import Image

from clever.evaluation.video.masks import write_mask
from clever.models import vision_transformer

COLOURS = np.array([(30, 60, 30), (220, 40, 40), (40, 60, 230)])  # background, two objects


def write_labels(labels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(labels, path)


def write_video(
    root: Path, name: str, frames=8, step=(0, 4), jump=None, objects=2, height=96, width=160, side=32, first=0
) -> None:
    """Squares on green, in noise: object 1 moves `step` (rows, columns) per frame, object 2 the other way.

    `jump` is (frame, x): from that frame on, object 1 is at x. Frames are numbered from `first` on.
    """
    rng = np.random.default_rng(0)
    folder = root / "JPEGImages/480p" / name
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(frames):
        labels = np.zeros((height, width), np.uint8)
        for i in range(objects):
            sign = 1 - 2 * i
            y = 8 + i * (side + 8) + sign * step[0] * t
            x = (8 if i == 0 else width - 8 - side) + sign * step[1] * t
            if jump and i == 0 and t >= jump[0]:
                x = jump[1]
            labels[y : y + side, x : x + side] = i + 1
        pixels = COLOURS[labels] + rng.integers(-6, 7, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{first + t:05}.jpg", quality=95)
        write_labels(labels, root / "Annotations/480p" / name / f"{first + t:05}.png")


def write_list(root: Path, *names: str, subset: str = "val") -> None:
    path = root / "ImageSets/2017" / f"{subset}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_davis(root: Path) -> Path:
    """The four videos on which the original was scored."""
    write_video(root, "two-squares")
    write_video(root, "static", frames=5, step=(0, 0))
    write_video(root, "fast", frames=7, step=(0, 0), jump=(3, 120), objects=1)
    write_video(root, "unaligned", step=(1, 3))
    write_list(root, "two-squares", "static", "fast", "unaligned")
    return root


# The blocks of the networks below add nothing, so one block gives the same as twelve in a twelfth of the time.
shallow_vit_tiny = partial(vision_transformer.VisionTransformer, embed_dim=192, depth=1, num_heads=3)


@torch.no_grad()
def colour_probe(patch_size: int) -> torch.nn.Module:
    """A ViT whose tokens are the mean colour of their patch and its negative, each value 32 times."""
    vit = shallow_vit_tiny(patch_size)
    _silence(vit)
    values = torch.cat([torch.eye(3), -torch.eye(3)]).repeat_interleave(192 // 6, 0)  # 192, 3
    vit.patch_embed.proj.weight.copy_(repeat(values / patch_size**2, "D c -> D c p1 p2", p1=patch_size, p2=patch_size))
    return vit


@torch.no_grad()
def constant_network(patch_size: int) -> torch.nn.Module:
    """A ViT whose patch features are all equal."""
    vit = shallow_vit_tiny(patch_size)
    _silence(vit)
    vit.patch_embed.proj.weight.zero_()
    vit.norm.bias.fill_(1)
    return vit


def _silence(vit: torch.nn.Module) -> None:
    """Blocks that add nothing, no positions, no bias."""
    for block in vit.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    for parameter in (vit.pos_embed, vit.cls_token, vit.patch_embed.proj.bias):
        parameter.zero_()


def save_checkpoint(vit: torch.nn.Module, path: Path) -> Path:
    """Save a checkpoint as the original saves its teacher."""
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}}, path)
    return path
