"""The rows of a generation call: what each has written, how its scores are processed, where it ends.

Knows logits processors and stopping criteria, and shows a row to them as it would be alone; adds to a row's drafts
what its window rule draws from its text. Knows no models and no caches.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation import logits_process as processors

from .draft_session import to_device
from .trace import GenerationTrace
from .windowing import WindowRule

# Processors that look at the scores alone: one call for all rows and positions.
MEMORYLESS = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.SuppressTokensLogitsProcessor,
    processors.LogitNormalization,
    processors.InfNanRemoveLogitsProcessor,
)
# Processors that look at the length alone, which the caller gave for the padded prompt.
LENGTH_ONLY = (
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.ExponentialDecayLengthPenalty,
    processors.SuppressTokensAtBeginLogitsProcessor,
)


@dataclass
class Row:
    """One prompt of the batch on its way.

    Args:
        place (`int`): its row in the caller's batch.
        padding (`int`): columns of padding on the left of its prompt.
        ids (`list[int]`): its own tokens, prompt and continuation, without padding.
        rule ([`WindowRule`]), trace ([`GenerationTrace`]): its own.
        new_tokens (`int`): tokens generated.
        room (`int`): longest window that fits in this round.
        limit (`int`): longest window that the drafter drafts in this round.
        read (`int`): how many of `ids` the rule has read.
        scores, logits (`list[torch.Tensor]`): of each new token `[V]`, where the caller asked for them.
    """

    place: int
    padding: int
    ids: list[int]
    rule: WindowRule
    trace: GenerationTrace
    new_tokens: int = 0
    room: int = 0
    limit: int = 0
    read: int = 0
    finished: bool = False
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class ScoreProcessing:
    """The call's logits processors, applied to each row at each position as if the row were alone."""

    def __init__(self, given: Sequence[Any], input_ids: torch.Tensor):
        self.processors = list(given)
        self.input_ids = input_ids
        self.memoryless = all(isinstance(processor, MEMORYLESS) for processor in self.processors)
        self._of_row: dict[int, list[Any]] = {}

    def __call__(
        self, logits: torch.Tensor, rows: Sequence[Row], drafted: Callable[[int, int], list[int]]
    ) -> torch.Tensor:
        """Processed scores of logits `[B, T, V]`; position t of row i stands behind its ids and `drafted(i, t)`."""
        if not self.processors:
            return logits
        batch, length, width = logits.shape
        if self.memoryless:
            flat, ids = logits.reshape(-1, width), self.input_ids.new_zeros(batch * length, 1)
            for processor in self.processors:
                flat = processor(ids, flat)
            return flat.view(batch, length, width)
        scores = logits.clone()
        for i, row in enumerate(rows):
            for t in range(length):
                own = torch.tensor([row.ids + drafted(i, t)], device=self.input_ids.device)
                padded = torch.cat([self.input_ids[row.place : row.place + 1, : row.padding], own], dim=1)
                here = scores[i, t : t + 1]
                for processor in self._processors_of(row):
                    here = processor(padded if isinstance(processor, LENGTH_ONLY) else own, here)
                scores[i, t] = here[0]
        return scores

    def _processors_of(self, row: Row) -> list[Any]:
        """The call's processors; one that was told of each row's padding gets a copy that knows of none."""
        if row.place not in self._of_row:
            own = []
            for processor in self.processors:
                ignored = getattr(processor, "prompt_ignore_length", None)
                if isinstance(ignored, torch.Tensor):
                    processor = copy.copy(processor)
                    processor.prompt_ignore_length = (ignored[row.place : row.place + 1] - row.padding).clamp_min(0)
                own.append(processor)
            self._of_row[row.place] = own
        return self._of_row[row.place]


