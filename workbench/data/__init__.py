"""Data a model is judged on: tasks, preprocessing, metrics, and the data sets that come ready."""

from workbench.data import tasks
from workbench.data.augment import Augment, Crop, Flip, Rotate
from workbench.data.cleaning import DropMissing, FillMissing, Interpolate
from workbench.data.denoise import Denoise
from workbench.data.metric import Accuracy, Metric
from workbench.data.preprocess import Normalize, Preprocess, Resize, Scale
from workbench.data.scaling import MinMax, Shift, ZScore
from workbench.data.task import Task

__all__ = [
    "Accuracy",
    "Augment",
    "Crop",
    "Denoise",
    "DropMissing",
    "FillMissing",
    "Flip",
    "Interpolate",
    "Metric",
    "MinMax",
    "Normalize",
    "Preprocess",
    "Resize",
    "Rotate",
    "Scale",
    "Shift",
    "Task",
    "ZScore",
    "tasks",
]
