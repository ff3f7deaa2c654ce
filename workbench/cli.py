"""The command line: demo, run, profile, lab, doctor."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from workbench import demo, report
from workbench import formatting as fmt
from workbench.compression import Step
from workbench.data import Task, tasks
from workbench.deployment import BACKENDS, Backend, doctor
from workbench.errors import DataError, LoadError, RecipeError, WorkbenchError, nearest
from workbench.jobs import on_progress
from workbench.models import Model, load
from workbench.profiling import profile
from workbench.study import Recipe, Study

_TASKS = {"digits": tasks.digits, "mnist": tasks.mnist, "cifar10": tasks.cifar10}
_RUN_KEYS = ("model", "architecture", "weights", "task", "data", "store", "recipes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error told on stderr, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command is not _lab:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        options.command(options)
    except WorkbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept in the store, if one was given", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="Make a trained network cheap to run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="LeNet-5 on digits: a dozen candidates, a table, report.html")
    command.add_argument("--store", help="folder to keep the study in (default: in memory)")
    command.add_argument("--report", default="report.html", help="where to write the page (default: %(default)s)")
    command.set_defaults(command=_demo)

    command = commands.add_parser("run", help="run the recipes of a YAML file")
    command.add_argument("file", help="YAML: model, task, store, recipes; or one recipe alone")
    command.add_argument("--model", help="zoo name or file; overrides the file's")
    command.add_argument("--architecture", help="zoo name that a checkpoint's weights belong to")
    command.add_argument("--weights", help="of a zoo network: random, or the task they were trained on")
    command.add_argument("--task", help=f"one of {', '.join(_TASKS)}; overrides the file's")
    command.add_argument("--data", help="the task's .npz file or folder")
    command.add_argument("--store", help="folder to keep the study in; overrides the file's")
    command.add_argument("--report", help="also write the report to this file")
    command.set_defaults(command=_run)

    command = commands.add_parser("profile", help="where the time goes, layer by layer")
    command.add_argument("model", help="zoo name or file")
    command.add_argument("--architecture", help="zoo name that a checkpoint's weights belong to")
    command.add_argument("--input", metavar="SHAPE", help="shape of the float input where the file has none: 1,3,32,32")
    command.add_argument("--on", default=None, choices=sorted(BACKENDS), help="backend (default: the model's own)")
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--csv", help="write the whole table to this file")
    command.set_defaults(command=_profile)

    command = commands.add_parser("lab", help="open JupyterLab on the notebooks; options are passed on to it")
    command.set_defaults(command=_lab)

    command = commands.add_parser("doctor", help="which backends are usable here, and how to enable the others")
    command.set_defaults(command=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> None:
    with demo.study(options.store) as study:
        _run_all(study, list(demo.recipes()))
        print(f"\n{results(study)}\n")
        best = study.best(max_drop=0.01)
        where = f"{best.label} on {best.recipe.backend_label}"
        print(f"Fastest within one point of accuracy: candidate {best.number}, {where}")
        print(f"Report: {report.write(study, options.report)}")


def _run(options: argparse.Namespace) -> None:
    settings, recipes = _read_run(Path(options.file))
    chosen = {k: getattr(options, k) or settings.get(k) for k in _RUN_KEYS if k != "recipes"}
    if not chosen["model"]:
        raise RecipeError(f"{options.file} names no model; add a line such as `model: lenet5`, or give --model.")
    with Study(
        load(chosen["model"], architecture=chosen["architecture"], weights=chosen["weights"]),
        _task(chosen["task"] or "digits", chosen["data"]),
        store=chosen["store"],
    ) as study:
        _run_all(study, [(r.steps, r.backend, r.batch, r.seed) for r in recipes])
        print(f"\n{results(study)}")
        if options.report:
            print(f"Report: {report.write(study, options.report)}")


def _read_run(path: Path) -> tuple[dict[str, Any], list[Recipe]]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no mapping; it needs keys such as model, task and recipes.")
    if "recipes" not in data:
        settings = {k: data.pop(k) for k in _RUN_KEYS if k in data}
        return settings, [Recipe.from_dict(data)]
    for key in data:
        if key not in _RUN_KEYS:
            raise RecipeError(f"{path} has an unknown key {key!r}. {nearest(str(key), _RUN_KEYS)}")
    if not isinstance(data["recipes"], list) or not data["recipes"]:
        raise RecipeError(f"recipes in {path} is {data['recipes']!r}; a list of at least one recipe is needed.")
    return data, [Recipe.from_dict(r) for r in data["recipes"]]


def _task(name: str, data: str | None) -> Task:
    if name not in _TASKS:
        raise DataError(f"there is no task {name!r}. {nearest(name, _TASKS)}")
    if name == "digits":
        return tasks.digits()
    return _TASKS[name](data)


def _profile(options: argparse.Namespace) -> None:
    model = _load(options)
    backend = BACKENDS[options.on]() if options.on else None
    taken = profile(model, on=backend, batch=options.batch)
    frame = taken.frame()
    print(repr(taken)[1:-1])
    lines = [
        (
            row.layer or row.name,
            row.type,
            fmt.significant(row.latency_ms),
            fmt.share(row.share),
            fmt.count(row.macs),
            fmt.count(row.parameters),
        )
        for row in frame.itertuples()
    ]
    print(_columns(("layer", "type", "latency, ms", "share", "MACs", "parameters"), lines, left=2))
    if options.csv:
        frame.to_csv(options.csv, index=False)


def _load(options: argparse.Namespace) -> Model:
    inputs = None
    if options.input:
        try:
            inputs = torch.zeros([int(n) for n in options.input.split(",")])
        except (ValueError, RuntimeError):
            raise LoadError(f"--input is {options.input!r}; a shape such as 1,3,32,32 is needed.") from None
    return load(options.model, architecture=options.architecture, inputs=inputs)


def _lab(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("jupyterlab") is None:
        raise LoadError('JupyterLab is not installed. Install it with: pip install "jupyterlab>=4.2"')
    from jupyterlab.labapp import main as jupyter_lab

    notebooks = Path(__file__).parent.parent / "notebooks"
    if not (
        notebooks / "00_start.ipynb"
    ).exists():  # installed from a wheel: the copy inside the package stays as it is
        bundled, notebooks = Path(__file__).parent / "notebooks", Path.cwd() / "workbench-notebooks"
        if not notebooks.exists():
            shutil.copytree(bundled, notebooks)
    jupyter_lab([str(notebooks / "00_start.ipynb"), *options.rest])


def _doctor(_: argparse.Namespace) -> None:
    lines = [(row.name, "yes" if row.usable else "no", row.why or "", row.command or "") for row in doctor.doctor()]
    print(_columns(("backend", "usable", "why not", "to enable it"), lines, left=4))


def _run_all(study: Study, runs: Iterable[tuple[tuple[Step, ...], Backend] | tuple]) -> None:
    runs = list(runs)
    with tqdm(total=len(runs), unit="candidate", bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}]") as bar:
        for index, (steps, backend, *rest) in enumerate(runs):
            label = Recipe(steps, backend).label
            bar.set_description_str(f"{label} on {backend.label}"[:58].ljust(58), refresh=False)

            def show(fraction: float, _: str, index: int = index) -> None:
                bar.n = index + fraction
                bar.refresh()

            study.run(steps, backend, *rest, progress=on_progress(show))
            bar.n = index + 1
            bar.refresh()


def results(study: Study) -> str:
    """A study's candidates as a table of text, those on the front starred."""
    front = set(study.pareto()["candidate"])
    lines = [
        ("*" if c.number in front else "", *row)
        for c, row in zip(study.candidates, report.rows(study.candidates), strict=True)
    ]
    notes = ["* on the front of accuracy against latency"]
    if any(c.measurement.contended for c in study.candidates):
        notes.append(report.BUSY)
    return "\n".join([_columns(("", *report.HEADER), lines, left=4), *notes])


def _columns(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Text in columns, the first `left` of them flush left and the numbers after them flush right."""
    table = [tuple(header), *map(tuple, lines)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
