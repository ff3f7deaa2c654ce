"""One model, one task, all candidates: recipes, the cache, the record, the Pareto front."""

from workbench.study.candidate import Candidate
from workbench.study.recipe import Recipe
from workbench.study.sensitivity import Sensitivity, sensitivity
from workbench.study.study import Study

__all__ = ["Candidate", "Recipe", "Sensitivity", "Study", "sensitivity"]
