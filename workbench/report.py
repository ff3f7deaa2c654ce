"""A study as one self-contained HTML page: chart, table, recipes, environment."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import yaml

from workbench import formatting as fmt
from workbench.figures.pareto import pareto_figure
from workbench.study import Candidate, Study

_STYLE = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 32px auto; max-width: 1100px; padding: 0 16px; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 32px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
tr.front td { font-weight: 600; }
pre { overflow-x: auto; padding: 8px; border: 1px solid var(--line); }
.chart { background: #fff; }
"""


def write(study: Study, path: str | Path = "report.html") -> Path:
    """Write the report; nothing in it is fetched when it is opened, and every name in it is escaped.

    Parameters
    ----------
    path
        The file to write; replaced atomically if it exists.

    Returns
    -------
    pathlib.Path
        The absolute path written.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.writing")
    temporary.write_text(html(study), encoding="utf-8")
    os.replace(temporary, target)
    return target


def html(study: Study) -> str:
    """The report as text; see `write`."""
    frame = study.frame()
    chart = pareto_figure(frame).update_layout(height=560)
    parts = [
        f"<h1>{escape(study.name)}</h1>",
        f"<p>{len(frame)} candidates, {int(frame['pareto'].sum())} of them on the front (in bold). Accuracy on "
        f"{study.task.count('test')} test samples; intervals are 95 %. Speed-ups are against the untouched model "
        "run in turn with each candidate.</p>",
        f'<div class="chart">{chart.to_html(full_html=False, include_plotlyjs=True)}</div>',
        "<h2>Candidates</h2>",
        _table(study.candidates, set(frame.loc[frame["pareto"], "candidate"])),
        f"<p>{BUSY}</p>" if frame["contended"].any() else "",
        "<h2>Recipes</h2>",
        *(_recipe(c) for c in study.candidates),
        "<h2>Environment</h2>",
        *(_environment(study.candidates)),
    ]
    title = escape(study.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="generator" content="inference-workbench"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )


def rows(candidates: list[Candidate]) -> list[tuple[str, ...]]:
    """Each candidate's line of a results table, as text under `HEADER`."""
    lines = []
    for c in candidates:
        m = c.measurement
        lines.append(
            (
                str(c.number),
                c.label,
                c.recipe.backend_label,
                fmt.accuracy(m.accuracy, unit=False),
                fmt.plus_minus(m.accuracy, m.accuracy_interval, 100),
                ("~" if m.contended else "") + fmt.milliseconds(m.latency_ms, unit=False),
                fmt.latency_interval(m.latency_ms, m.latency_interval_ms),
                fmt.factor(m.speedup),
                fmt.significant(m.throughput_per_s),
                fmt.size(m.size_bytes),
                fmt.significant(m.memory_mb),
            )
        )
    return lines


HEADER = (
    "",
    "recipe",
    "backend",
    "accuracy, %",
    "",
    "latency, ms",
    "",
    "speed-up",
    "samples/s",
    "size",
    "memory, MB",
)


BUSY = "~ timed while other processes kept the machine busy: run again when it is quiet"


def _table(candidates: list[Candidate], front: set[int]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in HEADER)
    body = "".join(
        f"<tr{' class=front' if c.number in front else ''}>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>"
        for c, row in zip(candidates, rows(candidates), strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _recipe(c: Candidate) -> str:
    return (
        f"<details><summary>{c.number}. {escape(c.label)}, {escape(c.recipe.backend_label)}</summary>"
        f"<pre>{escape(c.to_python())}</pre><pre>{escape(c.recipe.to_yaml())}</pre></details>"
    )


def _environment(candidates: list[Candidate]) -> list[str]:
    """One block for each environment that differs in more than load and date."""
    seen: dict[str, list[int]] = {}
    for c in candidates:
        lasting = {k: v for k, v in c.measurement.environment.items() if k not in ("load_average", "taken")}
        seen.setdefault(yaml.safe_dump(lasting, sort_keys=False), []).append(c.number)
    return [
        f"<p>Candidates {', '.join(map(str, numbers))}</p><pre>{escape(text)}</pre>" for text, numbers in seen.items()
    ]
