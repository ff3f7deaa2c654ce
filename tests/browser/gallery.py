"""Take the README's pictures: the app on the demo's study, light and dark. Run it on a quiet machine.

python tests/browser/gallery.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository's

from tests.browser.lab import lab  # noqa: E402

CELL = """
import workbench as wb
from widgets import Workbench
from workbench import demo

study = demo.study()
for steps, backend in demo.recipes():
    study.run(steps, on=backend)
app = Workbench(study)
app.show("Compare")
app.selection.candidate = study.best(max_drop=0.03).number
app
"""


def main() -> None:
    """Write docs/app.png and docs/app-dark.png."""
    folder = ROOT / "docs"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as notebooks, lab(Path(notebooks), [CELL], height=1400) as session:
        session.run(0)
        session.page.locator(".wb-filled .point").first.wait_for(state="attached")
        for theme, name in (("Light", "app.png"), ("Dark", "app-dark.png")):
            session.theme(f"JupyterLab {theme}")
            session.page.wait_for_timeout(1500)  # until plotly has drawn again; a script, not a test
            session.page.locator(".wb-app").screenshot(path=folder / name)
            print(folder / name)
        print(
            session.python("print(int(study.frame()['contended'].sum()), 'candidates were measured on a busy machine')")
        )


if __name__ == "__main__":
    main()