class Endings:
    """Where rows end, and how long a window still fits.

    Length and end-of-sequence tokens are read from the criteria, since a caller's own take the place of the
    configuration's; any other criterion is asked after each committed token, with the row's own tokens `[1, n]`.
    """

    def __init__(
        self,
        criteria: Sequence[Any],
        generation_config: GenerationConfig,
        input_ids: torch.Tensor,
        context_length: int | None,
    ):
        self.generation_config, self.context_length = generation_config, context_length
        self.device, self.prompt_length = input_ids.device, input_ids.shape[1]
        self.eos = {t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()}
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.max_length = min([limit for limit in (generation_config.max_length, *limits) if limit], default=None)
        self.records = bool(generation_config.return_dict_in_generate)

    def room(self, row: Row) -> int:
        """Longest window that fits: its round commits one token more, and the target must be able to read it."""
        room = row.rule.max_window
        if self.max_length is not None:
            room = min(room, self.max_length - self.prompt_length - row.new_tokens - 1)
        if self.context_length is not None:
            room = min(room, self.context_length - len(row.ids))
        return max(room, 0)

    def commit(self, row: Row, tokens: list[int], logits: torch.Tensor, scores: torch.Tensor) -> int:
        """Append tokens up to the first that ends the row; returns how many. `logits`, `scores` `[n, V]` are theirs.

        What is cut off was never given out, at T > 0 neither.
        """
        for count, token in enumerate(tokens):
            row.ids.append(token)
            row.new_tokens += 1
            if self.records and self.generation_config.output_scores:
                row.scores.append(scores[count])
            if self.records and self.generation_config.output_logits:
                row.logits.append(logits[count])
            row.finished = token in self.eos or (
                self.max_length is not None and self.prompt_length + row.new_tokens >= self.max_length
            )
            if self.others:
                ids = torch.tensor([row.ids], device=self.device)
                so_far = tuple(score[None] for score in row.scores) or None
                stops = [torch.as_tensor(criterion(ids, so_far)).any() for criterion in self.others]
                row.finished = row.finished or any(map(bool, stops))
            if row.finished:
                return count + 1
        return len(tokens)

    def result(self, rows: Sequence[Row], input_ids: torch.Tensor, cache: Any) -> Any:
        """What `generate` returns of finished rows in the caller's order: `[B, n + new]`, or the output class."""
        longest = max(row.new_tokens for row in rows)
        pad = getattr(self.generation_config, "_pad_token_tensor", None)
        pad_id = int(pad) if pad is not None else (self.generation_config.pad_token_id or 0)
        new = torch.full((len(rows), longest), pad_id, dtype=input_ids.dtype)
        for row in rows:
            new[row.place, : row.new_tokens] = torch.tensor(row.ids[len(row.ids) - row.new_tokens :])
        sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
        if not self.records:
            return sequences
        output = GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_token([row.scores for row in rows], longest) if self.generation_config.output_scores else None,
            logits=_by_token([row.logits for row in rows], longest) if self.generation_config.output_logits else None,
        )
        if cache is not None:
            output[CACHE_FIELD] = cache
        return output


# What a GenerateDecoderOnlyOutput calls the cache: `cache` from transformers 5.24 on, `past_key_values` before.
CACHE_FIELD = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


def _by_token(rows: Sequence[list[torch.Tensor]], longest: int) -> tuple[torch.Tensor, ...]:
    """A tensor `[B, V]` for each new token, as plain `generate` gives; zeros behind a row's end."""
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[t] if t < len(row) else nothing for row in rows]) for t in range(longest))


def one_hot_scores(tokens: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """Scores `[n, V]` of distributions that are certain of one token each: tokens looked up, not drawn."""
    scores = torch.full((len(tokens), width), -torch.inf, device=device)
    return scores.scatter(1, to_device(tokens, device)[:, None], 0.0)


def append_looked_up(
    rows: Sequence[Row],
    draft_ids: torch.Tensor,
    draft_scores: list[torch.Tensor],
    valid: torch.Tensor,
    eos: set[int],
    width: int | None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The drafts of a round, with tokens from the text behind each row's own; these take no draft step.

    Args:
        draft_ids (`[B, W]`), valid (`[B, W]` bool), draft_scores (W of `[B, V]`): what the drafter drafted.
        eos (`set[int]`): tokens that end a text, and a draft.
        width (`int`, *optional*):
            V, where the drafts will be verified by their distributions: a looked-up token's is certain of it. Whether
            a token is looked up follows from the tokens before it, so that the output stays distributed as P.

    Returns the three with the looked-up tokens (without `width` the scores are the drafter's); the rows' records get
    the tokens, and say how many there are.
    """
    drafts = [row.trace.rounds[-1].draft_ids for row in rows]
    own = [len(draft) for draft in drafts]
    for row, draft in zip(rows, drafts, strict=True):
        ended = bool(draft) and draft[-1] in eos
        for token in [] if ended else row.rule.look_up(draft, row.room):
            draft.append(token)
            if token in eos:
                break
    lengths = [len(draft) for draft in drafts]
    for row, length, count in zip(rows, lengths, own, strict=True):
        row.trace.rounds[-1].looked_up = length - count
    if lengths == own:
        return draft_ids, draft_scores, valid
    window, device = max(lengths), draft_ids.device
    if width is not None:
        draft_scores = [scores.clone() for scores in draft_scores]
        draft_scores += [torch.zeros(len(rows), width, device=device) for _ in range(window - len(draft_scores))]
        for i, draft in enumerate(drafts):
            for place, scores in enumerate(one_hot_scores(draft[own[i] :], width, device), start=own[i]):
                draft_scores[place][i] = scores
    padded = to_device([draft + [0] * (window - len(draft)) for draft in drafts], device)
    return padded, draft_scores, torch.arange(window, device=device) < to_device(lengths, device)[:, None]


def visible_tokens(input_ids: torch.Tensor, mask: torch.Tensor | None, left_out: int | None) -> torch.Tensor:
    """Which tokens of the prompts are their own `[B, n]`; `left_out` is the length of a mask that generate dropped."""
    if mask is None and left_out is not None and left_out != input_ids.shape[1]:
        raise ValueError(
            f"attention_mask: {left_out} entries given for {input_ids.shape[1]} tokens. Pass one for each token "
            "(with a cache, the whole sequence as input_ids: the drafter has not read the tokens in the cache)."
        )
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)} given for input_ids of shape {tuple(input_ids.shape)}. "
            "Pass a mask of 0 and 1 for each prompt token (and, with a cache, the whole sequence as input_ids)."
        )
    mask = mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask: a prompt is padded on the right, or has a hole. Pad prompts on the left "
            '(tokenizer.padding_side = "left").'
        )
    return mask
