"""The demo: its search tool, how it reads and ends turns, its loop with scripted agents, its replay, and one real run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import agents_demo
import pytest
import search_tool
from agents_demo import Caches, Episode, Turn, closing, equal_choices, replay, tool_argument, tool_name, turn_is_over
from search_tool import Article, SearchTool
from smollm2 import smollm2_available
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache

from .tiny import share_a, tiny_llama, tokens, with_adapters

ROOT = Path(__file__).resolve().parents[1]


# --- The search tool --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> list[Article]:
    return search_tool.read_articles()


@pytest.fixture
def tool(library) -> SearchTool:
    return SearchTool(library)


def test_the_library_is_small_articles_with_titles_of_their_own(library):
    assert 30 <= len(library) <= 40
    assert len({article.title for article in library}) == len(library)
    lengths = {article.title: len(article.text.split()) for article in library}
    assert {title: n for title, n in lengths.items() if not 60 <= n <= 120} == {}
    assert not [article.title for article in library if "\n" in article.text]


@pytest.mark.parametrize("entry", agents_demo.read_questions(), ids=lambda entry: entry["answers"][0])
def test_each_question_can_be_answered_from_what_the_search_finds_for_it(tool, entry):
    observation = tool.call("BingSearch", entry["question"])
    assert any(answer.casefold() in observation.casefold() for answer in entry["answers"])


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("glowing shrimps in swarms", "Krill"),  # stemmed: shrimp-like, swarm
        ("Who deciphered the hieroglyphs?", "Rosetta Stone"),
        ("rosetta stone", "Rosetta Stone"),
    ],
)
def test_search_finds_the_article(tool, query, title):
    assert tool.search(query)[0].title == title


@pytest.mark.parametrize("query", ["", "?", "the", "AND OR NOT", "not the", 'title:"', "(((", "zxqv", "a" * 5000])
def test_search_takes_any_text(tool, query):
    assert tool.call("BingSearch", query) == "No Results"


def test_a_search_shows_the_best_article_and_the_start_of_the_next(tool):
    best, second = tool.search("Baikal seal", limit=2)
    assert tool.call("BingSearch", "Baikal seal") == f"{best.text} {second.sentences[0]}"


def test_the_same_search_again_goes_on_down_the_list(tool):
    query = "leaves of green plants"
    expected = [article.title for article in tool.search(query, limit=100)]
    assert len(expected) > 2
    for title in expected:
        assert tool.call("BingSearch", query).startswith(next(a.text for a in tool.articles if a.title == title))
    assert tool.call("BingSearch", query) == "No more results"


def test_retrieve_finds_a_title_or_offers_similar_ones(tool, library):
    chess = next(article for article in library if article.title == "Chess")
    assert tool.call("Retrieve", "'chess'") == chess.text
    assert tool.call("Retrieve", "mercury").startswith("Mercury is a metal")  # a title less what is in parentheses
    assert tool.call("Retrieve", "river of Egypt").startswith(
        "Could not find [river of Egypt]. Similar: ['Amazon River', 'Nile', "
    )
    assert tool.call("Retrieve", "zxqv") == "Could not find [zxqv]."


def test_lookup_walks_through_the_last_passage(tool):
    assert tool.call("Lookup", "hearts") == "No Results"  # nothing was found before
    tool.call("Retrieve", "Octopus")
    first, second = tool.call("Lookup", "blood"), tool.call("Lookup", "Blood")
    assert first.startswith("(Result 1/2) It has three hearts")
    assert second.startswith("(Result 2/2) Its blood is blue")
    assert tool.call("Lookup", "blood") == "No more results"
    assert tool.call("Lookup", "copper").startswith("(Result 1/1)")
    assert tool.call("Lookup", "whale") == "No Results"


def test_an_unknown_tool_is_answered(tool):
    assert tool.call("Image2Text", "image") == (
        "There is no tool Image2Text. The tools are BingSearch, Retrieve, Lookup."
    )


# --- The text of a turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "over", "missing"),
    [
        ("thought", " I need [more]", False, "\n"),
        ("thought", " I need more.\n", True, ""),
        ("thought", " Done.\n\n", True, ""),
        ("action_type", " Bing", False, "["),
        ("action_type", " BingSearch[", True, ""),
        ("action_type", " Finish\n", True, "["),
        ("argument", "how do bees", False, "]\n"),
        ("argument", "how do bees]", False, "\n"),
        ("argument", "how do bees]\n", True, ""),
        ("argument", "how do bees\n", True, ""),
        ("argument", "how do bees] and", True, "\n"),
        ("argument", "a [b] c]", False, "\n"),
        ("verdict", " Reflect[right]", False, "\n"),
        ("verdict", " Reflect[right]\n", True, ""),
    ],
)
def test_where_a_turn_ends(kind, text, over, missing):
    assert turn_is_over(kind, text) == over
    assert closing(kind, text) == missing


def test_tool_calls_are_read():
    assert tool_name(" BingSearch[") == "BingSearch"
    assert tool_name(" no bracket at all") == "no bracket at all"
    assert tool_argument("how do bees find flowers]\n") == "how do bees find flowers"
    assert tool_argument(" in [brackets] ]\n") == "in [brackets]"
    assert tool_argument("cut off at its lim") == "cut off at its lim"
    assert tool_argument("") == ""


# --- The loop, with agents that follow a script -------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are the characters."""

    all_special_ids, eos_token_id = [0], 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def scripted(monkeypatch, script):
    """An episode whose agents write the lines of `script`, which maps (agent, kind) to what it writes each time."""
    lines = {key: iter(texts) for key, texts in script.items()}

    def take_turn(model, caches, agent, kind, prompt, **generate):
        text = next(lines[agent, kind])
        return Turn(agent, kind, prompt, [ord(letter) for letter in text], covered=0, seconds=0.0, nbytes=1)

    monkeypatch.setattr(agents_demo, "take_turn", take_turn)
    return Episode(None, Letters(), SearchTool([Article("Owl", "Owls fly in silence.")]), None, "How do owls fly?")


