"""Data a model is judged on: tasks, preprocessing, metrics, and the data sets that come ready."""

from workbench.data import tasks
from workbench.data.metric import Accuracy, Metric
from workbench.data.preprocess import Normalize, Preprocess, Resize, Scale
from workbench.data.task import Task

__all__ = ["Accuracy", "Metric", "Normalize", "Preprocess", "Resize", "Scale", "Task", "tasks"]
