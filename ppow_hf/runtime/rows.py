"""The rows of a generation call: what each has written, how its scores are processed, where it ends.

Knows logits processors and stopping criteria, and shows a row to them as it would be alone. Knows no models and no
caches.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation import logits_process as processors

from .trace import GenerationTrace
from .windowing import WindowRule

# Processors that look at the scores alone: one call for all rows and positions. A subclass may look at more.
MEMORYLESS = {
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
    processors.TopHLogitsWarper,
    processors.BarkEosPrioritizerLogitsProcessor,
}
# Processors that look at the length alone, which the caller gave for the padded prompt.
LENGTH_ONLY = {
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.ExponentialDecayLengthPenalty,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.AlternatingCodebooksLogitsProcessor,
}


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
        self.memoryless = all(type(processor) in MEMORYLESS for processor in self.processors)
        self._of_row: dict[int, list[Any]] = {}

    def __call__(
        self, logits: torch.Tensor, rows: Sequence[Row], drafted: Callable[[int, int], list[int]]
    ) -> torch.Tensor:
        """Processed scores of logits `[B, T, V]`; position t of row i stands after its ids and `drafted(i, t)`."""
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
                ids = torch.tensor([row.ids + drafted(i, t)], device=self.input_ids.device)
                padded_ids = torch.cat([self.input_ids[row.place : row.place + 1, : row.padding], ids], dim=1)
                position_scores = scores[i, t : t + 1]
                for processor in self._processors_of(row):
                    seen_ids = padded_ids if type(processor) in LENGTH_ONLY else ids
                    position_scores = processor(seen_ids, position_scores)
                    if position_scores.shape != (1, width):
                        raise ValueError(
                            f"logits_processor: {type(processor).__name__} was shown scores (1, {width}) of one "
                            f"row and returned {tuple(position_scores.shape)}. Rows of a batch are processed one by "
                            "one: let it treat each row alike, or pass prompts one by one."
                        )
                scores[i, t] = position_scores[0]
        return scores

    def process_after(self, logits: torch.Tensor, rows: Sequence[Row], drafts: Sequence[list[int]]) -> torch.Tensor:
        """Processed scores of logits `[B, V]` that stand after each row's ids and its draft tokens."""
        return self(logits.to(self.input_ids.device)[:, None], rows, lambda i, t: drafts[i])[:, 0]

    def _processors_of(self, row: Row) -> list[Any]:
        """The call's processors, those that know rows by their number or their prompts as copies of the row's own."""
        if row.place not in self._of_row:
            self._of_row[row.place] = [processor_of_row(p, row, self.input_ids) for p in self.processors]
        return self._of_row[row.place]


def processor_of_row(processor: Any, row: Row, input_ids: torch.Tensor) -> Any:
    """A logits processor of prompts `[B, n]` as the row would have it alone, but under its own number."""
    kind, ignored = type(processor), getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, torch.Tensor):  # each row's padding counts as its prompt
        processor = copy.copy(processor)
        processor.prompt_ignore_length = (ignored[row.place : row.place + 1] - row.padding).clamp_min(0)
    elif kind is processors.PrefixConstrainedLogitsProcessor:
        allowed_tokens = processor._prefix_allowed_tokens_fn
        number = row.place // processor._num_beams  # of the prompt; beams are its num_return_sequences
        processor = copy.copy(processor)
        processor._num_beams = 1
        processor._prefix_allowed_tokens_fn = lambda _, ids: allowed_tokens(number, ids)
    elif kind is processors.EncoderRepetitionPenaltyLogitsProcessor:
        sources = processor.encoder_input_ids  # [prompts before num_return_sequences, n], or texts of the caller's
        place = row.place * len(sources) // len(input_ids)
        padding = row.padding if torch.equal(sources[place], input_ids[row.place]) else 0
        processor = copy.copy(processor)
        processor.encoder_input_ids = sources[place : place + 1, padding:]
    elif kind is processors.EncoderNoRepeatNGramLogitsProcessor:
        place = row.place * processor.batch_size // len(input_ids)
        row_processor = kind(processor.ngram_size, input_ids[row.place : row.place + 1])
        if row_processor.generated_ngrams[0] == processor.generated_ngrams[place]:  # the prompt's: without its padding
            row_processor = kind(processor.ngram_size, input_ids[row.place : row.place + 1, row.padding :])
        else:
            row_processor.generated_ngrams = [processor.generated_ngrams[place]]
        processor = row_processor
    return processor


