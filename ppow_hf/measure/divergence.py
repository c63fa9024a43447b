"""How often greedy text in half precision departs from plain `generate`'s, and whether each departure is rounding.

In float32 a drafter does not change the text. In bfloat16 and float16 a window's logits differ in their last bits
from those of tokens read one by one, so that where the two likeliest tokens are nearly tied the other one may win.
Knows how to generate both ways and to compare; loads and writes nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..data.targets import plain_distribution
from ..runtime.draft_session import cache_argument
from ..runtime.target_weights import input_device
from .costs import with_progress
from .evaluation import decode

HALF_PRECISION = (torch.bfloat16, torch.float16)


@torch.no_grad()
def measure_divergence(
    target: Any, drafter: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **settings: Any
) -> dict[str, Any]:
    """Generate greedily after each prompt, plain and with the drafter, and look at where the texts part [ours].

    Args:
        target (`PreTrainedModel`), drafter ([`PPOWDrafter`]): in the number format that is measured.
        prompts (`list[list[int]]`): token ids of each.
        max_new_tokens (`int`, *optional*, defaults to `64`): after each prompt.
        settings: those of [`PPOWDrafter.with_settings`].

    Returns `dtype`, `prompts`, `max_new_tokens` and

        - `differing`: how many outputs differ;
        - `first_differences`: of each of them the `prompt`, the `token` (counted from 0) at which it first differs,
          and the `gap` there: how much plain generation's likeliest token led the next, in (processed) logits;
        - `largest_gap` of these, `None` where nothing differs;
        - `noise`: the most by which reading in windows of `max_window` + 1 tokens in place of one by one moves the
          difference between the logits of a position's two likeliest tokens, over plain generation's texts;
        - `near_ties`: how many of the gaps are no larger than this noise. More is not rounding.
    """
    plain, gaps, noise = [], [], 0.0
    window = settings.get("max_window") or drafter.config.max_window
    for prompt in with_progress(prompts, "half precision, plain"):
        ids = torch.tensor([list(prompt)], device=input_device(target))
        with plain_distribution(target):
            output = target.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
            )
        plain.append(output.sequences[0, ids.shape[1] :].tolist())
        leading = torch.cat(output.scores).float().topk(2).values  # [n, 2]
        gaps.append((leading[:, 0] - leading[:, 1]).tolist())
        noise = max(noise, window_noise(target, output.sequences, torch.cat(output.logits).float(), window + 1))
    drafted, _ = decode(target, drafter, prompts, max_new_tokens, progress="half precision, drafted", **settings)
    first_differences = []
    for place, (wanted, given) in enumerate(zip(plain, drafted, strict=True)):
        differing = [token for token, pair in enumerate(zip(wanted, given, strict=False)) if pair[0] != pair[1]]
        if differing:
            first_differences.append({"prompt": place, "token": differing[0], "gap": gaps[place][differing[0]]})
    found = [difference["gap"] for difference in first_differences]
    return {
        "dtype": str(target.dtype).removeprefix("torch."),
        "prompts": len(plain),
        "max_new_tokens": max_new_tokens,
        "differing": len(found),
        "near_ties": sum(gap <= noise for gap in found),
        "largest_gap": max(found, default=None),
        "noise": noise,
        "first_differences": first_differences,
    }


@torch.no_grad()
def window_noise(target: Any, sequence: torch.Tensor, logits: torch.Tensor, width: int) -> float:
    """The most by which reading `width` tokens at once moves the lead of a position's likeliest token over the next.

    `sequence` `[1, prompt + n]` and `logits` `[n, V]` are plain generation's, of its n new tokens.
    """
    count = len(logits)
    prompt_length = sequence.shape[1] - count
    cache = DynamicCache(config=target.config)
    noise, start, end = 0.0, 0, prompt_length
    while start < prompt_length + count - 1:
        outputs = target(input_ids=sequence[:, start:end], use_cache=True, **{cache_argument(target): cache})
        one_by_one = logits[max(start + 1 - prompt_length, 0) : end + 1 - prompt_length]
        in_window = outputs.logits[0, -len(one_by_one) :].float()
        first, second = one_by_one.topk(2).indices.unbind(-1)
        rows = torch.arange(len(one_by_one), device=logits.device)
        moved = in_window - one_by_one
        noise = max(noise, float((moved[rows, first] - moved[rows, second]).abs().max()))
        start, end = end, min(end + width, prompt_length + count - 1)
    return noise
