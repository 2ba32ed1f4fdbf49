"""``generate`` with a shared cache, empty or not: every mode gives what it gives with a ``DynamicCache`` or says what to do."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from lora_shared_cache import SharedLoRACache, TrajectoryError, attach

from .tiny import (
    TokenCounter,
    activate,
    assert_equal_logits,
    copy_adapter,
    difference,
    logits,
    share_a,
    tiny_llama,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

NEW = 7


def one_agent():
    model = with_adapters(tiny_llama(), ["one"])
    return model, twin(model)


def prompt(n: int = 12, rows: int = 1):
    """A prompt that repeats itself, so that prompt lookup finds something."""
    ids = tokens(n, rows=rows, seed=4)
    ids[:, n // 2 :] = ids[:, : n - n // 2]
    return ids


def generate(model, ids, cache=None, mask="ones", **settings):
    if isinstance(mask, str):
        mask = torch.ones_like(ids)
    torch.manual_seed(11)
    kwargs = dict(max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, do_sample=False)
    kwargs.update(settings)
    if mask is not None:
        kwargs["attention_mask"] = mask
    return model.generate(input_ids=ids, past_key_values=cache, **kwargs)


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(theirs.logits)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        # generate hands out float32.
        assert_equal_logits(a, b, 1e-5)


MODES = {
    "greedy": dict(),
    "sampling": dict(do_sample=True, temperature=1.5),
    "top_k": dict(do_sample=True, top_k=5, top_p=0.9),
    "beams": dict(num_beams=3),
    "beam_sampling": dict(num_beams=3, do_sample=True),
    "return_sequences": dict(do_sample=True, num_return_sequences=3),
    "prompt_lookup": dict(prompt_lookup_num_tokens=3),
    "chunked_prefill": dict(prefill_chunk_size=5),
    "repetition_penalty": dict(repetition_penalty=1.3),
    # Runs another prompt without a cache of ours in the middle of `generate`.
    "guidance": dict(guidance_scale=1.5),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_on_an_empty_cache(sharing, mode):
    model, plain = one_agent()
    theirs = generate(plain, prompt(), **MODES[mode])
    cache = SharedLoRACache(sharing=sharing)
    ours = generate(model, prompt(), cache, **MODES[mode])
    assert_same(ours, theirs)
    assert ours.past_key_values is cache
    assert cache.trajectory_length == theirs.past_key_values.get_seq_length()
    rows = 1 if "beams" not in mode and mode not in ("beam_sampling", "return_sequences") else 3
    assert cache.rows == rows
    if rows == 1:
        assert torch.equal(cache.token_ids, ours.sequences[:, : cache.trajectory_length])


def test_sampling_depends_on_the_seed():
    model, _ = one_agent()
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(
            model.generate(
                input_ids=prompt(),
                attention_mask=torch.ones_like(prompt()),
                past_key_values=SharedLoRACache(),
                max_new_tokens=12,
                do_sample=True,
                temperature=2.0,
            )
        )
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


def cached(model, n=7, rows=1, **settings):
    """The first n tokens of the prompt, cached by a plain call."""
    cache = SharedLoRACache(**settings)
    logits(model, prompt(rows=rows)[:, :n], cache)
    return cache


ONE_ROW = ["greedy", "sampling", "top_k", "prompt_lookup", "chunked_prefill", "repetition_penalty", "guidance"]


@pytest.mark.parametrize("mode", ONE_ROW)
@pytest.mark.parametrize("known", [1, 7, 11, 12], ids="{}_of_12_cached".format)
def test_on_a_cache_that_holds_a_part_of_the_prompt(mode, known):
    """Full ids with or without a mask: rows 1, 3, 4 and 5 of the table of traps (12 of 12 is the equal prompt)."""
    model, plain = one_agent()
    theirs = generate(plain, prompt(), **MODES[mode])
    for mask in ("ones", None):
        counter = TokenCounter(model)
        cache = cached(model, known)
        counter.take()
        ours = generate(model, prompt(), cache, mask=mask, **MODES[mode])
        assert_same(ours, theirs)
        # What is cached is not run again, except for the last token of an equal prompt.
        first = sum(counter.take())
        if mode in ("greedy", "sampling"):
            assert first == max(12 - known, 1) + NEW - 1
        assert cache.trajectory_length == theirs.past_key_values.get_seq_length()
        counter.handle.remove()


@pytest.mark.parametrize("mode", [m for m in ONE_ROW if m != "repetition_penalty"])
def test_new_tokens_with_a_mask_over_all(mode):
    """Row 1 of the table, second half (right), row 6 (an error or right) and chunks."""
    model, plain = one_agent()
    theirs = generate(plain, prompt(), **MODES[mode])
    cache = cached(model)
    new, mask = prompt()[:, 7:], torch.ones_like(prompt())
    try:
        ours = generate(model, new, cache, mask=mask, **MODES[mode])
    except TrajectoryError as error:
        assert mode in ("prompt_lookup", "chunked_prefill"), error
        assert "whole trajectory" in str(error)
        assert cache.trajectory_length == 7
        ours = generate(model, prompt(), cache, **MODES[mode])
        assert_same(ours, theirs)
        return
    if mode == "prompt_lookup":
        pytest.fail("prompt lookup over the new tokens alone can't be what it is over all of them")
    assert torch.equal(ours.sequences[:, 5:], theirs.sequences[:, 12:])
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert_equal_logits(a, b, 1e-5)


def test_new_tokens_without_a_mask_is_a_clear_error():
    """Row 2 of the table: Transformers would feed three of the five tokens at wrong positions."""
    model, plain = one_agent()
    theirs = generate(plain, prompt())
    for mask in (None, "ones"):
        cache = cached(model)
        with pytest.raises(TrajectoryError) as error:
            generate(model, prompt()[:, 7:], cache, mask=mask)
        assert "contradicts" in str(error.value) or "attention_mask over all 12" in str(error.value)
        assert cache.trajectory_length == 7
        assert_same(generate(model, prompt(), cache), theirs)


def test_a_prompt_that_is_a_part_of_the_cache_is_a_clear_error():
    model, plain = one_agent()
    theirs = generate(plain, prompt()[:, :9])
    cache = cached(model, 12)
    with pytest.raises(TrajectoryError, match=r"crop\(-3\)"):
        generate(model, prompt()[:, :9], cache)
    assert cache.trajectory_length == 12
    cache.crop(-3)
    assert_same(generate(model, prompt()[:, :9], cache), theirs)


@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_contradicting_prompt_is_a_clear_error(position):
    model, plain = one_agent()
    other = prompt()
    held = int(other[0, position])
    other[0, position] = held % 60 + 1
    cache = cached(model)
    with pytest.raises(TrajectoryError) as error:
        generate(model, other, cache)
    text = str(error.value)
    for part in (f"position {position}:", f"token {held},", f"has {held % 60 + 1}.", f"crop(-{7 - position})"):
        assert part in text, text
    assert cache.trajectory_length == 7
    assert_same(generate(model, prompt(), cache), generate(plain, prompt()))
    # The remedy works.
    cache = cached(model)
    cache.crop(-(7 - position))
    assert_same(generate(model, other, cache), generate(plain, other))


def test_without_check_tokens_the_caller_is_trusted():
    model, _ = one_agent()
    other = prompt()
    other[0, 3] = int(other[0, 3]) % 60 + 1
    cache = cached(model, check_tokens=False)
    generate(model, other, cache)
    assert cache.trajectory_length == 12 + NEW - 1


@pytest.mark.parametrize("mode", ["beams", "beam_sampling", "return_sequences"])
def test_several_sequences_on_a_non_empty_cache(mode):
    model, plain = one_agent()
    theirs = generate(plain, prompt(), **MODES[mode])
    cache = cached(model)
    with pytest.raises(TrajectoryError, match=r"batch_repeat_interleave\(3\)"):
        generate(model, prompt(), cache, **MODES[mode])
    assert (cache.trajectory_length, cache.rows) == (7, 1)
    cache.batch_repeat_interleave(3)
    assert_same(generate(model, prompt(), cache, **MODES[mode]), theirs)


def test_an_equal_prompt_again_and_again():
    model, plain = one_agent()
    theirs = generate(plain, prompt())
    cache = SharedLoRACache()
    first = generate(model, prompt(), cache, max_new_tokens=1)
    assert torch.equal(first.sequences, theirs.sequences[:, :13])
    for _ in range(3):
        again = generate(model, prompt(), cache, max_new_tokens=1)
        assert_equal_logits(again.logits[0], theirs.logits[0], 1e-5)
        assert cache.trajectory_length == 12
    assert_same(generate(model, prompt(), cache), theirs)


def test_the_output_of_a_turn_is_the_prompt_of_the_next():
    model, plain = one_agent()
    cache, ids = SharedLoRACache(), prompt()
    counter = TokenCounter(model)
    for turn in range(3):
        ours, theirs = generate(model, ids, cache), generate(plain, ids)
        assert_same(ours, theirs)
        # The last generated token was never fed: it and the user's next tokens are new.
        assert sum(counter.take()) == (12 if turn == 0 else 4) + NEW - 1
        ids = torch.cat((ours.sequences, tokens(3, seed=turn)), dim=1)


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared", "auto"])
@pytest.mark.parametrize("mode", ONE_ROW)
def test_modes_with_a_switch_in_between(mode, sharing):
    """Two equal adapters: whoever goes on, the result is that of one of them alone."""
    model = with_adapters(tiny_llama(), ["one", "two"])
    copy_adapter(model, "one", "two")
    plain = twin(model)
    cache, ids = SharedLoRACache(sharing=sharing), prompt()
    for name in ("one", "two", "one"):
        activate(model, name)
        ours = generate(model, ids, cache, **MODES[mode])
        assert_same(ours, generate(plain, ids, **MODES[mode]))
        ids = torch.cat((ours.sequences, ids[:, :3]), dim=1)


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_chunked_prefill_after_a_switch_equals_unchunked(sharing, chunk):
    """Different adapters: chunks walk through what the agent covers and what it has to run again."""
    model = with_adapters(tiny_llama(), ["one", "two"])
    share_a(model, ["one", "two"])
    ids, out = prompt(), []
    for settings in (dict(), dict(prefill_chunk_size=chunk) if chunk else dict(mask=None)):
        cache = SharedLoRACache(sharing=sharing)
        activate(model, "one")
        logits(model, ids[:, :7], cache)
        activate(model, "two")
        first = generate(model, ids[:, :9], cache, **settings)
        activate(model, "one")
        out.append((first, generate(model, ids[:, :9], SharedLoRACache(sharing=sharing), **settings)))
        again = torch.cat((first.sequences, ids[:, :2]), dim=1)
        out[-1] += (generate(model, again, cache, **settings),)
    for a, b in zip(*out, strict=True):
        assert_same(a, b)
    assert difference(out[0][0].logits[0], out[0][1].logits[0]) > 1e-3


@pytest.mark.parametrize("known", [0, 7, 12])
def test_assisted_decoding_with_a_draft_model(known):
    model, plain = one_agent()
    draft = tiny_llama(seed=9, num_hidden_layers=1)
    for m in (model.get_base_model(), plain.get_base_model(), draft):
        m.generation_config.pad_token_id = 0
    theirs = generate(plain, prompt())
    cache = cached(model, known) if known else SharedLoRACache()
    ours = generate(model, prompt(), cache, assistant_model=draft)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert_equal_logits(a, b, 1e-5)
    # What was drafted and rejected is gone.
    n = cache.trajectory_length
    assert torch.equal(cache.token_ids, ours.sequences[:, :n]) and n <= 12 + NEW
    assert type(n) is int  # Transformers 5.17 crops by a tensor


def test_streamers_see_every_token():
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, _ = one_agent()
    streamer = Collect()
    out = generate(model, prompt(), cached(model), streamer=streamer)
    assert streamer.seen == out.sequences[0].tolist() and streamer.ended
    assert TextStreamer is not None


def test_a_generation_config_is_read_too():
    model, plain = one_agent()
    config = GenerationConfig(max_new_tokens=NEW, num_beams=3, pad_token_id=0)
    settings = dict(attention_mask=torch.ones_like(prompt()), generation_config=config)
    cache = cached(model)
    with pytest.raises(TrajectoryError, match=r"batch_repeat_interleave\(3\)"):
        model.generate(input_ids=prompt(), past_key_values=cache, **settings)
    cache.batch_repeat_interleave(3)
    ours = model.generate(input_ids=prompt(), past_key_values=cache, **settings)
    assert torch.equal(ours, plain.generate(input_ids=prompt(), **settings))


@pytest.mark.parametrize("implementation", ["static", "paged"])
@pytest.mark.parametrize("known", [0, 7])
def test_another_cache_asked_for_by_name_is_refused(known, implementation):
    """Paged is continuous batching: Transformers would leave the shared cache out and say nothing."""
    model, plain = one_agent()
    attach(model)
    cache = cached(model, known) if known else SharedLoRACache()
    with pytest.raises(
        ValueError, match="paged.* is continuous batching" if implementation == "paged" else "one of the two"
    ):
        generate(model, prompt(), cache, cache_implementation=implementation)
    assert cache.trajectory_length == known
    assert_same(generate(model, prompt(), cache), generate(plain, prompt()))


def test_prompt_given_as_inputs_or_positionally():
    model, plain = one_agent()
    theirs = generate(plain, prompt()).sequences
    settings = dict(attention_mask=torch.ones_like(prompt()), max_new_tokens=NEW, do_sample=False)
    for known in (7, 12):
        assert torch.equal(model.generate(inputs=prompt(), past_key_values=cached(model, known), **settings), theirs)
        assert torch.equal(
            model.get_base_model().generate(prompt(), past_key_values=cached(model, known), **settings), theirs
        )


@pytest.mark.parametrize("known", [0, 7, 12])
def test_inputs_embeds(known):
    model, plain = one_agent()
    embed = model.get_input_embeddings()
    settings = dict(attention_mask=torch.ones_like(prompt()), max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        theirs = plain.generate(inputs_embeds=embed(prompt()), **settings)
        cache = cached(model, known) if known else SharedLoRACache()
        if known == 7:
            # generate would cut these by what is cached once more, and go on at wrong positions.
            with pytest.raises(TrajectoryError, match="inputs_embeds has 5 tokens for a text of 12"):
                model.generate(inputs_embeds=embed(prompt()[:, 7:]), past_key_values=cache, **settings)
        ours = model.generate(inputs_embeds=embed(prompt()), past_key_values=cache, **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("known", [0, 9, 12])
def test_left_padded_batch(known):
    model, plain = one_agent()
    ids, mask = prompt(rows=3), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    theirs = generate(plain, ids, mask=mask)
    assert difference(generate(plain, ids, mask=torch.ones_like(mask)).logits[0], theirs.logits[0]) > 0.01
    cache = SharedLoRACache()
    if known:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :known]
        logits(model, ids[:, :known], cache, attention_mask=mask[:, :known], position_ids=positions)
    assert_same(generate(model, ids, cache, mask=mask), theirs)
    out = generate(plain, ids, mask=mask)
    more = torch.cat((out.sequences, prompt(rows=3)[:, :2]), dim=1)
    longer = torch.cat((mask, torch.ones(3, NEW + 2, dtype=torch.long)), dim=1)
    assert_same(generate(model, more, cache, mask=longer), generate(plain, more, mask=longer))


def test_rows_that_end_at_different_steps():
    model, plain = one_agent()
    free = generate(plain, prompt(rows=3), max_new_tokens=12)
    end = int(free.sequences[0, 15])
    settings = dict(eos_token_id=end, pad_token_id=0, max_new_tokens=12)
    theirs = generate(plain, prompt(rows=3), **settings)
    ours = generate(model, prompt(rows=3), SharedLoRACache(), **settings)
    assert_same(ours, theirs)
    assert bool((theirs.sequences == 0).any())


def test_a_wrong_batch_size_is_a_clear_error():
    model, plain = one_agent()
    cache = cached(model, rows=2)
    for rows in (1, 3):
        with pytest.raises(TrajectoryError, match=f"{rows} rows, the cache holds 2"):
            generate(model, prompt(rows=rows), cache)
    assert_same(generate(model, prompt(rows=2), cache), generate(plain, prompt(rows=2)))


def test_max_cache_len_is_an_error_before_it_is_exceeded():
    model, plain = one_agent()
    cache = SharedLoRACache(max_cache_len=15)
    logits(model, prompt()[:, :8], cache)
    # Before anything is run: in the middle of generate, what was generated would be lost.
    with pytest.raises(ValueError, match=f"up to {11 + NEW} tokens, 12 of the prompt .* max_cache_len is 15"):
        generate(model, prompt(), cache)
    assert cache.trajectory_length == 8
    assert_same(generate(model, prompt(), cache, max_new_tokens=4), generate(plain, prompt(), max_new_tokens=4))
    assert cache.trajectory_length == 15
    fits = SharedLoRACache(max_cache_len=12 + NEW - 1)
    assert_same(generate(model, prompt(), fits), generate(plain, prompt()))


def test_contrastive_features_of_generate_that_need_other_caches_are_not_hidden():
    """use_cache=False ignores the cache that was given; nothing may be recorded then."""
    model, plain = one_agent()
    theirs = generate(plain, prompt(), use_cache=False)
    cache = SharedLoRACache()
    try:
        ours = generate(model, prompt(), cache, use_cache=False)
    except ValueError:
        return
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("known", [0, 7])
def test_stopping_criteria(known):
    model, plain = one_agent()
    end = generate(plain, prompt()).sequences[0, 15]

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == end

    settings = dict(stopping_criteria=StoppingCriteriaList([Stop()]))
    theirs = generate(plain, prompt(), **settings)
    assert theirs.sequences.shape[1] <= 16
    cache = cached(model, known) if known else SharedLoRACache()
    assert_same(generate(model, prompt(), cache, **settings), theirs)
    # The next turn goes on behind what was stopped.
    longer = torch.cat((theirs.sequences, tokens(3)), dim=1)
    assert_same(generate(model, longer, cache), generate(plain, longer))


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 64)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w60 ' if m.role == 'user' else 'w61 ' }}{{ m.content }} w62 {% endfor %}"
        "{% if add_generation_prompt %}w61 {% endif %}"
    )
    return tokenizer


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_with_a_chat_template_over_two_turns():
    model, plain = one_agent()
    for m in (model, plain):
        m.generation_config.pad_token_id = 0
    cache, tokenizer, chats = SharedLoRACache(), tiny_tokenizer(), []
    for m, settings in ((model, dict(past_key_values=cache)), (plain, {})):
        speak = pipeline("text-generation", model=m, tokenizer=tokenizer, device="cpu")
        chat = [{"role": "user", "content": "w5 w9 w7"}]
        for question in ("w8 w4", "w3"):
            chat = speak(chat, max_new_tokens=NEW, do_sample=False, **settings)[0]["generated_text"]
            chat = [*chat, {"role": "user", "content": question}]
        chats.append(chat)
    assert chats[0] == chats[1] and len(chats[0]) == 5
    assert cache.trajectory_length > 2 * NEW
