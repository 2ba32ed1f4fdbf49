"""``docs/models.md`` says what the code does."""

from __future__ import annotations

import json

import pytest

from .models_table import JSON, PAGE, TOLERANCE, page, verdict

pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = json.loads(JSON.read_text())
ROWS = {row["model_type"]: row for row in TABLE["rows"]}
# One of each kind; the whole table takes minutes.
SOME = [
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_oss", "glm4", "cohere2", "opt", "phi3", "gpt2",
    "deepseek_v3", "persimmon", "hunyuan_v1_dense",
]  # fmt: skip


def test_the_page_is_the_table():
    assert page(TABLE["rows"], TABLE["transformers"], TABLE.get("gpu")) == PAGE.read_text()


def test_nothing_in_the_table_is_wrong():
    """A model either gives PEFT's logits or is refused."""
    assert not [row for row in TABLE["rows"] if row["status"] == "WRONG"]
    assert all(row["error"] <= TOLERANCE and row["effect"] > 1e-3 for row in TABLE["rows"] if row["status"] == "ok")


@pytest.mark.parametrize("model_type", SOME)
def test_some_of_the_table_again(model_type):
    now, then = verdict(model_type), ROWS[model_type]
    assert now["status"] == then["status"]
    if now["status"] == "refused":
        assert now["message"] == then["message"]
