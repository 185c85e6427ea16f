"""Pages of the site about methods: one for each under ``methods/``, and an index by place. For mkdocs-gen-files."""

from __future__ import annotations

import mkdocs_gen_files

from foveate.core import registry
from foveate.core.description import describe
from foveate.engine.hosting import by_family
from foveate.report.method_page import method_page, methods_table


def main() -> None:
    """Write them all."""
    known, verdicts = registry.methods(), by_family()
    with mkdocs_gen_files.open("methods/index.md", "w") as file:
        file.write("# Methods\n\n" + methods_table(known.values(), page="{name}.md"))
    for name, kind in known.items():
        where = [verdict for verdict in verdicts if verdict.method == name]
        with mkdocs_gen_files.open(f"methods/{name}.md", "w") as file:
            file.write(method_page(kind, describe(kind), known, where))


main()
