"""k-means in one dimension: the shared values of a layer's weights."""

from __future__ import annotations

import numpy as np

_ROUNDS = 100  # of Lloyd's iteration; it mostly ends by itself before
_EXCHANGES = 25


def kmeans_1d(values: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that stand for all, so that the squared distances to the nearest of them are small.

    Parameters
    ----------
    values
        Any shape, real and finite, at least one; compared in float64.
    clusters
        At least 1.

    Returns
    -------
    centroids
        float32, ascending, all different; `clusters` of them, or fewer where values are too few or too close. Where
        there are no more different values than clusters, they are those values.
    indices
        Shape of `values`, the smallest unsigned dtype: each value's nearest centroid.

    Notes
    -----
    Lloyd's algorithm from evenly spaced centroids, which Han et al., "Deep Compression", ICLR 2016, section 3.2, found
    best for weights. On sorted values a cluster is a stretch, and its mean a difference of prefix sums. From where it
    ends it goes on, as often as that helps, with the clusters that gain most split and those that cost least merged.
    Nothing is drawn at random.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    different = ordered[np.r_[True, ordered[1:] != ordered[:-1]]]
    centroids = different if len(different) <= clusters else _Line(ordered).centroids(clusters)
    centroids = np.unique(centroids.astype(np.float32))
    middles = (centroids[1:].astype(np.float64) + centroids[:-1]) / 2
    return centroids, np.searchsorted(middles, values).astype(np.min_scalar_type(len(centroids) - 1))


class _Line:
    """Sorted values and their prefix sums; clusters are the stretches between `cuts`, none of them empty."""

    def __init__(self, ordered: np.ndarray):
        self._ordered, self._middle = ordered, ordered.mean()
        self._sums = np.r_[0.0, np.cumsum(ordered - self._middle)]  # centred, so that differences keep their digits

    def centroids(self, clusters: int) -> np.ndarray:
        """Means of at most so many clusters, of small distances within."""
        edges = np.linspace(self._ordered[0], self._ordered[-1], clusters + 1)
        best = self._lloyd(self._cuts((edges[1:] + edges[:-1]) / 2))
        best = self._lloyd(self._exchanged(best, clusters, 0))
        most = clusters // 2 + 1
        for _ in range(_EXCHANGES):
            tried = self._lloyd(self._exchanged(best, clusters, most))
            if self._between(tried) > self._between(best):
                best = tried
            elif most == 1:
                break
            else:
                most //= 2
        return self._means(best)

    def _means(self, cuts: np.ndarray) -> np.ndarray:
        return np.diff(self._sums[cuts]) / np.diff(cuts) + self._middle

    def _between(self, cuts: np.ndarray) -> float:
        """Squares between the clusters: as much as this is more, the squares within are less."""
        return float((np.diff(self._sums[cuts]) ** 2 / np.diff(cuts)).sum())

    def _cuts(self, centroids: np.ndarray) -> np.ndarray:
        inner = np.searchsorted(self._ordered, (centroids[1:] + centroids[:-1]) / 2)
        return np.unique(np.r_[0, inner, len(self._ordered)])

    def _lloyd(self, cuts: np.ndarray) -> np.ndarray:
        for _ in range(_ROUNDS):
            after = self._cuts(self._means(cuts))
            if np.array_equal(after, cuts):
                break
            cuts = after
        return cuts

    def _exchanged(self, cuts: np.ndarray, clusters: int, most: int) -> np.ndarray:
        """`cuts` with those added that are missing of `clusters`, and at most `most` moved to where they gain more."""
        split = np.searchsorted(self._ordered, self._means(cuts))
        inside = (split > cuts[:-1]) & (split < cuts[1:])
        gains = np.where(inside, self._worth(cuts[:-1], split, cuts[1:]), 0.0)
        costs = self._worth(cuts[:-2], cuts[1:-1], cuts[2:])
        by_gain, by_cost = np.argsort(-gains, kind="stable"), np.argsort(costs, kind="stable")
        missing = clusters - (len(cuts) - 1)
        moved = min(most, len(costs), max(int((gains > 0).sum()) - missing, 0))
        kept = np.delete(cuts, 1 + by_cost[:moved])
        added = by_gain[: missing + moved]
        return np.unique(np.r_[kept, split[added[gains[added] > 0]]])

    def _worth(self, start: np.ndarray, cut: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """How many squares within a cut between two neighbours saves."""
        left, right = np.maximum(cut - start, 1), np.maximum(stop - cut, 1)
        apart = (self._sums[cut] - self._sums[start]) / left - (self._sums[stop] - self._sums[cut]) / right
        return apart**2 * left * right / (left + right)
