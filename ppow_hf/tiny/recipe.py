"""The recipe of the embedded targets: tokenizer, language models and their report, from the standard library's source.

Knows how to train a small causal language model with transformers' Trainer; knows nothing about drafters.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..data.models import default_device
from ..data.rows import read_rows
from ..data.sources import split_column
from ..measure.costs import bfloat16_pays
from ..training.optimizers import Muon, muon_groups
from .cards import write_target_card
from .corpus import (
    SourceFile,
    corpus_fingerprint,
    function_prompts,
    held_in_and_out,
    openings,
    standard_library,
    texts_of_rows,
)

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 1024
WORTH_COMPILING = 50  # optimizer steps
EVAL_ROWS = 24  # of the held-out texts, for the loss during training
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass
class TargetRecipe:
    """What is needed to make an embedded target again.

    Args:
        family (`str`, *optional*, defaults to `"llama"`): `"llama"` or `"qwen3"`.
        hidden_size, intermediate_size, num_layers, num_heads, num_key_value_heads, head_dim (`int`): the shape.
        max_steps (`int`, *optional*, defaults to `1076`): optimizer steps.
        tokens_per_step (`int`, *optional*, defaults to `8192`): tokens in each step's batch.
        short_length (`int`, *optional*, defaults to `256`): length of the training rows before the long phase.
        long_share (`float`, *optional*, defaults to `0.2`): share of the steps, at the end, with rows of the whole
            context (1,024 tokens).
        muon_learning_rate, adamw_learning_rate (`float`): peak learning rates of the matrices, and of the rest.
        decay_share (`float`, *optional*, defaults to `0.4`): share of the steps in which the rate falls to zero.
        seed (`int`, *optional*, defaults to `0`): seed of the weights and of the order of the data.
    """

    family: str = "llama"
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 12
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_steps: int = 1076
    tokens_per_step: int = 8192
    short_length: int = 256
    long_share: float = 0.2
    muon_learning_rate: float = 0.02
    adamw_learning_rate: float = 3e-3
    warmup_steps: int = 30
    decay_share: float = 0.4
    seed: int = 0
    max_cpu_hours: float = field(default=2.0, metadata={"help": "training stops after this much processor time"})

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: {self.family!r} is not one of {sorted(FAMILIES)}.")


QWEN3_RECIPE = TargetRecipe(family="qwen3", num_layers=8, intermediate_size=384, max_steps=250)


def recipe_of(family: str, hidden_size: int | None = None, **changes: Any) -> TargetRecipe:
    """The recipe of a target of a family, `"llama"` or `"qwen3"`; what is not `None` replaces the recipe's own.

    With `hidden_size`, a multiple of twice the head's size, heads and the feed-forward layers grow in proportion.
    Raises `ValueError` for another.
    """
    recipe = QWEN3_RECIPE if family == "qwen3" else TargetRecipe(family=family)
    if hidden_size is not None:
        least = 2 * recipe.head_dim
        if hidden_size < least or hidden_size % least:
            raise ValueError(f"hidden_size: {hidden_size} given; it must be a multiple of {least}.")
        heads = hidden_size // recipe.head_dim
        wider = recipe.intermediate_size * hidden_size // recipe.hidden_size
        recipe = replace(
            recipe, hidden_size=hidden_size, intermediate_size=wider, num_heads=heads, num_key_value_heads=heads // 2
        )
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def train_tokenizer(files: list[SourceFile]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, trained on the held-in modules. `<|endoftext|>` is bos and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files if not file.held_out), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def token_stream(files: list[SourceFile], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All files as one stream `[tokens]`, each file opened by `<|endoftext|>`."""
    encoded = tokenizer([file.text for file in files], add_special_tokens=False)["input_ids"]
    pieces = [torch.tensor([tokenizer.bos_token_id, *ids], dtype=torch.int32) for ids in encoded]
    return torch.cat(pieces)


def spread_rows(stream: torch.Tensor, most: int | None = None) -> torch.Tensor:
    """A stream `[tokens]` as rows `[n, 1024]`; where there are more than `most`, so many evenly spread ones."""
    rows = stream[: len(stream) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH).long()
    if most is not None and len(rows) > most:
        rows = rows[torch.linspace(0, len(rows) - 1, most).long()]
    return rows


