"""An interactive bench for making a trained network cheaper to run.

Load a model, see where its time goes, compress it, compile it for a real engine, and compare accuracy against speed::

    import workbench as wb

    study = wb.Study(wb.load("lenet5"), wb.tasks.digits())
    study.run([wb.Prune(0.5), wb.Finetune(epochs=2), wb.Quantize("int8")], on=wb.OnnxRuntime())
    study.pareto()
"""

from workbench import compression, data, deployment, environment, errors, jobs, measure, models, profiling, study
from workbench.compression import (
    QAT,
    Clip,
    Cluster,
    Distill,
    FakeQuantize,
    Finetune,
    LowRank,
    Prune,
    Quantize,
    Sizes,
    Step,
    sizes,
)
from workbench.data import Shift, Task, tasks
from workbench.deployment import Backend, Compiled, Eager, Engine, OnnxRuntime, OpenVINO
from workbench.measure import Measurement
from workbench.models import Model, load
from workbench.profiling import Profile, profile
from workbench.study import Candidate, Recipe, Sensitivity, Study, sensitivity, size_table, under_shift

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 by the alphabet alone
    "Backend",
    "Candidate",
    "Clip",
    "Cluster",
    "Compiled",
    "Distill",
    "Eager",
    "Engine",
    "FakeQuantize",
    "Finetune",
    "LowRank",
    "Measurement",
    "Model",
    "OnnxRuntime",
    "OpenVINO",
    "Profile",
    "Prune",
    "QAT",
    "Quantize",
    "Recipe",
    "Sensitivity",
    "Shift",
    "Sizes",
    "Step",
    "Study",
    "Task",
    "compression",
    "data",
    "deployment",
    "environment",
    "errors",
    "jobs",
    "load",
    "measure",
    "models",
    "profile",
    "profiling",
    "sensitivity",
    "size_table",
    "sizes",
    "study",
    "tasks",
    "under_shift",
]
