"""The recipe of the embedded drafters, and of the one that `ppow quickstart` trains.

Knows the embedded corpus and PPOWTrainer; the shipped drafters and the quickstart differ in nothing but time.
"""

import copy
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.models import default_device
from ..data.regeneration import regenerate
from ..data.sequences import SequenceDataset, all_positions
from ..measure import provenance
from ..measure.costs import bfloat16_pays
from ..publish.model_card import write_drafter_card
from ..runtime.modeling_ppow import PPOWDrafter
from ..training import PPOWTrainingArguments
from ..training.budget import Budget, BudgetTrainer
from ..training.objective import parse_objective
from .corpus import SourceFile, excerpts, held_in_and_out, standard_library

PROMPT_TOKENS, COMPLETION_TOKENS = 64, 96
EVALUATIONS = 4  # of a stage, in equal shares of its time, beside the one before it
KEPT_ENCODINGS = 4 * 2**30  # bytes of the target's states that are kept instead of computed again in every epoch


@dataclass
class Stage:
    """One stage of training: how long, how fast, and whatever else of PPOWTrainingArguments differs.

    The learning rate falls linearly to a twentieth over the share `decay` of the time and stays there: what is gained
    in the rest shows how far the stage is from its plateau.
    """

    objective: str
    seconds: float
    learning_rate: float
    settings: dict[str, Any]
    decay: float = 1.0

    @property
    def kind(self) -> str:
        """What folders call it: PPOW, or supervised for every loss along the text."""
        return self.objective if self.objective == "ppow" else "supervised"


def text_temperatures(architecture: str) -> list[float]:
    """At which temperatures, in turn, the target writes what a drafter is trained on.

    Eagle: every other text is sampled. Others: T = 0, since the text verifies the windows of their PPOW stage.
    """
    return [0.0, 1.0] if architecture == "eagle" else [0.0]


def target_text(
    target,
    tokenizer,
    files: list[SourceFile],
    sequences: int,
    seed: int,
    cache_dir: str | Path | None = None,
    temperature: float | list[float] = 0.0,
) -> SequenceDataset:
    """Text that the target writes after `sequences` excerpts of `files`, 64 tokens each."""
    return regenerate(
        excerpts(files, tokenizer, sequences, PROMPT_TOKENS, seed),
        target,
        tokenizer,
        max_length=PROMPT_TOKENS + COMPLETION_TOKENS,
        max_new_tokens=COMPLETION_TOKENS,
        batch_size=128,
        temperature=temperature,
        cache_dir=cache_dir,
    )


def train_stage(
    drafter: PPOWDrafter,
    target,
    tokenizer,
    stage: Stage,
    train_data: SequenceDataset,
    eval_data: SequenceDataset,
    output_dir: str | Path,
    seed: int,
    **settings: Any,
) -> list[dict]:
    """Train for `stage.seconds`, evaluating before and after each quarter of them; returns the log."""
    budget = Budget("seconds", stage.seconds, EVALUATIONS)
    arguments = PPOWTrainingArguments(
        output_dir=str(output_dir),
        objective=stage.objective,
        learning_rate=stage.learning_rate,
        max_length=max(len(train_data[n]["input_ids"]) for n in range(len(train_data))),
        adam_beta2=0.95,
        per_device_train_batch_size=8,
        max_steps=100_000,
        logging_steps=5 if stage.seconds < 600 else 25,  # a long training's log is shipped beside its drafter
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=bfloat16_pays(default_device()),
        use_cpu=not torch.cuda.is_available(),
        chunk_size=512,  # at this vocabulary the fastest on a processor: a chunk stays in its cache
        **settings,
        **stage.settings,
    )
    trainer = BudgetTrainer(
        budget,
        stage.decay,
        model=drafter,
        target_model=target,
        args=arguments,
        train_dataset=all_positions(train_data) if stage.kind == "supervised" else train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
    )
    trainer.target.keep_encodings(KEPT_ENCODINGS)
    before = {**trainer.evaluate(), "step": 0}  # train() begins a log of its own
    trainer.train()
    return [before, *trainer.state.log_history]


