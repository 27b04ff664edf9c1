"""``python -m tools.cuda_check``: see ``check``."""

from .check import app

if __name__ == "__main__":
    app()
