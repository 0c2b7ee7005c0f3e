"""Reads a report's page as a browser would, and checks that it shows what its JSON says."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "hr", "img", "input"}
"""Elements without an end."""


class Page(HTMLParser):
    """What a page consists of; unbalanced elements fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.values: dict[str, str] = {}
        self.embedded = ""
        self._value: str | None = None
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        self._value = dict(attrs).get("data-value") if tag == "dd" else None

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.embedded += data
        if self._value is not None:
            self.values.setdefault(self._value, data.strip())


def check_page(page: Page, report: dict[str, Any]) -> None:
    """Checks that a page shows a report."""
    assert json.loads(page.embedded) == report
    shown = {name: page.values[f"summary.{name}"] for name in ("num_rows_out", "num_rows_failed")}
    assert {name: int(text.replace(",", "")) for name, text in shown.items()} == {
        name: report["summary"][name] for name in shown
    }
    drawn = [value for tag, name, value in page.attributes if tag == "path" and name == "d"]
    assert len(drawn) == 12  # Area and line of six charts over time.
    assert all(path.startswith("M") and len(path) > 30 for path in drawn)
    bars = [value for tag, name, value in page.attributes if tag == "rect" and name == "class" and "bar" in value]
    assert len(bars) >= 2
    assert sum(tag == "circle" for tag, name, _ in page.attributes if name == "class") == 3
