"""The decoding loop at the shape of a large model whose weights are not at hand: how near it comes to its cost model.

Target and drafter have random weights and compute all that real ones would; what the target says and how often a
draft token is right are laid down beforehand, so that acceptance is exactly what is asked for. Knows the loop and
clocks; what is measured says nothing about any text.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..runtime.draft_session import DraftSession, cache_argument
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.windowing import CostModel
from .costs import check_count, measure_costs, now
from .provenance import (
    describe_machine,
)

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
CERTAIN = 1e4  # logit of the token that is laid down


@dataclass(frozen=True)
class Script:
    """What the target says behind `prompt_length` tokens, and how likely each draft token is right."""

    tokens: torch.Tensor  # [prompt_length + new], the prompt included
    alpha: float
    generator: torch.Generator

    def draft(self, position: int) -> int:
        """The draft token at `position`: the script's with probability alpha, else another."""
        token = int(self.tokens[min(position, len(self.tokens) - 1)])
        right = bool(torch.rand((), generator=self.generator) < self.alpha)
        return token if right else token ^ 1


class ScriptedSession(DraftSession):
    """A session that computes as any other, and then says what the script wants."""

    script: Script

    def observe(self, tokens, target_states, first_position, visible=None) -> None:
        super().observe(tokens, target_states, first_position, visible)
        self._next_position = int(first_position) + tokens.shape[1]

    def first_logits(self) -> torch.Tensor:
        return self._scripted(super().first_logits(), self._next_position)

    def next_logits(self, token: torch.Tensor, drafted: int) -> torch.Tensor:
        return self._scripted(super().next_logits(token, drafted), self._next_position + drafted + 1)

    def _scripted(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        logits = logits.clone()
        logits[:, self.script.draft(position)] = CERTAIN
        return logits


class ScriptedDrafter(PPOWDrafter):
    """A drafter whose draft tokens are right as often as its script says."""

    script: Script

    def start_session(self, width: int | None = None) -> ScriptedSession:
        session = ScriptedSession(self, width)
        session.script = self.script
        return session


def follow_script(target: PreTrainedModel, script: Script):
    """Make the target's forwards behind a cache say the script's tokens; returns the hook's handle."""
    tokens, cache_name = script.tokens.to(target.device), cache_argument(target)

    def hook(module, inputs, keywords, output):
        end, length = (
            keywords[cache_name].get_seq_length(),
            output.logits.shape[1],
        )  # one sequence: columns are positions
        following = tokens[end - length + 1 : end + 1]
        output.logits[:, : len(following)].scatter_(-1, following[None, :, None], CERTAIN)
        return output

    return target.register_forward_hook(hook, with_kwargs=True)


def make_target(shape: str | dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Llama of this shape, one of SHAPES or its fields, with random weights made on `device`."""
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"shape: {shape!r} is not one of {list(SHAPES)}.")
        shape = SHAPES[shape]
    config = AutoConfig.for_model("llama", **shape, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return target.eval().requires_grad_(False)


@torch.inference_mode()
def run_shape(
    shape: str | dict[str, Any] = "llama-3.1-8b",
    alphas: Sequence[float] = (0.7, 0.8, 0.9),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    prompt_length: int = 128,
    max_new_tokens: int = 256,
    repeats: int = 3,
    max_window: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """The speed of our loop with an eagle drafter of injected acceptance, over what the cost model predicts.

    The window is fixed at the cost model's best for each alpha. Predicted: E[tokens] / (target forward x (W gamma +
    v(W))), from costs measured in the same run; medians of `repeats` runs.

    Raises:
        `ValueError`: for an unknown shape, counts below 1, or an alpha outside (0, 1).
    """
    for name, value in (("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens), ("repeats", repeats)):
        check_count(name, value)
    for alpha in alphas:
        if not 0 < alpha < 1:
            raise ValueError(f"alphas: {alpha} given; an acceptance probability between 0 and 1 is needed.")
    device = torch.device(device)
    target = make_target(shape, dtype, device)
    with torch.device(device):
        drafter = ScriptedDrafter.from_target(target, "eagle").to(device=device, dtype=dtype).eval()
    drafter.config.max_window = max_window
    generator = torch.Generator().manual_seed(seed)
    vocabulary = target.config.vocab_size
    tokens = torch.randint(2, vocabulary - 2, (prompt_length + max_new_tokens + max_window,), generator=generator)
    prompt = tokens[None, :prompt_length].to(device)
    drafter.script = Script(tokens, 1.0, generator)
    measured = measure_costs(target, drafter, prompt, max_window=max_window)
    costs = CostModel(measured.cost_ratio, measured.verification_cost)
    results = []
    for alpha in alphas:
        window = max(costs.best_window(alpha, max_window), 1)
        script = Script(tokens, alpha, torch.Generator().manual_seed(seed))
        drafter.script = script
        handle = follow_script(target, script)
        speeds, accepted, drafted = [], 0, 0
        try:
            for repeat in range(repeats + 1):  # the first is warm-up
                decoding = drafter.generate_with(window="fixed", max_window=window, record=False)
                started = now(device)
                output = target.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    custom_generate=decoding,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
                seconds = now(device) - started
                rounds = decoding.last_trace.rounds  # type: ignore[union-attr]
                if repeat:
                    prompt_seconds = rounds[0].verify_seconds
                    speeds.append((output.shape[1] - prompt_length - 1) / (seconds - prompt_seconds))
                    accepted += sum(r.accepted for r in rounds)
                    drafted += sum(min(r.accepted + 1, r.window) for r in rounds)
        finally:
            handle.remove()
        same = torch.equal(output[0].cpu(), tokens[: output.shape[1]])
        predicted = costs.speedup(alpha, window) / measured.target_forward_seconds
        results.append(
            {
                "alpha": alpha,
                "window": window,
                "measured_alpha": accepted / drafted,
                "tokens_per_second": statistics.median(speeds),
                "predicted_tokens_per_second": predicted,
                "of_predicted": statistics.median(speeds) / predicted,
                "plain_tokens_per_second": 1 / measured.target_forward_seconds,
                "text_as_laid_down": same,
            }
        )
    return {
        "shape": shape if isinstance(shape, str) else dict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "costs": asdict(measured),
        "results": results,
        "machine": describe_machine(device),
    }
