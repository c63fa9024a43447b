"""`ppow train`: a drafter for one's own target and data.

Knows arguments, files and what the trainer is made of; its arguments are those of dataclasses, read by transformers'
parser, so that every [`PPOWTrainingArguments`] is an option.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.files import ensure_writable
from ..data.models import check_tokenizer, load_drafter, load_target, load_tokenizer
from ..data.sources import check_source
from .options import MODEL_HELP, TARGET_HELP

if TYPE_CHECKING:
    from ..runtime.modeling_ppow import PPOWDrafter
    from ..training.recorded_states import StateRecord


@dataclasses.dataclass
class ScriptArguments:
    """What `ppow train` is given beside the training arguments; each field's help says what it is."""

    target: str | None = dataclasses.field(default=None, metadata={"help": f"The target model: {TARGET_HELP}."})
    train_data: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Training data with text, prompt, prompt and completion, or messages: a .jsonl file, or a dataset "
            "as NAME[/CONFIG][@SPLIT]; :COLUMN after it names a column of prompts."
        },
    )
    target_states: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Folders of ppow record, in place of target and training data; a target given too evaluates only."
        },
    )
    eval_data: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Held-out data of the same kind; several as NAME=SOURCE."}
    )
    drafter: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"The drafter to go on training: {MODEL_HELP}. Without it a new one is made from the target."
        },
    )
    architecture: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Architecture of a new drafter; by default eagle. A block drafter's block is of --max_window "
            "tokens.",
            "choices": ["eagle", "standalone", "medusa", "block"],
        },
    )
    draft_vocab_size: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Size of a new eagle or block drafter's own vocabulary; by default it is the target's."},
    )
    num_hidden_layers: int | None = dataclasses.field(
        default=None, metadata={"help": "Layers of a new drafter; by default 1, of a block drafter 2."}
    )
    markov_rank: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Rank of a new block drafter's Markov head (DSpark); by default it has none (DFlash)."},
    )
    confidence_head: bool | None = dataclasses.field(
        default=None, metadata={"help": "Whether a new block drafter estimates its tokens' acceptance (DSpark)."}
    )
    init_layers: list[int] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Layers of the target, from 0, whose weights a new drafter's own begin with: one for eagle, some "
            "for standalone; by default they begin at random."
        },
    )
    target_dtype: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "Number format the target is loaded in; auto is the model's own on a GPU, and on a CPU bfloat16 "
            "with --bf16 true (the default where this machine computes it faster), else float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    resume: bool = dataclasses.field(
        default=False,
        metadata={"help": "Go on from the last complete checkpoint in the output folder, if there is one."},
    )


def register(subparsers: Any) -> None:
    """List `ppow train` among the commands; [`parse`] reads its arguments."""
    subparsers.add_parser(
        "train", add_help=False, help="train a drafter on your own data (ppow train --help lists its arguments)"
    )


