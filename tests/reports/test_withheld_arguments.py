"""Arguments of `generate` that transformers keeps from a `custom_generate` callable: handed on, or refused."""

import threading

import pytest
import torch
from test_batches import Listener, make_drafter
from test_generation import CHARACTERS, character_tokenizer
from test_generation import prompt as any_prompt
from transformers import GenerationConfig, TextIteratorStreamer

from ppow_hf.runtime.generation import SpeculativeDecoding


def prompt(seed: int) -> torch.Tensor:
    return any_prompt(seed).clamp_min(1)  # without the padding token


def given(target, drafter, ids, **options):
    return target.generate(ids, custom_generate=drafter.generate_with(), do_sample=False, **options)


def test_a_streamer_hears_prompt_tokens_and_end(make_target):
    """Reported of huggingface/transformers#22576: who reads a streamer that is never ended waits for ever."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    heard, plain = Listener(), Listener()
    ids = prompt(3)
    output = given(target, drafter, ids, max_new_tokens=20, streamer=heard)
    target.generate(ids, do_sample=False, max_new_tokens=20, streamer=plain)
    assert heard.ended and sum(heard.pieces, []) == sum(plain.pieces, []) == output[0].tolist()


def test_a_reader_in_another_thread_comes_to_an_end(make_target):
    """The same with the streamer that a server reads."""
    target, tokenizer = make_target("llama"), character_tokenizer()
    drafter = make_drafter(target, "standalone")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"streamer": streamer, "max_new_tokens": 20}
    thread = threading.Thread(target=given, args=(target, drafter, prompt(3)), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = target.generate(prompt(3), do_sample=False, max_new_tokens=20)[0, 8:]
    assert text == tokenizer.decode(expected)


def test_stop_strings_of_the_configuration(make_target):
    """Reported of huggingface/transformers: stop strings ask for a tokenizer that was given."""
    target, tokenizer = make_target("llama"), character_tokenizer()
    drafter = make_drafter(target, "standalone")
    ids = prompt(3)
    text = target.generate(ids, do_sample=False, max_new_tokens=24)[0, 8:]
    config = GenerationConfig(do_sample=False, max_new_tokens=24, stop_strings=[CHARACTERS[int(text[9])]])
    expected = target.generate(ids, generation_config=config, tokenizer=tokenizer)
    assert expected.shape[1] < ids.shape[1] + 24
    options = {"generation_config": config}
    output = target.generate(ids, custom_generate=drafter.generate_with(), tokenizer=tokenizer, **options)
    assert torch.equal(output, expected)
    output = target.generate(ids, custom_generate=drafter.generate_with(tokenizer=tokenizer), **options)
    assert torch.equal(output, expected)
    output = target.generate(ids, assistant_model=drafter, tokenizer=tokenizer, **options)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synced_gpus": True}, "synced_gpus: "),
        ({"assistant_model": "theirs"}, "assistant_model: .*brings its own drafter"),
        ({"assistant_tokenizer": character_tokenizer()}, "assistant_tokenizer: "),
        ({"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[5, 6]])}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"dola_layers": "low"}, "dola_generation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_lost_is_refused(make_target, options, message):
    """The kind as a whole: what plain generate would heed, or wait for."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    if options.get("assistant_model") == "theirs":
        options = {"assistant_model": make_target("llama", num_layers=1)}
    with pytest.raises(ValueError, match=message):
        given(target, drafter, prompt(1), max_new_tokens=4, **options)


def test_synced_gpus_in_batches_of_the_assistant_path(make_target):
    """Another of the kind: the batch that `assistant_model=` hands to our loop."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="synced_gpus: "):
        target.generate(ids, assistant_model=drafter, synced_gpus=True, max_new_tokens=4)


def test_a_streamer_given_twice_is_refused(make_target):
    """Two streamers, of which one would wait."""
    target = make_target("llama")
    decoding: SpeculativeDecoding = make_drafter(target, "standalone").generate_with(streamer=Listener())
    with pytest.raises(ValueError, match="streamer: given to generate and to generate_with"):
        target.generate(prompt(1), custom_generate=decoding, streamer=Listener(), max_new_tokens=4)


@pytest.mark.parametrize("way", ["custom_generate", "assistant_model"])
def test_several_sequences_of_a_prompt(make_target, way):
    """`num_return_sequences`, which the assisted loop of huggingface/transformers refuses: both ways sample them."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    call = {"custom_generate": drafter.generate_with()} if way == "custom_generate" else {"assistant_model": drafter}
    torch.manual_seed(0)
    output = target.generate(prompt(1), **call, do_sample=True, num_return_sequences=3, max_new_tokens=12)
    assert output.shape == (3, 20) and len({tuple(row) for row in output.tolist()}) > 1
    assert len(drafter.last_traces) == 3
