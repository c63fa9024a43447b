"""`ppow bench --engine`: what a serving engine makes of a drafter, next to ours in transformers, on the same prompts.

Knows exports, engines in environments of their own, and clocks. Each prompt runs alone on both sides, so that rows
compare.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import llamacpp_runner, vllm_runner
from .engine_process import EngineRun
from .llamacpp_runner import llamacpp_python, run_llamacpp
from .vllm_runner import run_vllm, vllm_python

if TYPE_CHECKING:
    import torch

    from ..runtime.modeling_ppow import PPOWDrafter

ENGINES = {"vllm": "vLLM", "llamacpp": "llama.cpp"}
METHODS = {"eagle": "eagle3", "standalone": "draft_model", "medusa": "medusa", "block": "dflash"}
NGRAM = 3  # tokens that must have occurred before, in the engines' own lookup


@dataclass
class EngineRow:
    """One line of the comparison.

    Args:
        name (`str`): who generated, and how.
        tokens (`int`): new tokens of all prompts.
        seconds (`float`): their time.
        drafts, drafted, accepted (`int`): verified windows, draft tokens in them, and those kept.
        different_prompts (`int`): prompts whose text differs from what the same side says without a drafter.
    """

    name: str
    tokens: int
    seconds: float
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    different_prompts: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean of accepted + 1 over verified windows: the target's own token is counted."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppow bench` that this module reads."""
    parser.add_argument(
        "--engine",
        choices=list(ENGINES),
        help="compare plain decoding, the drafter and n-gram lookup in this engine instead, next to ours in "
        "transformers",
    )
    parser.add_argument(
        "--engine-python",
        metavar="FILE",
        help="the interpreter of the engine's own environment (default: "
        f"${vllm_runner.PYTHON_VARIABLE} or ${llamacpp_runner.PYTHON_VARIABLE})",
    )
    parser.add_argument(
        "--engine-tokens",
        type=int,
        nargs="+",
        default=[3, 5, 8],
        metavar="N",
        help="draft tokens a round, a row for each (default: 3 5 8)",
    )


def run(
    arguments: argparse.Namespace,
    target: Any,
    tokenizer: Any,
    drafter: "PPOWDrafter",
    prompts: Sequence["torch.Tensor"],
) -> int:
    """`ppow bench --engine` with everything loaded: print the table, and write it with `--json`."""
    from ..data.models import resolve
    from ..measure.provenance import describe

    python = {"vllm": vllm_python, "llamacpp": llamacpp_python}[arguments.engine](arguments.engine_python)
    rows, version = compare(
        arguments.engine,
        resolve(arguments.target),
        target,
        tokenizer,
        drafter,
        prompts,
        arguments.max_new_tokens,
        arguments.engine_tokens,
        python,
    )
    print(format_rows(rows))
    print(
        f"{len(prompts)} prompts one by one, {arguments.max_new_tokens} new tokens each, "
        f"{str(target.dtype).removeprefix('torch.')}, greedy, {ENGINES[arguments.engine]} {version}. Acceptance "
        "length counts the target's own token. vLLM drafts whole windows up to the last token, llama.cpp and we no "
        "further than there is room."
    )
    if arguments.json:
        described = [asdict(row) | {"acceptance_length": row.acceptance_length} for row in rows]
        content = {
            "engine": arguments.engine,
            "version": version,
            "prompts": len(prompts),
            "max_new_tokens": arguments.max_new_tokens,
            "rows": described,
            "provenance": describe(target.device, arguments.command),
        }
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(
    engine: str,
    target_name: str,
    target: Any,
    tokenizer: Any,
    drafter: "PPOWDrafter",
    prompts: Sequence["torch.Tensor"],
    max_new_tokens: int,
    windows: Sequence[int],
    python: str,
) -> tuple[list[EngineRow], str]:
    """Greedy generation in an engine and in transformers: plain, with the drafter, and by lookup in the engine.

    Args:
        engine (`str`): one of `ENGINES`.
        target_name (`str`): folder or Hub name of the target, for vLLM.
        target (`PreTrainedModel`), tokenizer, drafter ([`PPOWDrafter`]): loaded, for transformers and GGUF files.
        prompts (`list[torch.LongTensor]`): token ids `[1, n]` each.
        max_new_tokens (`int`): of each prompt.
        windows (`list[int]`): draft tokens a round; a medusa or block drafter has its longest window only.
        python (`str`): interpreter of the engine's environment.

    Returns:
        The rows, and the engine's version.
    """
    longest = drafter.config.longest_window
    windows = [longest] if longest else list(windows)
    ids = [prompt[0].tolist() for prompt in prompts]
    with tempfile.TemporaryDirectory(prefix="ppow-export-") as folder:
        if engine == "vllm":
            runs = _vllm_runs(Path(folder), target_name, target, drafter, ids, max_new_tokens, windows, python)
        else:
            runs = _llamacpp_runs(Path(folder), target, tokenizer, drafter, ids, max_new_tokens, windows, python)
    plain = runs[ENGINES[engine]]
    rows = [_engine_row(name, run, plain) for name, run in runs.items()]
    views: dict[str, Any] = {"transformers": None}
    for window in windows:
        view = drafter.with_settings(window="fixed", max_window=window)
        views[f"transformers, drafter, {window} tokens"] = view
    views["transformers, drafter, adaptive"] = drafter.with_settings(window="kl")
    said: list[list[int]] = []
    for name, view in views.items():
        row, outputs = _own_row(name, target, view, prompts, max_new_tokens)
        said = said or outputs
        row.different_prompts = sum(one != other for one, other in zip(outputs, said, strict=True))
        rows.append(row)
    return rows, plain.version


