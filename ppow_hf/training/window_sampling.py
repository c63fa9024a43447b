"""Which prefixes of a sequence get rolled out: uniformly at first, then by divergence (ADAW) [paper]; the text there.

Pure tensors; all randomness is handed in as uniform numbers, so that callers can key it.
"""

import torch


def eligible_prefixes(loss_mask: torch.Tensor, first_prefix: int, window: int, context_length: int | None = None):
    """Prefixes p that a window of W tokens may start from, `[B, S]` bool from `loss_mask` `[B, S]` bool.

    Token p + 1 must be one that is learned. Windows that end inside the sequence are preferred: those that would run
    beyond it are only eligible in a sequence that has no others.
    """
    batch, length = loss_mask.shape
    prefixes = torch.arange(length, device=loss_mask.device)
    starts = torch.zeros_like(loss_mask)
    starts[:, :-1] = loss_mask[:, 1:]
    starts &= prefixes >= first_prefix
    if context_length is not None:
        starts &= prefixes + window < context_length
    inside = torch.zeros_like(starts)
    if length > window:
        inside[:, : length - window] = starts[:, : length - window] & loss_mask[:, window:]
    return torch.where(inside.any(-1, keepdim=True), inside, starts)


def window_priorities(divergence: torch.Tensor, window: int, attention_mask: torch.Tensor | None = None):
    """Mean of v over positions p .. p + W - 1 (as far as they exist), `[B, S]` from `divergence` v `[B, S]` [paper].

    `divergence[:, p]` is v = C(P) * KL(P||Q) of the distribution after prefix p, which is the window's first one.
    `attention_mask` `[B, S]` is 0 at padding, which does not count as existing.
    """
    length = divergence.shape[1]
    real = torch.ones_like(divergence) if attention_mask is None else attention_mask.to(divergence.dtype)
    starts = torch.arange(length, device=divergence.device)
    ends = (starts + window).clamp_max(length)

    def sums(values: torch.Tensor) -> torch.Tensor:
        cumulative = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
        return cumulative[:, ends] - cumulative[:, starts]

    return (sums(divergence * real) / sums(real).clamp_min(1)).to(divergence.dtype)


def within_windows(eligible: torch.Tensor, window: int) -> torch.Tensor:
    """Which positions lie in p .. p + W - 1 of an `eligible` prefix p, `[B, S]` bool."""
    behind = torch.nn.functional.pad(eligible.float(), (window - 1, 0))
    return torch.nn.functional.max_pool1d(behind[:, None], window, 1)[:, 0].bool()


def choose_prefixes(eligible: torch.Tensor, uniforms: torch.Tensor, count: int, priorities: torch.Tensor | None):
    """Draw `count` prefixes of each sequence `[B, count]`, without replacement as long as there are enough.

    Args:
        eligible (`torch.Tensor` of shape `(B, S)`): bool.
        uniforms (`torch.Tensor` of shape `(B, S)`): numbers in (0, 1), one for each prefix.
        count (`int`): N.
        priorities (`torch.Tensor` of shape `(B, S)`, *optional*):
            Probability of a prefix is proportional to it (Efraimidis and Spirakis 2006); `None`: all alike.

    Returns:
        `(torch.LongTensor of shape (B, N), torch.BoolTensor of shape (B,))`: ascending prefixes, and whether the
        sequence has any; prefixes of a sequence that has none are 0.
    """
    weights = torch.ones_like(uniforms) if priorities is None else priorities.clamp_min(0) + 1e-6
    keys = uniforms.clamp(1e-9, 1 - 1e-7).log() / weights
    keys = keys.masked_fill(~eligible, -torch.inf)
    order = keys.argsort(dim=-1, descending=True)
    available = eligible.sum(-1)
    places = torch.arange(count, device=eligible.device) % available.clamp_min(1)[:, None]
    chosen = order.gather(1, places).sort(-1).values
    has_any = available > 0
    return torch.where(has_any[:, None], chosen, torch.zeros_like(chosen)), has_any


def text_windows(input_ids: torch.Tensor, prefixes: torch.Tensor, window: int) -> torch.Tensor:
    """The text's own windows after prefixes, `[B, M, K]`; what lies beyond the sequence repeats its last token."""
    places = prefixes[..., None] + 1 + torch.arange(window, device=prefixes.device)
    clamped = places.clamp_max(input_ids.shape[1] - 1)
    return input_ids.gather(1, clamped.flatten(1)).view(places.shape)
