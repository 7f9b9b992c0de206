"""The notebook in examples/ runs from top to bottom, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.fixture(scope="module")
def cells(repo: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outputs of each cell by the first line of its source."""
    notebook = nbformat.read(repo / "examples" / "first_look.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("models/SmolLM2-135M-Instruct", str(tiny_model_dir)).replace(
            "saves/notebook", str(tmp_path_factory.getbasetemp() / "notebook")
        )
    imports = next(cell for cell in notebook.cells if cell.cell_type == "code")
    imports.source += (
        "\nimport dataflex.commands.console as console; console.BRIEF = 0  # a tiny model's tasks are brief"
    )
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(repo / "examples")}}).execute()
    return {cell.source.partition("\n")[0]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text(outputs: list[Any]) -> str:
    return "".join(output["data"].get("text/plain", "") if "data" in output else output["text"] for output in outputs)


def test_what_a_cell_shows_can_be_read(cells: dict[str, Any]) -> None:
    shown = {line: text(outputs) for line, outputs in cells.items()}
    assert "Training: " in shown["config = dataflex.load_config("]
    assert "⟦" in shown['dataflex.inspect("glaive_toolcall_en_demo", config)']
    assert "<row 0 of 'alpaca_en_demo'" in shown["dataflex.load_examples(config)[::15]"]
    assert "60 rows of 8192 float16" in shown['with dataflex.open_store(OUT / "train.h5") as store:']
    assert shown["path = dataflex.score("].startswith("Scores of 60 rows; the best are\n row")
    assert (
        "subset "
        in shown[
            'subset = dataflex.select(config.changed(scores=str(path), top=0.1, output=str(OUT / "subset.jsonl")))'
        ]
    )


def test_progress_is_shown_in_lines(cells: dict[str, Any]) -> None:
    lines = text(cells["checkpoint = dataflex.warmup(config, progress)"])
    assert "train data: 60 of 60 rows" in lines and "gradients: 60 rows in" in lines
