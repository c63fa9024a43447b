"""`ppow quickstart`: the whole job, from text to a table, in minutes on two cores, for the embedded or a named target.

Puts the parts together in the order a user would; everything it does is in the library.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.files import ensure_writable
from ..data.models import default_device, load_drafter, load_target, load_tokenizer, prompt_room
from ..tiny import is_embedded
from .options import TARGET_HELP, add_number, check_options, check_seed

if TYPE_CHECKING:
    import torch

    from ..data.sequences import SequenceDataset
    from ..runtime.modeling_ppow import PPOWDrafter
    from ..runtime.trace import GenerationTrace
    from ..tiny.corpus import SourceFile
    from ..tiny.drafters import Stage

PROMPT_TOKENS, CHAT_TOKENS = 128, 256
TRAINING_TEXTS, HELD_OUT_TEXTS = 640, 8  # that the target writes to train and to evaluate on
NAMED_TEXTS, EXCERPTS, EXCERPT_TOKENS = 96, 600, 192  # for a named target, which writes slowly, texts of people first
LARGE_VOCABULARY, DRAFT_VOCABULARY = 16_384, 8192  # a larger vocabulary is reduced to so many tokens
DEFAULT_PROMPTS = {"embedded": 20, "named": 8}
# Compared with an eagle drafter; transformers' assisted generation has the embedded standalone one.
ROWS = ["plain", "prompt_lookup_10", "transformers_assisted_constant", "ppow_fixed_8", "ppow_kl", "ppow_kl_lookup"]


class Phase(NamedTuple):
    """A stage of the training and the sequences that it reads."""

    stage: "Stage"
    data: "SequenceDataset"


def register(subparsers: Any) -> None:
    """Add the parser of `ppow quickstart`."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train a drafter for the embedded target, or a named one, and compare it with other ways of generating",
        description="Prepare data, train a drafter, and compare it with plain generation, prompt lookup and "
        "transformers' own assisted generation on held-out prompts. For the embedded target the drafter learns from "
        "what the target wrote, for a named one from code first.",
    )
    parser.add_argument("--target", default="tiny", metavar="MODEL", help=f"{TARGET_HELP} (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="use the embedded drafter and train nothing (two minutes)")
    parser.add_argument(
        "--output-dir", default="ppow-quickstart", help="folder for everything it saves (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=int, help="held-out prompts to compare on (default: 20; 8 for a named target)"
    )
    add_number(parser, "--max-new-tokens", 64, "tokens generated from each prompt")
    add_number(parser, "--seed", 0, "seed of data and training")
    add_number(parser, "--minutes", 3.2, "time given to training, about")
    parser.add_argument(
        "--architecture",
        choices=["eagle", "standalone"],
        default="eagle",
        help="architecture of the drafter; a standalone one of the embedded target ends with PPOW (default: "
        "%(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train a drafter (not with `--fast`), compare it with the other ways, save and print."""
    embedded = is_embedded(arguments.target)
    if arguments.prompts is None:
        arguments.prompts = DEFAULT_PROMPTS["embedded" if embedded else "named"]
    check_options(arguments, "prompts", "max_new_tokens", "minutes")
    check_seed(arguments.seed)
    if arguments.fast and not embedded:
        raise ValueError(f"--fast: there is no embedded drafter for {arguments.target!r}. Leave one of both out.")
    folder = ensure_writable(arguments.output_dir, "--output-dir")
    started = time.perf_counter()
    from ..tiny.corpus import held_in_and_out, standard_library

    files, tokenizer = standard_library(), load_tokenizer(arguments.target)
    held_in, held_out = held_in_and_out(files)
    rows = function_rows(held_out, arguments.prompts, tokenizer, arguments.seed, "--prompts")
    target = _load(arguments.target)
    prompts = _encode(rows, target, tokenizer, arguments)
    print(
        f"Target: {'the embedded ' if embedded else ''}{target.config.model_type} of {target.num_parameters():,} "
        f"parameters, {str(target.dtype).removeprefix('torch.')}. Modules of the standard library: "
        f"{len(held_in)} held in, {len(held_out)} held out.",
        flush=True,
    )
    if arguments.fast:
        name = f"tiny-{arguments.architecture}"
        drafter = load_drafter(name, dtype="float32")
        drafter_source = f"ppow_hf.tiny.drafter_path({name!r})"
        print(f"Drafter: the embedded {name}; nothing is trained (--fast).", flush=True)
    else:
        drafter = _train(folder, target, tokenizer, files, arguments)
        drafter_source = repr(arguments.output_dir)
    _compare(folder, target, tokenizer, drafter, prompts, arguments)
    written = "windows.png" if arguments.fast else "windows.png, training.png and the drafter"
    print(f"\nSaved in {arguments.output_dir}: benchmark.json, {written}.")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. To use the drafter:\n")
    print("    import ppow_hf")
    print(f"    drafter = ppow_hf.PPOWDrafter.from_pretrained({drafter_source})")
    print("    target.generate(**inputs, assistant_model=drafter)")
    return 0


def _load(name: str) -> Any:
    """The target: the embedded one in float32, another in bfloat16 where this machine computes it faster."""
    from ..measure.costs import faster_dtype

    if is_embedded(name):
        return load_target(name, dtype="float32")
    return load_target(name, dtype=faster_dtype(default_device()))


def _train(
    folder: Path, target: Any, tokenizer: Any, files: list["SourceFile"], arguments: argparse.Namespace
) -> "PPOWDrafter":
    """Prepare data, train a new drafter on it phase by phase, save it, and print what each phase gained."""
    from ..tiny.drafters import in_turn, save_drafter, train_stage
    from ..training.curves import draw_curves

    prepare = _embedded_phases if is_embedded(arguments.target) else _named_phases
    drafter, phases, eval_data = prepare(folder, target, tokenizer, files, arguments)
    evaluated = 48 if is_embedded(arguments.target) else 24  # tokens after each held-out prompt
    log: list[dict] = []
    lengths: list[tuple[str, float]] = []
    for number, (stage, data) in enumerate(phases):
        print(f"\nTraining, {stage.objective}, {stage.seconds:.0f} s:", flush=True)
        steps_before = log[-1]["step"] if log else 0
        history = train_stage(
            drafter, target, tokenizer, stage, data, eval_data, folder / f"{number}-{stage.kind}", arguments.seed,
            eval_prompts=HELD_OUT_TEXTS, eval_new_tokens=evaluated, disable_tqdm=True,
            calibrate_at_end=number == len(phases) - 1,
        )  # fmt: skip
        log += [{**row, "step": row["step"] + steps_before} for row in history]
        evaluations = [row["eval_acceptance_length"] for row in history if "eval_acceptance_length" in row]
        if not lengths:
            lengths.append(("untrained", evaluations[0]))
        lengths.append((f"after {stage.objective}", evaluations[-1]))
    save_drafter(drafter, tokenizer, folder)
    title = f"quickstart: {in_turn(phase.stage.kind for phase in phases)}"
    draw_curves(log, folder / "training.png", title=title)
    print("\nAcceptance length on held-out prompts (window 10, greedy, bonus token counted):")
    width = max(len(name) for name, _ in lengths) + 2
    for name, length in lengths:
        print(f"  {name:<{width}}{length:.2f}")
    print("  On 8 prompts differences below about 0.2 are noise.")
    return drafter.eval()


def _embedded_phases(
    folder: Path, target: Any, tokenizer: Any, files: list["SourceFile"], arguments: argparse.Namespace
) -> tuple["PPOWDrafter", list[Phase], "SequenceDataset"]:
    """A new drafter of the embedded target, what it is trained with, and held-out data: the target wrote all of it."""
    from ..runtime.modeling_ppow import PPOWDrafter
    from ..tiny.corpus import held_in_and_out
    from ..tiny.drafters import default_stages, target_text

    print("Data: the target completes excerpts of held-in modules (its own text is what a drafter must learn) ...")
    seed, cache = arguments.seed, folder / "data"
    held_in, held_out = held_in_and_out(files)
    train_data = target_text(target, tokenizer, held_in, TRAINING_TEXTS, seed, cache)
    eval_data = target_text(target, tokenizer, held_out, HELD_OUT_TEXTS, seed + 1, cache)
    drafter = PPOWDrafter.from_target(target, arguments.architecture, target_name_or_path="tiny")
    stages = default_stages(60 * arguments.minutes, arguments.architecture)
    return drafter, [Phase(stage, train_data) for stage in stages], eval_data


def _named_phases(
    folder: Path, target: Any, tokenizer: Any, files: list["SourceFile"], arguments: argparse.Namespace
) -> tuple["PPOWDrafter", list[Phase], "SequenceDataset"]:
    """The same of a named target: code as people wrote it for two thirds of the time, then the target's own text.

    Along any text the target tells its distribution without writing, which takes longer than reading.
    """
    from ..data.regeneration import regenerate
    from ..data.sequences import all_positions, prepare_prompts, prepare_sequences
    from ..runtime.modeling_ppow import PPOWDrafter
    from ..runtime.target_weights import target_width
    from ..tiny.corpus import excerpts, held_in_and_out
    from ..tiny.drafters import Stage, text_temperatures

    seed, architecture = arguments.seed, arguments.architecture
    held_in, held_out = held_in_and_out(files)
    print("Data: excerpts of held-in modules, and the target's answers to the beginnings of their functions ...")
    people = prepare_sequences(excerpts(held_in, tokenizer, EXCERPTS, EXCERPT_TOKENS, seed), tokenizer, EXCERPT_TOKENS)
    longest = CHAT_TOKENS + EXCERPT_TOKENS // 2
    written = regenerate(
        function_rows(held_in, NAMED_TEXTS, tokenizer, seed), target, tokenizer, max_length=longest,
        max_new_tokens=EXCERPT_TOKENS // 2, batch_size=32, temperature=text_temperatures("eagle"), seed=seed,
        cache_dir=folder / "data",
    )  # fmt: skip
    eval_data = prepare_prompts(function_rows(held_out, HELD_OUT_TEXTS, tokenizer, seed + 1), tokenizer, CHAT_TOKENS)
    width, options = target_width(target), {}
    if architecture == "eagle" and width > LARGE_VOCABULARY:
        counts = people.count_tokens(width) + written.count_tokens(width)
        options = {"draft_vocab_size": DRAFT_VOCABULARY, "token_counts": counts}
    drafter = PPOWDrafter.from_target(target, architecture, target_name_or_path=arguments.target, **options).float()
    first = Stage("supervised", 40 * arguments.minutes, 2e-3, {"unroll_steps": 3} if architecture == "eagle" else {})
    second = replace(first, objective="tv + 0.3*kl", seconds=20 * arguments.minutes, learning_rate=1e-3)
    return drafter, [Phase(first, all_positions(people)), Phase(second, all_positions(written))], eval_data


def function_rows(
    files: list["SourceFile"], count: int, tokenizer: Any, seed: int, argument: str = "count"
) -> list[dict[str, Any]]:
    """`count` beginnings of functions as rows of data: a user's turn each where the tokenizer has a chat template.

    Raises `ValueError` naming `argument` where there are fewer.
    """
    from ..tiny.corpus import function_prompts

    if tokenizer.chat_template is None:
        return [{"prompt": text} for text in function_prompts(files, count, seed=seed, argument=argument)]
    texts = function_prompts(files, count, seed=seed, prompt_lines=6, choices=3, argument=argument)
    texts = sorted(texts, key=len)[count : 2 * count]  # not the longest: a chat must not lose its opening
    return [{"messages": [{"role": "user", "content": f"Complete this Python code:\n{text}"}]} for text in texts]


def _encode(
    rows: list[dict[str, Any]], target: Any, tokenizer: Any, arguments: argparse.Namespace
) -> list["torch.Tensor"]:
    """The prompts to compare on; raises where `--max-new-tokens` leaves no room for them."""
    import torch

    from ..data.sequences import extract_prompts

    longest = PROMPT_TOKENS if is_embedded(arguments.target) else CHAT_TOKENS
    room = min(longest, prompt_room(target, arguments.max_new_tokens))
    return [torch.tensor([ids]) for ids in extract_prompts(rows, tokenizer, room, argument="--prompts")]


def _compare(
    folder: Path,
    target: Any,
    tokenizer: Any,
    drafter: "PPOWDrafter",
    prompts: list["torch.Tensor"],
    arguments: argparse.Namespace,
) -> None:
    """Benchmark on functions of held-out modules; write benchmark.json and windows.png, print table and verdict.

    A standalone drafter runs in transformers' assisted generation too; for an eagle one the embedded standalone does.
    """
    import torch

    from ..measure.benchmark import run_benchmark
    from ..measure.benchmark_report import format_table, plot_windows, verdict, write_benchmark

    embedded = is_embedded(arguments.target)
    standalone, rows = None, None
    if embedded and arguments.architecture == "eagle":
        standalone, rows = load_drafter("tiny-standalone", dtype="float32"), ROWS
    print(
        f"\nComparing on {arguments.prompts} functions of held-out modules, {arguments.max_new_tokens} tokens each, "
        "greedy:",
        flush=True,
    )
    traces: dict[str, list[GenerationTrace]] = {}
    options = {"max_new_tokens": arguments.max_new_tokens, "command": arguments.command}
    result = run_benchmark(
        target, tokenizer, drafter, prompts, standalone=standalone, traces=traces, rows=rows, **options
    )  # fmt: skip
    if not embedded and target.dtype != torch.float32:
        _compare_in_float32(result, tokenizer, drafter, prompts, arguments.target, options)
    write_benchmark(result, folder / "benchmark.json")
    plot_windows(traces["ppow_kl"], folder / "windows.png")
    print(format_table(result))
    print(verdict(result))


def _compare_in_float32(
    result: dict[str, Any], tokenizer: Any, drafter: "PPOWDrafter", prompts: list, name: str, options: dict[str, Any]
) -> None:
    """Say in `result` which rows' outputs are plain generation's in float32: in 16 bits a near tie may round apart."""
    from ..measure.benchmark import run_benchmark

    names = [row["name"] for row in result["rows"]]
    exact = run_benchmark(
        load_target(name, dtype="float32"), tokenizer, drafter.float(), prompts, rows=names, **options
    )
    for row, same in zip(result["rows"], exact["rows"], strict=True):
        row |= {key: same[key] for key in ("identical_to_plain", "different_prompts")}
    print("Outputs are compared in float32, speeds in the target's own number format.")
