"""What the README shows is what there is."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import workbench as wb

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_every_name_in_a_python_example_exists(code: str):
    used = {n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    assert [n.attr for n in used if n.value.id == "wb" and not hasattr(wb, n.attr)] == []
    assert [n.attr for n in used if n.value.id == "study" and not hasattr(wb.Study, n.attr)] == []


def test_the_recipes_file_is_one_that_can_be_run():
    (text,) = blocks("yaml")
    recipes = [wb.Recipe.from_dict(recipe) for recipe in yaml.safe_load(text)["recipes"]]
    assert [recipe.family for recipe in recipes] == ["dense", "pruned+quantised"]


def test_the_line_of_the_tests_installs_every_extra_but_the_gpus():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (line,) = [line for line in README.splitlines() if line.endswith("&& .venv/bin/pytest")]
    assert set(re.search(r"\[(.*?)\]", line)[1].split(",")) == set(extras) - {"gpu"}


def test_every_file_it_points_to_exists():
    paths = re.findall(r"\]\((?!http)([^)]+)\)|`((?:workbench|widgets|notebooks|tests|binder)/[\w./-]*)`", README)
    assert [p for pair in paths for p in pair if p and not (ROOT / p).exists()] == []
