"""The HTML page: self-contained, safe with any text, and valid for both colour schemes."""

from __future__ import annotations

from html.parser import HTMLParser

from servingtiers.reporting.page import Figure, Page, Table, Text


class Elements(HTMLParser):
    """Collects elements and checks that they close in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        """Note an element."""
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        """Check that the innermost element ends."""
        assert self.open.pop() == tag


def a_page(text: str) -> str:
    """A page with one of everything."""
    figure = Figure([{"type": "scatter", "x": [1, 2], "y": [3, 4], "name": text}], {"height": 300}, text)
    return Page(
        text,
        text,
        [(text, [Text(text, "good"), Table(("a", "b"), [(text, "1")], frozenset({"a"})), figure])],
        text,
    ).html()


def test_every_element_is_closed_and_every_part_is_there() -> None:
    """Browsers forgive; artefact viewers may not."""
    elements = Elements()
    elements.feed(a_page("plain"))

    assert elements.open == []
    assert {"table", "footer", "h1", "h2", "script", "style"} <= set(elements.seen)


def test_text_cannot_become_markup_or_end_a_script() -> None:
    """Model names and reasons come from users."""
    page = a_page('</script><script>alert("x")</script><b>')

    assert "<script>alert" not in page
    assert "<b>" not in page


def test_nothing_is_loaded_from_elsewhere() -> None:
    """The page opens from an e-mail on a train."""
    head = a_page("plain").split("<body>")[0]

    assert "src=" not in head.split("<script>")[0]
    assert "@import" not in head.split("<script>")[0]
    assert "prefers-color-scheme: dark" in head
