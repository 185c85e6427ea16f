"""How results show themselves: a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they say, as an HTML table of two columns that needs no style sheet."""
    body = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(said)}</td></tr>'
        for name, said in rows
    )
    return f"<table>{body}</table>"
