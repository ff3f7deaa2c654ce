"""`Roofline`: each layer of a profile against what its engine reaches on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench import formatting
from workbench.errors import BackendError, DataError
from workbench.jobs import SILENT, Progress
from workbench.profiling.ceilings import Ceilings
from workbench.profiling.ceilings import ceilings as measured
from workbench.profiling.profile import Profile

ADDED = ["achieved_gop_s", "achieved_gb_s", "bound", "attainable_ms", "gain_ms"]
_MOST = ["name", "layer", "type", "precision", "bound", "latency_ms", "attainable_ms", "gain_ms"]


@dataclass(frozen=True, eq=False)
class Roofline:
    """A profile's rows under the ceilings of its engine.

    Attributes
    ----------
    rows
        See `frame`.
    ceilings
        What the rows are held against.
    """

    rows: pd.DataFrame
    ceilings: Ceilings
    model_name: str
    backend_label: str

    def frame(self) -> pd.DataFrame:
        """The profile's rows and, for each, how near it comes to the ceilings.

        Columns beside the profile's: achieved_gop_s and achieved_gb_s (10^9 operations, two per multiply-accumulate,
        and 10^9 bytes per second); bound (``memory``, ``compute`` or ``unknown``: what limits a layer of this
        intensity); attainable_ms (what it would take at the ceiling that limits it) and gain_ms (what could be saved
        at the most, never negative).

        A row may well be faster than attainable: small tensors stay in the cache, which is faster than memory. Its
        achieved figures stand as they are, and its gain is 0. Unknown, with NaN, are rows whose bytes the engine does
        not tell, and rows that compute in a precision without a ceiling.
        """
        return self.rows.copy()

    def most_to_gain(self, n: int = 5) -> pd.DataFrame:
        """The `n` rows with most to gain, the most first; fewer where fewer have anything to gain.

        Columns: name, layer, type, precision, bound, latency_ms, attainable_ms, gain_ms.

        Raises
        ------
        DataError
            If `n` is below 1.
        """
        if not isinstance(n, int) or n < 1:
            raise DataError(f"n is {n!r}; give a whole number of at least 1.")
        gaining = self.rows[self.rows["gain_ms"] > 0]
        return gaining.nlargest(n, "gain_ms")[_MOST].reset_index(drop=True)

    def __repr__(self) -> str:
        gain = formatting.milliseconds(self.rows["gain_ms"].sum())
        return f"<Roofline {self.model_name} on {self.backend_label}: {gain} to gain at the most; {self.ceilings!r}>"


def roofline(profile: Profile, ceilings: Ceilings | None = None, *, progress: Progress = SILENT) -> Roofline:
    """Where the layers of a profile stand under the roofline of its engine.

    A layer of intensity I (operations per byte) can reach min(peak, I · bandwidth) operations per second, with the peak
    of its precision. It is memory-bound where the second is smaller. Rows that multiply nothing, such as an activation
    or a reformat, are bound by the memory they move.

    Parameters
    ----------
    ceilings
        Measured on the profile's backend by default, which takes a few seconds once per process.

    Raises
    ------
    BackendError
        If the profile was read from files, and `ceilings` is not given.

    References
    ----------
    Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
    Communications of the ACM 52(4), 2009.
    """
    if ceilings is None:
        if profile.backend is None:
            raise BackendError(
                f"The profile of {profile.model_name} was read from files, so there is no engine here to measure the "
                "ceilings on. Give them: roofline(profile, Ceilings(bandwidth_gb_s=…, arithmetic_gop_s={'fp32': …}))."
            )
        ceilings = measured(profile.backend, progress=progress)
    frame = profile.frame()
    return Roofline(frame.assign(**_held_against(frame, ceilings)), ceilings, profile.model_name, profile.backend_label)


def _held_against(frame: pd.DataFrame, ceilings: Ceilings) -> dict[str, np.ndarray]:
    """The columns that `Roofline.frame` adds."""
    latency_ms, macs, read, written = (
        frame[column].to_numpy(float) for column in ("latency_ms", "macs", "read_bytes", "written_bytes")
    )
    moved, operations = read + written, 2 * np.nan_to_num(macs)
    peak = frame["precision"].map(ceilings.arithmetic_gop_s).to_numpy(float)
    computing_ms = np.where(operations > 0, operations / peak, 0.0) / 1e6
    moving_ms = moved / ceilings.bandwidth_gb_s / 1e6
    # NaN wherever one of the two is not known
    attainable_ms = np.maximum(computing_ms, moving_ms)
    bound = np.where(computing_ms > moving_ms, "compute", "memory")
    # below the resolution of an engine's clock there is no rate
    timed_ms = np.where(latency_ms > 0, latency_ms, np.nan)
    return {
        "achieved_gop_s": 2 * macs / timed_ms / 1e6,
        "achieved_gb_s": moved / timed_ms / 1e6,
        "bound": np.where(np.isnan(attainable_ms), "unknown", bound),
        "attainable_ms": attainable_ms,
        "gain_ms": np.maximum(latency_ms - attainable_ms, 0.0),
    }
