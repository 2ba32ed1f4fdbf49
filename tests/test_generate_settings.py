"""Settings of ``generate`` that pass a shared cache by: each gives what it gives with a ``DynamicCache``."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, WatermarkingConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lora_shared_cache import SharedLoRACache

from .test_generate import NEW, assert_same, cached, generate, one_agent, prompt, tiny_tokenizer
from .tiny import difference

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Halved(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * 0.5


def loop_of_ones_own(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """What ``custom_generate=`` takes: a decoding loop of the user's."""
    logits, outputs = [], None
    while outputs is None or not stopping_criteria(input_ids, None).all():
        if outputs is None:
            outputs = model._prefill(input_ids, generation_config, kwargs)
        else:
            outputs = model(**model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs))
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        logits.append(outputs.logits[:, -1].float())
        input_ids = torch.cat((input_ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
    return GenerateDecoderOnlyOutput(sequences=input_ids, logits=tuple(logits))


SETTINGS = {
    "min_p": dict(do_sample=True, min_p=0.1),
    "typical_p": dict(do_sample=True, typical_p=0.5),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2),
    "bad_words": dict(bad_words_ids=[[3], [29]]),
    "end_of_sequence": dict(eos_token_id=[46, 47], pad_token_id=0),
    "watermark": dict(watermarking_config=WatermarkingConfig(bias=2.5)),
    "logits_processor": dict(logits_processor=LogitsProcessorList([Halved()])),
    "scores_and_hidden_states": dict(output_scores=True, output_hidden_states=True),
    "use_cache_false": dict(use_cache=False),
    "custom_generate": dict(custom_generate=loop_of_ones_own),
    "lookup_in_chunks": dict(prompt_lookup_num_tokens=3, prefill_chunk_size=5),
    "lookup_and_sampling": dict(prompt_lookup_num_tokens=3, do_sample=True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting(setting):
    model, plain = one_agent()
    theirs = generate(plain, prompt(), **SETTINGS[setting])
    for known in (0, 7, 12):
        cache = cached(model, known) if known else SharedLoRACache()
        ours = generate(model, prompt(), cache, **SETTINGS[setting])
        assert_same(ours, theirs)
        assert torch.equal(cache.token_ids, ours.sequences[:, :-1])
        if setting == "scores_and_hidden_states":
            for a, b in zip(ours.scores, theirs.scores, strict=True):
                assert difference(a, b) < 1e-5
            for step, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                assert all(difference(a[:, -1], b[:, -1]) < 1e-5 for a, b in zip(step, other, strict=True))


def test_out_of_time():
    model, _ = one_agent()
    cache = SharedLoRACache()
    out = generate(model, prompt(), cache, max_time=0.0, max_new_tokens=50)
    assert cache.trajectory_length == out.sequences.shape[1] - 1 == 12


def test_inference_mode_and_then_without():
    model, plain = one_agent()
    cache = SharedLoRACache()
    with torch.inference_mode():
        first = generate(model, prompt(), cache)
    ids = torch.cat((first.sequences, prompt()[:, :3]), dim=1).clone()
    assert_same(generate(model, ids, cache), generate(plain, ids))


@pytest.mark.parametrize("known", [0, 7])
def test_text_from_another_thread(known):
    model, plain = one_agent()
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=60)
    cache, theirs, out = cached(model, known) if known else SharedLoRACache(), generate(plain, prompt()), []
    thread = threading.Thread(target=lambda: out.append(generate(model, prompt(), cache, streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert_same(out[0], theirs)
    assert text.split() == tiny_tokenizer().decode(theirs.sequences[0, 12:]).split() and len(text.split()) == NEW


def test_a_streamer_that_raises_leaves_the_cache_usable():
    class Breaks:
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 4:
                raise RuntimeError("the reader has gone")

        def end(self):
            pass

    model, plain = one_agent()
    cache = cached(model, 7)
    with pytest.raises(RuntimeError, match="the reader has gone"):
        generate(model, prompt(), cache, streamer=Breaks())
    assert cache.trajectory_length == 14
    cache.crop(-2)
    assert_same(generate(model, prompt(), cache), generate(plain, prompt()))


def test_a_cache_goes_from_mode_to_mode():
    """Greedily, by beams, and on with the beam that was chosen."""
    model, plain = one_agent()
    cache, ids = SharedLoRACache(), prompt()
    ids = torch.cat((generate(model, ids, cache).sequences, prompt()[:, :2]), dim=1)
    cache.batch_repeat_interleave(3)
    beams = generate(model, ids, cache, num_beams=3)
    assert_same(beams, generate(plain, ids, num_beams=3))
    chosen = (cache.token_ids == beams.sequences[:, :-1]).all(dim=1).nonzero()[0]
    cache.batch_select_indices(chosen)
    ids = torch.cat((beams.sequences, prompt()[:, :2]), dim=1)
    assert_same(generate(model, ids, cache), generate(plain, ids))
