"""The command line: ``python -m examples.g2p train``, ``evaluate``, ``predict``, ``export``, ``compare``."""

from __future__ import annotations

from bench.cli import application

from . import recipe

app = application(help="Seq2Seq writes the phonemes of English words (CMUdict).")
for command in (recipe.train, recipe.evaluate, recipe.predict, recipe.export):
    app.command()(command)

if __name__ == "__main__":
    app()
