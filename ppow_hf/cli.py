"""The `ppow` command: reads the command line, loads what it names, and calls the library.

Knows arguments, files and messages; everything that is computed is computed elsewhere. A mistake of the user ends with
one line on stderr and exit code 2 (`PPOW_DEBUG=1` shows the traceback instead).
"""

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import COMMANDS
from .commands.errors import check_words, explain
from .data.models import (
    MODEL_HELP,
    add_models,
    check_fits,
    check_positive,
    check_tokenizer,
    ensure_writable,
    load_drafter,
    load_pair,
    load_target,
    load_tokenizer,
)
from .data.sources import check_source, split_column
from .tiny import is_embedded

if TYPE_CHECKING:
    from .runtime.modeling_ppow import PPOWDrafter
    from .runtime.trace import GenerationTrace


@dataclasses.dataclass
class ScriptArguments:
    """What `ppow train` is given beside the training arguments.

    Args:
        target (`str`): the target model: a folder, a name on the Hub, or an embedded model.
        train_data (`str`): training data: a JSON Lines or text file, or a dataset as `NAME[/CONFIG][@SPLIT]`.
        eval_data (`list[str]`, *optional*): held-out data of the same kind; several as `NAME=SOURCE`.
        drafter (`str`, *optional*): drafter to train on; `None` makes a new one from the target.
        architecture (`str`, *optional*, defaults to `"eagle"`): architecture of a new drafter.
        draft_vocab_size (`int`, *optional*): reduced vocabulary of a new eagle drafter.
        target_dtype (`str`, *optional*, defaults to `"auto"`): number format the target is loaded in.
        resume (`bool`, *optional*, defaults to `False`): whether to go on from the last complete checkpoint.
    """

    target: str = dataclasses.field(metadata={"help": f"The target model: {MODEL_HELP}."})
    train_data: str = dataclasses.field(
        metadata={
            "help": "Training data with text, prompt, prompt and completion, or messages: a .jsonl file, or a dataset "
            "as NAME[/CONFIG][@SPLIT]; :COLUMN behind it names a column of prompts."
        }
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
    architecture: str = dataclasses.field(
        default="eagle",
        metadata={"help": "Architecture of a new drafter.", "choices": ["eagle", "standalone", "medusa"]},
    )
    draft_vocab_size: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Size of a new eagle drafter's own vocabulary; by default it is the target's."},
    )
    target_dtype: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "Number format the target is loaded in; auto is float32 on a CPU and the model's own on a GPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    resume: bool = dataclasses.field(
        default=False,
        metadata={"help": "Go on from the last complete checkpoint in the output folder, if there is one."},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `ppow` command with `argv` (by default the process's own arguments) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:
            return train(argv[1:])  # its arguments are those of a dataclass, read by transformers' parser
        if argv[:1] == ["bench"] and "--windows" in argv:
            argv = ["windows", *(word for word in argv[1:] if word != "--windows")]
        parser = build_parser()
        arguments = parser.parse_args(argv)
        check_words(arguments, argv)
        arguments.command = _as_command(argv)
        return arguments.run(arguments)
    except SystemExit as exit_request:  # argparse: --help, or a mistake that it has explained already
        return exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except KeyboardInterrupt:
        print("ppow: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = explain(error, argv)
        if sentence is None or os.environ.get("PPOW_DEBUG"):
            raise
        print(f"ppow: error: {sentence}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands but `train`, whose arguments are those of the training arguments' dataclass."""
    parser = argparse.ArgumentParser(
        prog="ppow",
        description="Train drafters for speculative decoding, generate with them, and measure what they gain.",
        epilog="Set PPOW_DEBUG=1 to see the traceback of an error.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    quick = commands.add_parser(
        "quickstart",
        help="train a drafter for the embedded target and compare it with the other ways of generating",
        description="On the embedded target: prepare data, train a drafter (a standalone one supervised, then with "
        "PPOW; an eagle one supervised), and compare it with plain generation, prompt lookup and transformers' own "
        "assisted generation on held-out prompts.",
    )
    quick.add_argument("--fast", action="store_true", help="use the embedded drafter and train nothing (two minutes)")
    quick.add_argument(
        "--output-dir", default="ppow-quickstart", help="folder for everything it saves (default: %(default)s)"
    )
    quick.add_argument("--prompts", type=int, default=20, help="held-out prompts to compare on (default: %(default)s)")
    quick.add_argument(
        "--max-new-tokens", type=int, default=64, help="tokens generated from each prompt (default: %(default)s)"
    )
    quick.add_argument("--seed", type=int, default=0, help="seed of data and training (default: %(default)s)")
    quick.add_argument(
        "--minutes", type=float, default=3.2, help="time given to training, about (default: %(default)s)"
    )
    quick.add_argument(
        "--architecture",
        choices=["standalone", "eagle"],
        default="standalone",
        help="architecture of the drafter (default: %(default)s)",
    )
    quick.set_defaults(run=quickstart)

    tiny = commands.add_parser(
        "tiny-target",
        help="train an embedded target again from the Python standard library, or a small one on other texts",
        description="Train a small target on the source of the running Python's standard library, or on a file of "
        "texts. Run again with the same folder, it goes on from its last checkpoint.",
    )
    tiny.add_argument("--output-dir", required=True, help="folder for the target, its tokenizer and its report")
    tiny.add_argument(
        "--family", choices=["llama", "qwen3"], default="llama", help="architecture (default: %(default)s)"
    )
    tiny.add_argument(
        "--texts",
        metavar="FILE[:COLUMNS]",
        help="a .jsonl or .jsonl.gz file with a text in each row, and its columns with commas between "
        "(default column: text), in place of the standard library",
    )
    tiny.add_argument("--layers", type=int, help="decoder layers (default: those of the recipe)")
    tiny.add_argument(
        "--hidden-size",
        type=int,
        help="width, a multiple of 128, by which heads and feed-forward layers grow (default: that of the recipe); "
        "768 with 14 layers are 100 million parameters, for a GPU",
    )
    tiny.add_argument("--max-steps", type=int, help="optimizer steps (default: those of the recipe)")
    tiny.add_argument("--tokenizer", help="folder of a tokenizer to use instead of training one")
    tiny.set_defaults(run=tiny_target)

    tiny_draft = commands.add_parser(
        "tiny-drafter",
        help="train an embedded drafter again for an embedded target",
        description="Let the target write text from excerpts of the standard library, then train a drafter on it: "
        "an eagle one supervised, a standalone one supervised and then with PPOW.",
    )
    tiny_draft.add_argument("--output-dir", required=True, help="folder for the drafter and its training log")
    tiny_draft.add_argument("--target", default="tiny", metavar="MODEL", help=f"the target: {MODEL_HELP}")
    tiny_draft.add_argument(
        "--architecture", choices=["eagle", "standalone"], default="eagle", help="architecture (default: %(default)s)"
    )
    tiny_draft.add_argument(
        "--minutes", type=float, default=60.0, help="time for all training stages together (default: %(default)s)"
    )
    tiny_draft.add_argument(
        "--sequences", type=int, default=4000, help="texts that the target writes first (default: %(default)s)"
    )
    tiny_draft.add_argument(
        "--start", metavar="FOLDER", help="go on with a drafter that this command made (its supervised stage, if kept)"
    )
    tiny_draft.add_argument("--seed", type=int, default=0, help="seed of data and training (default: %(default)s)")
    tiny_draft.set_defaults(run=tiny_drafter)

    generation = commands.add_parser(
        "generate",
        help="continue a prompt with a target and a drafter",
        description="Continue a prompt. The text goes to stdout, a summary of the drafting to stderr.",
    )
    add_models(generation)
    generation.add_argument("--prompt", required=True, help="the text to continue, or - to read it from stdin")
    generation.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens to generate (default: %(default)s)"
    )
    generation.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token each time; above, sample (default: 0)",
    )
    generation.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    generation.add_argument(
        "--window", choices=["kl", "fixed", "heuristic"], help="rule for the window (default: the drafter's own)"
    )
    generation.add_argument(
        "--max-window", type=int, metavar="N", help="longest window in tokens (default: the drafter's own)"
    )
    generation.add_argument("--json", action="store_true", help="print one JSON object with the text and the trace")
    generation.set_defaults(run=generate)

    for name in COMMANDS:
        importlib.import_module(f".commands.{name}", __package__).register(commands)

    commands.add_parser(
        "train", add_help=False, help="train a drafter on your own data (ppow train --help lists its arguments)"
    )
    return parser


# -- the commands


def quickstart(arguments: argparse.Namespace) -> int:
    """`ppow quickstart`."""
    for name in ("prompts", "max_new_tokens"):
        check_positive(f"--{name.replace('_', '-')}", getattr(arguments, name))
    check_positive("--minutes", arguments.minutes)
    ensure_writable(arguments.output_dir, "--output-dir")
    from .commands import quickstart as module

    module.run(
        output_dir=arguments.output_dir,
        fast=arguments.fast,
        prompts=arguments.prompts,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        minutes=arguments.minutes,
        architecture=arguments.architecture,
        command=arguments.command,
    )
    return 0


def tiny_target(arguments: argparse.Namespace) -> int:
    """`ppow tiny-target`."""
    for name in ("max_steps", "layers"):
        if getattr(arguments, name) is not None:
            check_positive(f"--{name.replace('_', '-')}", getattr(arguments, name))
    ensure_writable(arguments.output_dir, "--output-dir")
    tokenizer = load_tokenizer(arguments.tokenizer, "--tokenizer") if arguments.tokenizer else None
    from .data.sequences import read_rows
    from .tiny.corpus import texts_of_rows
    from .tiny.recipe import make_target, recipe_of

    sizes = {"hidden_size": arguments.hidden_size, "num_layers": arguments.layers}
    recipe = recipe_of(arguments.family, max_steps=arguments.max_steps, **sizes)
    texts = None
    if arguments.texts is not None:
        file, columns = split_column(arguments.texts)
        texts = texts_of_rows(read_rows(file, "--texts"), (columns or "text").split(","), "--texts")
    make_target(arguments.output_dir, recipe, tokenizer=tokenizer, texts=texts)
    return 0


def tiny_drafter(arguments: argparse.Namespace) -> int:
    """`ppow tiny-drafter`."""
    check_positive("--minutes", arguments.minutes)
    check_positive("--sequences", arguments.sequences)
    for file in ("training_log.json", "config.json"):
        if arguments.start and not Path(arguments.start, file).is_file():
            raise FileNotFoundError(f"--start: {arguments.start!r} has no {file}; pass what `ppow tiny-drafter` made.")
    ensure_writable(arguments.output_dir, "--output-dir")
    target = load_target(arguments.target, "--target", None, None)
    tokenizer = load_tokenizer(arguments.target, "--target")
    from .tiny.drafters import make_drafter

    make_drafter(
        arguments.output_dir,
        arguments.architecture,
        target,
        tokenizer,
        seconds=60 * arguments.minutes,
        sequences=arguments.sequences,
        seed=arguments.seed,
        target_name=arguments.target if is_embedded(arguments.target) else None,
        start=arguments.start,
        command=arguments.command,
    )
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """`ppow generate`."""
    check_positive("--max-new-tokens", arguments.max_new_tokens)
    if not 0 <= arguments.temperature < float("inf"):
        raise ValueError(f"--temperature: {arguments.temperature} given; 0 (greedy) or a positive number is needed.")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    target, tokenizer, drafter = load_pair(arguments)
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    check_fits("--prompt", input_ids.shape[1], arguments.max_new_tokens, target)
    settings = {
        name: getattr(arguments, name) for name in ("window", "max_window") if getattr(arguments, name) is not None
    }
    assistant = drafter.with_settings(**settings)
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
        from transformers import set_seed

        set_seed(arguments.seed)
    started = time.perf_counter()
    output = target.generate(
        input_ids.to(target.device),
        attention_mask=input_ids.new_ones(input_ids.shape).to(target.device),
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        assistant_model=assistant,
        **sampling,
    )
    seconds = time.perf_counter() - started
    new_ids = output[0, input_ids.shape[1] :].tolist()
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    summary = summarize_trace(assistant.last_trace, len(new_ids), seconds)
    if arguments.json:
        rounds = [dataclasses.asdict(one_round) for one_round in assistant.last_trace.rounds]
        print(json.dumps({"prompt": prompt, "text": text, "trace": {**summary, "rounds": rounds}}))
        return 0
    print(prompt + text)
    print(format_summary(summary), file=sys.stderr)
    return 0


def train(argv: list[str]) -> int:
    """`ppow train`: the arguments are [`ScriptArguments`] and [`PPOWTrainingArguments`]."""
    from transformers import HfArgumentParser, set_seed

    from .training import PPOWTrainer, PPOWTrainingArguments

    parser = HfArgumentParser(
        [ScriptArguments, PPOWTrainingArguments],
        prog="ppow train",
        description="Train a drafter for a target on your own data, supervised or with PPOW.",
    )
    script, args = parser.parse_args_into_dataclasses(args=argv)
    ensure_writable(args.output_dir, "--output_dir")
    check_source(script.train_data, "--train_data")
    evaluation = evaluation_sources(script.eval_data or [])
    set_seed(args.seed)  # which draws a new drafter's weights
    device = str(args.device)
    dtype = None if script.target_dtype == "auto" else script.target_dtype
    target = load_target(script.target, "--target", dtype, device)
    tokenizer = load_tokenizer(script.target, "--target")
    if script.drafter is not None:
        drafter = load_drafter(script.drafter, "--drafter", "float32", device)
        check_tokenizer(drafter, tokenizer, "--drafter")
    else:
        drafter = new_drafter(script, target, tokenizer)
    trainer = PPOWTrainer(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=script.train_data,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    resume: bool | str | None = args.resume_from_checkpoint
    if script.resume or resume in ("auto", "true", "True"):
        resume = True  # the last complete one, or a new start where there is none
    trainer.train(resume_from_checkpoint=resume)
    if not trainer.already_finished:
        trainer.save_model()
    trainer.accelerator.end_training()  # of several processes, one that exits in its group's midst may abort
    return 0


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


def new_drafter(script: ScriptArguments, target: Any, tokenizer: Any) -> "PPOWDrafter":
    """An untrained float32 drafter for `target`, as the arguments describe it."""
    import torch

    from .runtime.configuration_ppow import vocabulary_fingerprint
    from .runtime.modeling_ppow import PPOWDrafter

    token_counts = None
    if script.draft_vocab_size is not None:
        from .data.sequences import extract_prompts, prepare_sequences, read_rows

        if "prompt" in read_rows(script.train_data, "--train_data")[0]:
            # The target will write the completions; until then the prompts are all the text there is.
            sequences = [torch.tensor(ids) for ids in extract_prompts(script.train_data, tokenizer, 1024)]
        else:
            dataset = prepare_sequences(script.train_data, tokenizer, 1024, argument="--train_data")
            sequences = [dataset[index]["input_ids"] for index in range(len(dataset))]
        width = target.get_output_embeddings().weight.shape[0]
        token_counts = torch.bincount(torch.cat(sequences).long(), minlength=width)
    drafter = PPOWDrafter.from_target(
        target,
        script.architecture,
        draft_vocab_size=script.draft_vocab_size,
        token_counts=token_counts,
        target_vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
        target_name_or_path=script.target,
    )
    return drafter.float()


# -- messages


def _as_command(argv: Sequence[str]) -> str:
    import shlex

    return shlex.join(["ppow", *argv])


def summarize_trace(trace: "GenerationTrace", new_tokens: int, seconds: float) -> dict[str, Any]:
    """The numbers of a call's trace that a person wants to see."""
    return {
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "window": trace.window_rule,
        "target_forwards": len(trace.rounds),
        "tokens_per_target_forward": trace.tokens_per_target_forward,
        "acceptance_length": trace.acceptance_length,
        "drafted": trace.drafted,
        "accepted": trace.accepted,
        "wasted": trace.wasted,
        "cost_ratio": trace.cost_ratio,
        "verification_cost": trace.verification_cost,
        "speculation_pays": trace.speculation_pays,
    }


def format_summary(summary: dict[str, Any]) -> str:
    """[`summarize_trace`]'s numbers as three lines of text."""
    pays = "" if summary["speculation_pays"] else "\nspeculation does not pay here: the window rule stopped drafting"
    return (
        f"{summary['new_tokens']} new tokens in {summary['seconds']:.2f} s "
        f"({summary['tokens_per_second']:.1f} tokens/s), {summary['target_forwards']} target forwards "
        f"({summary['tokens_per_target_forward']:.2f} tokens each)\n"
        f"window rule {summary['window']}: {summary['drafted']} tokens drafted, {summary['accepted']} accepted, "
        f"{summary['wasted']:.0%} wasted; acceptance length {summary['acceptance_length']:.2f} (the target's own "
        f"token counted); cost ratio {summary['cost_ratio']:.3f}{pays}"
    )


if __name__ == "__main__":
    sys.exit(main())
