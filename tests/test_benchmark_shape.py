"""The loop at a shape with random weights: the text is the one laid down, the acceptance the one asked for."""

import pytest
import torch

from ppow_hf.measure.shape import run_shape

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
}


def test_acceptance_is_injected_and_the_text_laid_down():
    found = run_shape(SMALL, alphas=(0.8,), dtype=torch.float32, prompt_length=8, max_new_tokens=250, repeats=1)
    for result in found["results"]:
        assert result["text_as_laid_down"]
        assert result["measured_alpha"] == pytest.approx(result["alpha"], abs=0.1)
        assert result["of_predicted"] == pytest.approx(
            result["tokens_per_second"] / result["predicted_tokens_per_second"]
        )
    assert found["costs"]["target_forward_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "llama-9"}, "shape: 'llama-9' is not one of"),
        ({"shape": SMALL, "alphas": (1.0,)}, "alphas: 1.0 given"),
        ({"shape": SMALL, "repeats": 0}, "repeats: 0 given"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_shape(**arguments)
