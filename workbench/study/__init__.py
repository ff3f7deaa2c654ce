"""One model, one task, all candidates: recipes, the cache, the record, the Pareto front."""

from workbench.study.candidate import Candidate
from workbench.study.recipe import Recipe
from workbench.study.sensitivity import Sensitivity, sensitivity
from workbench.study.shift import under_shift
from workbench.study.sizes import table as size_table
from workbench.study.study import Study

__all__ = ["Candidate", "Recipe", "Sensitivity", "Study", "sensitivity", "size_table", "under_shift"]
