"""The command line: ``python -m bench.g2p train``, ``evaluate``, ``predict``, ``export``, ``compare``."""

from __future__ import annotations

import typer

from . import compare, recipe

app = typer.Typer(add_completion=False, help="Seq2Seq writes the phonemes of English words (CMUdict).")
for command in (recipe.train, recipe.evaluate, recipe.predict, recipe.export):
    app.command()(command)
app.command("compare")(compare.main)

if __name__ == "__main__":
    app()
