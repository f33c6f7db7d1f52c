"""C-Abstractor, Honeybee's projector: convolutions, pooling to fewer tokens, convolutions (arXiv 2312.06742).

Names and shapes of its weights are those of Honeybee's checkpoints, whose blocks are RegNet's as timm writes them.

Letters: B images, S patches of the tower, C its width, H width of the convolutions, Q visual tokens, D width of the
LLM; `s` and `q` are the sides of the square grids, S = s * s and Q = q * q.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CAbstractor(nn.Module):
    """Maps features `[B, S, C]` to visual tokens `[B, Q, D]`, row-major over `grid`.

    `patches` and `queries` (S and Q) are square numbers. `depth` blocks stand before and after the pooling; 0 leaves
    the pooling alone.
    """

    def __init__(
        self, patches: int, width_in: int, width_out: int, queries: int = 256, depth: int = 3, hidden_size: int = 1024
    ):
        super().__init__()
        side = square_side("mm_projector_num_queries", queries)
        self.grid = (side, side)
        self.patch_side = square_side("The number of the tower's patches", patches)
        self.pos_emb = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, patches, width_in), std=0.02))
        pooling = nn.AdaptiveAvgPool2d(side)
        self.net = (
            nn.Sequential(stage(depth, width_in, hidden_size), pooling, stage(depth, hidden_size, hidden_size))
            if depth
            else pooling
        )
        self.readout = nn.Sequential(
            nn.Linear(hidden_size if depth else width_in, width_out), nn.SiLU(), nn.Linear(width_out, width_out)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Visual tokens `[B, Q, D]` of features `[B, S, C]`."""
        pixels = (features + self.pos_emb).transpose(1, 2)  # [B, C, S]
        pixels = pixels.unflatten(2, (self.patch_side, self.patch_side))  # [B, C, s, s]
        pooled = self.net(pixels)  # [B, H, q, q]
        return self.readout(pooled.flatten(2).transpose(1, 2))  # [B, Q, D]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, H, s, s]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` with each position's channels normalised."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """A convolution without bias, and a norm over channels. `bn` is timm's name for whatever norm stands there."""

    def __init__(self, width_in: int, width_out: int, kernel: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = ChannelNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, width_in, s, s]` -> `[B, width_out, s, s]`."""
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """Weighs channels by what the whole image holds."""

    def __init__(self, width: int, narrow: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, narrow, 1)
        self.fc2 = nn.Conv2d(narrow, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` `[B, H, s, s]` with each channel scaled by 0..1."""
        mean = x.mean((2, 3), keepdim=True)  # [B, H, 1, 1]
        return x * self.fc2(F.silu(self.fc1(mean))).sigmoid()


class Block(nn.Module):
    """RegNet's residual block at stride 1, with a depthwise convolution in the middle."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv1 = ConvNorm(width_in, width)
        self.conv2 = ConvNorm(width, width, kernel=3, groups=width)
        self.se = SqueezeExcite(width, round(width_in / 4))  # a quarter of what comes in, as RegNet has it
        self.conv3 = ConvNorm(width, width)
        self.downsample = ConvNorm(width_in, width) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, width_in, s, s]` -> `[B, width, s, s]`."""
        inner = F.silu(self.conv2(F.silu(self.conv1(x))))  # [B, width, s, s]
        return F.silu(self.conv3(self.se(inner)) + self.downsample(x))


def stage(depth: int, width_in: int, width: int) -> nn.Sequential:
    """`depth` blocks under timm's names `b1`, `b2`, ..."""
    blocks = nn.Sequential()
    for number in range(1, depth + 1):
        blocks.add_module(f"b{number}", Block(width_in if number == 1 else width, width))
    return blocks


def square_side(name: str, count: int) -> int:
    """Root of a square number."""
    side = math.isqrt(count) if count > 0 else 0
    if not side or side * side != count:
        raise ValueError(
            f"{name} is {count}, which is not a square number: the C-Abstractor maps a square of patches to a square "
            f"of visual tokens, such as 144 (12 x 12) or 256 (16 x 16)."
        )
    return side
