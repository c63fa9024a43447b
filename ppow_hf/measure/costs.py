"""What drafting and verifying cost on this machine, and the clock and checks that measurements share.

Knows generation's parts and clocks; knows nothing about whole calls.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..runtime.draft_session import DraftSession, cache_argument, now
from ..runtime.generation import DrafterView
from ..runtime.modeling_ppow import PPOWDrafter, collect_target_states
from ..runtime.target_weights import input_device, target_width


@dataclass(frozen=True)
class Costs:
    """What drafting and verifying cost on this machine.

    Args:
        draft_step_seconds (`float`): median time of one draft step, the choice of its token included; of a block
            drafter the step that gives a window of `max_window` tokens.
        target_forward_seconds (`float`): median time of a one-token target forward after a cached context.
        cost_ratio (`float`): gamma, the first over the second.
        verification_cost (`float`): slope of v(W) = 1 + verification_cost * W, the (W+1)-token target forward over the
            one-token one; at least 0.
    """

    draft_step_seconds: float
    target_forward_seconds: float
    cost_ratio: float
    verification_cost: float


@lru_cache
def bfloat16_pays(device: str) -> bool:
    """Whether bfloat16 matrix products are clearly faster than float32 ones here (some processors emulate them).

    Measured once in a process, in a second at most: a decoding step's products and a training step's, the best of
    several timings each. On a CUDA device nothing is measured: there it pays.
    """
    if device == "cuda":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        right = torch.randn(1024, 1024).to(dtype)
        seconds[dtype] = sum(_product_seconds(torch.randn(rows, 1024).to(dtype), right) for rows in (1, 512))
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def faster_dtype(device: str) -> str | None:
    """Number format of a target that only reads or writes texts: bfloat16 on a CPU that computes it faster; `None`
    stands for the default of `load_target`."""
    return "bfloat16" if device == "cpu" and bfloat16_pays("cpu") else None


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    timings = []
    for _ in range(7):
        started = time.perf_counter()
        left @ right
        timings.append(time.perf_counter() - started)
    return min(timings)


@torch.inference_mode()
def measure_costs(
    target: PreTrainedModel,
    drafter: PPOWDrafter | DrafterView,
    input_ids: torch.Tensor,
    max_window: int = 10,
    repeats: int = 20,
) -> Costs:
    """Measure the costs of the cost model behind a cached context; every number is a median.

    Args:
        target (`PreTrainedModel`): the target.
        drafter ([`PPOWDrafter`] or [`DrafterView`]): the drafter.
        input_ids (`torch.LongTensor` of shape `(1, n)`): the context; cut at the left where the target's own context
            would not take `max_window` tokens more.
        max_window (`int`, *optional*, defaults to `10`): longest window timed; 2 and 5 are timed too.
        repeats (`int`, *optional*, defaults to `20`): timings of each kind, taken in turns.

    Raises:
        `ValueError`: if `input_ids` is not one sequence, or `max_window` or `repeats` is below 1.
    """
    check_count("max_window", max_window)
    check_count("repeats", repeats)
    check_prompt("input_ids", input_ids)
    model = drafter.drafter if isinstance(drafter, DrafterView) else drafter
    model.attach_target(target)
    context_length = context_length_of(target)
    if context_length is not None:
        input_ids = input_ids[:, -max(context_length - max_window - 1, 1) :]
    if input_ids.shape[1] < 2:
        input_ids = input_ids.repeat(1, 2)  # an eagle drafter has nothing to say after a single token
    context = CachedContext(target, model, input_ids.to(input_device(target)))
    windows = sorted({0, max_window} | {window for window in (2, 5) if window < max_window})
    timings: dict[int, list[float]] = {window: [] for window in windows}
    steps: list[float] = []
    for repeat in range(repeats + 2):  # the first two are warm-up
        new_timings = {window: context.forward_seconds(window + 1) for window in windows}
        new_steps = context.step_seconds(max_window)
        if repeat >= 2:
            steps.extend(new_steps)
            for window, seconds in new_timings.items():
                timings[window].append(seconds)
    one_token = statistics.median(timings[0])
    growth = {window: statistics.median(timings[window]) / one_token - 1 for window in windows}
    slope = sum(window * growth[window] for window in windows) / sum(window * window for window in windows)
    draft_step = statistics.median(steps)
    return Costs(draft_step, one_token, draft_step / one_token, max(slope, 0.0))


class CachedContext:
    """A target and a drafter after the same text `[1, n]`, each step of which can be timed again and again."""

    def __init__(self, target: PreTrainedModel, drafter: PPOWDrafter, input_ids: torch.Tensor):
        self.target, self.drafter, self.input_ids = target, drafter, input_ids
        self.cache = DynamicCache(config=target.config.get_text_config())
        outputs = self._forward(input_ids, output_hidden_states=True)
        self.cache.activate_past_recording()  # without it a sliding-window cache cannot be cropped
        self.states = collect_target_states(outputs.hidden_states, drafter.config.target_layer_ids)

    def _forward(self, tokens: torch.Tensor, **options: Any) -> Any:
        return self.target(tokens, use_cache=True, **{cache_argument(self.target): self.cache}, **options)

    def forward_seconds(self, count: int) -> float:
        """Time of the target's forward over `count` tokens more."""
        tokens = self.input_ids.repeat(1, count // self.input_ids.shape[1] + 1)[:, :count]
        started = now(self.target.device)
        self._forward(tokens)
        seconds = now(self.target.device) - started
        self.cache.crop(-count)
        return seconds

    def start_session(self) -> DraftSession:
        """The drafter's session, which was given the text and has not read it yet."""
        first, device = self.drafter.draft_model.first_prefix, self.drafter.device
        session = self.drafter.start_session(target_width(self.target))
        read = None if self.states is None else self.states[:, : self.input_ids.shape[1] - first].to(device)
        session.observe(self.input_ids[:, first:].to(device), read, first)
        return session

    def step_seconds(self, max_window: int) -> list[float]:
        """Times of the draft steps of a window, the choice of their tokens included; the first step reads the text."""
        session, device = self.start_session(), self.drafter.device
        block_started = now(device)
        token = session.first_logits().argmax(-1, keepdim=True)
        seconds = []
        longest = min(max_window, self.drafter.config.longest_window or max_window)
        for drafted in range(max(longest - 1, 0 if session.one_step else 1)):
            started = now(device)
            token = session.next_logits(token, drafted).argmax(-1, keepdim=True)
            seconds.append(now(device) - started)
        return [now(device) - block_started] if session.one_step else seconds


# -- checks and clocks


def with_progress(prompts: Sequence[Any], description: str) -> Iterable[Any]:
    """`prompts`, with a bar that a terminal is shown."""
    from tqdm import tqdm

    return tqdm(prompts, desc=description, unit="prompt", disable=None, leave=False)


def context_length_of(target: PreTrainedModel) -> int | None:
    return getattr(target.config.get_text_config(), "max_position_embeddings", None)


def check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {value} given, at least 1 is needed.")


def check_prompt(name: str, prompt: torch.Tensor) -> None:
    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] < 1:
        raise ValueError(f"{name}: token ids of shape [1, n] with n >= 1 are needed, given was {list(prompt.shape)}.")


def check_prompts(target: PreTrainedModel, prompts: Sequence[torch.Tensor], max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("prompts: none given; at least one prompt is needed.")
    context_length = context_length_of(target)
    for number, prompt in enumerate(prompts):
        check_prompt(f"prompts[{number}]", prompt)
        if context_length is not None and prompt.shape[1] + max_new_tokens > context_length:
            raise ValueError(
                f"prompts[{number}]: {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} are more than the "
                f"target's context of {context_length}. Shorten the prompt, or generate fewer tokens."
            )
