"""``python -m foveate.reference``."""

from .cli import app

if __name__ == "__main__":
    app()
