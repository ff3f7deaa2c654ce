"""The Pareto front of accuracy against a cost."""

from __future__ import annotations

import numpy as np
import pandas as pd


def front(frame: pd.DataFrame, cost: str = "latency_ms", gain: str = "accuracy") -> np.ndarray:
    """Which rows nobody beats: no other row costs less or as much and gains more or as much, one of them truly.

    Parameters
    ----------
    frame
        A row per candidate, with the two columns; rows with NaN in either are never on the front.

    Returns
    -------
    numpy.ndarray
        bool, one per row. Rows equal in both columns are on the front together.
    """
    costs, gains = frame[cost].to_numpy(float), frame[gain].to_numpy(float)
    mask = np.zeros(len(frame), dtype=bool)
    valid = np.flatnonzero(np.isfinite(costs) & np.isfinite(gains))
    order = valid[np.lexsort((-gains[valid], costs[valid]))]
    best, best_cost = -np.inf, np.nan
    for row in order:
        if gains[row] > best:
            mask[row], best, best_cost = True, gains[row], costs[row]
        elif gains[row] == best and costs[row] == best_cost:
            mask[row] = True
    return mask


def clearly_dominated(frame: pd.DataFrame) -> np.ndarray:
    """Which rows are beaten beyond their intervals.

    A row is clearly dominated where another is at least as good in both accuracy and latency, and in one of them so
    much better that the 95 % intervals do not meet. Other rows off the front cannot be told apart from it.

    Parameters
    ----------
    frame
        The columns accuracy, accuracy_low, accuracy_high, latency_ms, latency_low_ms, latency_high_ms.

    Returns
    -------
    numpy.ndarray
        bool, one per row.
    """
    columns = ("accuracy", "accuracy_low", "accuracy_high", "latency_ms", "latency_low_ms", "latency_high_ms")
    a, a_low, a_high, t, t_low, t_high = (frame[c].to_numpy(float) for c in columns)
    beaten = np.zeros(len(frame), dtype=bool)
    # only rows of the front need be tried: whoever beats a row clearly is beaten, or is there itself
    for other in np.flatnonzero(front(frame)):
        no_worse = (a[other] >= a) & (t[other] <= t)
        beaten |= no_worse & ((a_low[other] > a_high) | (t_high[other] < t_low))
    return beaten
