"""The command line: ``python -m bench.g2p train``, ``evaluate``, ``predict``, ``export``, ``compare``."""

from __future__ import annotations

from ..terminal import application
from . import compare, recipe

app = application(help="Seq2Seq writes the phonemes of English words (CMUdict).")
for command in (recipe.train, recipe.evaluate, recipe.predict, recipe.export):
    app.command()(command)
app.command("compare")(compare.main)

if __name__ == "__main__":
    app()
