"""``python -m foveate_reference``."""

from .training.cli import app

if __name__ == "__main__":
    app(prog_name="python -m foveate_reference")
