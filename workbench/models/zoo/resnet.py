"""ResNets for CIFAR-10 with option-A shortcuts; keys as in the checkpoints of `akamaster/pytorch_resnet_cifar10`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Shortcut(nn.Module):
    """Option A: every `stride`-th pixel, and channels of zeros on both sides; it has no weights.

    Parameters
    ----------
    channels
        How many channels of zeros to add in all; even.
    stride
        In both spatial axes.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.pad, self.stride = channels // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + channels, ⌈H / stride⌉, ⌈W / stride⌉)."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))

    def extra_repr(self) -> str:
        """Its settings, so that a printed model tells two apart."""
        return f"pad={self.pad}, stride={self.stride}"


class Block(nn.Module):
    """Two 3 × 3 convolutions and the shortcut past them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Shortcut(outputs - inputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) to logits (N, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(inputs, outputs, stride), *rest)


def resnet(depth: int) -> ResNet:
    """The network of 6 n + 2 layers; `depth` is 20, 32, 44, 56 and so on.

    After He et al., "Deep residual learning for image recognition" (2016), section 4.2.
    """
    return ResNet((depth - 2) // 6)
