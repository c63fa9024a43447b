"""A drafter with settings of its own is copied and pickled like any object."""

import copy
import pickle

import pytest
import torch
from test_batches import make_drafter

from ppow_hf.runtime.generation import DrafterView

PROMPT = torch.tensor([[5, 17, 3, 42, 8]])


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
@pytest.mark.parametrize("make", ["with_settings", "generate_with"])
def test_a_view_is_copied(make_target, make, again):
    """Reported of ModelCloud/GPTQModel#2966: `__getattr__` of an object that copying has not filled yet."""
    target = make_target("llama")
    view = getattr(make_drafter(target, "standalone"), make)(window="fixed", max_window=3)
    other = again(view)
    name = "assistant_model" if make == "with_settings" else "custom_generate"
    expected = target.generate(PROMPT, do_sample=False, max_new_tokens=12)
    assert torch.equal(target.generate(PROMPT, **{name: other}, do_sample=False, max_new_tokens=12), expected)
    assert other.last_trace.rounds[-1].window <= 3


def test_a_name_that_nobody_has(make_target):
    """A view passes on what the drafter has, and misses what it has not, half-built or whole."""
    view = make_drafter(make_target("llama"), "standalone").with_settings()
    assert view.config is view.drafter.config
    for missing in (view, DrafterView.__new__(DrafterView)):
        with pytest.raises(AttributeError):
            missing.no_such_name  # noqa: B018
