"""Metrics for `evaluate` (`evaluate.load(ppow_hf.metrics.path("acceptance_length"))`), and measuring with them.

Each metric is a folder that loads from anywhere and imports nothing of this package.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent


def path(name: str) -> str:
    """The folder of a metric, as `evaluate.load` takes it. Raises `ValueError` for an unknown name."""
    names = sorted(folder.name for folder in _ROOT.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in names:
        raise ValueError(f"name: {name!r} is not a metric of ppow_hf; there are {names}.")
    return str(_ROOT / name)


def measure_acceptance(
    target: Any,
    drafter: Any,
    workloads: Mapping[str, Sequence[Sequence[int]]],
    *,
    temperatures: Sequence[float] = (0.0,),
    windows: Sequence[str] = ("fixed", "kl"),
    max_window: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    target_name: str | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Decode each workload's prompts for real and compute the metric from the rounds: what `acceptance.json` holds.

    Each row has the 95% interval of its acceptance length over prompts too, by bootstrap; `None` for fewer than five.

    Args:
        target (`PreTrainedModel`), drafter ([`PPOWDrafter`]): the pair.
        workloads (`dict[str, list[list[int]]]`): name -> token ids of its prompts.
        temperatures (`list[float]`), windows (`list[str]`): every combination is measured.
        max_window (`int`, *optional*): by default the drafter's own.
        max_new_tokens (`int`, *optional*, defaults to `64`), seed (`int`, *optional*, defaults to `0`).
        target_name (`str`, *optional*): by default the name that the target was loaded from.
        command (`str`, *optional*): recorded; by default the process's own.
    """
    import evaluate

    from ..measure.provenance import describe, public_name

    metric = evaluate.load(path("acceptance_length"))
    longest = drafter.config.max_window if max_window is None else max_window
    rows = [
        _measured_row(metric, target, drafter, workload, prompts, temperature, window, longest, max_new_tokens, seed)
        for workload, prompts in workloads.items()
        for temperature, window in itertools.product(temperatures, windows)
    ]
    facts = {
        "target": public_name(target_name or target.config._name_or_path),
        "dtype": str(target.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "rows": rows,
    }
    return describe(target.device, command, **facts)


def _measured_row(
    metric, target, drafter, workload, prompts, temperature, window, max_window, max_new_tokens, seed
) -> dict[str, Any]:
    """One workload at one temperature with one window rule."""
    from ..measure.evaluation import decode, repeated_ngrams
    from ..measure.intervals import ratio_interval
    from ..measure.window_report import check_rounds

    outputs, traces = decode(
        target, drafter, prompts, max_new_tokens, temperature, seed, window=window, max_window=max_window,
        progress=f"{workload}, T = {temperature:g}, {window}",
    )  # fmt: skip
    by_prompt = [trace.rounds[1:] for trace in traces]  # the first round reads the prompt
    rounds = [r for rounds in by_prompt for r in rounds]
    check_rounds(workload, len(rounds))
    drafting = [[r for r in rounds if r.window > 0] for rounds in by_prompt]
    kept = [sum(r.accepted + 1 for r in rounds) for rounds in drafting]
    costs = traces[0]
    row = metric.compute(
        drafted=[r.window for r in rounds],
        accepted=[r.accepted for r in rounds],
        cost_ratio=costs.cost_ratio,
        verification_cost=costs.verification_cost,
    )
    return {
        "workload": workload,
        "temperature": temperature,
        "window": window,
        "max_window": max_window,
        "prompts": len(prompts),
        "repeated_8grams": repeated_ngrams(outputs, 8),
        **row,
        "acceptance_length_interval": ratio_interval((kept, list(map(len, drafting)))),
    }
