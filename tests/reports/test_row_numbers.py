"""Logits processors and stopping criteria that know which row they are shown.

Each row of a batch is what plain `generate` writes for its prompt alone; a processor that is told a row's number gets
the row's own.
"""

import inspect

import pytest
import torch
from own_loop import generate_by_loop
from test_batches import COSTS, alone, assert_rows, make_drafter, ragged, together
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

from ppow_hf.runtime import compatibility, rows

WAYS = [{"window": "fixed", "max_window": 4}, {"tree_nodes": 10, "tree_branches": 3, **COSTS}]
ways = pytest.mark.parametrize("way", WAYS, ids=["chains", "trees"])


@ways
def test_allowed_tokens_of_each_row(make_target, way):
    """Reported of dottxt-ai/outlines#789: a prefix function in a batch."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([6, 6, 6])  # of one length, so that plain generate can take them together
    numbers = []

    def allowed(row: int, text: torch.Tensor) -> list[int]:
        numbers.append(row)
        return list(range(1 + row, 64, 3))

    options = {"prefix_allowed_tokens_fn": allowed, "do_sample": False, "max_new_tokens": 24}
    expected = target.generate(ids, attention_mask=mask, **options)
    numbers.clear()
    given = generate_by_loop(target, drafter, ids, attention_mask=mask, **options, **way)
    assert torch.equal(given, expected)
    assert set(numbers) == {0, 1, 2}
    given = target.generate(ids, attention_mask=mask, assistant_model=drafter.with_settings(**way), **options)
    assert torch.equal(given, expected)


def test_allowed_tokens_of_several_sequences(make_target):
    """The same with `num_return_sequences`: a number is that of plain generate, the prompt's or the sequence's."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([5, 3])
    numbers = []

    def allowed(number: int, text: torch.Tensor) -> list[int]:
        numbers.append(number)
        return [number, number + 10]

    options = {"do_sample": True, "num_return_sequences": 3, "prefix_allowed_tokens_fn": allowed, "max_new_tokens": 8}
    target.generate(ids, attention_mask=mask, **options)
    sequences = 6 // len(set(numbers))  # of a number: 3, and 1 in older versions
    output = generate_by_loop(target, drafter, ids, attention_mask=mask, **options, **COSTS)
    for row, tokens in enumerate(output[:, ids.shape[1] :].tolist()):
        assert set(tokens) <= {row // sequences, row // sequences + 10}


@ways
@pytest.mark.parametrize(
    "option",
    [{"encoder_repetition_penalty": 3.0}, {"encoder_no_repeat_ngram_size": 1}, {"repetition_penalty": 1.7}],
    ids=lambda option: next(iter(option)),
)
def test_processors_that_hold_the_prompts(make_target, option, way):
    """The kind of huggingface/transformers: processors made for a batch of prompts, shown one row."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([9, 4, 7])
    expected = alone(target, prompts, max_new_tokens=24, **option)
    assert expected != alone(target, prompts, max_new_tokens=24)
    assert_rows(together(target, drafter, ids, mask, max_new_tokens=24, **option, **way), expected)


def test_texts_of_the_callers_own(make_target):
    """The same processors made by the caller, with other texts than the prompts: one for each row."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([6, 6], seed=1)
    texts = torch.arange(40).view(2, 20)
    made = [
        logits_process.EncoderRepetitionPenaltyLogitsProcessor(3.0, texts),
        logits_process.EncoderNoRepeatNGramLogitsProcessor(1, texts[:, :10]),
    ]
    for processor in made:
        options = {"do_sample": False, "max_new_tokens": 16, "logits_processor": LogitsProcessorList([processor])}
        expected = target.generate(ids, attention_mask=mask, **options)
        given = generate_by_loop(target, drafter, ids, attention_mask=mask, **options, **WAYS[0])
        assert torch.equal(given, expected)


class RowBias(LogitsProcessor):
    """Adds a bias of its own to each row of the batch."""

    def __init__(self, bias: torch.Tensor):
        self.bias = bias

    def __call__(self, input_ids, scores):
        return scores + self.bias


class EndOfRow(StoppingCriteria):
    """Ends the rows at lengths of their own."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] > 9, input_ids.shape[1] > 12])


def test_what_answers_for_a_whole_batch_is_refused(make_target):
    """Another of the kind: a caller's processor or criterion with a value for each row."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([5, 5])
    with pytest.raises(ValueError, match="logits_processor: RowBias was shown"):
        bias = LogitsProcessorList([RowBias(torch.randn(2, 64))])
        generate_by_loop(target, drafter, ids, attention_mask=mask, max_new_tokens=4, logits_processor=bias)
    with pytest.raises(ValueError, match="stopping_criteria: EndOfRow was shown"):
        ends = StoppingCriteriaList([EndOfRow()])
        generate_by_loop(target, drafter, ids, attention_mask=mask, max_new_tokens=4, stopping_criteria=ends)


class OnlyAfterSeven(logits_process.TemperatureLogitsWarper):
    """A subclass that looks at more than its parent does."""

    def __call__(self, input_ids, scores):
        return scores.flip(-1) if int(input_ids[0, -1]) % 2 else scores


def test_a_subclass_of_a_simple_processor_is_shown_the_text(make_target):
    """Another of the kind: what is true of a processor need not be of one derived from it."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    prompts, ids, mask = ragged([4, 7])
    options = {"logits_processor": LogitsProcessorList([OnlyAfterSeven(1.5)]), "max_new_tokens": 24}
    assert_rows(together(target, drafter, ids, mask, **options, **WAYS[0]), alone(target, prompts, **options))


def test_processors_of_two_batches_in_one_are_refused(make_target):
    """The kind as a whole: classifier-free guidance, and processors that keep a state from call to call."""
    target = make_target("llama")
    drafter = make_drafter(target, "standalone")
    ids = torch.tensor([[1, 2, 3]])
    processor = LogitsProcessorList([logits_process.ClassifierFreeGuidanceLogitsProcessor(2.0)])
    for call in ({"custom_generate": drafter.generate_with()}, {"assistant_model": drafter}):
        with pytest.raises(ValueError, match="logits_processor: a ClassifierFreeGuidanceLogitsProcessor"):
            target.generate(ids, **call, max_new_tokens=4, logits_processor=processor)


def test_every_processor_of_transformers_is_sorted():
    """A processor that transformers adds has to be looked at: does it know rows, lengths or its own past?"""
    by_row = {
        "PrefixConstrainedLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    }  # fmt: skip
    by_text = {
        "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor",
        "WatermarkLogitsProcessor", "WhisperTimeStampLogitsProcessor",
    }  # fmt: skip
    refused = {kind.__name__ for kind in compatibility.STATEFUL_PROCESSORS}
    refused |= {"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"}
    simple = {kind.__name__ for kind in rows.MEMORYLESS | rows.LENGTH_ONLY}
    known = {
        name
        for name, kind in vars(logits_process).items()
        if inspect.isclass(kind) and issubclass(kind, LogitsProcessor) and kind is not LogitsProcessor
    }
    assert known <= by_row | by_text | refused | simple
