"""ResNets (He et al., arXiv 1512.03385): torchvision's, with its state-dict names, pooled features [B, D], no classifier."""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from clever.models.layers import CheckpointedSequential


class ResNet(TorchvisionResNet):
    """torchvision's ResNet without `fc`: [B, 3, H, W] -> pooled features [B, D], D = `embed_dim`.

    Args:
        block, layers: as torchvision's.
        small: a 3x3 stem of stride 1 and no max pooling, for images of about 32 to 64 pixels.
        checkpointing: recompute each stage in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: list[int], small: bool = False, checkpointing: bool = False
    ) -> None:
        super().__init__(block, layers)
        self.embed_dim = self.fc.in_features
        self.fc = nn.Identity()
        if small:
            self.conv1 = _conv3x3(3, 64, stride=1)
            self.maxpool = nn.Identity()
        if checkpointing:
            for name in ("layer1", "layer2", "layer3", "layer4"):
                setattr(self, name, CheckpointedSequential(*getattr(self, name)))


class ResNet8(nn.Sequential):
    """For tiny images on a CPU: a 3x3 stem of stride 2 and three blocks, [B, 3, H, W] -> [B, 128]."""

    embed_dim = 128

    def __init__(self, checkpointing: bool = False) -> None:
        stage = CheckpointedSequential if checkpointing else nn.Sequential
        super().__init__(
            OrderedDict(
                conv1=_conv3x3(3, 32, stride=2),
                bn1=nn.BatchNorm2d(32),
                relu=nn.ReLU(inplace=True),
                layer1=stage(BasicBlock(32, 32)),
                layer2=stage(BasicBlock(32, 64, stride=2, downsample=_downsample(32, 64))),
                layer3=stage(BasicBlock(64, 128, stride=2, downsample=_downsample(64, 128))),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        self.apply(_init_conv)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, 128]."""
        return super().forward(images.contiguous(memory_format=torch.channels_last))  # faster on a CPU


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    _init_conv(conv)
    return conv


def _downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels))


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# Called with (checkpointing=False).
resnet8 = ResNet8
resnet18 = partial(ResNet, BasicBlock, [2, 2, 2, 2])  # D = 512
resnet50 = partial(ResNet, Bottleneck, [3, 4, 6, 3])  # D = 2048
resnet18_small = partial(resnet18, small=True)  # for small images
resnet50_small = partial(resnet50, small=True)
