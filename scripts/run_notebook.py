"""Executes a notebook and stores printed text and figures in it. Needs no Jupyter."""

from __future__ import annotations

import argparse
import base64
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl

from gradexp.base.files import write_atomically

DPI = 80


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    given = parser.parse_args(words)
    notebook = executed(json.loads(given.notebook.read_text(encoding="utf-8")))
    write_atomically(given.notebook, (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode())


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells, which are executed in one namespace. Errors of cells are raised."""
    mpl.use("agg")
    figures()  # closes those of the caller
    names: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        text = io.StringIO()
        with redirect_stdout(text):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        printed = {"output_type": "stream", "name": "stdout", "text": text.getvalue().splitlines(keepends=True)}
        cell |= {"id": f"cell-{number}", "execution_count": number, "outputs": [printed] if printed["text"] else []}
        cell["outputs"] += figures()
    for number, cell in enumerate(notebook["cells"]):
        cell.setdefault("id", f"text-{number}")
    return notebook


def figures() -> list[dict[str, Any]]:
    """Outputs of the figures that a cell has drawn, which are closed."""
    import matplotlib.pyplot as plt

    outputs = []
    for number in plt.get_fignums():
        content = io.BytesIO()
        plt.figure(number).savefig(content, format="png", dpi=DPI, bbox_inches="tight")
        image = base64.b64encode(content.getvalue()).decode()
        outputs.append({"output_type": "display_data", "metadata": {}, "data": {"image/png": image}})
    plt.close("all")
    return outputs


if __name__ == "__main__":
    main()
