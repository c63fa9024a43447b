"""The texts of a comparison: what is trained on, and the two evaluation splits, which share nothing with it.

Knows workloads and files; knows no recipe and trains nothing.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from ..data.files import write_whole
from ..data.regeneration import regenerate
from ..data.rows import read_rows
from ..data.sequences import SequenceDataset, all_positions, extract_prompts
from ..tiny.corpus import excerpts, held_in_and_out, standard_library
from .configuration import CompareConfig
from .evaluation import EvaluationTexts, SampledText, write_texts

SPLITS = ("validation", "test")
UNCUT = 2**30  # tokens of a prompt


def check_prompts(config: CompareConfig, tokenizer: Any) -> None:
    """Raise `ValueError` for rows of a workload's files that give no prompts, before the target writes after any."""
    if "evaluation" not in config.workload:
        return
    train, evaluation = workload_rows(config, tokenizer)
    evaluated = [row for rows in evaluation.values() for row in rows]
    for split, rows in (("train", train), ("evaluation", evaluated)):
        if rows:
            extract_prompts(rows, tokenizer, UNCUT, argument=f"workload.{split}")


def evaluation_texts(config: CompareConfig, folder: Path, target: Any, tokenizer: Any) -> dict[str, EvaluationTexts]:
    """The texts of both splits, written by the target once and kept in `folder`."""
    data, path = config.data, folder / "texts.json"
    if not path.is_file():
        _, evaluation_rows = workload_rows(config, tokenizer)
        found = {}
        for split, rows in evaluation_rows.items():
            prompts = extract_prompts(rows, tokenizer, data["prompt_tokens"], argument="workload")
            texts = write_texts(target, prompts, data["completion_tokens"], seed=0)
            found[split] = {
                "prompts": texts.prompts,
                "greedy": texts.greedy,
                "sampled": [vars(text) for text in texts.sampled],
            }
        write_whole(path, json.dumps(found))
    splits = {}
    for split, parts in json.loads(path.read_text()).items():
        sampled = [SampledText(**text) for text in parts["sampled"]]
        splits[split] = EvaluationTexts(parts["prompts"], parts["greedy"], sampled, data["completion_tokens"])
    return splits


def training_text(
    config: CompareConfig, folder: Path, target: Any, tokenizer: Any, temperature: float | list[float] = 0.0
) -> SequenceDataset:
    """What the target writes after the workload's training prompts, kept in `folder`."""
    sequences = regenerate(
        workload_rows(config, tokenizer)[0], target, tokenizer,
        max_length=config.longest_sequence, max_new_tokens=config.data["completion_tokens"], batch_size=32,
        temperature=temperature, cache_dir=folder / "data",
    )  # fmt: skip
    return all_positions(sequences)


def workload_rows(config: CompareConfig, tokenizer: Any) -> tuple[list[dict], dict[str, list[dict]]]:
    """Prompts to train on, and those of both evaluation splits, which share no source with them or each other."""
    data, workload = config.data, config.workload
    wanted = {split: data[f"{split}_prompts"] for split in SPLITS}
    if workload.get("name") == "stdlib" and "train" not in workload:
        held_in, held_out = held_in_and_out(standard_library())
        sides = {split: [f for f in held_out if _side(f.name) == split] for split in SPLITS}
        count = data["train_sequences"] if config.target_states is None else 0
        train = excerpts(held_in, tokenizer, count, data["prompt_tokens"], seed=0)
        return train, {
            split: excerpts(sides[split], tokenizer, wanted[split], data["prompt_tokens"], seed=1) for split in SPLITS
        }
    train = []
    if config.target_states is None:
        train = read_rows(workload["train"], "workload.train")[: data["train_sequences"]]
    rows = read_rows(workload["evaluation"], "workload.evaluation")
    random.Random(0).shuffle(rows)
    first = wanted[SPLITS[0]]
    return train, {SPLITS[0]: rows[:first], SPLITS[1]: rows[first : first + wanted[SPLITS[1]]]}


def _side(name: str) -> str:
    """The evaluation split of a held-out module: its tests are on the same side."""
    key = name.rsplit(".", maxsplit=1)[-1].removeprefix("test_").strip("_")
    return SPLITS[hashlib.sha256(f"split {key}".encode()).digest()[0] % 2]
