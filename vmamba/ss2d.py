"""The 2D selective scan block of VMamba (arXiv 2401.10166, section 4), on channels-last tensors.

Shapes: C channels of the block, D channels of the scan (ssm_ratio * C), K = 4 directions, N states of a channel,
R rank of delta.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.selective_scan import selective_scan_2d

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}
DIRECTIONS = 4  # row by row, column by column, and both reversed
DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4  # time steps at initialisation


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Conv2d(nn.Conv2d):
    """Convolution of [B, H, W, C]: computed on the permuted view, in torch's channels_last memory format."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return super().forward(x).permute(0, 2, 3, 1)


class SS2D(nn.Module):
    """Projection, depthwise convolution, selective scan in four directions, norm, projection: [B, H, W, C] -> [B, H, W, C].

    The scan's parameters and sums are float32 under autocast too; with forward type v0, so are its input and its projections.

    Args:
        dim: C.
        d_state: N.
        ratio: D / C.
        dt_rank: R; auto means ceil(C / 16).
        act: activation after the convolution and of the gate: silu, gelu or relu.
        kernel: kernel size of the depthwise convolution, odd; no convolution if 1 or less.
        conv_bias: whether the convolution has a bias; it always has with v0.
        dropout: dropout rate after the last projection.
        forward_type: v05_noz: no gate; v05: the scan's output is multiplied by a gate, a second projection of the input;
            v0: gated too, and in float32.
        backend: backend of the scan, see `vmamba.selective_scan`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ratio: float = 1.0,
        dt_rank: int | str = "auto",
        act: str = "silu",
        kernel: int = 3,
        conv_bias: bool = False,
        dropout: float = 0.0,
        forward_type: str = "v05_noz",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = int(ratio * dim)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        self.gated = forward_type != "v05_noz"
        self.full_precision = forward_type == "v0"
        self.backend = backend

        # In the original's order: the state of an optimizer is stored by the position of a parameter.
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * d_state, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(DIRECTIONS * inner, 1))  # [K*D, N]
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.out_norm = nn.LayerNorm(inner)
        self.in_proj = nn.Linear(dim, 2 * inner if self.gated else inner, bias=False)
        self.act = ACTIVATIONS[act]()
        self.conv2d = nn.Identity()
        if kernel > 1:
            bias = conv_bias or forward_type == "v0"
            self.conv2d = Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=bias)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self._init_projections()

    @torch.no_grad()
    def _init_projections(self) -> None:
        """x_proj like torch's Linear; dt_projs_bias such that softplus(bias) is log-uniform in [DT_MIN, DT_MAX]."""
        inner, rank = self.dt_projs_weight.shape[1:]
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        dt = torch.empty_like(self.dt_projs_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)  # [B, H, W, D], or [B, H, W, 2D] with the gate
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        x = self.act(self.conv2d(x))  # [B, H, W, D]
        if self.full_precision:
            with torch.autocast(x.device.type, enabled=False):
                y = self._scan(at_least_float32(x))
        else:
            y = self._scan(x)
        # The norm, like the scan, is computed in float32, unless the whole network was converted to half precision.
        y = self.out_norm(y.to(self.out_norm.weight.dtype)).to(x.dtype)
        if self.gated:
            y = y * self.act(gate)
        return self.dropout(self.out_proj(y))  # [B, H, W, C]

    def _scan(self, x: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D], float32. One projection gives dt, B and C of all directions, without copies of x."""
        weight = at_least_float32(self.x_proj_weight) if self.full_precision else self.x_proj_weight
        proj = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (DIRECTIONS, -1))  # [B, H, W, K, R + 2N]
        y = selective_scan_2d(
            x.permute(0, 3, 1, 2),  # [B, D, H, W]
            proj,
            self.dt_projs_weight,
            -torch.exp(at_least_float32(self.A_logs)),
            self.Ds,
            self.dt_projs_bias.flatten(),
            backend=self.backend,
        )
        return y.permute(0, 2, 3, 1)  # [B, H, W, D]
