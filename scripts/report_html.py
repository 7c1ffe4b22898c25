"""Text, tags and data as HTML: everything is escaped, since names and values come from files of any origin."""

import base64
import hashlib
import html
import json
import math
from pathlib import Path
from typing import Any

from clever.utils import printable

FOLDER = Path(__file__).parent
SHOWN_LENGTH = 300  # of a value that is no number, characters


class Html(str):
    """Finished HTML. All other text is escaped."""


def escape(text: object) -> Html:
    """Any text as HTML."""
    return text if isinstance(text, Html) else Html(html.escape(printable(str(text))))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes: class_ is class, data_key is data-key; None and False are left out."""
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.strip("_").replace("_", "-")
            written += f" {key}" if value is True else f' {key}="{escape(value)}"'
    return Html(f"<{name}{written}>{''.join(map(escape, children))}</{name}>")


def void(name: str, /, **attributes: object) -> Html:
    """An element without an end tag, such as img."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


def number(value: float, digits: int | None = None) -> str:
    """A number with so many digits after the point, or with four that count."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if digits is not None:
        return f"{round(value, digits) + 0:.{digits}f}"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}"


def text_of(value: Any, digits: int | None = None) -> str:
    """A value of any kind as short text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return number(value, digits)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + "…"


def json_block(name: str, value: Any) -> Html:
    """Data for the page's script. It holds no <, so that it cannot end its own element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def data_uri(path: Path) -> str:
    """A PNG file as the address of a picture."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def document(title: str, marker: str, body: Html) -> str:
    """A whole page, with its style and its script.

    Its policy lets it load nothing but pictures that it holds itself, and run no script but its own.
    """
    style, script = ((FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        void("link", rel="icon", href="data:,"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    ]
    parts = [marker, '<html lang="en">', tag("head", *head), f"<body>{body}", f"<script>{script}</script></body></html>\n"]
    return "\n".join(parts)
