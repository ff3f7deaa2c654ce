"""torch.compile: what is called compiled is compiled, whole, for every candidate and every batch size."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import workbench as wb
from workbench import deployment
from workbench.errors import BackendError

pytestmark = pytest.mark.skipif(not wb.Compiled().availability().usable, reason=wb.Compiled().availability().why or "-")


class Small(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def small(width: int = 6) -> wb.Model:
    return wb.Model("small", {"x": torch.randn(2, 8)}, module=Small(width))


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 8), dtype=np.float32)


@pytest.fixture
def programs():
    """Programs compiled since the test began."""
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def test_every_batch_size_is_a_program_of_its_own(programs):
    model = small()
    with wb.Compiled().compile(model) as engine:
        for count in (1, 2, 5, 2, 1, 5):
            wanted = model.run_module(torch.from_numpy(rows(count))).detach().numpy()
            np.testing.assert_allclose(engine(rows(count)), wanted, atol=1e-5)
        assert engine.outputs[0].shape == (None, 4)
    assert programs() == 3


def test_the_tenth_model_of_one_class_is_compiled_like_the_first(programs):
    for width in range(3, 13):
        with wb.Compiled().compile(small(width)) as engine:
            engine(rows(1))
    assert programs() == 10


def test_a_closed_engine_frees_its_module():
    model = small()
    kept = weakref.ref(model.module)
    wb.Compiled().compile(model).close()
    del model
    gc.collect()
    assert kept() is None


def test_a_model_that_cannot_be_one_program_is_refused_naming_the_line():
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum().item() > 0 else x

    model = wb.Model("branch", {"x": torch.randn(2, 8)}, module=Branch())
    with pytest.raises(BackendError, match=r"one program of branch: .*test_deployment_compiled\.py.*wb\.Eager\(\)"):
        wb.Compiled().compile(model)


def test_python_that_nothing_depends_on_does_not_stand_in_the_way(programs):
    class Chatty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("seen")
            return x * 2

    with wb.Compiled().compile(wb.Model("chatty", {"x": torch.randn(2, 8)}, module=Chatty())) as engine:
        np.testing.assert_array_equal(engine(rows(3)), rows(3) * 2)


def test_a_package_of_a_compiled_model_is_compiled_again(tmp_path, programs):
    with wb.Compiled(threads=1).compile(small()) as engine:
        wanted = engine(rows(3))
        engine.save(tmp_path / "p")
    with deployment.open(tmp_path / "p") as again:
        assert again.backend == wb.Compiled(threads=1)
        np.testing.assert_allclose(again(rows(3)), wanted, atol=1e-6)
    assert programs() >= 4
