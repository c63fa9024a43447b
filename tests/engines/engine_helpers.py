"""Our side of a comparison with an engine, and the comparison of what both accepted."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ppow_hf import PPOWDrafter
from ppow_hf.measure.evaluation import decode
from ppow_hf.runtime.trace import RoundTrace
from ppow_hf.serving.engine_process import engine_python

PROMPTS = int(os.environ.get("PPOW_ENGINE_PROMPTS", "50"))
NEW_TOKENS = 64
WINDOW = 5


def interpreter_or_skip(engine: str, variable: str, script: str) -> str:
    """The interpreter of an engine's environment. That `variable` does not name it is the only reason to skip."""
    how = f"make one with tests/engines/{script} FOLDER"
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: {how} and run {variable}=FOLDER/bin/python pytest -m engines -n 0")
    return engine_python(engine, variable, how)


def smollm2_or_skip() -> Path:
    """The folder of SmolLM2-135M-Instruct in the one that PPOW_REAL_TARGETS names."""
    if "PPOW_REAL_TARGETS" not in os.environ:
        pytest.skip("PPOW_REAL_TARGETS names no folder of real targets")
    return Path(os.environ["PPOW_REAL_TARGETS"], "smollm2")


@dataclass
class OurRun:
    outputs: list[list[int]]
    drafts: int
    accepted_per_position: list[int]
    rounds: list[list[RoundTrace]] = field(default_factory=list)  # of each prompt

    @property
    def acceptance_length(self) -> float:
        return 1 + sum(self.accepted_per_position) / self.drafts


def run_ours(target, drafter, prompts, window: int = WINDOW, new_tokens: int = NEW_TOKENS, **settings) -> OurRun:
    """Our own decoding with a fixed window, counted as an engine counts.

    An engine drafts whole windows up to the end and cuts the text afterwards, we draft no further than there is room.
    So ours runs on by a window, and the rounds count that began before the end.
    """
    settings = {"window": "fixed", "max_window": window, **settings}
    outputs, traces = decode(target, drafter, prompts, new_tokens + window + 1, **settings)
    ours = OurRun([output[:new_tokens] for output in outputs], 0, [0] * window)
    for trace in traces:
        committed = trace.rounds[0].accepted + 1  # by the forward over the prompt
        ours.rounds.append([])
        for r in trace.rounds[1:]:
            if committed >= new_tokens:
                break
            assert r.parents or r.window == window  # a tree may be flatter
            ours.rounds[-1].append(r)
            ours.drafts += 1
            for position in range(r.accepted):
                ours.accepted_per_position[position] += 1
            committed += r.accepted + 1
    return ours


def assert_same_acceptance(engine, ours: OurRun) -> None:
    """Accepted tokens per position as ours, and enough of them that the comparison says something."""
    counts = f"vLLM {engine.drafts} {engine.accepted_per_position}, ours {ours.drafts} {ours.accepted_per_position}"
    print(f"acceptance length: vLLM {engine.acceptance_length:.4f}, ours {ours.acceptance_length:.4f}; {counts}")
    assert sum(ours.accepted_per_position) >= len(ours.outputs), counts
    assert engine.acceptance_length == pytest.approx(ours.acceptance_length, rel=0.01), counts
    assert engine.drafts == pytest.approx(ours.drafts, rel=0.01), counts
    for theirs, own in zip(engine.accepted_per_position, ours.accepted_per_position, strict=True):
        assert abs(theirs - own) <= max(2, 0.01 * ours.drafts), counts


def random_qwen3() -> Qwen3ForCausalLM:
    """A Qwen3 target, whose heads are wider than its hidden size divided by their number, with random weights.

    Its greedy text runs into loops, which a drafter learns in seconds.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float().eval().requires_grad_(False)


def random_prompts() -> list[list[int]]:
    """Eight prompts of twelve tokens for [`random_qwen3`]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (8, 12), generator=generator).tolist()


def trained_eagle(target, prompts, steps: int = 60, learning_rate: float = 3e-3, **options) -> PPOWDrafter:
    """An eagle drafter trained for seconds on what the target writes after these prompts, all of one length.

    With `draft_vocab_size`, its tokens are those of these texts first.
    """
    torch.manual_seed(0)
    ids = torch.tensor(prompts)
    text = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    if "draft_vocab_size" in options:
        options["token_counts"] = text.flatten().bincount(minlength=target.config.vocab_size)
    drafter = PPOWDrafter.from_target(target, "eagle", **options)
    hidden = target(text, output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer] for layer in drafter.config.target_layer_ids], dim=-1)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=learning_rate)
    for _ in range(steps):
        logits = drafter(text, target_states=states).logits[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()
