"""``docs/models.md`` says what the code does, and ``python -m lora_shared_cache check`` says what the table says."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
import transformers

from lora_shared_cache import graphs
from lora_shared_cache.check import check

from .conftest import emulate_graphs
from .models_table import EFFECT, JSON, PAGE, TOLERANCE, models, page, quiet, reason, verdict
from .tiny_configs import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = json.loads(JSON.read_text())
ROWS = {row["model"]: row for row in TABLE["versions"].get(transformers.__version__, [])}
# What `check` finds by itself: it knows that the config is an encoder-decoder's, and makes adapters of its own.
OF_CHECK = ("is an encoder-decoder model", "PEFT makes no such adapters")


@pytest.fixture(autouse=True)
def in_quiet():
    threads = torch.get_num_threads()
    quiet()
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def test_the_page_is_the_table():
    assert page(TABLE) == PAGE.read_text()


def test_nothing_in_the_table_is_wrong():
    """A model either gives PEFT's logits or is refused."""
    rows = [row for rows in TABLE["versions"].values() for row in rows]
    assert {row["status"] for row in rows} == {"ok", "refused", "not runnable"}
    assert all(row["error"] <= TOLERANCE and row["effect"] > EFFECT for row in rows if row["status"] == "ok")


@pytest.mark.parametrize("name", models())
def test_the_table_again(name, monkeypatch):
    """With decode steps as they are captured, where the table was made without."""
    emulate_graphs(monkeypatch, graphs)
    now = verdict(name)
    assert now["status"] != "WRONG", now
    if ROWS:
        then = ROWS[name]
        assert now["status"] == then["status"], now
        if now["status"] == "refused":
            assert reason(now["message"]) == then["message"]


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name]["status"] != "not runnable"])
def test_check_says_what_the_table_says(name, tmp_path):
    row = ROWS[name]
    tiny_config(name).save_pretrained(tmp_path)
    found = check(tmp_path)
    assert found.possible == (row["status"] == "ok"), found.refused
    if not found.possible and not any(words in found.refused[0] for words in OF_CHECK):
        # Its adapters have another rank, its text model stands alone; BigBird's attention is another class until it is used, so
        # what it has instead of k_proj is not known before.
        said, expected = (re.sub(r"\d+", "n", text) for text in (reason(found.refused[0]), row["message"]))
        assert said == (expected.partition(" (")[0] if name == "big_bird" else expected)
