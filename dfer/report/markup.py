"""Write the pieces of HTML that all pages are made of."""

import base64
import hashlib
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dfer.cli import printable


def section(title: str, lead: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{content}</section>'


def folded(title: str, lead: str, content: str) -> str:
    """Return a section that is closed at first."""
    return (
        f'<section><h2>{title}</h2><details><summary>{lead} <span class="open">Show</span></summary>{content}</details>'
        "</section>"
    )


def grid(cards: Sequence[str], wide: bool = False) -> str:
    return f'<div class="grid{" wide" * wide}">{"".join(cards)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table with a CSS class; the cells are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{lines}</tbody></table></div>'


def interval_text(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:.1f} to {high:.1f}"


def notes_box(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(printable(note))}</li>" for note in notes)
    return f'<div class="notes"><strong>Missing, or to be known</strong><ul>{items}</ul></div>'


def tiles(contents: Sequence[tuple[str, str, str]]) -> str:
    """Return tiles of (CSS class, number, text)."""
    cards = [
        f'<div class="card tile {kind}"><b>{number}</b><span>{text}</span></div>' for kind, number, text in contents
    ]
    return f'<div class="tiles">{"".join(cards)}</div>' if cards else ""


def settings_section(config: dict[str, Any], summary: str) -> str:
    """Return a section that is closed at first, with all flags of a configuration."""
    settings = f'<div class="card">{table([], _settings_rows(config), "settings")}</div>'
    return f"<h2>Settings</h2><details><summary>{summary}</summary>{settings}</details>"


def _settings_rows(config: dict[str, Any], prefix: str = "--") -> list[list[str]]:
    rows = []
    for key, value in config.items():
        name = f"{prefix}{key}".replace("_", "-")
        nested = isinstance(value, dict)
        rows += _settings_rows(value, f"{name}.") if nested else [[escape(printable(x)) for x in (name, value)]]
    return rows


def document(title: str, lead: str, body: Sequence[str], writer: str) -> str:
    """Return a whole page.

    Args:
        title: as text.
        lead: the line below the title, as text.
        body: HTML.
        writer: the script that the last line names.
    """
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]  # the only one that a browser runs
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(
        title=escape(title), lead=escape(printable(lead)), body="\n".join(body), writer=writer, script=digest
    )
