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

# every chart in view is as wide as its place
FITTED = """() => [...document.querySelectorAll('.wb-chart .js-plotly-plot')]
    .filter((chart) => chart.clientWidth > 0)
    .every((chart) => Math.abs(chart._fullLayout.width - chart.clientWidth) < 2)"""


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


def wait_for_candidate(session: Lab, number: int, timeout_s: int = 30) -> None:
    """Until the inspector shows that candidate: it was selected, by a click or because its run is over."""
    words = session.page.locator(".wb-inspector .wb-name", has_text=re.compile(rf"Candidate {number}:"))
    words.wait_for(timeout=1000 * timeout_s)


def click_point(session: Lab, number: int) -> None:
    """Click the chart where it drew that candidate."""
    session.page.locator(".wb-filled .point").first.wait_for(state="attached")
    session.page.locator(".wb-filled:visible").scroll_into_view_if_needed()
    session.page.wait_for_function(FITTED)
    session.page.wait_for_timeout(400)  # two clicks within 300 ms are plotly's double click, wherever they are
    spot = session.page.evaluate(
        """(number) => {
            const chart = [...document.querySelectorAll('.wb-filled .js-plotly-plot')].at(-1);
            const points = chart._fullData.find((t) => t.name === 'candidates');
            const index = [...points.customdata].indexOf(number);
            const { xaxis: x, yaxis: y } = chart._fullLayout;
            const box = chart.getBoundingClientRect();
            return [box.x + x._offset + x.d2p(points.x[index]), box.y + y._offset + y.d2p(points.y[index])];
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
    wait_for_candidate(opened, 1, timeout_s=240)

    for step in ("Prune", "Quantize"):
        panel.get_by_label("Step", exact=True).select_option(step)
        panel.get_by_role("button", name="Add step").click()
        panel.locator(".wb-card", has_text=step[:5]).wait_for()
    ratio = panel.get_by_label("ratio", exact=True)
    ratio.fill("1.5")
    ratio.press("Enter")
    panel.locator(".wb-card [role=alert]", has_text="1.5").wait_for()  # the step's own words, on its card
    ratio.fill("0.25")
    ratio.press("Enter")
    panel.get_by_text("Prune 25 % → Quantise int8").first.wait_for()
    panel.get_by_role("button", name="Run", exact=True).click()
    wait_for_candidate(opened, 2, timeout_s=240)

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
    jobs.get_by_text("going on · Endless work").wait_for()
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
                """(text) => {
                    const charts = [...document.querySelectorAll('.wb-chart .js-plotly-plot')]
                        .filter((chart) => chart.clientWidth > 0 && chart.clientHeight > 0);
                    const drawn = (chart) => chart._fullLayout?.font.color === text && chart.querySelector('.point');
                    return charts.length > 0 && charts.every(drawn);
                }""",
                arg=text,
            )
            page.wait_for_function(FITTED)
        app_controls = page.locator(".wb-app").locator("button, input, select, .wb-table-box, .wb-chart")
        for control in app_controls.locator("visible=true").all():
            if control.evaluate("(e) => e.parentElement.closest('.wb-table-box') !== null"):
                continue  # what is inside a table scrolls with it
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
    # as it was when the cell ran: the widgets' own later state is not in the file
    for words in ("Which one should I take?", "No candidates yet.", "conv2"):
        assert words in page


def test_nothing_was_fetched_from_elsewhere_and_the_page_had_no_errors(opened: Lab):
    assert [
        url for url in opened.requests if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))
    ] == []
    assert [text for text in opened.errors if "widgets" in text or "anywidget" in text or "wb-" in text] == []
