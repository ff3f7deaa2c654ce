"""`Denoise`: noise taken out of images by a mean, a median, or non-local means."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import ndimage

from workbench.data.cleaning import has_missing
from workbench.data.preprocess import Preprocess, numbers, whole
from workbench.errors import DataError, nearest

_METHODS = ("mean", "median", "non-local means")
_LARGEST_WINDOW = 31


@dataclass(frozen=True)
class Denoise(Preprocess):
    """Take noise out of images, each channel's borders continued by their nearest pixel.

    Parameters
    ----------
    method
        ``mean`` or ``median`` of the window around each pixel, channel by channel; or ``non-local means``: the average
        of those pixels in a wider window whose surroundings look alike, which keeps edges.
    size
        Side of the window, or of the patches that non-local means compare, in pixels; odd.
    search
        Side of the window in which non-local means look for alike patches, in pixels; odd. The other methods have no
        use for it. The work grows with its square.
    strength
        Of non-local means, above 0: how unlike a patch may be, as a share of the image's range of values. The noise's
        standard deviation over that range is a good start.

    Raises
    ------
    DataError
        If a setting is out of range.

    Notes
    -----
    Non-local means after Buades, Coll & Morel, "A non-local algorithm for image denoising", CVPR 2005, section 3:
    ``v̂(i) = Σ_j w(i, j) v(j) / Σ_j w(i, j)`` with ``w(i, j) = exp(-d(i, j) / h²)``. Here ``d`` is the mean squared
    difference of the patches around ``i`` and ``j`` over all channels, each pixel of the patch alike (the paper weighs
    them by a Gaussian); ``j`` runs over the pixels of the image in the search window; ``h`` is `strength` times the
    image's largest minus its smallest value.
    """

    method: str = "median"
    size: int = 3
    search: int = 7
    strength: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise DataError(f"Denoise has no method {self.method!r}. {nearest(str(self.method), _METHODS)}")
        whole("Denoise", "size", self.size, 3, _LARGEST_WINDOW, odd=True)
        whole("Denoise", "search", self.search, 3, _LARGEST_WINDOW, odd=True)
        (strength,) = numbers("Denoise", "strength", self.strength, count=1)
        if strength <= 0:
            raise DataError(f"Denoise has strength={strength:g}; give a share of the image's range above 0, e.g. 0.1.")
        object.__setattr__(self, "strength", strength)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3:
            raise DataError(f"Denoise takes images (N, C, H, W); one sample here has the shape {shape}.")
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        if has_missing(x):
            raise DataError(
                "Denoise was given missing values; put wb.data.Interpolate(), FillMissing or DropMissing before it."
            )
        if self.method == "non-local means":
            return _non_local_means(x, self.size, self.search, self.strength)
        window = {"mean": ndimage.uniform_filter, "median": ndimage.median_filter}[self.method]
        return window(x, size=(1, 1, self.size, self.size), mode="nearest")


def _non_local_means(x: np.ndarray, size: int, search: int, strength: float) -> np.ndarray:
    """All images at once, one place of the search window after the other."""
    height, width = x.shape[2:]
    reach, half = search // 2, size // 2
    wide = np.pad(x, [(0, 0), (0, 0), (reach + half,) * 2, (reach + half,) * 2], mode="edge")
    here = wide[:, :, reach : wide.shape[2] - reach, reach : wide.shape[3] - reach]
    range_ = np.ptp(x, axis=(1, 2, 3))[:, None, None]
    # an image of one value has no range, and only patches that are alike
    divisor = np.where(range_ > 0, (strength * range_) ** 2, 1).astype(np.float32)
    total, weights = np.zeros_like(x), np.zeros_like(x[:, :1])
    for down, right in product(range(search), repeat=2):
        there = wide[:, :, down : down + here.shape[2], right : right + here.shape[3]]
        unlike = ndimage.uniform_filter(np.square(here - there).mean(axis=1), size=(1, size, size), mode="nearest")
        weight = np.exp(-unlike[:, half : half + height, half : half + width] / divisor)
        weight *= _inside(height, down - reach)[:, None] & _inside(width, right - reach)
        total += weight[:, None] * there[:, :, half : half + height, half : half + width]
        weights += weight[:, None]
    return total / weights


def _inside(length: int, offset: int) -> np.ndarray:
    """Which pixels of a side have a neighbour at this distance inside the image."""
    moved = np.arange(length) + offset
    return (moved >= 0) & (moved < length)
