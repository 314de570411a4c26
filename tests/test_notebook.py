"""The notebook of the documentation runs from top to bottom, in Jupyter's own way, on a run that is there."""

import nbclient
import nbformat
import pytest
from tiny import ROOT, command_environment


@pytest.mark.slow
@pytest.mark.processes
def test_notebook_runs_from_top_to_bottom(run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(run)
    for name, value in command_environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("Model(MaskDiT of" in output.get("data", {}).get("text/plain", "") for output in outputs)
