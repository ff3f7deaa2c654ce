"""What imports what, and that every public name explains itself."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import workbench as wb

ROOT = Path(__file__).resolve().parents[2]
NOT_AT_IMPORT = ("IPython", "anywidget", "ipywidgets", "keras", "openvino", "plotly", "sklearn")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def public_classes() -> list[type]:
    return [value for name in wb.__all__ if inspect.isclass(value := getattr(wb, name))]


def public_methods() -> list[tuple[type, str]]:
    """Methods and properties of the public classes that this package itself defines."""
    return [
        (owner, name)
        for owner in public_classes()
        for name, value in inspect.getmembers(owner)
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, property))
        and getattr(getattr(value, "fget", value), "__module__", "").startswith("workbench")
    ]


def test_import_contracts_hold():
    run = python("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_kernel_loads_no_screen_and_no_optional_library():
    run = python("-c", "import json, sys, workbench; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))")
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.splitlines()[-1])
    assert "torch" in loaded
    assert sorted(set(NOT_AT_IMPORT) & set(loaded)) == []


def test_public_names_exist_once_and_in_order():
    assert list(wb.__all__) == sorted(set(wb.__all__))
    assert [name for name in wb.__all__ if not hasattr(wb, name)] == []


@pytest.mark.parametrize("name", wb.__all__)
def test_public_name_explains_itself(name: str):
    assert len((inspect.getdoc(getattr(wb, name)) or "").split()) >= 3


@pytest.mark.parametrize(("owner", "name"), public_methods(), ids=lambda v: getattr(v, "__name__", v))
def test_public_method_explains_itself(owner: type, name: str):
    assert (inspect.getdoc(getattr(owner, name)) or "").strip()


def test_the_version_is_the_distributions():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{wb.__version__}"\n' in pyproject
    assert f"\nversion: {wb.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