REFLECT = {("reflect", "thought"): [" That is in the text.\n"], ("reflect", "verdict"): [" Reflect[right]\n"]}


def test_the_agents_take_turns_until_finish(monkeypatch):
    episode = scripted(
        monkeypatch,
        {
            ("plan", "thought"): [" I search.\n", " I know it.\n"],
            ("plan", "action_type"): [" BingSearch[", " Finish["],
            ("action", "argument"): ["owls]\n", "in silence]\n"],
            **REFLECT,
        },
    )
    pieces = list(episode.run(max_steps=4))
    assert "".join(piece.text for piece in pieces) == (
        "Thought: I search.\nAction: BingSearch[owls]\nObservation: Owls fly in silence.\n"
        "Thought: I know it.\nAction: Finish[in silence]\nObservation: Please reflect your answer.\n"
        "Thought: That is in the text.\nAction: Reflect[right]\n"
    )
    assert episode.answer == "in silence"
    assert [turn.agent for turn in episode.turns] == ["plan", "plan", "action"] * 2 + ["reflect", "reflect"]


def test_the_loop_ends_when_no_agent_finishes_and_every_turn_is_cut_off(monkeypatch):
    episode = scripted(
        monkeypatch,
        {
            ("plan", "thought"): [" on and on"] * 3,
            ("plan", "action_type"): [" Bing"] * 2,
            ("action", "argument"): ["owls", "owls", "perhaps"],
            ("reflect", "thought"): [" so"],
            ("reflect", "verdict"): [" Ref"],
        },
    )
    list(episode.run(max_steps=2))
    text = Letters().decode(episode.tokens)
    assert episode.answer == "perhaps"
    assert text.count("Observation: There is no tool Bing.") == 2
    assert "\nThought: on and on\nAction: Finish[perhaps]\nObservation: Please" in text
    assert text.endswith("Action: Ref]\n")


def test_every_prompt_continues_the_one_before_token_for_token(monkeypatch):
    episode = scripted(
        monkeypatch,
        {
            ("plan", "thought"): [" so.\n", " cut off"],
            ("plan", "action_type"): [" Lookup[", " Finish["],
            ("action", "argument"): ["owls]\n", "x]\n"],
            **REFLECT,
        },
    )
    list(episode.run(max_steps=3))
    for before, after in zip(episode.turns, episode.turns[1:], strict=False):
        written = before.prompt + before.tokens
        assert after.prompt[: len(written)] == written


# --- The replay -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agents():
    model = with_adapters(tiny_llama(), ["plan", "action", "reflect"])
    share_a(model, ["plan", "action", "reflect"])
    return model


def record(model, caches) -> list[Turn]:
    """Three greedy turns, with some tokens put in between them."""
    turns, prompt = [], tokens(12)[0].tolist()
    for agent in ("plan", "action", "plan"):
        turns.append(agents_demo.take_turn(model, caches, agent, "thought", prompt, max_new_tokens=5))
        prompt = prompt + turns[-1].tokens + [7, 8]
    return turns


class NoTokenizer:
    all_special_ids, eos_token_id = [0], 0


def test_a_replay_on_the_same_kind_of_cache_chooses_what_was_recorded(agents):
    recorded = record(agents, Caches(SharedLoRACache, one_for_all=True))
    again = replay(agents, NoTokenizer(), {"": Caches(SharedLoRACache, one_for_all=True)}, recorded)[""]
    assert [turn.choices for turn in again] == [turn.tokens for turn in recorded] == [turn.tokens for turn in again]
    assert [(turn.covered, turn.nbytes) for turn in again] == [(turn.covered, turn.nbytes) for turn in recorded]
    assert [turn.prefilled for turn in again] == [12, 3, 3]  # adapters with one A: nothing is run twice


