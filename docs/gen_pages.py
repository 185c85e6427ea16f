"""Pages of the site that are made of other files: README and its neighbours, the model cards, the notebook."""

from __future__ import annotations

import re
from pathlib import Path

import mkdocs_gen_files
import nbformat

ROOT = Path(__file__).parents[1]
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CARDS, NOTEBOOK = "reference-models.md", "notebook"
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(#[^)]*)?\)")


def main() -> None:
    """Write them all."""
    for source, page in MOVED.items():
        write(page, LINK.sub(_on_the_site, (ROOT / source).read_text()))
    cards = [link for link, _ in LINK.findall((ROOT / "README.md").read_text()) if _is_card(link)]
    write(CARDS, "\n".join(["# Reference models\n", *(_card((ROOT / card).read_text()) for card in cards)]))
    write(f"{NOTEBOOK}.md", "\n\n".join(_cells(ROOT / "docs" / f"{NOTEBOOK}.ipynb")))


def write(page: str, text: str) -> None:
    """One page of the site."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def _on_the_site(link: re.Match[str]) -> str:
    target, anchor = link[1], link[2] or ""
    page = CARDS if _is_card(target) else MOVED.get(target, target.removeprefix("docs/").replace(".ipynb", ".md"))
    return f"]({page}{anchor})"


def _is_card(link: str) -> bool:
    """Model cards are the pages called README that lie beside the weights."""
    return link.endswith("/README.md")


def _card(text: str) -> str:
    """A model card, one heading down and without its metadata."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"^#", "##", body, flags=re.MULTILINE)


def _cells(path: Path) -> list[str]:
    """Text, code and what it showed, pictures inside of the page."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/jpeg" in data:
                parts.append(f"![what the cell above shows](data:image/jpeg;base64,{''.join(data['image/jpeg'].split())})")
            else:
                parts.append(f"```text\n{output.get('text', data.get('text/plain', '')).rstrip()}\n```")
    return parts


main()
