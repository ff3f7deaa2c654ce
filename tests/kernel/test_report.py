"""The report stands alone and lets no name through as markup."""

from __future__ import annotations

import re

import workbench as wb
from workbench import report


def test_report_holds_chart_table_recipes_and_environment(digits_study, digits_candidate, tmp_path):
    page = report.write(digits_study, tmp_path / "r.html").read_text()
    assert "Plotly.newPlot" in page
    assert digits_candidate.to_python() in page.replace("&#x27;", "'")
    assert digits_candidate.measurement.environment["versions"]["torch"] in page
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["'](https?:)?//""", page)


def test_names_are_escaped(digits, tmp_path):
    with wb.Study(wb.load("lenet5"), digits, name="<img src=x onerror=alert(1)>") as study:
        study.run([], on=wb.Eager())
        page = report.html(study)
    assert "<img src=x" not in page
