"""LeNet-5 distilled into a quarter of its size on MNIST, against the same student trained alone: accuracy over seeds.

    python tests/benchmarks/distill.py [--store FOLDER] [--samples N] [--epochs N] [--seeds N] …

The teacher is trained on all 60,000 training images. Both students of a pair see the same 10,000 of them (--samples),
with the same tenth held out, in the same order, from the same first weights; only the loss differs. Every accuracy is
of all 10,000 test images, after the epoch that is best on the held-out ones. The last line says whether the 95 %
t-interval of the paired difference lies above zero. With --store teacher and students are kept and found again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.torch import save_file
from scipy import stats

import workbench as wb

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist" / "mnist.npz"
STUDENT = "lenet5-quarter"


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="folder to keep teacher and students in")
    parser.add_argument("--samples", type=int, default=10_000, help="training images of the students")
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12, help="of each student")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--weight", type=float, default=0.9, help="of the teacher's answers against the labels")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("an interval needs at least two seeds")
    return given


def mnist(samples: int) -> wb.Task:
    """MNIST with so many of its training images, drawn with seed 0, and all of its test images."""
    task = wb.tasks.mnist(DATA)
    (x, y), (x_test, y_test) = task.raw("train"), task.raw("test")
    if samples >= len(y):
        return task
    chosen = np.sort(np.random.default_rng(0).permutation(len(y))[:samples])
    return wb.Task.from_arrays(
        x[chosen], y[chosen], x_test, y_test, preprocess=task.preprocess, classes=task.classes, name="mnist"
    )


def teacher(epochs: int, folder: Path) -> wb.Model:
    """LeNet-5 trained on all training images from random weights, or as it was kept in the folder."""
    file = folder / f"lenet5-mnist-{epochs}.safetensors"
    if not file.exists():
        step = wb.Finetune(epochs=epochs, batch_size=64)
        trained = step.apply(wb.load("lenet5", weights="random"), mnist(60_000), seed=0)
        save_file(trained.module.state_dict(), file)
    return wb.load(file, architecture="lenet5")


def pairs(study: wb.Study, given: argparse.Namespace) -> list[tuple[float, float]]:
    """Accuracy of the student alone and of the distilled one, for each seed."""
    found = []
    for seed in range(given.seeds):
        scores = []
        for weight in (0.0, given.weight):
            step = wb.Distill(
                STUDENT, temperature=given.temperature, weight=weight, epochs=given.epochs, learning_rate=5e-3
            )
            scores.append(study.run([step], on=wb.Eager(), seed=seed).measurement.accuracy)
        print(f"seed {seed}: alone {scores[0]:.2%}, distilled {scores[1]:.2%}", flush=True)
        found.append((scores[0], scores[1]))
    return found


def main() -> int:
    """Print each pair, the mean difference with its interval, and whether it excludes zero; 0 if it does."""
    given = options()
    with TemporaryDirectory() as passing:
        folder = given.store or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        task = mnist(given.samples)
        model, count = teacher(given.teacher_epochs, folder), task.count("train")
        with wb.Study(model, task, folder / f"study-{count}-{given.teacher_epochs}") as study:
            print(f"teacher: {study.reference_accuracy:.2%}, {model.parameters:,} parameters", flush=True)
            print(f"students: {wb.load(STUDENT).parameters:,} parameters, {count:,} training images", flush=True)
            alone, distilled = np.array(pairs(study, given)).T
    test = stats.ttest_rel(distilled, alone)
    low, high = test.confidence_interval(0.95)
    mean = (distilled - alone).mean()
    print(
        "holds " if low > 0 else "MISSED",
        f"distilled minus alone: {100 * mean:+.2f} points, 95 % from {100 * low:+.2f} to {100 * high:+.2f}: above zero",
    )
    return 0 if low > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
