"""`ppow bench --engine vllm`: what an engine makes of a drafter, next to ours in transformers, on the same prompts.

Knows exports, a vLLM in its own environment, and clocks. Each prompt runs alone on both sides, so that rows compare.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine_process import EngineRun
from .vllm_runner import PYTHON_VARIABLE, run_vllm, vllm_python

if TYPE_CHECKING:
    import torch

    from ..runtime.modeling_ppow import PPOWDrafter

METHODS = {"eagle": "eagle3", "standalone": "draft_model", "medusa": "medusa", "block": "dflash"}


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
        choices=["vllm"],
        help="compare with and without the drafter in this engine instead, next to ours in transformers",
    )
    parser.add_argument(
        "--engine-python",
        metavar="FILE",
        help=f"the interpreter of the engine's own environment (default: ${PYTHON_VARIABLE})",
    )
    parser.add_argument(
        "--engine-tokens", type=int, default=5, metavar="N", help="draft tokens a round there (default: %(default)s)"
    )


def run(arguments: argparse.Namespace, target: Any, drafter: "PPOWDrafter", prompts: Sequence["torch.Tensor"]) -> int:
    """`ppow bench --engine vllm` with everything loaded: print the table, and write it with `--json`."""
    from ..data.models import resolve
    from ..measure.provenance import describe

    vllm_python(arguments.engine_python)  # before anything is run
    rows, version = compare(
        resolve(arguments.target),
        target,
        drafter,
        prompts,
        arguments.max_new_tokens,
        arguments.engine_tokens,
        arguments.engine_python,
    )
    print(format_rows(rows))
    print(
        f"{len(prompts)} prompts one by one, {arguments.max_new_tokens} new tokens each, "
        f"{str(target.dtype).removeprefix('torch.')}, greedy, vLLM {version}; acceptance length counts the target's "
        "own token. Engines draft whole windows up to the last token, we draft no further than there is room."
    )
    if arguments.json:
        described = [asdict(row) | {"acceptance_length": row.acceptance_length} for row in rows]
        content = {
            "engine": "vllm",
            "version": version,
            "prompts": len(prompts),
            "max_new_tokens": arguments.max_new_tokens,
            "rows": described,
            "provenance": describe(target.device, arguments.command),
        }
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(
    target_name: str,
    target: Any,
    drafter: "PPOWDrafter",
    prompts: Sequence["torch.Tensor"],
    max_new_tokens: int = 64,
    window: int = 5,
    python: str | None = None,
    **engine: Any,
) -> tuple[list[EngineRow], str]:
    """Greedy generation in vLLM and in transformers, each with and without the drafter.

    Args:
        target_name (`str`): folder or Hub name of the target, for vLLM.
        target (`PreTrainedModel`), drafter ([`PPOWDrafter`]): both loaded, for transformers.
        prompts (`list[torch.LongTensor]`): token ids `[1, n]` each.
        max_new_tokens (`int`, *optional*, defaults to `64`): of each prompt.
        window (`int`, *optional*, defaults to `5`):
            Draft tokens a round; of a medusa or block drafter its longest window instead.
        python (`str`, *optional*): see [`vllm_python`].
        engine: further arguments of `vllm.LLM`.

    Returns:
        The rows, and vLLM's version.
    """
    from ..export import export_drafter

    architecture = drafter.config.architecture
    window = drafter.config.longest_window or window
    method = "dspark" if drafter.config.markov_rank else METHODS[architecture]
    ids = [prompt[0].tolist() for prompt in prompts]
    common: dict[str, Any] = {
        "python": python,
        "one_by_one": True,
        "ignore_eos": target.generation_config.eos_token_id is None,
        "warm_up": True,
        "dtype": str(target.dtype).removeprefix("torch."),
        **engine,
    }
    with tempfile.TemporaryDirectory(prefix="ppow-export-") as folder:
        export_drafter(drafter, folder, "vllm", target=target, target_name=target_name)
        speculative = {"method": method, "model": folder, "num_speculative_tokens": window}
        plain = run_vllm(target_name, ids, max_new_tokens, **common)
        with_drafter = run_vllm(target_name, ids, max_new_tokens, speculative, **common)
    rows = [_engine_row("vLLM", plain, plain), _engine_row(f"vLLM, drafter, {window} tokens", with_drafter, plain)]
    views = {
        "transformers": None,
        f"transformers, drafter, {window} tokens": drafter.with_settings(window="fixed", max_window=window),
        "transformers, drafter, adaptive": drafter.with_settings(window="kl"),
    }
    said: list[list[int]] = []
    for name, view in views.items():
        row, outputs = _own_row(name, target, view, prompts, max_new_tokens)
        said = said or outputs
        row.different_prompts = sum(one != other for one, other in zip(outputs, said, strict=True))
        rows.append(row)
    return rows, plain.version


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
        plain = row if not row.drafted and "drafter" not in row.name else plain
        wasted = f"{1 - row.accepted / row.drafted:.0%}" if row.drafted else "-"
        same = "yes" if not row.different_prompts else f"no ({row.different_prompts})"
        lines.append(
            f"{row.name:40} {row.tokens_per_second:9.1f} {row.tokens_per_second / plain.tokens_per_second:5.2f}x "
            f"{row.acceptance_length:11.2f} {wasted:>7} {same:>10}"
        )
    return "\n".join(lines)