class StepBatches(Dataset):
    """Item i is the whole batch of optimizer step i: short rows first, rows of the full context at the end.

    A batch is a function of (seed, step) alone, so that a resumed run reads what an uninterrupted one reads.
    """

    def __init__(self, stream: torch.Tensor, recipe: TargetRecipe):
        self.recipe = recipe
        self.chunks = stream[: len(stream) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
        self.long_from = round(recipe.max_steps * (1 - recipe.long_share))

    def __len__(self) -> int:
        return self.recipe.max_steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        per_step = self.recipe.tokens_per_step // CONTEXT_LENGTH
        positions = [step * per_step + offset for offset in range(per_step)]
        rows = []
        for position in positions:
            epoch, index = divmod(position, len(self.chunks))
            order = torch.randperm(len(self.chunks), generator=torch.Generator().manual_seed(self.recipe.seed + epoch))
            rows.append(self.chunks[order[index]])
        batch = torch.stack(rows).long()  # [rows, 1024]
        if step < self.long_from:
            batch = batch.view(-1, self.recipe.short_length)
        return {"input_ids": batch, "labels": batch}


class TargetTrainer(Trainer):
    """Trainer that reads `StepBatches` in order, optimises with `Muon` and compiles the training forward."""

    recipe: TargetRecipe
    optimizer: Any
    compiled: Any = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.compiled is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self.compiled(**inputs, use_cache=False).loss

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args):
        if self.optimizer is None:
            groups = muon_groups(self.model)
            for group, rate in zip(
                groups, (self.recipe.muon_learning_rate, self.recipe.adamw_learning_rate), strict=True
            ):
                group["lr"] = rate
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            self.optimizer = Muon(groups, eps=1e-10, scale="spectral", dtype=dtype)
        return self.optimizer


class ProcessorTimeLimit(TrainerCallback):
    """Stops training when the processor time of all sessions of this run reaches the recipe's limit."""

    FILE = "processor_seconds.json"

    def __init__(self, recipe: TargetRecipe, checkpoint: str | None):
        self.seconds = recipe.max_cpu_hours * 3600
        file = Path(checkpoint, self.FILE) if checkpoint else None
        self.earlier = json.loads(file.read_text()) if file is not None and file.exists() else 0.0

    def used(self) -> float:
        """Seconds of processor time of this session and of those that led to its checkpoint."""
        return self.earlier + time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if self.used() > self.seconds:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if folder.is_dir():
            (folder / self.FILE).write_text(json.dumps(self.used()))


def build_target(recipe: TargetRecipe, bos_token_id: int, pad_token_id: int):
    """An untrained target of the recipe's shape."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_key_value_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": bos_token_id,
        "pad_token_id": pad_token_id,
    }
    return AutoModelForCausalLM.from_config(FAMILIES[recipe.family](**shape))


@torch.no_grad()
def bits_per_byte(model, tokenizer, files: list[SourceFile], max_chunks: int | None = None) -> float:
    """Held-out bits per byte: total negative log2-likelihood over the files' UTF-8 bytes, in rows of 1,024 tokens."""
    rows = spread_rows(token_stream(files, tokenizer), max_chunks)
    nats, byte_count = 0.0, 0
    for row in rows.split(4):
        loss = model(input_ids=row.to(model.device), labels=row.to(model.device), use_cache=False).loss
        nats += loss.item() * row.shape[0] * (CONTEXT_LENGTH - 1)
        byte_count += sum(len(tokenizer.decode(r[1:]).encode()) for r in row)
    return nats / math.log(2) / byte_count


def texts_of_file(source: str, argument: str) -> list[SourceFile]:
    """The texts of `FILE:COLUMN,COLUMN`, by default of the column `text`; `argument` names it in errors."""
    file, columns = split_column(source)
    return texts_of_rows(read_rows(file, argument), (columns or "text").split(","), argument)