def default_stages(seconds: float, architecture: str, decay: float = 1.0, started: bool = False) -> list[Stage]:
    """The stages that a drafter of an `architecture` is trained in.

    Eagle: the trainer's default objective. Others: supervised for 70% of the time, then PPOW with windows verified by
    the target's text, by AdamW; a drafter that is `started` is trained supervised alone. `decay` is that of the last
    phase along the text.
    """
    if architecture == "eagle":
        last_phase = 1 - parse_objective(PPOWTrainingArguments.objective)[-1].start
        return [Stage(PPOWTrainingArguments.objective, seconds, 2e-3, {}, 1 - last_phase * (1 - decay))]
    alone = Stage("supervised", seconds, 2e-3, {}, decay)
    if started:
        return [alone]
    return [replace(alone, seconds=0.7 * seconds), Stage("ppow", 0.3 * seconds, 1e-4, {"muon": 0.0})]


def in_turn(objectives: Iterable[str]) -> str:
    """What stages were trained with, in their turn: "supervised, then ppow"."""
    return ", then ".join(name for name, _ in itertools.groupby(objectives))


def make_drafter(
    output_dir: str | Path,
    architecture: str,
    target,
    tokenizer,
    seconds: float = 3600.0,
    sequences: int = 4000,
    eval_prompts: int = 48,
    seed: int = 0,
    target_name: str | None = "tiny",
    start: str | Path | None = None,
    command: str | None = None,
    **settings: Any,
) -> PPOWDrafter:
    """Train a drafter for an embedded target and write it to `output_dir`, the supervised stage beside it.

    Writes bfloat16 safetensors, tokenizer, `training_log.json` (all stages), `provenance.json` and `training.png`.
    `start` is the folder of a drafter that this function made: its supervised stage, or where that was not kept the
    drafter itself, is gone on with and its log continued; another `seed` gives other training data. The held-out
    prompts are always the same. `settings` are PPOWTrainingArguments of all stages.
    """
    output_dir = Path(output_dir)
    held_in, held_out = held_in_and_out(standard_library())
    temperatures = text_temperatures(architecture)
    train_data = target_text(target, tokenizer, held_in, sequences, seed, temperature=temperatures)
    eval_data = target_text(target, tokenizer, held_out, eval_prompts, 0)
    log: list[dict] = []
    if start is None:
        drafter = PPOWDrafter.from_target(
            target, architecture, target_name_or_path=target_name, shares_target_embeddings=False
        )
    else:
        drafter, log = load_start(start)
    stages = default_stages(seconds, architecture, decay=0.75, started=start is not None)
    for stage in stages:
        folder = output_dir / stage.kind
        history = train_stage(
            drafter, target, tokenizer, stage, train_data, eval_data, folder, seed, eval_prompts=eval_prompts,
            **settings,
        )  # fmt: skip
        steps_before = log[-1]["step"] if log else 0
        log += [{**row, "step": row["step"] + steps_before, "objective": stage.objective} for row in history]
        save_drafter(drafter, tokenizer, folder)
    save_drafter(drafter, tokenizer, output_dir)
    write_log(log, output_dir, title=f"{architecture} drafter: {in_turn(row['objective'] for row in log)}")
    origin = provenance.describe(
        drafter.device,
        command,
        seed=seed,
        sequences=sequences,
        text_temperatures=temperatures,
        objectives=[stage.objective for stage in stages],
        data_fingerprint=train_data.fingerprint,
    )
    (output_dir / "provenance.json").write_text(json.dumps(origin, indent=2) + "\n")
    write_drafter_card(output_dir, f"tiny-{architecture}" if target_name == "tiny" else None)
    return drafter


def load_start(folder: str | Path) -> tuple[PPOWDrafter, list[dict]]:
    """The drafter to go on with, in float32, and the log of the stages that made it.

    Its supervised stage where that was kept, else the drafter itself.
    """
    kept = Path(folder, "supervised").is_dir()
    drafter = PPOWDrafter.from_pretrained(Path(folder, "supervised") if kept else folder, dtype=torch.float32)
    rows = json.loads(Path(folder, "training_log.json").read_text())
    return drafter, [row for row in rows if row["objective"] != "ppow" or not kept]


def write_log(log: list[dict], folder: Path, title: str) -> None:
    """Write training_log.json, one row a line, and draw it as training.png."""
    from ..training.curves import draw_curves

    rows = ",\n".join(json.dumps(row) for row in provenance.shortened(log))
    (folder / "training_log.json").write_text(f"[\n{rows}\n]\n")
    draw_curves(log, folder / "training.png", title=title)


def save_drafter(drafter: PPOWDrafter, tokenizer, folder: str | Path) -> None:
    """Save in bfloat16 (the live drafter stays as it is) with the tokenizer."""
    half = copy.deepcopy(drafter)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
