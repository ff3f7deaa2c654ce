"""LeNet-5, a narrow one to distil it into, the wide one that is pruned in papers, and a sibling for colour images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def _lenet(channels: int, padding: int, widths: tuple[int, int, int, int] = (6, 16, 120, 84)) -> nn.Sequential:
    first, second, third, fourth = widths
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * 5 * 5, third),
            relu3=nn.ReLU(),
            fc2=nn.Linear(third, fourth),
            relu4=nn.ReLU(),
            fc3=nn.Linear(fourth, 10),
        )
    )


def lenet5() -> nn.Sequential:
    """LeNet-5 for 28 × 28 grey images.

    After LeCun et al., "Gradient-based learning applied to document recognition" (1998), with what replaced its tanh
    and trainable averaging: ReLU, which fuses into the layer before it, and max pooling.
    """
    return _lenet(channels=1, padding=2)


def lenet5_quarter() -> nn.Sequential:
    """LeNet-5 of 3-8-58-42 channels: half as wide, which leaves just under a quarter of its parameters."""
    return _lenet(channels=1, padding=2, widths=(3, 8, 58, 42))


def lenet5_caffe() -> nn.Sequential:
    """The LeNet-5 of the pruning literature: Caffe's, of 20-50-500 channels and 431,080 parameters.

    Han et al. (2015) and "Deep Compression" (2016) call this one LeNet-5; the original has a seventh of its parameters.
    Layers after Caffe's ``examples/mnist/lenet.prototxt``: nothing but pooling follows a convolution.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * 4 * 4, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


def cifarnet() -> nn.Sequential:
    """LeNet-5's widths for 32 × 32 colour images, unpadded."""
    return _lenet(channels=3, padding=0)