def build_parser() -> Any:
    """The parser of `ppow train`, an `HfArgumentParser`."""
    from transformers import HfArgumentParser

    from ..training import PPOWTrainingArguments

    return HfArgumentParser(
        [ScriptArguments, PPOWTrainingArguments],
        prog="ppow train",
        description="Train a drafter for a target on your own data, supervised or with PPOW. On two machines each "
        "runs accelerate launch --num_machines 2 --machine_rank 0 (the other 1) --num_processes N --main_process_ip "
        "IP -m ppow_hf.cli train ..., with N of both together, the first's IP, and an --output_dir that both share.",
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The words after `ppow train` as `script` ([`ScriptArguments`]) and `training` ([`PPOWTrainingArguments`])."""
    import torch

    from ..measure.costs import bfloat16_pays
    from ..training.recorded_states import StateRecord

    parser, words = build_parser(), list(argv)
    chosen = any(word.startswith(("--bf16", "--fp16", "--target_dtype", "-h", "--help")) for word in words)
    if not chosen and not torch.accelerator.is_available() and bfloat16_pays("cpu"):
        words += ["--bf16", "true"]
    states = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    states.add_argument("--target_states", "--target-states", nargs="+")
    states.add_argument("--max_length", "--max-length")
    given = states.parse_known_args(words)[0]
    if given.target_states is not None and given.max_length is None:
        words += ["--max_length", str(StateRecord(*given.target_states).max_length)]
    script, training = parser.parse_args_into_dataclasses(args=words)
    missing = [f"--{name}" for name in ("target", "train_data") if getattr(script, name) is None]
    if missing and script.target_states is None:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --target_states)")
    return argparse.Namespace(script=script, training=training)


def run(arguments: argparse.Namespace) -> int:
    """Load or make the drafter, train it, and save it."""
    from transformers import set_seed

    from ..training import PPOWTrainer
    from ..training.checkpoints import check_complete
    from ..training.processes import end_processes
    from ..training.recorded_states import StateRecord

    script, training = arguments.script, arguments.training
    check_used(script, training)
    ensure_writable(training.output_dir, "--output_dir")
    if script.train_data is not None:
        check_source(script.train_data, "--train_data")
    eval_sources = evaluation_sources(script.eval_data or [])
    resume: bool | str | None = training.resume_from_checkpoint
    if script.resume or resume in ("auto", "true", "True"):
        resume = True  # the last complete one, or a new start where there is none
    elif resume:
        check_complete(str(resume))
    set_seed(training.seed)  # which draws a new drafter's weights
    device = str(training.device)
    dtype: str | None = script.target_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cpu" and training.bf16 else None
    record = None if script.target_states is None else StateRecord(*script.target_states)
    target = None if script.target is None else load_target(script.target, "--target", dtype, device)
    if record is None:
        tokenizer = load_tokenizer(script.target, "--target")
    else:
        tokenizer = load_tokenizer(script.target_states[0], "--target_states")
    train_data: Any = script.train_data
    if script.drafter is not None:
        drafter = load_drafter(script.drafter, "--drafter", "float32", device)
        check_tokenizer(drafter, tokenizer, "--drafter")
    elif record is None:
        drafter, train_data = drafter_for_data(script, training, target, tokenizer, eval_sources)
    else:
        drafter = drafter_for_record(script, training, record, target or record.target, tokenizer)
    trainer = PPOWTrainer(
        model=drafter,
        target_model=target,
        args=training,
        train_dataset=train_data,
        eval_dataset=eval_sources,
        processing_class=tokenizer,
        target_states=record,
    )
    trainer.train(resume_from_checkpoint=resume)
    if not trainer.already_finished:
        trainer.save_model()
    end_processes()
    return 0


def check_used(script: ScriptArguments, training: Any) -> None:
    """Raise `ValueError` for arguments of a new drafter beside one to train on, and of texts beside recorded ones."""
    of_new = ("architecture", "draft_vocab_size", "num_hidden_layers", "markov_rank", "confidence_head", "init_layers")
    fields = {field.name: field.default for field in dataclasses.fields(script)}
    for name in of_new if script.drafter is not None else ():
        if getattr(script, name) != fields[name]:
            raise ValueError(
                f"{name}: {getattr(script, name)} given, which is of a new drafter, and --drafter names one to train "
                "on. Leave out one of them."
            )
    if script.target_states is not None and training.regenerate is not None:
        raise ValueError(
            f"regenerate: {training.regenerate} given, and recorded states come with their texts. Leave it out."
        )


def drafter_for_data(
    script: ScriptArguments, training: Any, target: Any, tokenizer: Any, eval_sources: Any
) -> tuple[Any, Any]:
    """A new drafter, and the training data, whose tokens choose a reduced vocabulary."""
    import torch

    from ..runtime.target_weights import target_width
    from ..training.checks import check_evaluation, check_libraries, check_schedule
    from ..training.preparation import evaluation_sequences, training_sequences
    from ..training.records import make_repository

    if script.draft_vocab_size is None:
        return new_drafter(script, training, target, tokenizer), script.train_data
    # What is refused without the texts, before the target writes them.
    any_tokens = new_drafter(script, training, target, tokenizer, torch.ones(target_width(target)))
    check_evaluation(training, eval_sources)
    check_libraries(training, any_tokens)
    check_schedule(training)
    evaluation_sequences(eval_sources, tokenizer, training)
    make_repository(training)
    sequences = training_sequences(script.train_data, target, tokenizer, training, "--train_data")
    counts = sequences.count_tokens(target_width(target))
    return new_drafter(script, training, target, tokenizer, counts), sequences


def drafter_for_record(
    script: ScriptArguments, training: Any, record: "StateRecord", target: Any, tokenizer: Any
) -> "PPOWDrafter":
    """A new drafter that reads the recorded layers, begun from `target`, or from what the record has of it."""
    from ..runtime.target_weights import target_width

    named = dataclasses.replace(script, target=script.target or record.manifest["target"])
    counts = record.sequences.count_tokens(target_width(record.target))
    layers: dict[str, Any] = {}
    if script.architecture in (None, "eagle"):
        layers = {"target_layer_ids": record.layer_ids}
        if record.layer_ids:
            layers["state_scales"] = record.state_scales()
    elif script.architecture == "block":  # what an eagle drafter reads will do, without the embeddings if it can
        layers = {"target_layer_ids": sorted(set(record.layer_ids) - {0}) or record.layer_ids}
    return new_drafter(named, training, target, tokenizer, counts, **layers)


def evaluation_sources(given: list[str]) -> str | dict[str, str] | None:
    """`--eval_data`: one `SOURCE`, or several `NAME=SOURCE` by name; raises where one cannot be read."""
    named: dict[str, str] = {}
    for text in given:
        name, _, source = text.rpartition("=")
        check_source(source, "--eval_data")
        if not name and len(given) == 1:
            return source
        if not name or name in named:
            raise ValueError(f"--eval_data: {text!r} has no name of its own; pass several as NAME=FILE.")
        named[name] = source
    return named or None


def new_drafter(
    script: ScriptArguments, training: Any, target: Any, tokenizer: Any, token_counts: Any = None, **overrides: Any
) -> "PPOWDrafter":
    """An untrained float32 drafter for `target`, as the arguments describe it; `overrides` as of `from_target`.

    `token_counts` (`[vocab_size]`, of the training data) choose the tokens of a reduced draft vocabulary.
    """
    from ..runtime.configuration_ppow import vocabulary_fingerprint
    from ..runtime.modeling_ppow import PPOWDrafter

    if script.architecture in ("block", "medusa") and training.max_window is not None:  # their longest window
        overrides["max_window"] = training.max_window
    for name in ("num_hidden_layers", "markov_rank", "confidence_head"):
        if getattr(script, name) is not None:
            overrides[name] = getattr(script, name)
    drafter = PPOWDrafter.from_target(
        target,
        script.architecture or "eagle",
        draft_vocab_size=script.draft_vocab_size,
        token_counts=token_counts,
        init_layers=script.init_layers,
        target_vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
        target_name_or_path=script.target,
        **overrides,
    )
    return drafter.float()
