"""What each candidate's weights take, beside whether it runs any faster for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from workbench import formatting
from workbench.compression import sizes
from workbench.jobs import SILENT, Progress
from workbench.study.candidate import Candidate

if TYPE_CHECKING:
    from workbench.study.study import Study

COLUMNS = [
    *("candidate", "label", "engine", "batch", "dense_bytes", "sparse_bytes", "coded_bytes", "size_bytes"),
    *("compression", "faster"),
]


def table(study: Study, *, progress: Progress = SILENT) -> pd.DataFrame:
    """Bytes and speed of every candidate of a study, next to each other.

    Zeros of single weights and shared values make a file smaller and no engine here faster; the last column says what
    was measured.

    Returns
    -------
    pandas.DataFrame
        A row per candidate, by number. Columns: candidate, label, engine, batch; dense_bytes, sparse_bytes (compressed
        sparse rows) and coded_bytes (the file of `compression.coding`) of all its tensors, see `compression.sizes`;
        size_bytes (the deployed artefact after DEFLATE); compression (dense bytes of the untouched model for each
        coded byte); faster (than the untouched model on the same engine at the same batch size: ``1.8 × faster``,
        ``1.1 × slower``, ``indistinguishable``, ``not told: the machine was busy`` while either was measured,
        ``baseline not measured``, or ``baseline`` of that one itself).

    Notes
    -----
    Two candidates are told apart only where their 95 % intervals of latency do not meet, both as measured and with each
    taken relative to the reference engine of its own run, which takes out how the machine drifted between the runs.
    """
    candidates = study.candidates
    untouched = sizes(study.model).dense_bytes
    baselines: dict[tuple, Candidate] = {}
    for candidate in candidates:
        if not candidate.recipe.steps:
            baselines.setdefault((candidate.recipe.backend, candidate.recipe.batch), candidate)
    known: dict[tuple, tuple[int, int, int]] = {}
    rows = []
    for done, candidate in enumerate(candidates):
        progress(done / len(candidates), candidate.label)
        recipe = candidate.recipe
        of = recipe.steps, recipe.seed if recipe.steps else 0
        if of not in known:
            found = sizes(candidate.model())
            known[of] = found.dense_bytes, found.sparse_bytes, found.coded_bytes
        faster = _faster(candidate, baselines.get((recipe.backend, recipe.batch)))
        rows.append(
            (candidate.number, candidate.label, recipe.backend_label, recipe.batch, *known[of])
            + (candidate.measurement.size_bytes, untouched / known[of][-1], faster)
        )
    progress(1.0)
    return pd.DataFrame(rows, columns=COLUMNS)


def _faster(candidate: Candidate, baseline: Candidate | None) -> str:
    if baseline is None:
        return "baseline not measured"
    if candidate is baseline:
        return "baseline"
    mine, theirs = candidate.measurement, baseline.measurement
    if mine.contended or theirs.contended:
        return "not told: the machine was busy"
    drift = theirs.reference_ms / mine.reference_ms
    low, high = mine.latency_interval_ms
    their_low, their_high = theirs.latency_interval_ms
    ratio = theirs.latency_ms / (mine.latency_ms * drift)
    if high * max(drift, 1) < their_low:
        return f"{formatting.factor(ratio)} faster"
    if low * min(drift, 1) > their_high:
        return f"{formatting.factor(1 / ratio)} slower"
    return "indistinguishable"
