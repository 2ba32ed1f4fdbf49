"""The notebooks as they are committed, and the script that executes them (which is what runs them in CI: ``make notebooks``)."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OF_A_MACHINE = re.compile(r"/(?:tmp|root|home|Users|usr|opt|mnt)/|[A-Z]:\\|site-packages|\.venv/lib")


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_clean_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and max(map(len, pictures)) < 150_000
    shown = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert OF_A_MACHINE.findall(shown) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_how_to_start_it_and_ends_with_checks(path):
    first, *_, last = cells(path)
    assert "make notebooks" in "".join(first["source"]).splitlines()[0]
    assert last["cell_type"] == "code" and "assert " in "".join(last["source"]) and last["outputs"] == []


def test_links_lead_somewhere():
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        text = "\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
        assert [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (FOLDER / link).is_file()] == []
        assert [name for name in re.findall(r"`((?:docs|examples)/[^`]+)`", text) if not (ROOT / name).exists()] == []
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [path.stem for path in NOTEBOOKS if f"notebooks/{path.stem}.md" not in nav] == []


@pytest.mark.slow
def test_execution_fails_with_a_cell_and_writes_only_what_is_well(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    path = tmp_path / "made_up.ipynb"

    def run(*sources, **options):
        new = nbformat.v4
        notebook = new.new_notebook(cells=[new.new_code_cell(source, id=str(n)) for n, source in enumerate(sources)])
        notebook.metadata["from"] = "somewhere"
        nbformat.write(notebook, path)
        before = path.read_text()
        return script.execute(path, write=True, **options), path.read_text() != before

    outcome, written = run(f"import os; print(os.getcwd() == {str(tmp_path)!r})", "1 + 1")
    assert not outcome.failure and written and outcome.cpu_seconds > 0
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata == script.METADATA and notebook.cells[0].metadata == {}
    assert [cell.outputs[0].get("text", "") for cell in notebook.cells] == ["True\n", ""]

    outcome, written = run("assert 1 == 2, 'not so'")
    assert "not so" in outcome.failure and not written
    outcome, written = run("1", cpu_limit=0.0)
    assert "CPU seconds" in outcome.failure and not written
