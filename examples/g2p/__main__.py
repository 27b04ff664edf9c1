"""The command line: ``python -m examples.g2p train``, ``evaluate``, ``predict``, ``export``."""

from __future__ import annotations

import typer

from . import recipe

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Seq2Seq writes the phonemes of English words (CMUdict).",
)
for command in (recipe.train, recipe.evaluate, recipe.predict, recipe.export):
    app.command()(command)

if __name__ == "__main__":
    app()
