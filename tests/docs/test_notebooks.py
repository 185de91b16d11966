"""The notebooks run from a clean kernel, and their committed outputs are complete."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "notebooks"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq", "ignore::UserWarning:zmq")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    committed = [[output.output_type for output in cell.outputs] for cell in cells]
    resources = {"metadata": {"path": str(tmp_path)}}
    # Into how many streams the kernel splits what a cell prints depends on timing.
    NotebookClient(notebook, timeout=600, resources=resources, coalesce_streams=True).execute()
    assert [[output.output_type for output in cell.outputs] for cell in cells] == committed


def test_notebooks_are_small() -> None:
    paths = list(FOLDER.glob("*.ipynb"))
    assert len(paths) == 3
    assert all(path.stat().st_size < 200_000 for path in paths)
