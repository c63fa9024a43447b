"""Our own loop as a function."""

from ppow_hf.runtime.configuration_ppow import CALL_SETTINGS


def generate_by_loop(target, drafter, *args, streamer=None, tokenizer=None, stop_strings=None, **kwargs):
    """`target.generate(custom_generate=drafter.generate_with(...))`; `kwargs` are those of both."""
    settings = {name: kwargs.pop(name) for name in CALL_SETTINGS if name in kwargs}
    decoding = drafter.generate_with(streamer=streamer, tokenizer=tokenizer, stop_strings=stop_strings, **settings)
    return target.generate(*args, custom_generate=decoding, **kwargs)
