"""What our loop costs beyond the two models: round time over bare draft steps and a bare target forward.

Measures on this machine, both sides in turns in the same run; changes no model. Used by `ppow overhead` and the tests.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.targets import plain_distribution
from ..runtime.draft_session import now
from ..runtime.target_weights import input_device
from .costs import CachedContext


@dataclass
class Overhead:
    """Medians over rounds, in seconds.

    Args:
        window (`int`): W.
        rounds (`int`): rounds measured.
        round_seconds (`float`): a round of the loop that drafts and verifies W tokens.
        draft_step_seconds (`float`): the drafter's forward of one token after a cache of a round's length, logits
            included; of a block drafter that of a window, with its Markov head's chain.
        target_seconds (`float`): the target's forward of W + 1 tokens after a cache of that length.
        new_tokens (`int`), acceptance_length (`float`): of the texts that were written meanwhile.
        draft_steps (`int`): of a round; W, or 1 of a block drafter.
    """

    window: int
    rounds: int
    round_seconds: float
    draft_step_seconds: float
    target_seconds: float
    new_tokens: int
    acceptance_length: float
    draft_steps: int

    @property
    def ratio(self) -> float:
        """Round time over its bare draft steps and one bare target forward; 1 would be a loop that costs nothing."""
        return self.round_seconds / (self.draft_steps * self.draft_step_seconds + self.target_seconds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def measure_overhead(
    target: Any,
    drafter: Any,
    prompts: Sequence[torch.Tensor],
    window: int = 5,
    max_new_tokens: int = 64,
    repeats: int = 3,
    record: bool = False,
) -> Overhead:
    """Measure the loop's overhead on `prompts` (each `[1, n]`), at T = 0 with windows of `window` tokens.

    Args:
        repeats (`int`): how often the bare forwards are measured before and after each prompt's text.
        record (`bool`): whether the loop records divergences and features, see [`SpeculativeDecoding`].
    """
    rounds: list[float] = []
    steps: list[float] = []
    forwards: list[float] = []
    accepted, new_tokens = [], 0
    for prompt in prompts:
        prompt = prompt.to(input_device(target))
        middle = torch.cat([prompt, prompt.new_zeros(1, max_new_tokens // 2)], dim=1)
        bare = BareForwards(target, drafter, middle, window)
        for part in range(2):
            for _ in range(repeats):
                steps.append(bare.draft_step())
                forwards.append(bare.target_forward())
            if part:
                continue
            decoding = drafter.generate_with(window="fixed", max_window=window, record=record)
            with plain_distribution(target):
                output = target.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens,
                    custom_generate=decoding,
                )  # fmt: skip
            new_tokens += output.shape[1] - prompt.shape[1]
            full = [r for r in decoding.last_trace.rounds[2:] if r.window == window]  # two rounds read the prompt
            rounds += [r.seconds for r in full]
            accepted += [r.accepted + 1 for r in full]
    if not rounds:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} leave no room for rounds of {window} tokens after the first. Give more."
        )
    return Overhead(
        window,
        len(rounds),
        statistics.median(rounds),
        statistics.median(steps),
        statistics.median(forwards),
        new_tokens,
        statistics.mean(accepted),
        1 if drafter.config.one_step else window,
    )


class BareForwards(CachedContext):
    """The two models after caches of a given text, with nothing around them."""

    @torch.inference_mode()
    def __init__(self, target: Any, drafter: Any, ids: torch.Tensor, window: int):
        drafter.attach_target(target)
        super().__init__(target, drafter, ids)
        self.window, self.draft = window, drafter.draft_model
        self.session = self.start_session()
        self.session.first_logits()

    @torch.inference_mode()
    def draft_step(self) -> float:
        """Seconds of one draft step."""
        session = self.session
        if session.one_step:
            started = now(self.drafter.device)
            token = session.first_logits().argmax(-1, keepdim=True)
            for drafted in range(self.window - 1):
                token = session.next_logits(token, drafted).argmax(-1, keepdim=True)
            return now(self.drafter.device) - started
        position = torch.tensor([[session._position - self.draft.first_prefix]], device=self.drafter.device)
        cache = self.draft.cropped(session._cache, session._committed)
        token = self.input_ids[:, :1].to(self.drafter.device)
        started = now(self.drafter.device)
        features, cache = self.draft.advance(
            token, session._feature, cache, self.draft.embed_positions(position), None
        )
        self.drafter.compute_logits(features[:, 0])
        seconds = now(self.drafter.device) - started
        session._cache = self.draft.cropped(cache, session._committed)
        return seconds

    @torch.inference_mode()
    def target_forward(self) -> float:
        """Seconds of one target forward of W + 1 tokens."""
        return self.forward_seconds(self.window + 1)
