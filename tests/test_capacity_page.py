"""The capacity page in a real browser: its numbers are those of the formulas, of real caches and of real models.

Needs Chromium or Chrome on PATH (Debian: ``apt-get install chromium-headless-shell``); without one, what runs in it is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "benchmarks"), str(ROOT / "docs")]
import capacity_page  # noqa: E402
from agent_trace import share_a  # noqa: E402
from capacity_page import WAYS  # noqa: E402
from decode_step import TARGETS, add_adapters, build_base  # noqa: E402
from trace_capacity import RESERVE, Sizes, fits, sizes_of  # noqa: E402
from traces import Trace, Turn, count_tokens  # noqa: E402

from lora_shared_cache import SharedLoRACache  # noqa: E402

PAGE = capacity_page.PAGE
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(NAMES)})")
GB = 1e9

READ = """
const numbers = () => {
  const found = {sizes: {}, ways: {}, notice: document.getElementById("notice").textContent, model: state.model,
                 points: document.querySelectorAll("[data-chart=memory-tokens] circle").length};
  for (const cell of document.querySelectorAll("#sizes [data-value]"))
    found.sizes[cell.dataset.what] = Number(cell.dataset.value);
  for (const cell of document.querySelectorAll("#fits [data-value]"))
    (found.ways[cell.dataset.way] ??= {})[cell.dataset.what] = Number(cell.dataset.value);
  return found;
};
const wait = ms => new Promise(done => setTimeout(done, ms));
const visit = async hash => { location.hash = hash; await wait(20); return numbers(); };
"""


class Page:
    """The page in a browser without a display; every message on its console is a failure."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, script: str, *, address: str = "", width: int = 1280) -> Any:
        """What a JavaScript expression, which may wait, gives once the page has been loaded."""
        script = f"""<script>{READ}
        (async () => {{
          const out = document.body.appendChild(document.createElement("pre"));
          let text;
          try {{ text = JSON.stringify(await ({script})); }} catch (error) {{ console.error(error); throw error; }}
          out.id = "result";
          out.textContent = encodeURIComponent(text);
        }})();</script></body>"""
        page = PAGE.read_text(encoding="utf-8")
        assert page.count("</body>") == 1
        file = self.folder / "capacity.html"
        file.write_text(page.replace("</body>", script), encoding="utf-8")
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={self.folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=20000",
            "--dump-dom", f"{file.as_uri()}{address}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not console, console
        found = re.search(r'<pre id="result">([^<]*)</pre>', done.stdout)
        assert found, done.stdout[-2000:]
        return json.loads(unquote(found[1]))

    def visit(self, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The page's numbers for each of some settings, given by its address."""
        hashes = json.dumps([urlencode(chosen) for chosen in settings])
        visits = "async () => { const all = []; for (const hash of %s) all.push(await visit(hash)); return all; }"
        return self.run(f"({visits % hashes})()")


@pytest.fixture
def page(tmp_path) -> Page:
    return Page(tmp_path)


# ---- the file ------------------------------------------------------------------------------------------------------


def test_the_committed_page_has_todays_results(monkeypatch, capsys):
    assert capacity_page.main(["--check"]) == 0
    monkeypatch.setitem(capacity_page.SHAPES["qwen3-8b"], "layers", 37)
    assert capacity_page.main(["--check"]) == 1
    assert "python docs/capacity_page.py" in capsys.readouterr().err


def test_the_file_asks_for_nothing():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(
        r"\bsrc\s*=|@import|\bfetch\(|XMLHttpRequest|\bimport\(|navigator\.sendBeacon|WebSocket", text
    )
    assert re.findall(r'<link[^>]*href="([^"]*)"', text) == ["data:,"]
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {"#tip", "#${clip.id}"}
    for source in {row["source"] for row in capacity_page.data()["measured"]}:
        assert (ROOT / "docs" / source).is_file()


# ---- numbers -------------------------------------------------------------------------------------------------------


AGENTS = ["plan", "act"]


def preset_model(name: str, rank: int, targets: str):
    """The model that a preset stands for, with two adapters, without storage."""
    shape = capacity_page.SHAPES[name]
    if name in ("llama-8b", "ministral-8b"):
        base = build_base(name, torch.bfloat16, torch.device("meta"))
    else:
        config = AutoConfig.for_model(
            "qwen3" if shape["key_norm"] else "llama", num_hidden_layers=shape["layers"], hidden_size=shape["hidden"],
            num_key_value_heads=shape["kv_heads"], num_attention_heads=shape["heads"], head_dim=shape["head_dim"],
            intermediate_size=shape["mlp"], vocab_size=shape["vocab"], tie_word_embeddings=shape["tied"],
        )  # fmt: skip
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return add_adapters(base, AGENTS, targets, rank, torch.bfloat16)


CASES = [
    ("llama-8b", "attention", 16), ("ministral-8b", "qv", 8), ("qwen3-8b", "qv", 8), ("qwen3-8b", "attention", 16),
    ("smollm2-135m", "all", 32),
]  # fmt: skip


def print_preset_sizes() -> None:
    """The sizes of all cases as JSON."""
    print(json.dumps([asdict(sizes_of(preset_model(name, rank, targets), AGENTS)) for name, targets, rank in CASES]))


def preset_sizes() -> list[Sizes]:
    """The same from a process of its own: within the whole suite it took minutes here, alone it takes seconds."""
    call = "from tests.test_capacity_page import print_preset_sizes; print_preset_sizes()"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return [Sizes(**found) for found in json.loads(done.stdout.splitlines()[-1])]


# Parameters as the model cards give them.
PUBLISHED = {
    "llama-8b": 8_030_261_248,
    "ministral-8b": 8_019_808_256,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


@in_browser
@pytest.mark.integration
def test_presets_and_formulas_are_those_of_the_benchmark(page):
    """Sizes of real models (on no device), and what fits by ``trace_capacity.py``, in every preset."""
    adapters = {
        ("qv", 8): dict(rk=0, rv=8, ro=8, on="q"),
        ("attention", 16): dict(rk=16, rv=16, ro=16, on="qo"),
        ("all", 32): dict(rk=32, rv=32, ro=32, on="qom"),
    }
    assert {name for name, *_ in CASES} == capacity_page.SHAPES.keys()
    agents, tokens, card = 7, 50_000, 40
    asked = [
        dict(model=name, agents=agents, tokens=tokens, gpu=card, reserve=RESERVE / GB, **adapters[targets, rank])
        for name, targets, rank in CASES
    ]
    for (name, targets, _), sizes, found in zip(CASES, preset_sizes(), page.visit(asked), strict=True):
        assert found["notice"] == "" and sizes.base == 2 * PUBLISHED[name]
        mine = found["sizes"]
        assert Sizes(mine["base"], mine["adapter"], mine["full"], mine["low_rank"], sizes.layers) == sizes
        norms = "norms" in mine
        assert norms == (name == "qwen3-8b" and targets != "qv")
        for way in WAYS:
            row = found["ways"][way]
            if not norms or way in ("non_shared", "fully_shared"):
                assert row["caches"] == tokens * sizes.per_token(way, agents)
                assert row["whole"] == sizes.total(way, agents, tokens) + RESERVE
                assert row["most_agents"] == fits(sizes, way, tokens=tokens, card=card * GB)
                assert row["most_tokens"] == fits(sizes, way, agents=agents, card=card * GB)


@in_browser
@pytest.mark.integration
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_memory_is_that_of_real_caches(page, family):
    """Every policy, private layers and the norms of keys; ranks of k and v that differ."""
    sizes = dict(
        num_hidden_layers=3, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=40,
        vocab_size=99,
    )  # fmt: skip
    config, model_class = (LlamaConfig, LlamaForCausalLM) if family == "Llama" else (Qwen3Config, Qwen3ForCausalLM)
    names, tokens = ["plan", "act", "reflect"], 80
    lora = LoraConfig(r=4, rank_pattern={"k_proj": 3, "v_proj": 5}, target_modules=TARGETS["attention"])
    base = model_class(config(**sizes)).float().eval()
    model = get_peft_model(base, lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    share_a(model, names)
    model.eval()
    # What each policy is asked for, and the private layers that the page is told of.
    cases: list[tuple[str, dict[str, Any]]] = [(way, {}) for way in WAYS[2:]]
    cases.append(("base_shared", dict(private_layers=[1, 2])))
    asked = [
        dict(model="custom", layers=3, hidden=48, heads=4, kv=2, hd=16, mlp=40, vocab=99, tied=0, norm=int(family == "Qwen3"),
             bytes=4, wbytes=4, rk=3, rv=5, ro=4, on="qo", agents=3, tokens=tokens,
             private=len(settings.get("private_layers", ())))
        for _, settings in cases
    ]  # fmt: skip
    ids = torch.randint(1, 99, (1, tokens), generator=torch.Generator().manual_seed(0))
    for (way, settings), found in zip(cases, page.visit(asked), strict=True):
        cache = SharedLoRACache(model, sharing=way, **settings)
        for name in names:
            model.set_adapter(name)
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
        held = cache.memory_footprint()
        norms_of_base = sum(layer.base_rms.nbytes(tokens) for layer in cache.layers)
        caches = held["base"] + sum(held["low_rank"].values()) + sum(held["private"].values()) + norms_of_base
        assert cache.trajectory_length == tokens and found["notice"] == ""
        assert found["ways"][way]["caches"] == caches
        assert found["ways"]["non_shared"]["caches"] == held["non_shared"]
        assert found["ways"]["fully_shared"]["caches"] == held["non_shared"] / 3
        weights = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
        assert found["sizes"]["base"] == weights
        assert found["sizes"]["adapter"] == sum(p.nbytes for name, p in model.named_parameters() if ".plan." in name)


@in_browser
def test_what_fits_is_what_was_computed_on_the_gpu_machine(page):
    rows = json.loads((ROOT / "docs" / "benchmarks" / "trace_capacity.json").read_text())
    most = {row["policy"]: row for row in rows if row["kind"] == "most"}
    agents_at, tokens_for = (list(most["non_shared"][field]) for field in ("agents_at", "tokens_for"))
    found = page.visit([dict(tokens=n) for n in agents_at] + [dict(agents=n) for n in tokens_for])
    for way, row in most.items():
        for tokens, numbers in zip(agents_at, found, strict=False):
            assert numbers["ways"][way]["most_agents"] == row["agents_at"][tokens]
        for agents, numbers in zip(tokens_for, found[len(agents_at) :], strict=True):
            assert numbers["ways"][way]["most_tokens"] == row["tokens_for"][agents]


@in_browser
def test_prefill_is_what_the_turns_of_a_trace_run(page):
    """Each agent reads the whole text and writes one token: the page leaves out what they write, 1 + 2 tokens read by others."""
    roles, tokens = ["plan", "act", "reflect"], 4096
    trace = Trace("one turn each", tuple(Turn(role, tokens if role == "plan" else 0, 1) for role in roles))
    (found,) = page.visit([dict(agents=3, tokens=tokens, speed=5000)])
    for way in WAYS:
        counts, _ = count_tokens(trace, way)
        written = 1 + 2 if way in ("non_shared", "base_shared") else 1 + 1
        row = found["ways"][way]
        assert row["run"] == sum(count.prefilled for count in counts) - written
        assert row["rerun"] == row["run"] - tokens
        assert row["seconds"] == row["run"] / 5000


# ---- the page in use -----------------------------------------------------------------------------------------------


@in_browser
def test_sliders_change_the_numbers_and_the_address(page):
    before, after, address, requests = page.run("""(async () => {
        const before = numbers(), slide = (key, value) => {
          const slider = document.getElementById(`in-${key}-slider`);
          slider.value = value;
          slider.dispatchEvent(new Event("input", {bubbles: true}));
        };
        slide("tokens", 14); slide("agents", 3); slide("rk", 4); slide("private", 10);
        const after = numbers();
        await wait(500);
        return [before, after, location.hash, performance.getEntriesByType("resource").map(entry => entry.name)];
    })()""")
    assert requests == []
    # 20 agents at 128k, both ranks 16; then 8 agents at 16k, rank 4 on keys.
    token = 2 * 2 * 8 * 128
    assert before["ways"]["base_shared"]["caches"] == 131072 * 32 * (token + 20 * 2 * 32)
    assert after["ways"]["lr_precomputed"]["caches"] == 16384 * 32 * (token + 8 * 2 * 20)
    assert after["ways"]["base_shared"]["caches"] == 16384 * (22 * (token + 8 * 2 * 20) + 10 * 8 * token)
    # The address gives the same numbers again.
    again = page.run("numbers()", address=address)
    assert again == after and again["notice"] == ""


@in_browser
def test_what_can_not_be_used_is_said_and_changes_nothing(page):
    standard, wrong = page.visit([{}, dict(tokens="12.5", policy="best", agents=0, rk="x", colour="red", layers=3)])
    for name in ("Context length", "Policy", "Agents", "Rank on k_proj", '"colour"', "not custom"):
        assert name in wrong["notice"]
    assert wrong["ways"] == standard["ways"] and standard["notice"] == ""
    (too_many,) = page.visit([dict(model="smollm2-135m", private=31)])
    assert "30 layers" in too_many["notice"] and too_many["ways"]["base_shared"] != standard["ways"]["base_shared"]
    typed, mended = page.run("""(async () => {
        const type = text => {
          const field = document.getElementById("in-agents");
          field.value = text;
          field.dispatchEvent(new Event("input", {bubbles: true}));
          return numbers();
        };
        return [type("-3"), type("2")];
    })()""")
    assert "-3" in typed["notice"] and typed["ways"] == standard["ways"]
    assert (
        mended["notice"] == ""
        and mended["ways"]["non_shared"]["caches"] == standard["ways"]["non_shared"]["caches"] / 10
    )


@in_browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_the_screen_and_every_control_has_a_name(page, width):
    found = page.run(
        """(() => {
        document.querySelectorAll("details").forEach(d => { d.open = true; });
        const controls = [...document.querySelectorAll("input, select, button")];
        const named = c => c.getAttribute("aria-label") || c.labels?.[0]?.textContent.trim() || c.textContent.trim();
        const outside = [...document.querySelectorAll("svg[data-chart] text")].filter(text => {
          const a = text.getBoundingClientRect(), b = text.closest("svg").getBoundingClientRect();
          return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
        }).map(text => text.textContent);
        return {inner: innerWidth, scroll: document.documentElement.scrollWidth, controls: controls.length, outside,
                unnamed: controls.filter(c => !named(c)).map(c => c.id)};
    })()""",
        width=width,
    )
    assert found["inner"] == width and found["scroll"] <= width
    assert found["controls"] > 30 and found["unnamed"] == [] and found["outside"] == []


@in_browser
def test_measured_points_are_on_the_curves(page):
    """In the charts of their settings; caches are within 2 % of the formula (positions, and what was not covered yet)."""
    found, off = page.run("""(async () => {
        const links = [...document.querySelectorAll("#measured a[href^='#']")], found = [];
        for (const link of links) found.push(await visit(link.getAttribute("href").slice(1)));
        return [found, [...document.querySelectorAll("#measured [data-off]")].map(cell => Number(cell.dataset.off))];
    })()""")
    measured = capacity_page.data()["measured"]
    assert len(found) == len(off) == len(measured) > 20
    for row, numbers in zip(measured, found, strict=True):
        assert numbers["notice"] == "" and numbers["model"] == row["model"]
        assert numbers["points"] > 0
    # The last turns, which not every agent has read, are a larger part of short episodes.
    assert all(abs(share) < (0.02 if row["tokens"] >= 4096 else 0.08) for row, share in zip(measured, off, strict=True))
    # By hand: 20 agents on 131,111 tokens, 22,590,949,744 bytes.
    row = next(row for row in measured if row.get("whole") and row["agents"] == 20 and row["way"] == "lr_precomputed")
    assert off[measured.index(row)] == pytest.approx(22590949744 / (131111 * 32 * 2 * (2048 + 20 * 32)) - 1, abs=1e-12)


@in_browser
def test_an_error_on_the_console_is_noticed(page):
    with pytest.raises(AssertionError, match="CONSOLE"):
        page.run("(console.error('wrong'), 1)")
    with pytest.raises(AssertionError, match="CONSOLE"):
        page.run("nothing.here")
