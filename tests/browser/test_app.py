"""One real JupyterLab in a real browser: prune, quantise, run, compare, click a point."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.lab import ROOT, Lab, chromium, lab

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="needs playwright: pip install playwright"
    ),
]

CELLS = [
    "import workbench as wb\nfrom widgets import Workbench\n"
    'study = wb.Study(wb.load("lenet5"), wb.tasks.digits())\n'
    "app = Workbench(study)\napp",
    "# a busy cell: waits for a job that ends only when it is cancelled\n"
    "import threading\n"
    "def endless(progress):\n"
    "    waiting = threading.Event()\n"
    "    while True:\n"
    '        progress(0.4, "going on")\n'
    "        waiting.wait(0.02)\n"
    'job = wb.jobs.submit("Endless work", endless)\n'
    "try:\n"
    "    job.wait(120)\n"
    "except wb.errors.Cancelled as stop:\n"
    "    answer = str(stop)",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab with the app open on a study without candidates, and everything the page asked for."""
    with lab(tmp_path_factory.mktemp("lab"), CELLS) as session:
        session.run(0)
        session.page.wait_for_selector(".wb-app .wb-table table")
        yield session


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the screenshots go: the folder WORKBENCH_SCREENSHOTS names, or a temporary one."""
    named = os.environ.get("WORKBENCH_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def show(session: Lab, title: str) -> None:
    session.page.locator(".wb-app").get_by_role("tab", name=title, exact=True).click()


def wait_for_candidate(session: Lab, number: int) -> None:
    """Until the inspector shows that candidate: its run is over, and it was selected."""
    words = session.page.locator(".wb-inspector .wb-name", has_text=re.compile(rf"Candidate {number}:"))
    words.wait_for(timeout=240_000)


def click_point(session: Lab, number: int) -> None:
    """Click the chart where it drew that candidate."""
    spot = session.page.evaluate(
        """(number) => {
            const chart = [...document.querySelectorAll('.wb-filled .js-plotly-plot')].at(-1);
            const points = chart._fullData.find((t) => t.name === 'candidates');
            const index = [...points.customdata].indexOf(number);
            const { xaxis, yaxis } = chart._fullLayout;
            const box = chart.getBoundingClientRect();
            return [box.x + xaxis._offset + xaxis.d2p(points.x[index]), box.y + yaxis._offset + yaxis.d2p(points.y[index])];
        }""",
        number,
    )
    session.page.mouse.move(*spot)
    session.page.mouse.click(*spot)


def test_prune_quantise_run_compare_and_click_a_point(opened: Lab):
    page = opened.page
    show(opened, "Compress")
    panel = page.locator(".wb-panel:visible").filter(has_text="What shall I change?")

    panel.get_by_label("Start from").select_option("the model as it is")
    panel.get_by_text("No steps: this recipe is the model as it is.").wait_for()
    panel.get_by_role("button", name="Run", exact=True).click()
    wait_for_candidate(opened, 1)

    for step in ("Prune", "Quantize"):
        panel.get_by_label("Step", exact=True).select_option(step)
        panel.get_by_role("button", name="Add step").click()
        panel.locator(".wb-card", has_text=step[:5]).wait_for()
    ratio = panel.get_by_label("ratio")
    ratio.fill("1.5")
    ratio.press("Enter")
    panel.locator(".wb-card [role=alert]", has_text="1.5").wait_for()  # the step's own words, on its card
    ratio.fill("0.25")
    ratio.press("Enter")
    panel.get_by_text("Prune 25 % → Quantise int8").first.wait_for()
    panel.get_by_role("button", name="Run", exact=True).click()
    wait_for_candidate(opened, 2)

    show(opened, "Compare")
    click_point(opened, 1)
    wait_for_candidate(opened, 1)
    click_point(opened, 2)
    wait_for_candidate(opened, 2)
    inspector = page.locator(".wb-inspector").inner_text()
    said = json.loads(
        opened.python(
            "import json\nfrom workbench import formatting as f\nm = study.candidates[1].measurement\n"
            "print(json.dumps([f.accuracy(m.accuracy), f.milliseconds(m.latency_ms), f.size(m.size_bytes)]))"
        )
    )
    for words in ("Prune 25 % → Quantise int8", *said):
        assert words in inspector
    assert page.locator(".wb-notices").inner_text() == ""


def test_copy_as_code_puts_the_recipe_on_the_clipboard(opened: Lab):
    opened.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.python("app.selection.candidate = 2")
    wait_for_candidate(opened, 2)
    opened.page.locator(".wb-inspector").get_by_role("button", name="Copy as code").click()
    opened.page.get_by_role("button", name="Copied").wait_for()
    copied = opened.page.evaluate("() => navigator.clipboard.readText()")
    assert copied == 'study.run([wb.Prune(0.25), wb.Quantize("int8")], on=wb.OnnxRuntime())'.replace('"', "'")


def test_the_slowest_layer_of_a_profile_is_highlighted_in_the_model(opened: Lab):
    page = opened.page
    show(opened, "Profile")
    panel = page.locator(".wb-panel:visible").filter(has_text="Where do time and memory go?")
    panel.get_by_role("button", name="Run profile").click()
    row = panel.locator("tr[data-key]", has_text="conv2")
    row.wait_for(timeout=120_000)
    row.focus()
    row.press("Enter")  # by keyboard, as by mouse
    panel.locator("tr.wb-selected", has_text="conv2").wait_for()
    show(opened, "Model")
    page.locator(".wb-panel:visible tr.wb-selected", has_text="conv2").wait_for()


def test_a_column_sorts_by_its_numbers_and_not_by_their_text(opened: Lab):
    show(opened, "Model")
    panel = opened.page.locator(".wb-panel:visible").filter(has_text="What is this network?")
    header = panel.get_by_role("button", name=re.compile("^parameters"))
    header.click()
    header.click()
    assert panel.locator("th[aria-sort=descending]").inner_text().startswith("parameters")
    assert panel.locator("tbody tr td:first-child").all_inner_texts()[:3] == ["fc1", "fc2", "conv2"]


def test_cancel_answers_while_a_cell_is_busy(opened: Lab):
    page = opened.page
    page.evaluate(
        "() => { window.panel.content.activeCellIndex = 1; window.jupyterapp.commands.execute('notebook:run-cell'); }"
    )
    jobs = page.locator(".wb-jobs")
    jobs.get_by_text("Endless work · going on").wait_for()
    jobs.get_by_role("button", name="Cancel").click()  # the cell waits for this; on its own it never ends
    page.locator(".wb-notices", has_text="Endless work was cancelled").wait_for()
    assert "was cancelled at 40%; what was finished is kept." in opened.python("print(answer)")
    page.locator(".wb-notices").get_by_role("button", name="Dismiss").click()


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("width", [1400, 900])
def test_nothing_is_cut_and_colours_follow_the_theme(opened: Lab, pictures: Path, theme: str, width: int):
    page = opened.page
    page.set_viewport_size({"width": width, "height": 1500})
    opened.theme(f"JupyterLab {theme}")
    text = "rgba(0,0,0,0.87)" if theme == "Light" else "rgba(255,255,255,0.90)"
    for title in ("Model", "Profile", "Compress", "Compare"):
        show(opened, title)
        app = page.locator(".wb-app").bounding_box()
        if title in ("Profile", "Compare"):  # charts are drawn again for the theme, and as wide as there is room
            page.wait_for_function(
                """([text]) => [...document.querySelectorAll('.wb-chart .js-plotly-plot')]
                    .filter((c) => c.clientWidth > 0)
                    .every((c) => c._fullLayout.font.color === text && Math.abs(c._fullLayout.width - c.clientWidth) < 2)""",
                arg=[text],
            )
        for control in page.locator(".wb-app button:visible, .wb-app input:visible, .wb-app select:visible").all():
            box = control.bounding_box()
            assert box["x"] >= app["x"] and box["x"] + box["width"] <= app["x"] + app["width"] + 1
        page.locator(".wb-app").screenshot(path=pictures / f"{title.lower()}-{theme.lower()}-{width}.png")
    beside = page.locator(".wb-inspector").bounding_box()["y"] < page.locator(".wb-tabs").bounding_box()["y"] + 100
    assert beside == (width == 1400)


def test_the_saved_notebook_converts_to_a_page_that_is_not_blank(opened: Lab):
    opened.save()
    folder = Path(opened.python("import os; print(os.getcwd())").strip())
    notebook = folder / "test.ipynb"
    assert notebook.stat().st_size < 200_000
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--no-input", "--stdout", str(notebook)]
    page = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for words in ("Which one should I take?", "Prune 25 %", "conv2"):
        assert words in page


def test_nothing_was_fetched_from_elsewhere_and_the_page_had_no_errors(opened: Lab):
    assert [
        url for url in opened.requests if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))
    ] == []
    assert [text for text in opened.errors if "widgets" in text or "anywidget" in text or "wb-" in text] == []
