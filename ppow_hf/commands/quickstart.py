"""`ppow quickstart`: the whole job on the embedded target, from text to a table, in minutes on two cores.

Puts the parts together in the order a user would; everything it does is in the library.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.models import check_options, ensure_writable, load_drafter, load_target, load_tokenizer

if TYPE_CHECKING:
    import torch

    from ..runtime.modeling_ppow import PPOWDrafter
    from ..runtime.trace import GenerationTrace
    from ..tiny.corpus import SourceFile

PROMPT_TOKENS = 128
TRAINING_TEXTS, HELD_OUT_TEXTS = 640, 8  # that the target writes to train and to evaluate on


def register(subparsers: Any) -> None:
    """Add the parser of `ppow quickstart`."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train a drafter for the embedded target and compare it with the other ways of generating",
        description="On the embedded target: prepare data, train a drafter (a standalone one supervised, then with "
        "PPOW; an eagle one supervised), and compare it with plain generation, prompt lookup and transformers' own "
        "assisted generation on held-out prompts.",
    )
    parser.add_argument("--fast", action="store_true", help="use the embedded drafter and train nothing (two minutes)")
    parser.add_argument(
        "--output-dir", default="ppow-quickstart", help="folder for everything it saves (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=int, default=20, help="held-out prompts to compare on (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="tokens generated from each prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=3.2, help="time given to training, about (default: %(default)s)"
    )
    parser.add_argument(
        "--architecture",
        choices=["standalone", "eagle"],
        default="standalone",
        help="architecture of the drafter (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train a drafter for the embedded target (not with `--fast`), compare it with the other ways, save and print."""
    check_options(arguments, "prompts", "max_new_tokens", "minutes")
    folder = ensure_writable(arguments.output_dir, "--output-dir")
    started = time.perf_counter()
    from ..tiny.corpus import standard_library

    target, tokenizer = load_target("tiny", dtype="float32"), load_tokenizer("tiny")
    files = standard_library()
    held_out = [file for file in files if file.held_out]
    print(
        f"Target: the embedded {target.config.model_type} of {target.num_parameters():,} parameters. Modules of the "
        f"standard library: {len(files) - len(held_out)} held in, {len(held_out)} held out.",
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
    _compare(folder, target, tokenizer, drafter, held_out, arguments)
    written = "windows.png" if arguments.fast else "windows.png, training.png and the drafter"
    print(f"\nSaved in {arguments.output_dir}: benchmark.json, {written}.")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. To use the drafter:\n")
    print("    import ppow_hf")
    print(f"    drafter = ppow_hf.PPOWDrafter.from_pretrained({drafter_source})")
    print("    target.generate(**inputs, assistant_model=drafter)")
    return 0


def _train(
    folder: Path, target: Any, tokenizer: Any, files: list["SourceFile"], arguments: argparse.Namespace
) -> "PPOWDrafter":
    """Let the target write, train a new drafter on it stage by stage, save it, and print what each stage gained."""
    from ..runtime.modeling_ppow import PPOWDrafter
    from ..tiny.drafters import default_stages, in_turn, save_drafter, target_text, train_stage
    from ..training.trainer import draw_curves

    print("Data: the target completes excerpts of held-in modules (its own text is what a drafter must learn) ...")
    seed, cache = arguments.seed, folder / "data"
    held_in, held_out = ([file for file in files if file.held_out is side] for side in (False, True))
    train_data = target_text(target, tokenizer, held_in, TRAINING_TEXTS, seed, cache)
    eval_data = target_text(target, tokenizer, held_out, HELD_OUT_TEXTS, seed + 1, cache)
    drafter = PPOWDrafter.from_target(target, arguments.architecture, target_name_or_path="tiny")
    log: list[dict] = []
    lengths: list[tuple[str, float]] = []
    stages = default_stages(60 * arguments.minutes, arguments.architecture)
    for stage in stages:
        print(f"\nTraining, {stage.objective}, {stage.seconds:.0f} s:", flush=True)
        steps_before = log[-1]["step"] if log else 0
        history = train_stage(
            drafter, target, tokenizer, stage, train_data, eval_data, folder / stage.kind, seed,
            eval_prompts=HELD_OUT_TEXTS, eval_new_tokens=48, disable_tqdm=True,
            calibrate_at_end=stage is stages[-1],
        )  # fmt: skip
        log += [{**row, "step": row["step"] + steps_before} for row in history]
        evaluations = [row["eval_acceptance_length"] for row in history if "eval_acceptance_length" in row]
        if not lengths:
            lengths.append(("untrained", evaluations[0]))
        lengths.append((f"after {stage.objective}", evaluations[-1]))
    save_drafter(drafter, tokenizer, folder)
    draw_curves(log, folder / "training.png", title=f"quickstart: {in_turn(stage.kind for stage in stages)}")
    print("\nAcceptance length on held-out prompts (window 10, greedy, bonus token counted):")
    for name, length in lengths:
        print(f"  {name:<18}{length:.2f}")
    gain = lengths[-1][1] - lengths[-2][1]
    print(f"  The last stage changed it by {gain:+.2f}; on 8 prompts differences below about 0.2 are noise.")
    return drafter.eval()


def _compare(
    folder: Path,
    target: Any,
    tokenizer: Any,
    drafter: "PPOWDrafter",
    held_out: list["SourceFile"],
    arguments: argparse.Namespace,
) -> None:
    """Benchmark on functions of held-out modules; write benchmark.json and windows.png, print table and verdict.

    A standalone drafter runs in transformers' assisted generation too; beside an eagle one the embedded standalone.
    """
    from ..measure.benchmark import run_benchmark
    from ..measure.benchmark_report import format_table, plot_windows, verdict, write_benchmark
    from ..tiny.corpus import function_prompts

    standalone = None if arguments.architecture == "standalone" else load_drafter("tiny-standalone", dtype="float32")
    prompts: list[torch.Tensor] = [
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, -PROMPT_TOKENS:].long()
        for text in function_prompts(held_out, arguments.prompts, seed=arguments.seed)
    ]
    print(
        f"\nComparing on {arguments.prompts} functions of held-out modules, {arguments.max_new_tokens} tokens each, "
        "greedy:",
        flush=True,
    )
    traces: dict[str, list[GenerationTrace]] = {}
    result = run_benchmark(
        target,
        tokenizer,
        drafter,
        prompts,
        standalone=standalone,
        max_new_tokens=arguments.max_new_tokens,
        command=arguments.command,
        traces=traces,
    )
    write_benchmark(result, folder / "benchmark.json")
    plot_windows(traces["ppow_kl"], folder / "windows.png")
    print(format_table(result))
    print(verdict(result))
