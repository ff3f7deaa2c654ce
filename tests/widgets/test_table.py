"""The table: what it holds, what picking reports, and its fallback."""

from __future__ import annotations

import math

import pytest

from widgets._table import Column, Row, Table


@pytest.fixture
def table() -> Table:
    made = Table([Column("layer", number=False), Column("latency, ms")], caption="Layers", empty="Run a profile first.")
    made.fill(
        [Row("a", ("conv<1>", "0.131"), ("conv<1>", 0.131)), Row("b", ("fc", "–"), ("fc", math.nan), strong=True)]
    )
    return made


def test_rows_carry_what_is_read_and_what_is_sorted_by(table: Table):
    assert table.rows == [
        {"key": "a", "cells": ["conv<1>", "0.131"], "sort": ["conv<1>", 0.131], "strong": False},
        {"key": "b", "cells": ["fc", "–"], "sort": ["fc", None], "strong": True},
    ]


def test_a_row_picked_in_the_page_is_reported_by_its_key(table: Table):
    got = []
    table.on_pick(got.append)
    assert table.pickable
    table._received(table, {"kind": "pick", "key": "b"}, [])
    assert got == ["b"]


def test_a_pick_of_a_row_that_is_gone_is_nothing(table: Table):
    got = []
    table.on_pick(got.append)
    table._received(table, {"kind": "pick", "key": "z"}, [])
    table._received(table, {"key": "a"}, [])
    assert got == []


def test_what_is_written_in_a_cell_is_reported_with_its_row_and_only_where_cells_can_be_written_in(table: Table):
    got = []
    table.on_edit(lambda key, text: got.append((key, text)))
    table._received(table, {"kind": "edit", "key": "b", "text": "0.5"}, [])
    assert got == []
    table.editable = 1
    table._received(table, {"kind": "edit", "key": "b", "text": "0.5"}, [])
    table._received(table, {"kind": "edit", "key": "z", "text": "0.5"}, [])
    assert got == [("b", "0.5")]
    assert not table.pickable


def test_the_fallback_is_an_escaped_table_with_numbers_to_the_right(table: Table):
    html = table.to_html()
    assert '<td style="text-align:left">conv&lt;1&gt;</td><td style="text-align:right">0.131</td>' in html
    assert "conv<1>" not in html


def test_an_empty_table_says_what_to_do_first():
    assert Table([Column("layer")], empty="Run a <profile> first.").to_html() == "<p>Run a &lt;profile&gt; first.</p>"