def _vllm_runs(
    folder: Path,
    target_name: str,
    target: Any,
    drafter: "PPOWDrafter",
    prompts: list[list[int]],
    max_new_tokens: int,
    windows: list[int],
    python: str,
) -> dict[str, EngineRun]:
    from ..export import export_drafter

    export_drafter(drafter, folder, "vllm", target=target, target_name=target_name)
    method = "dspark" if drafter.config.markov_rank else METHODS[drafter.config.architecture]
    speculative: dict[str, Any] = {"vLLM": None}
    for window in windows:
        drafted = {"method": method, "model": str(folder), "num_speculative_tokens": window}
        speculative[f"vLLM, drafter, {window} tokens"] = drafted
    window = windows[len(windows) // 2]
    lookup = {
        "method": "ngram",
        "num_speculative_tokens": window,
        "prompt_lookup_max": NGRAM,
        "prompt_lookup_min": NGRAM,
    }
    speculative[f"vLLM, ngram, {window} tokens"] = lookup
    return {
        name: run_vllm(
            target_name,
            prompts,
            max_new_tokens,
            options,
            python=python,
            one_by_one=True,
            ignore_eos=target.generation_config.eos_token_id is None,
            warm_up=True,
            dtype=str(target.dtype).removeprefix("torch."),
        )
        for name, options in speculative.items()
    }


def _llamacpp_runs(
    folder: Path,
    target: Any,
    tokenizer: Any,
    drafter: "PPOWDrafter",
    prompts: list[list[int]],
    max_new_tokens: int,
    windows: list[int],
    python: str,
) -> dict[str, EngineRun]:
    import torch

    from ..export import export_drafter, write_causal_lm

    dtype = str(target.dtype).removeprefix("torch.")
    report = export_drafter(drafter, folder, "gguf", target=target, tokenizer=tokenizer, gguf_dtype=dtype)
    draft = folder / next(name for name in report.files if name.endswith(".gguf"))
    model = folder / "target.gguf"
    write_causal_lm(model, target, tokenizer, dtype)
    method = METHODS[drafter.config.architecture]
    ways: dict[str, tuple[str | None, Path | None, int]] = {"llama.cpp": (None, None, 0)}
    for window in windows:
        ways[f"llama.cpp, drafter, {window} tokens"] = (method, draft, window)
    window = windows[len(windows) // 2]
    ways[f"llama.cpp, ngram, {window} tokens"] = ("ngram", None, window)
    return {
        name: run_llamacpp(
            model,
            prompts,
            max_new_tokens,
            *way,
            python=python,
            ignore_eos=target.generation_config.eos_token_id is None,
            warm_up=True,
            threads=torch.get_num_threads(),
        )
        for name, way in ways.items()
    }


def _engine_row(name: str, run: EngineRun, plain: EngineRun) -> EngineRow:
    different = sum(one != other for one, other in zip(run.outputs, plain.outputs, strict=True))
    return EngineRow(name, run.tokens, run.seconds, run.drafts, run.drafted, run.accepted, different)


def _own_row(
    name: str, target: Any, view: Any, prompts: Sequence["torch.Tensor"], max_new_tokens: int
) -> tuple[EngineRow, list[list[int]]]:
    import torch

    from ..data.regeneration import plain_distribution

    row, outputs = EngineRow(name, 0, 0.0), []
    options = {} if view is None else {"assistant_model": view}
    for place, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: to warm up
        prompt = prompt.to(target.device)
        with plain_distribution(target):
            started = time.perf_counter()
            output = target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=target.generation_config.pad_token_id or 0,
                **options,
            )
            seconds = time.perf_counter() - started
        new = output[0, prompt.shape[1] :].tolist()
        if place == 0:
            continue
        row.seconds += seconds
        row.tokens += len(new)
        outputs.append(new)
        if view is not None:
            rounds = [r for r in view.last_trace.rounds if r.window > 0]
            row.drafts += len(rounds)
            row.drafted += sum(r.window for r in rounds)
            row.accepted += sum(r.accepted for r in rounds)
    return row, outputs


def format_rows(rows: Sequence[EngineRow]) -> str:
    """The rows as text; each side's speed next to its own without a drafter."""
    lines = [f"{'':40} {'tokens/s':>9} {'ratio':>6} {'acceptance':>11} {'wasted':>7} {'identical':>10}"]
    plain = rows[0]
    for row in rows:
        plain = row if "," not in row.name else plain
        wasted = f"{1 - row.accepted / row.drafted:.0%}" if row.drafted else "-"
        same = "yes" if not row.different_prompts else f"no ({row.different_prompts})"
        lines.append(
            f"{row.name:40} {row.tokens_per_second:9.1f} {row.tokens_per_second / plain.tokens_per_second:5.2f}x "
            f"{row.acceptance_length:11.2f} {wasted:>7} {same:>10}"
        )
    return "\n".join(lines)
