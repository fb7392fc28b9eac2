"""Results in a notebook: as tables, with everything escaped."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base.tables import Table, page
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