def test_a_replay_follows_the_record_where_the_cache_would_choose_otherwise(agents):
    recorded = record(agents, Caches(DynamicCache, one_for_all=False))
    prompt = recorded[0].prompt
    for turn in recorded:
        turn.prompt, turn.choices, turn.tokens = prompt, turn.tokens, [token % 60 + 1 for token in turn.tokens]
        prompt = prompt + turn.tokens + [7, 8]
    rivals = {"shared": Caches(SharedLoRACache, one_for_all=True), "exact": Caches(DynamicCache, one_for_all=False)}
    replays = replay(agents, NoTokenizer(), rivals, recorded)
    assert [len(turns) for turns in replays.values()] == [3, 3]
    again = replays["exact"]
    assert [turn.tokens for turn in again] == [turn.tokens for turn in recorded]
    assert [turn.prefilled for turn in again] == [12, 19, 10]
    same, count = equal_choices(again, recorded)
    assert (same < count) and count == 15


def test_memory_of_one_cache_per_adapter_is_counted_for_each(agents):
    caches = Caches(DynamicCache, one_for_all=False)
    first, second, third = record(agents, caches)
    per_token = 2 * 3 * 2 * 8 * 8  # K and V, layers, heads, head size, float64
    assert first.nbytes == (12 + 4) * per_token
    assert second.nbytes == first.nbytes + (19 + 4) * per_token
    assert third.nbytes == second.nbytes + (10 + 4) * per_token


def costs(nbytes, covered, seconds, choices):
    return Turn(
        "plan",
        "thought",
        prompt=[1] * 10,
        tokens=choices,
        covered=covered,
        seconds=seconds,
        nbytes=nbytes,
        choices=choices,
    )


def test_it_is_said_where_sharing_lost():
    exact, fully = [costs(300, 0, 1.0, [1, 2, 3, 4])], [costs(100, 0, 1.0, [9, 2, 3, 4])]
    won = {
        agents_demo.SHARED: [costs(100, 5, 0.5, [1, 2, 3, 4])],
        agents_demo.NON_SHARED: exact,
        agents_demo.FULLY_SHARED: fully,
    }
    assert [sign for sign, _ in agents_demo.verdicts(won)] == ["+"] * 5
    lost = won | {agents_demo.SHARED: [costs(600, 0, 2.0, [9, 9, 3, 4])]}
    assert list(agents_demo.verdicts(lost)) == [
        ("-", "memory: 2.00 times more"),
        ("=", "prefill: the same"),
        ("-", "time: 2.00 times slower"),
        ("-", "text: 2 of 4 greedy tokens are not those of the exact caches, first in turn 1 (plan, thought)"),
        ("-", "text, beside one DynamicCache for all: 2 to 3 equal tokens of 4"),
    ]


# --- The program --------------------------------------------------------------------------------------------------------


def demo(*arguments: str, timeout: int = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "agents_demo.py"), *arguments]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_a_question_is_a_number_or_a_text():
    first = json.loads((search_tool.LIBRARY / "questions.jsonl").read_text().splitlines()[0])
    assert agents_demo.pick_question("1") == (first["question"], first["answers"])
    assert agents_demo.pick_question("Who invented tea?") == ("Who invented tea?", [])
    with pytest.raises(SystemExit, match="1 to 5"):
        agents_demo.pick_question("6")


def test_missing_adapters_are_named(tmp_path):
    arguments = agents_demo.parse_arguments(["--adapters", str(tmp_path)])
    with pytest.raises(SystemExit, match="no adapter for plan, action, reflect"):
        agents_demo.load_agents(arguments)


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_available(), reason="the wheel with the model is not installed")
@pytest.mark.parametrize("sharing", ["auto", "base_shared"])
def test_the_demo_runs(tmp_path, sharing):
    done = demo(
        "--max-steps=1",
        "--question=Which animal has three hearts and blue blood?",
        f"--sharing={sharing}",
        f"--output={tmp_path / 'out'}",
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for heading in (
        "new tokens",
        "reused",
        "re-run",
        "seconds",
        "memory at the end",
        "prefilled tokens",
        "greedy tokens",
    ):
        assert heading in shown
    rows = re.findall(r"│ +\d+ │ (plan|action|reflect) ", shown)
    assert rows[-2:] == ["reflect", "reflect"] and {"plan", "action"} <= set(rows)
    rerun = int(re.findall(r"│ +│ all +│ +│ +[\d,]+ │ +[\d,]+ │ +([\d,]+) │", shown)[0].replace(",", ""))
    assert (rerun == 0) == (sharing == "auto")
    assert "memory: " in shown and "text: " in shown
    picture = (tmp_path / "out" / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
