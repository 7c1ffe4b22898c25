"""What the [CLS] token of a ViT attends to: attention maps, the masks of their largest values, and pictures of both.

Shapes: p patch size, h w rows and columns of patches, M heads.
"""

import math

import matplotlib
import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from clever.data.augmentations import ToNormalizedTensor
from clever.data.files import read_image
from clever.utils import InputError, printable

MAX_PATCHES = 65_536  # of an image
RED = np.array([255, 0, 0])


class ResizeAndCrop:
    """PIL image -> normalised tensor [3, H, W], resized, then cropped at the right and the bottom to whole patches.

    `size` is height and width, or the shorter side, or 0 to keep the size of the image.
    Raises InputError if the result is smaller than a patch, or has more than MAX_PATCHES of them.
    """

    def __init__(self, size: list[int], patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.resize = v2.Resize(size, antialias=True) if any(size) else nn.Identity()
        self.size = size
        self.patch_size, self.to_tensor = patch_size, ToNormalizedTensor(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        p, (W, H) = self.patch_size, image.size
        area = math.prod(self.size) if len(self.size) == 2 else W * H * ((self.size[0] or min(W, H)) / min(W, H)) ** 2
        if area / p**2 > MAX_PATCHES:
            raise InputError(
                f"image of {W}x{H} pixels: {area / p**2:.0f} patches, more than {MAX_PATCHES}; give a smaller --image_size"
            )
        image = self.resize(image)
        W, H = image.size
        if min(W, H) < p:
            raise InputError(f"image of {W}x{H} pixels: smaller than a patch of {p}; give a larger --image_size")
        return self.to_tensor(image.crop((0, 0, W - W % p, H - H % p)))


class PictureDataset(Dataset):
    """(transformed image, its number) of each of `paths`; sizes may differ. Raises InputError for an unreadable image."""

    def __init__(self, paths: list[str], transform: ResizeAndCrop) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(read_image(self.paths[number])), number


# --- attention ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of [CLS] to the patches in the last block, per head: [B, 3, H, W] -> [B, M, h, w], on the CPU.

    Raises FloatingPointError if it is not finite.
    """
    attention = backbone.get_last_cls_attention(images)  # B, M, h*w
    if not attention.isfinite().all():
        raise FloatingPointError("attention of [CLS]")
    return rearrange(attention, "B M (h w) -> B M h w", h=images.shape[-2] // backbone.patch_embed.patch_size).float().cpu()


def threshold_mask(attention: Tensor, threshold: float) -> Tensor:
    """The fewest patches that together hold at least the fraction `threshold` of an attention map; bool, [..., h, w]."""
    ordered, order = attention.flatten(-2).double().sort(dim=-1, descending=True, stable=True)  # ..., h*w
    cumulative = ordered.cumsum(-1)
    before = cumulative - ordered  # sum over the patches with larger attention
    kept = before < threshold * cumulative[..., -1:]
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(attention.shape)


# --- pictures ----------------------------------------------------------------------------------------------------------


def stretch(x: np.ndarray) -> np.ndarray:
    """Values shifted and scaled to 0..1; all 0 if they are equal."""
    span = x.max() - x.min()
    return (x - x.min()) / span if span > 0 else np.zeros_like(x)


def colored(x: np.ndarray, colormap: str) -> np.ndarray:
    """Values [H, W], stretched to 0..1, as colours [H, W, 4]."""
    return matplotlib.colormaps[colormap](stretch(x), bytes=True)


def upsample(x: np.ndarray, p: int) -> np.ndarray:
    """One value per patch [..., h, w] -> one per pixel [..., H, W]."""
    return repeat(x, "... h w -> ... (h p1) (w p2)", p1=p, p2=p)


def overlay(image: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Sum of an image [H, W, 3], uint8, and the mean of the stretched heads [M, H, W] in the colours of jet; maximum 255."""
    mean = np.mean([stretch(head) for head in heads], axis=0)
    blend = matplotlib.colormaps["jet"](mean)[..., :3] + image / 255
    return (255 * blend / blend.max()).astype(np.uint8)


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image [H, W, 3], uint8, with a mask [H, W] in half transparent red, its outline in opaque red."""
    inner = mask.copy()  # without the pixels next to one outside
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    alpha = np.where(mask & ~inner, 1.0, 0.5 * mask)[..., None]  # H, W, 1
    return (image * (1 - alpha) + RED * alpha).astype(np.uint8)


def draw_pictures(image: Tensor, attention: Tensor, threshold: float | None) -> dict[str, np.ndarray]:
    """{file name without suffix: picture} of a normalised image [3, H, W] and its attention [M, h, w]."""
    p = image.shape[-1] // attention.shape[-1]
    pixels = (255 * stretch(rearrange(image, "channels H W -> H W channels").numpy())).round().astype(np.uint8)  # H, W, 3
    heads = upsample(attention.numpy(), p)  # M, H, W
    pictures = {"img": pixels, "overlay": overlay(pixels, heads), "attn-mean": colored(heads.mean(0), "viridis")}
    pictures |= {f"attn-head{j}": colored(head, "viridis") for j, head in enumerate(heads)}
    if threshold is not None:
        masks = upsample(threshold_mask(attention, threshold).numpy(), p)  # M, H, W
        pictures |= {f"mask_th{threshold}_head{j}": masked(pixels, mask) for j, mask in enumerate(masks)}
    return pictures


def draw_frame(image: Tensor, attention: Tensor) -> np.ndarray:
    """Picture [H, W, 4] of a video frame [3, H, W]: the mean of the heads [M, h, w]."""
    return colored(upsample(attention.mean(0).numpy(), image.shape[-1] // attention.shape[-1]), "inferno")


def draw_overview(pictures: dict[str, np.ndarray], title: str) -> np.ndarray:
    """All pictures with their names, up to six in a row: [H, W, 4]."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    H, W = pictures["img"].shape[:2]
    figure = Figure(figsize=(2.4 * columns, (2.4 * H / W + 0.35) * rows + 0.35), dpi=100, layout="constrained")
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, (name, pixels) in zip(grid, pictures.items(), strict=False):
        axes.imshow(pixels)
        axes.set_title(printable(name), fontsize=8, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