class StopConditions:
    """Where texts end, and how long a window still fits.

    Length and end-of-sequence tokens are read from the criteria, since a caller's own take the place of the
    configuration's. Any other criterion is asked with a text's own tokens `[1, n]`.

    Args:
        criteria (`Sequence`), generation_config (`GenerationConfig`): the call's.
        context_length (`int`, *optional*): longest sequence that target and drafter can both take.
    """

    def __init__(self, criteria: Sequence[Any], generation_config: GenerationConfig, context_length: int | None):
        self.context_length = context_length
        self.eos = {t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()}
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.max_length = min([limit for limit in (generation_config.max_length, *limits) if limit], default=None)

    def room(self, max_window: int, length: int, own_length: int) -> int:
        """Longest window that fits after `length` tokens, `own_length` of which are not padding.

        Its round commits one token more, and the target must be able to read it.
        """
        room = max_window
        if self.max_length is not None:
            room = min(room, self.max_length - length - 1)
        if self.context_length is not None:
            room = min(room, self.context_length - own_length)
        return max(room, 0)

    def met_by(self, ids: torch.Tensor, draft_ids: list[int]) -> bool:
        """Whether the last of `draft_ids`, after `ids` `[1, n]`, ends the text; its length is not asked about."""
        if draft_ids[-1] in self.eos:
            return True
        if not self.others:
            return False
        ids = append_drafts(ids, draft_ids)
        return any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in self.others)


class Endings(StopConditions):
    """Where the rows of a batch end, and what is returned of them."""

    def __init__(
        self,
        criteria: Sequence[Any],
        generation_config: GenerationConfig,
        input_ids: torch.Tensor,
        context_length: int | None,
    ):
        super().__init__(criteria, generation_config, context_length)
        self.generation_config = generation_config
        self.device, self.prompt_length = input_ids.device, input_ids.shape[1]
        self.records = bool(generation_config.return_dict_in_generate)

    def room_of(self, row: Row) -> int:
        """Longest window that fits after a row."""
        return self.room(row.rule.max_window, self.prompt_length + row.new_tokens, len(row.ids))

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
                stops = [stops_row(criterion, ids, so_far) for criterion in self.others]
                row.finished = row.finished or any(stops)
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


def stops_row(criterion: Any, ids: torch.Tensor, scores: Any) -> bool:
    """What a stopping criterion says of one row `[1, n]`."""
    stops = torch.as_tensor(criterion(ids, scores))
    if stops.numel() != 1:
        raise ValueError(
            f"stopping_criteria: {type(criterion).__name__} was shown one row and answered for {stops.numel()}. Rows "
            "of a batch end one by one: let it treat each row alike, or pass prompts one by one."
        )
    return bool(stops)


# What a GenerateDecoderOnlyOutput calls the cache: `cache` from transformers 5.24 on, `past_key_values` before.
CACHE_FIELD = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


def _by_token(rows: Sequence[list[torch.Tensor]], longest: int) -> tuple[torch.Tensor, ...]:
    """A tensor `[B, V]` for each new token, as plain `generate` gives; zeros after a row's end."""
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[t] if t < len(row) else nothing for row in rows]) for t in range(longest))


def append_drafts(input_ids: torch.Tensor, draft_ids: list[int]) -> torch.Tensor:
    """`input_ids` `[1, n]` with draft tokens after them, `[1, n + W]`."""
    return torch.cat([input_ids, input_ids.new_tensor([draft_ids])], dim=-1)


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
