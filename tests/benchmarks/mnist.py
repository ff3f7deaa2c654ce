"""The published cases on full MNIST, trained here from random weights by the recipes in notebooks/recipes.

    python tests/benchmarks/mnist.py [--cases lenet300,lenet5-caffe] [--store FOLDER] [--data mnist.npz] [--write]

Each file of recipes is one study: the dense network, then what the case makes of it. `error` is on the 10,000 test
images with its 95 % interval; `fewer` counts parameters that are not zero against all; `smaller` is the coded file
(`workbench.compression.coding`) against the dense float32 weights. With --store the studies are kept, so that a run
that was broken off goes on; with --write the rows replace those of the same networks in notebooks/recipes/results.csv,
which the labs show.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

import workbench as wb
from workbench import environment

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "mnist" / "mnist.npz"
RECIPES = ROOT / "notebooks" / "recipes"
RESULTS = RECIPES / "results.csv"


class Target(NamedTuple):
    """What a recipe is to reach, and what was published."""

    what: str
    error_at_most: float | None  # of 1; None: that of the dense network
    fewer: float = 0.0
    smaller: float = 0.0
    published: str = ""


TARGETS = {
    "lenet300": (
        Target("dense", 0.0170, published="1.64 % (Han 2015)"),
        Target("pruned", None, fewer=12, published="1.59 %, 12 x (Han 2015)"),
        Target("pruned, shared, coded", None, smaller=40, published="1.58 %, 40 x (Deep Compression)"),
    ),
    # what both papers call LeNet-5
    "lenet5-caffe": (
        Target("dense", 0.0085, published="0.80 % (Han 2015)"),
        Target("pruned", None, fewer=12, published="0.77 %, 12 x (Han 2015)"),
        Target("pruned, shared, coded", None, smaller=39, published="0.74 %, 39 x (Deep Compression)"),
    ),
    # the original, a seventh of that, to the same measure
    "lenet5": (
        Target("dense", 0.0085),
        Target("pruned", None, fewer=12),
        Target("pruned, shared, coded", None, smaller=39),
    ),
    "mlp": (
        Target("dense", 0.025, published="6.0 % (textbook)"),
        Target("int8", 0.001, published=""),  # above the dense error
    ),
}


def run(case: str, data: Path, store: str | None) -> list[dict[str, object]]:
    """The rows of the case's candidates, in the order of its file."""
    settings = yaml.safe_load((RECIPES / f"{case}.yaml").read_text(encoding="utf-8"))
    recipes = [wb.Recipe.from_dict(recipe) for recipe in settings["recipes"]]
    model = wb.load(settings["model"], weights=settings["weights"])
    with wb.Study(model, wb.tasks.mnist(data), store=store and f"{store}/{case}") as study:
        rows = []
        for target, recipe in zip(TARGETS[case], recipes, strict=True):
            candidate = study.run(recipe.steps, on=recipe.backend, batch=recipe.batch, seed=recipe.seed)
            rows.append(row(case, target, candidate, rows[0]["error"] if rows else 0.0))
            print(written(rows[-1]), flush=True)
        return rows


def row(case: str, target: Target, candidate: wb.Candidate, dense_error: float) -> dict[str, object]:
    """What one candidate measured, and whether it reaches its target."""
    measured = candidate.measurement
    model = candidate.model()
    dense_bytes = 4 * model.origin.parameters
    if model.module is None:
        fewer, smaller = 1.0, dense_bytes / measured.size_bytes
    else:
        parameters = list(model.module.parameters())
        fewer = model.origin.parameters / sum(int(p.count_nonzero()) for p in parameters)
        smaller = dense_bytes / wb.sizes(model).coded_bytes
    error = 1 - measured.accuracy
    allowed = dense_error if target.error_at_most is None else target.error_at_most
    if target.what == "int8":
        allowed += dense_error
    low, high = (1 - end for end in reversed(measured.accuracy_interval))
    return {
        "network": case,
        "what": target.what,
        "error": round(error, 6),
        "error_low": round(low, 6),
        "error_high": round(high, 6),
        "fewer": round(fewer, 2),
        "smaller": round(smaller, 2),
        "published": target.published,
        "date": candidate.created[:10],
        "holds": error <= allowed + 1e-9 and fewer >= target.fewer and smaller >= target.smaller,
    }


def written(row: dict[str, object]) -> str:
    """A row as a line of the printed table."""
    interval = f"({100 * row['error_low']:.2f} to {100 * row['error_high']:.2f})"
    return (
        f"{row['network']:9} {row['what']:22} {100 * row['error']:5.2f} % {interval:15} {row['fewer']:7.1f} x "
        f"{row['smaller']:7.1f} x  {row['published']:32} {'holds' if row['holds'] else 'MISSED'}"
    )


def keep(rows: list[dict[str, object]]) -> None:
    """Put the rows into the labs' table, in place of those of the same networks."""
    new = pd.DataFrame(rows).drop(columns="holds")
    if RESULTS.exists():
        old = pd.read_csv(RESULTS, keep_default_na=False)
        new = pd.concat([old[~old["network"].isin(new["network"])], new])
    order = list(TARGETS)
    new.sort_values("network", key=lambda names: names.map(order.index), kind="stable").to_csv(RESULTS, index=False)


def main() -> int:
    """Print the table; 0 if every target is reached."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--cases", default=",".join(TARGETS))
    options.add_argument("--store")
    options.add_argument("--data", type=Path, default=DATA)
    options.add_argument("--write", action="store_true")
    asked = options.parse_args()
    print(f"{'network':9} {'what':22} {'error (95 % interval)':23} {'fewer':>9} {'smaller':>9}  published")
    rows = []
    for case in asked.cases.split(","):
        rows += run(case, asked.data, asked.store)
    if asked.write:
        keep(rows)
    here = environment.current()
    print(f"\n{here.processor}, {here.cores} cores, {here.taken}; {here.versions}")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
