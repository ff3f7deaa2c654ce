"""What the panel tests share: a study with three candidates, and how to wait for panels and jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import workbench as wb
from widgets import _bind
from workbench import jobs


@pytest.fixture(scope="session")
def study(digits: wb.Task) -> Iterator[wb.Study]:
    """LeNet-5 on digits: 1 as it is, 2 in int8, 3 pruned by half, all on ONNX Runtime; tests add none."""
    with wb.Study(wb.load("lenet5"), digits) as made:
        for steps in ((), (wb.Quantize("int8"),), (wb.Prune(0.5),)):
            made.run(steps, on=wb.OnnxRuntime())
        yield made


@pytest.fixture
def fresh(digits: wb.Task) -> Iterator[wb.Study]:
    """A study without candidates, for one test."""
    with wb.Study(wb.load("lenet5"), digits) as made:
        yield made


@pytest.fixture
def settle() -> Callable[[], None]:
    """Wait until the handlers posted so far, the jobs they started and the redraws these caused are done."""

    def wait() -> None:
        _bind.flush()
        jobs.submit("settling", lambda progress: None).wait(300)  # the one worker takes jobs in order
        _bind.flush()

    return wait
