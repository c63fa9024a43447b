"""`ppow quickstart`: the whole job on the embedded target, from text to a table, in minutes on two cores.

Puts the parts together in the order a user would; everything it does is in the library.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..measure.benchmark import (
    run_benchmark,
)
from ..measure.benchmark_report import (
    format_table,
    plot_windows,
    verdict,
    write_benchmark,
)
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.trace import GenerationTrace
from ..tiny import drafter_path, target_path
from ..tiny.corpus import function_prompts, standard_library

PROMPT_TOKENS = 128


def run(
    output_dir: str,
    fast: bool = False,
    prompts: int = 20,
    max_new_tokens: int = 64,
    seed: int = 0,
    minutes: float = 3.2,
    architecture: str = "standalone",
    command: str = "ppow quickstart",
) -> dict[str, Any]:
    """Train a drafter for the embedded target (not when `fast`), compare it with the other ways, save and print.

    Args:
        output_dir (`str`): gets the drafter, `benchmark.json`, `windows.png` and `training.png`.
        fast (`bool`, *optional*, defaults to `False`): use the embedded drafter and train nothing.
        prompts (`int`, *optional*, defaults to `20`): held-out functions to complete.
        max_new_tokens (`int`, *optional*, defaults to `64`): tokens generated behind each.
        seed (`int`, *optional*, defaults to `0`): of data and training.
        minutes (`float`, *optional*, defaults to `3.2`): time for the training stages together.
        architecture (`str`, *optional*, defaults to `"standalone"`):
            `"standalone"`, which learns the most in these minutes and which transformers' own assisted generation
            takes too, so that both run the same drafter; or `"eagle"`, compared with the embedded standalone one.
        command (`str`, *optional*): recorded in `benchmark.json`.

    Returns:
        `dict`: the content of `benchmark.json`.
    """
    started = time.perf_counter()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(target_path(), dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(target_path())
    standalone = None  # the drafter itself
    if architecture != "standalone":
        standalone = PPOWDrafter.from_pretrained(drafter_path("tiny-standalone"), dtype=torch.float32)
        standalone.eval().to(device)
    files = standard_library()
    held_out = [file for file in files if file.held_out]
    print(
        f"Target: the embedded {target.config.model_type} of {target.num_parameters():,} parameters. Modules of the "
        f"standard library: {len(files) - len(held_out)} held in, {len(held_out)} held out.",
        flush=True,
    )
    if fast:
        name = f"tiny-{architecture}"
        drafter = PPOWDrafter.from_pretrained(drafter_path(name), dtype=torch.float32).eval().to(device)
        used = f"ppow_hf.tiny.drafter_path({name!r})"
        print(f"Drafter: the embedded {name}; nothing is trained (--fast).", flush=True)
    else:
        drafter = _train(folder, target, tokenizer, files, seed, minutes * 60, architecture)
        used = repr(output_dir)

    texts = function_prompts(held_out, prompts, seed=seed)
    ids = [
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, -PROMPT_TOKENS:].long()
        for text in texts
    ]
    print(f"\nComparing on {prompts} functions of held-out modules, {max_new_tokens} tokens each, greedy:", flush=True)
    traces: dict[str, list[GenerationTrace]] = {}
    result = run_benchmark(
        target,
        tokenizer,
        drafter,
        ids,
        standalone=standalone,
        max_new_tokens=max_new_tokens,
        command=command,
        traces=traces,
    )
    write_benchmark(result, folder / "benchmark.json")
    plot_windows(traces["ppow_kl"], folder / "windows.png")
    print(format_table(result))
    print(verdict(result))
    pictures = "windows.png" if fast else "windows.png, training.png"
    print(f"\nSaved in {output_dir}: benchmark.json, {pictures}{'' if fast else ' and the drafter'}.")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. To use the drafter:\n")
    print("    import ppow_hf")
    print(f"    drafter = ppow_hf.PPOWDrafter.from_pretrained({used})")
    print("    target.generate(**inputs, assistant_model=drafter)")
    return result


def _train(folder: Path, target, tokenizer, files, seed: int, seconds: float, architecture: str) -> PPOWDrafter:
    from ..tiny.drafters import default_stages, in_turn, save_drafter, target_text, train_stage
    from ..training.trainer import draw_curves

    print("Data: the target completes excerpts of held-in modules (its own text is what a drafter must learn) ...")
    cache = folder / "data"
    train_data = target_text(target, tokenizer, [f for f in files if not f.held_out], 640, seed, cache)
    eval_data = target_text(target, tokenizer, [f for f in files if f.held_out], 8, seed + 1, cache)
    drafter = PPOWDrafter.from_target(target, architecture, target_name_or_path="tiny")
    log: list[dict] = []
    lengths: list[tuple[str, float]] = []
    stages = default_stages(seconds, architecture)
    for stage in stages:
        print(f"\nTraining, {stage.objective}, {stage.seconds:.0f} s:", flush=True)
        offset = log[-1]["step"] if log else 0
        history = train_stage(
            drafter, target, tokenizer, stage, train_data, eval_data, folder / stage.kind, seed,
            eval_prompts=8, eval_new_tokens=48, disable_tqdm=True,
            calibrate_at_end=stage is stages[-1],
        )  # fmt: skip
        log += [{**row, "step": row["step"] + offset} for row in history]
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
