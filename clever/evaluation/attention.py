"""What the [CLS] token of a ViT attends to: attention maps, the masks of their largest values, and pictures of both.

Shapes: p patch size, h w rows and columns of patches, M heads.
"""

import matplotlib
import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from clever.evaluation.images import ToNormalizedTensor, montage, read_upright
from clever.utils import InputError

RED = np.array([255, 0, 0])


class PictureDataset(Dataset):
    """(path, normalised image [3, H, W]) of each path, or (path, reason) if it cannot be used; sizes may differ.

    Images are resized to `size`, height and width, or the shorter side, or 0 to keep their sizes; then cropped at the right and
    the bottom to whole patches.
    """

    def __init__(
        self, paths: list[str], size: list[int], patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.paths, self.patch_size, self.to_tensor = paths, patch_size, ToNormalizedTensor(mean, std)
        self.resize = v2.Resize(size, antialias=True) if any(size) else nn.Identity()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[str, Tensor | str]:
        path, p = self.paths[number], self.patch_size
        try:
            image = self.resize(read_upright(path))
        except InputError as error:
            return path, str(error)
        W, H = image.size
        if min(W, H) < p:
            return path, f"image {path}: {W}x{H} pixels are less than a patch of {p}; give a larger --image_size"
        return path, self.to_tensor(image.crop((0, 0, W - W % p, H - H % p)))


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
    """An image [H, W, 3], uint8, with a mask [H, W] in half transparent red."""
    return np.where(mask[..., None], (image + RED) // 2, image).astype(np.uint8)


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


def draw_overview(pictures: dict[str, np.ndarray]) -> np.ndarray:
    """All pictures in their order, six in a row: uint8 [H, W, 3]."""
    images = [Image.fromarray(pixels) for pixels in pictures.values()]
    return montage([images[i : i + 6] for i in range(0, len(images), 6)])
