"""Our window rule inside a real vLLM: the same text on a mixed batch, next to vLLM's own fixed lengths.

The comparison is printed (`pytest -s`); only what must hold on any machine is asserted.
"""

from pathlib import Path

import pytest
from engine_helpers import NEW_TOKENS

import ppow_hf
from ppow_hf import tiny
from ppow_hf.data.models import load_tokenizer
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines

LONGEST = 8
QUESTIONS = [
    "Tell me a story about a lighthouse.",
    "List five facts about bread.",
    "Why is the sky blue?",
    "Could you help me to write an email to my landlord about the heating, which has not worked since Monday?",
    "What should I see in Hawaii?",
    "Who painted the Mona Lisa, and where can I see it?",
    "Explain to a child how a bicycle keeps its balance.",
    "Compare tea with coffee.",
]


@pytest.fixture(scope="module")
def mixed(prompts):
    """Code and questions in turns, of 3 to 128 tokens, so that requests join and leave the batch at other times."""
    code = [prompt[-(128, 60, 17, 3)[place % 4] :] for place, prompt in enumerate(prompts[: len(QUESTIONS)])]
    tokenizer = load_tokenizer("tiny")
    chats = [tokenizer(f"User: {question}\nAssistant:")["input_ids"] for question in QUESTIONS]
    return [prompt for pair in zip(code, chats, strict=False) for prompt in pair]


def with_proposer(prompts, **settings):
    return run_vllm(
        tiny.target_path(),
        prompts,
        NEW_TOKENS,
        {
            "method": "custom_class",
            "model": "ppow_hf.serving.vllm_proposer.KLAdaptiveProposer",
            "num_speculative_tokens": LONGEST,
        },
        warm_up=True,
        environment={"PYTHONPATH": str(Path(ppow_hf.__file__).parents[1])},
        additional_config={"ppow": {"drafter": "tiny-standalone", **settings}},
    )


def test_adaptive_windows_in_a_mixed_batch(engine_python, mixed, exported, standalone):
    folder = exported("standalone", standalone)
    plain = run_vllm(tiny.target_path(), mixed, NEW_TOKENS, warm_up=True)
    runs = {"plain": plain}
    for window in (3, 5, 8):
        speculative = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": window}
        runs[f"vLLM's draft_model, {window}"] = run_vllm(
            tiny.target_path(), mixed, NEW_TOKENS, speculative, warm_up=True
        )
    runs["our proposer, fixed 8"] = with_proposer(mixed, window="fixed")
    runs["our proposer, adaptive"] = with_proposer(mixed)
    print(f"\n{len(mixed)} prompts, {NEW_TOKENS} tokens each, 8 at once, float32, greedy, vLLM {plain.version}")
    for name, run in runs.items():
        wasted = 1 - run.accepted / run.drafted if run.drafted else 0.0
        ratio, cpu_ratio = plain.seconds / run.seconds, plain.cpu_seconds / run.cpu_seconds
        print(
            f"{name:24} {run.tokens_per_second:7.1f} tokens/s, {ratio:.2f} of plain, {cpu_ratio:.2f} by CPU time; "
            f"acceptance length {run.acceptance_length:.2f}; {run.drafted} drafted, {wasted:.0%} wasted"
        )
    for name, run in runs.items():
        assert run.outputs == plain.outputs, name
    fixed, adaptive = runs["our proposer, fixed 8"], runs["our proposer, adaptive"]
    # The same windows as vLLM's own drafting with the same model, so that both read the requests alike.
    assert fixed.accepted_per_position == runs["vLLM's draft_model, 8"].accepted_per_position
    assert 0 < adaptive.drafted < adaptive.drafts * LONGEST and adaptive.accepted > 0