def make_target(
    output_dir: str | Path, recipe: TargetRecipe, tokenizer=None, device: str | None = None,
    texts: list[SourceFile] | None = None,
) -> Path:  # fmt: skip
    """Train a target from `texts`, by default the running Python's standard library, and write it to `output_dir`.

    Checkpoints lie under `output_dir/checkpoints`; a second call with the same folder resumes from the last one.
    Writes bfloat16 safetensors, tokenizer, `recipe.json`, `training_log.json` and `loss.png`.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    device = device or default_device()
    files = standard_library() if texts is None else texts
    held_in, held_out = held_in_and_out(files)
    tokenizer = tokenizer or train_tokenizer(files)
    tokenizer.save_pretrained(output_dir)

    set_seed(recipe.seed)
    model = build_target(recipe, tokenizer.bos_token_id, tokenizer.pad_token_id)
    train_stream, eval_stream = token_stream(held_in, tokenizer), token_stream(held_out, tokenizer)
    for side, stream in (("held in", train_stream), ("held out", eval_stream)):
        if len(stream) < CONTEXT_LENGTH:
            raise ValueError(
                f"texts: {len(stream)} tokens {side} are less than one row of {CONTEXT_LENGTH}. Pass more texts."
            )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(held_in)} held-in texts with "
        f"{len(train_stream):,} tokens; {len(held_out)} held-out texts with {len(eval_stream):,} tokens",
        flush=True,
    )
    arguments = target_arguments(recipe, output_dir / "checkpoints", device)
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    clock = ProcessorTimeLimit(recipe, checkpoint)
    trainer = make_target_trainer(model, recipe, arguments, train_stream, spread_rows(eval_stream, EVAL_ROWS), clock)
    started = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.model.eval()
    report = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_in_tokens": len(train_stream),
        "tokens_seen": trainer.state.global_step * recipe.tokens_per_step,
        "steps": trainer.state.global_step,
        "held_out_bits_per_byte": bits_per_byte(model, tokenizer, held_out, max_chunks=200),
        "held_out_bits_per_byte_rows": 200,
        "corpus": "stdlib" if texts is None else "texts",
        "corpus_fingerprint": corpus_fingerprint(files),
        "processor_hours": clock.used() / 3600,
        "wall_minutes_last_session": (time.time() - started) / 60,
    }
    write_target(output_dir, model, report, trainer.state.log_history)
    prompts = function_prompts(held_out, 4, seed=recipe.seed) if texts is None else openings(held_out, 4)
    samples = continuations(model.float(), tokenizer, prompts)
    write_target_card(output_dir, samples)
    print(json.dumps(report, indent=2))
    print("\n\n".join(f"{prompt}>>>{completion}" for prompt, completion in samples))
    return output_dir


def target_arguments(recipe: TargetRecipe, checkpoints: Path, device: str) -> TrainingArguments:
    """How the Trainer trains a target of this recipe."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=4,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(recipe.max_steps * recipe.decay_share)},
        max_grad_norm=1.0,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        save_total_limit=2,
        bf16=bfloat16_pays(device),
        use_cpu=device == "cpu",
        report_to=[],
        seed=recipe.seed,
        prediction_loss_only=True,
        dataloader_num_workers=0,
    )


def make_target_trainer(
    model: Any,
    recipe: TargetRecipe,
    arguments: TrainingArguments,
    train_stream: torch.Tensor,
    eval_rows: torch.Tensor,
    clock: ProcessorTimeLimit,
) -> TargetTrainer:
    """The trainer on a stream `[tokens]`, evaluated on rows `[n, 1024]`, compiled where that is worth its time."""
    trainer = TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=StepBatches(train_stream, recipe),
        eval_dataset=[{"input_ids": row, "labels": row} for row in eval_rows],
        data_collator=_collate,
        callbacks=[clock],
    )
    trainer.recipe = recipe
    # Without torch.compile training takes 1.6 times as long on a CPU; compiling takes a minute, and g++ there.
    if recipe.max_steps >= WORTH_COMPILING and (shutil.which("g++") or not arguments.use_cpu):
        trainer.compiled = torch.compile(model, dynamic=False)
    return trainer


def write_target(output_dir: Path, model: Any, report: dict[str, Any], log: list[dict]) -> None:
    """Write weights (the model is bfloat16 then), recipe.json, training_log.json and loss.png."""
    from ..measure.plots import plot_curves

    model.config.use_cache = model.generation_config.use_cache = True  # Trainer had turned it off for training
    model.to(torch.bfloat16).save_pretrained(output_dir)
    (output_dir / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")
    (output_dir / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    plot_curves(
        {"loss": [(row["step"], row["loss"]) for row in log if "loss" in row]},
        {"held-out loss": [(row["step"], row["eval_loss"]) for row in log if "eval_loss" in row]},
        output_dir / "loss.png",
        title=f"{report['recipe']['family']} target, nats per token",
    )


def continuations(model: Any, tokenizer: Any, prompts: list[str]) -> list[tuple[str, str]]:
    """The last 96 tokens of each prompt, and what the model writes after them, 96 tokens at T = 0."""
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"][:, -96:].long()
        ids = ids.to(model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False)
        samples.append((tokenizer.decode(ids[0]), tokenizer.decode(output[0, ids.shape[1] :])))
    return samples


def _collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A training item is a whole batch already; evaluation items are rows."""
    if items[0]["input_ids"].dim() == 2:
        return items[0]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
