"""LeNet-5 and its sibling for small colour images, both 6-16-120-84-10."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def _lenet(channels: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * 5 * 5, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, 10),
        )
    )


def lenet5() -> nn.Sequential:
    """LeNet-5 for 28 × 28 grey images.

    After LeCun et al., "Gradient-based learning applied to document recognition" (1998), with what replaced its tanh
    and trainable averaging: ReLU, which fuses into the layer before it, and max pooling.
    """
    return _lenet(channels=1, padding=2)


def cifarnet() -> nn.Sequential:
    """The same for 32 × 32 colour images, unpadded."""
    return _lenet(channels=3, padding=0)
