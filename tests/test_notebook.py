"""The notebook in examples/ runs, with a shorter training, and its cells show the kinds of numbers and pictures that it keeps."""

import nbformat
import pytest

from tests.configuration import ROOT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def kinds(notebook):
    """What each cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.get("name") or sorted(output["data"]) for output in cell.outputs] for cell in cells]


@pytest.mark.slow
def test_the_notebook_shows_what_is_kept_in_it(tmp_path):
    client = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    kept, run = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    for cell in run.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    training = next(cell for cell in run.cells if "roi_quantization.train(cfg)" in cell.source)
    for setting in ("trainer.max_epochs=", "trainer.check_val_every_n_epoch="):
        assert f"{setting}12" in training.source
        training.source = training.source.replace(f"{setting}12", f"{setting}1")
    client.NotebookClient(run, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds(run) == kinds(kept)
    assert sum("image/png" in str(cell) for cell in kinds(kept)) == 2 and "stderr" not in str(kinds(kept))
    text = "".join(output.text for cell in run.cells if cell.cell_type == "code" for output in cell.outputs if "text" in output)
    assert "(96, 96, 3) uint8 ->" in text and "align  AP" in text and "pool   AP" in text
