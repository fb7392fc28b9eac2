"""Results in a notebook: as tables, with everything escaped."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base.tables import Table, page
from spurge.engine.cascade.attribution import Attribution
from spurge.engine.evaluation.groups import compare
from spurge.engine.evaluation.report import Report
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.methods.fcr.removal import Removal
from spurge.methods.find.found import Found
from spurge.methods.macu.located import Located
from spurge.methods.mediation.effects import Effects
from spurge.methods.neurontune.tuned import Tuned
from spurge.report.results import Results


class Shown(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    shown = Shown(page([Table(text, [["a", text], [text, "b"]], [text])], [text]))
    assert set(shown.tags) <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p", "bdi"}
    assert "".join(shown.text).count(text) >= 5 if text else True


def test_results_are_a_table() -> None:
    results = Results("demo")
    results.add("<script>alert(1)</script>", "none", "accuracy", 61.5, n=200, unit="percent")
    shown = Shown(results._repr_html_())
    assert "script" not in shown.tags
    assert shown.tags.count("tr") == 2
    assert {"case", "61.5", "percent", "200"} <= set(shown.text)
    assert "table" not in Shown(Results("empty")._repr_html_()).tags


@pytest.mark.parametrize("kind", [Attribution, Effects, Found, Located, Removal, Report, Results, Tuned])
def test_results_have_a_form_for_notebooks(kind: type) -> None:
    assert callable(getattr(kind, "_repr_html_", None))


def test_a_report_is_rendered_as_its_tables() -> None:
    head = Head(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]))
    test = Features(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2, head)
    report = compare(test, {"none": head, "FCR <b>": head.with_(weight=-head.weight)}, bootstrap=20)
    shown = Shown(report._repr_html_())
    tables = list(report.tables())
    assert shown.tags.count("table") == len(tables)
    assert shown.tags.count("th") == sum(len(lines[0]) for _, lines, _ in tables)
    assert {"accuracy, percent", "FCR <b>", "test"} <= set(shown.text)
    assert set(report.notes) <= set(shown.text)
