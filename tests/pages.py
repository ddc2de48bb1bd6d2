"""Pages as a browser would make them, and words that would like to be code."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
EVIL_FILE = "<img src=x onerror=alert(3)>\"'.png"


class Tags(HTMLParser):
    """Every element and attribute of a page, and its words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data

    def active(self) -> list[str]:
        """What would run, or load something from elsewhere."""
        names = [name for name in self.names if name in ("script", "iframe", "object", "embed", "base")]
        return names + [
            f"{name}={value}"
            for name, value in self.attributes
            if name.startswith("on")
            or (value or "").lower().startswith("javascript:")
            or (name in ("src", "href") and not (value or "").startswith(("/", "#", "data:")))
        ]
