"""Projection heads and the multi-crop network.

IR is the invariant part of the representation, EF its equivariant factor.

Shapes: V views, D width of the representation, K and K2 outputs of the two heads, C width of a head's bottleneck.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F

from clever.utils import InputError


class Split:
    """The cut of a representation of width `dim` into the IR, its first int(dim * hp1) columns, and the EF, the rest (CLeVER,
    section 3): `z[:, split.ir]`, `z[:, split.ef]`.

    Raises InputError if hp1 leaves one of the parts empty.
    """

    def __init__(self, dim: int, hp1: float) -> None:
        if not self.leaves_both(dim, hp1):
            raise InputError(f"hp1 {hp1}: leaves the IR or the EF of a representation of width {dim} empty")
        self.dim, self.hp1 = dim, hp1
        cut = int(dim * hp1)
        self.ir, self.ef = slice(0, cut), slice(cut, dim)

    @staticmethod
    def leaves_both(dim: int, hp1: float) -> bool:
        """Whether neither part is empty."""
        return 0 < int(dim * hp1) < dim

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of the IR and of the EF."""
        return self.ir.stop, self.dim - self.ir.stop


def split_ir_ef(z: torch.Tensor, hp1: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Representations z [..., D] -> IR [..., int(D * hp1)] and EF, the other columns. Raises InputError as `Split` does."""
    split = Split(z.shape[-1], hp1)
    return z[..., split.ir], z[..., split.ef]


class _NormalizedLinear(torch.autograd.Function):
    """y = (x v^T) * g / |v|, forward and backward without materialising the normalised weight.

    At K = 65536 this weight and its gradient would be the largest tensors of a step besides the parameters.
    """

    @staticmethod
    def forward(ctx, x, v, g):
        norm = torch.linalg.vector_norm(v, dim=1)  # K
        ctx.save_for_backward(x, v, g, norm)
        return F.linear(x, v).mul_(g.squeeze(1) / norm)  # B, K

    @staticmethod
    def backward(ctx, grad_y):
        x, v, g, norm = ctx.saved_tensors
        scaled = grad_y * (g.squeeze(1) / norm).to(grad_y.dtype)  # B, K
        grad_x = (scaled @ v.to(scaled.dtype)).to(x.dtype)  # B, C
        grad_v = (scaled.T @ x.to(scaled.dtype)).to(v.dtype)  # K, C
        radial = torch.einsum("kc,kc->k", grad_v, v)  # component of grad_v along v, removed by the normalisation
        grad_g = (radial / g.squeeze(1))[:, None] if ctx.needs_input_grad[2] else None
        return grad_x, grad_v.addcmul_(v, (radial / norm.square())[:, None], value=-1), grad_g


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have length g: y_k = g_k <x, v_k> / |v_k|.

    The parameters are called `weight_g` [K, 1] and `weight_v` [K, C], as in DINO's checkpoints (torch's first weight norm).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NormalizedLinear.apply(x, self.weight_v, self.weight_g)  # B, K


class DINOHead(nn.Module):
    """MLP, L2-normalised bottleneck and weight-normalised last layer (DINO, section 3.1 and appendix C).

    Args:
        in_dim: width of the input.
        out_dim: K, the number of outputs ("prototypes").
        use_bn: batch norm after each hidden layer.
        norm_last_layer: keep the length of the last layer's rows at 1.
        nlayers, hidden_dim, bottleneck_dim: layers of the MLP, and their widths.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers.append(nn.Linear(n_in, n_out))
            if i < len(widths) - 2:
                layers += [nn.BatchNorm1d(n_out), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, in_dim] -> logits [B, out_dim]."""
        x = self.mlp(x)  # B, C
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x)  # B, K


class MultiCropWrapper(nn.Module):
    """Backbone and heads applied to several crops; the backbone runs once per resolution.

    Args:
        backbone: images [B, 3, H, W] -> representations z [B, D].
        head: projection head of the representation, or of its IR if there is a head2 or hp1 is less than 1.
        head2: projection head of the EF, or None.
        hp1: share of the IR in the representation; 1 without a head2: there are no parts.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, head2: nn.Module | None = None, hp1: float = 1.0):
        super().__init__()
        self.backbone, self.head, self.head2, self.hp1 = backbone, head, head2, hp1

    def forward(self, crops: torch.Tensor | Sequence[torch.Tensor], return_features: bool = False):
        """Crops [V'*B, 3, H, W], those of equal size adjacent -> logits [V*B, K], or with a head2 [V*B, K] and [V*B, K2].

        V' views of equal size may be concatenated already; V counts all of them.

        With `return_features`, the representation z [V*B, D] is also returned.
        """
        crops = [crops] if isinstance(crops, torch.Tensor) else crops
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        batches = [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
        z = torch.cat([self.backbone(batch) for batch in batches])  # V*B, D
        ir, ef = (z, None) if self.is_whole else split_ir_ef(z, self.hp1)
        out = self.head(ir) if self.head2 is None else (self.head(ir), self.head2(ef))  # V*B, K and V*B, K2
        return (out, z) if return_features else out

    @property
    def is_whole(self) -> bool:
        """Whether the representation has no parts."""
        return self.head2 is None and self.hp1 == 1

    @property
    def heads(self) -> list[nn.Module]:
        """The one or two heads."""
        return [head for head in (self.head, self.head2) if head is not None]

    def split(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split representations z [B, D] into {"_IR": IR, "_EF": EF}; without parts, return {"": z}.

        The keys are suffixes: the log has `feature_std_IR` and `feature_std_EF`, or `feature_std`.
        """
        return {"": z} if self.is_whole else dict(zip(("_IR", "_EF"), split_ir_ef(z, self.hp1), strict=True))
