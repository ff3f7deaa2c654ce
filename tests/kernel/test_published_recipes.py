"""The recipes of the published cases are recipes, and do in miniature what they do on MNIST."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

import workbench as wb

FILES = sorted((Path(__file__).resolve().parents[2] / "notebooks" / "recipes").glob("*.yaml"))


def shortened(step: wb.Step) -> wb.Step:
    """The step with one epoch instead of many."""
    names = {f.name for f in fields(step)}
    return replace(step, **{name: 1 for name in ("epochs", "rounds") if name in names and getattr(step, name) > 1})


def test_there_is_a_file_for_each_case():
    assert {file.stem for file in FILES} == {"lenet300", "lenet5", "lenet5-caffe", "mlp"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_recipe_goes_through_from_random_weights(file, digits):
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    recipes = [wb.Recipe.from_dict(recipe) for recipe in settings["recipes"]]
    assert recipes[0].steps == recipes[1].steps[:1], "what all recipes share is computed once"
    model = wb.load(settings["model"], weights=settings["weights"])
    assert "random" in model.weights
    for step in map(shortened, recipes[-1].steps):
        step.check(model)
        model = step.apply(model, digits)
    assert len(model.records) >= len(recipes[-1].steps)
    if model.module is None:
        assert model.precision == "int8"
        return
    pruned = next(step for step in recipes[-1].steps if isinstance(step, wb.Prune))
    sizes = wb.sizes(model)
    for layer, ratio in pruned.layers.items():
        weight = model.module.get_submodule(layer).weight
        assert int((weight == 0).sum()) == pytest.approx(ratio * weight.numel(), abs=1)
        assert len(weight.unique()) <= 17  # sixteen shared values, and zero
    assert sizes.coded_bytes < sizes.dense_bytes / 20
