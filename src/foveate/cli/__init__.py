"""The command line, ``foveate``."""

import sys
from importlib.util import find_spec

NEEDS = ("PIL", "filelock", "jinja2", "matplotlib", "rich", "typer")
"""What the extra ``cli`` brings and the commands import."""


def main() -> None:
    """Entry point of the console script; without what it needs, a line says how to get it."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        print(f"foveate: the command line needs {', '.join(missing)}; pip install 'foveate[cli]'", file=sys.stderr)
        sys.exit(2)
    from foveate.cli.app import run_command

    run_command()
