"""Data without a length, possibly without an end: read as far as a training needs it."""

import itertools

import pytest
import torch

from ppow_hf.training.preparation import sequences_of_training


class Stream(torch.utils.data.IterableDataset):
    """Endless rows of token ids, or of what `row` makes of a number; counts how many were taken."""

    def __init__(self, row=lambda number: {"input_ids": [1 + number % 60, *range(2, 14)]}, rows=None):
        self.row, self.rows, self.taken = row, rows, 0

    def __iter__(self):
        for number in itertools.count() if self.rows is None else range(self.rows):
            self.taken += 1
            assert self.taken < 5000, "read on and on"
            yield self.row(number)


def test_an_endless_stream_is_read_as_far_as_the_steps_take(make_trainer):
    """TRL: `max_steps` bounds a streamed dataset."""
    train, evaluate = Stream(), Stream()
    trainer = make_trainer("eagle", "kl", train=train, evaluate=evaluate, max_steps=3, gradient_accumulation_steps=2)
    assert sequences_of_training(trainer.args) == 3 * 2 * 2
    assert train.taken <= 100 and evaluate.taken <= 100
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.evaluate()["eval_acceptance_length"] >= 1


@pytest.mark.parametrize("words", [3, 400])
def test_enough_texts_are_read_whether_they_are_short_or_long(make_trainer, qwen3_pair, words):
    """datasets: packed rows give fewer or more sequences than there are rows."""
    target, tokenizer = qwen3_pair
    train = Stream(lambda number: {"text": f"def f{number}(x): " + "return x " * words})
    trainer = make_trainer("standalone", "kl", target=target, tokenizer=tokenizer, train=train, max_steps=40)
    assert len(trainer.train_dataset) >= 40 * 2
    assert train.taken < (1500 if words == 3 else 101)


def test_the_target_completes_as_many_prompts_as_are_needed(make_trainer, qwen3_pair, tmp_path, monkeypatch):
    """TRL: prompts come from a stream too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    target, tokenizer = qwen3_pair
    train = Stream(lambda number: {"prompt": f"def f{number}(x):"})
    trainer = make_trainer(
        "standalone", "kl", target=target, tokenizer=tokenizer, train=train, max_steps=2, max_new_tokens=4
    )
    assert train.taken == len(trainer.train_dataset) == 2 * 2


def test_a_stream_that_ends_is_seen_again(make_trainer):
    """transformers: fewer rows than the steps take are several epochs."""
    trainer = make_trainer("eagle", "kl", train=Stream(rows=4), max_steps=6)
    trainer.train()
    assert len(trainer.train_dataset) == 4 and trainer.state.epoch == 3


def test_a_stream_without_steps_is_refused(make_trainer):
    """transformers: nothing tells how much of a stream an epoch is."""
    with pytest.raises(ValueError, match="^train_dataset: a stream given.*Pass max_steps"):
        make_trainer("eagle", "kl", train=Stream(), max_steps=-1, num_train_epochs=1)
