"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) as DINO uses them: no classifier, any image size.

Shapes: h w = H/p W/p patches of p pixels, N = h*w, T = 1 + N tokens ([CLS] first), D width, M heads of width E = D/M,
g patches per side of the images that positions are stored for.
"""

from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clever.models.layers import StochasticDepth, checkpointed
from clever.utils import InputError

# In bfloat16 on a CPU, fused attention is faster above this number of tokens. It also needs no T x T matrix.
CPU_FUSED_BF16_ATTENTION_MIN_TOKENS = 1024


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, M, T, E]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, M, E]
        return tuple(rearrange(x, "b t m e -> b m t e") for x in qkv.unbind(2))  # views

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, M, T, T]

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights of every token (row) on every token (column), [B, M, T, T]; rows sum to one."""
        q, k, _ = self._split_heads(x)
        return self._weights(q, k)

    def cls_weights(self, x: Tensor) -> Tensor:
        """Attention weights of [CLS], [B, M, T]: the first row of `weights`, without computing the others."""
        q, k, _ = self._split_heads(x)
        return self._weights(q[:, :, :1], k)[:, :, 0]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split_heads(x)
        x = self._weights(q, k) @ v if self._prefers_plain(q) else F.scaled_dot_product_attention(q, k, v)  # [B, M, T, E]
        return self.proj(rearrange(x, "b m t e -> b t (m e)"))  # [B, T, D]

    def _prefers_plain(self, q: Tensor) -> bool:
        """True where fused attention is slower, and while fvcore traces, which does not count it."""
        slow = q.device.type == "cpu" and q.dtype != torch.float32 and q.shape[2] <= CPU_FUSED_BF16_ATTENTION_MIN_TOKENS
        return slow or torch.jit.is_tracing()


class MLP(nn.Module):
    """Two linear layers with a GELU between, [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; each residual branch is dropped per sample with probability `drop_path`."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(x, lambda x: self.attn(self.norm1(x)))
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping square patches, [B, 3, H, W] -> [B, D, h, w]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise InputError(f"image size {H}x{W} is not a multiple of the patch size {self.patch_size}")
        return self.proj(x)


class VisionTransformer(nn.Module):
    """ViT whose feature is [CLS] after the final norm, with DINO's state-dict names.

    Args:
        patch_size: side of a patch in pixels.
        img_size: side in pixels of the square images that positions are stored for; they are interpolated for other sizes.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0 in the first block.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        InputError: the size of an image given to the network is not a multiple of `patch_size`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        checkpointing: bool = False,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.grid_size = img_size // patch_size
        self.checkpointing = checkpointing
        self.positions_by = "factor"  # how positions are interpolated, "factor" or "size": see _positions

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        drop_paths = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop_path) for drop_path in drop_paths)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [CLS] after the final norm, [B, D]."""
        x = self._tokens(x)
        for block in self.blocks:
            x = checkpointed(block, x, self.checkpointing)
        return self.norm(x[:, 0])

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last `n` blocks in their order, each [B, 1+N, D] after the final norm."""
        x = self._tokens(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block, query by key: [B, M, 1+N, 1+N]."""
        return self.blocks[-1].attn.weights(self._last_attention_input(x))

    def get_last_cls_attention(self, x: Tensor) -> Tensor:
        """Attention weights of [CLS] on the patches in the last block, without computing other rows: [B, M, N]."""
        return self.blocks[-1].attn.cls_weights(self._last_attention_input(x))[:, :, 1:]

    def get_last_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the patches in the last block, heads concatenated: each [B, N, D]."""
        return self.blocks[-1].attn.qkv(self._last_attention_input(x))[:, 1:].chunk(3, dim=-1)

    def _last_attention_input(self, x: Tensor) -> Tensor:
        """Input of the attention in the last block: [B, 1+N, D]."""
        x = self._tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].norm1(x)

    def _tokens(self, x: Tensor) -> Tensor:
        """Embeddings of [CLS] and the patches, with positions: [B, 1+N, D]."""
        x = self.patch_embed(x)  # [B, D, h, w]
        B, _, h, w = x.shape
        x = rearrange(x, "b d h w -> b (h w) d")
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)  # [B, 1+N, D]
        return x + self._positions(h, w)

    def _positions(self, h: int, w: int) -> Tensor:
        """Position embeddings of an h by w grid, [1, 1+h*w, D], interpolated bicubically from the stored g by g grid.

        As in DINO, torch is given a scale factor rather than the output size. The 0.1 guards the size against rounding, but
        torch also uses the factor to place the samples, so it shifts them slightly. Weights trained with one form need the
        same form again: `positions_by` "size" is for weights trained with the output size.
        """
        g = self.grid_size
        if h == w == g:
            return self.pos_embed
        if self.positions_by == "size":
            return _interpolate(self.pos_embed, g, size=(h, w))
        return _interpolate(self.pos_embed, g, scale_factor=((h + 0.1) / g, (w + 0.1) / g))


def _interpolate(pos_embed: Tensor, g: int, **size: Any) -> Tensor:
    """Position embeddings [1, 1+g*g, D] for a grid of another size, [1, 1+h*w, D], bicubically; [CLS] keeps its own."""
    cls, patches = pos_embed.split((1, g * g), dim=1)
    patches = rearrange(patches, "1 (h w) d -> 1 d h w", h=g)
    patches = F.interpolate(patches, mode="bicubic", **size)  # [1, D, h, w]
    return torch.cat((cls, rearrange(patches, "1 d h w -> 1 (h w) d")), dim=1)


def resize_positions(pos_embed: Tensor, grid_size: int) -> Tensor:
    """Position embeddings [1, 1+g*g, D] as [1, 1+grid_size**2, D], bicubically; as they are if the patches form no square."""
    g = isqrt(pos_embed.shape[1] - 1)
    if g == grid_size or 1 + g * g != pos_embed.shape[1]:
        return pos_embed
    return _interpolate(pos_embed.float(), g, size=(grid_size, grid_size), antialias=True)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# Called with (patch_size=16, img_size=224, drop_path_rate=0.0, checkpointing=False).
vit_micro = partial(VisionTransformer, embed_dim=128, depth=6, num_heads=4)  # for small images on a CPU
vit_tiny = partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3)
vit_small = partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6)
vit_base = partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12)
