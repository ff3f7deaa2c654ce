"""Fixtures that several kinds of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.onnx.errors import OnnxExporterError

import workbench as wb

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and weights beside the repository; skips where a checkout has none."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared/data, which this checkout does not have beside it")
    return SHARED


@pytest.fixture(scope="session")
def digits() -> wb.Task:
    """The embedded task."""
    return wb.tasks.digits()


@pytest.fixture(scope="session")
def digits_study(digits: wb.Task) -> Iterator[wb.Study]:
    """A study of LeNet-5 on digits that tests may add candidates to; kept in memory."""
    with wb.Study(wb.load("lenet5"), digits) as study:
        yield study


@pytest.fixture(scope="session")
def digits_candidate(digits_study: wb.Study) -> wb.Candidate:
    """LeNet-5 as it is on ONNX Runtime, measured."""
    return digits_study.run([], on=wb.OnnxRuntime())


@pytest.fixture
def newer_exporter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx.export works by its older exporter only."""
    newer = torch.onnx.export

    def failing(*args, dynamo: bool = True, **kwargs):
        if dynamo:
            raise OnnxExporterError("the newer one is broken")
        return newer(*args, dynamo=False, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", failing)
