"""Ways of generating, side by side in one run: how fast each is, what it drafts, and whether the text stays the same.

Knows generation and clocks; knows nothing about training. The rounds of our rows come from their traces; those of
transformers' own methods are told from the tokens that each target forward was given, so that all are counted alike.
"""

import copy
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from .benchmark_costs import Costs, check_count, check_prompts, measure_costs, now, with_progress
from .benchmark_report import (
    describe_machine,
    format_table,
    own_version,
    plot_windows,
    verdict,
    without_paths,
    write_benchmark,
)
from .candidate_generator import check_call, target_width
from .modeling_ppow import DrafterView, PPOWDrafter
from .trace import GenerationTrace, RoundTrace

__all__ = [
    "Costs",
    "ForwardRecorder",
    "describe_machine",
    "format_table",
    "measure_costs",
    "plot_windows",
    "ratio_interval",
    "run_benchmark",
    "trace_from_forwards",
    "verdict",
    "without_paths",
    "write_benchmark",
]

PROMPT_LOOKUP_TOKENS = 10
FIXED_WINDOW = 8
INTERVAL_SAMPLES = 1000
FEWEST_PROMPTS_FOR_INTERVAL = 5


def run_benchmark(
    target: PreTrainedModel,
    tokenizer: Any,
    drafter: PPOWDrafter,
    prompts: Sequence[torch.Tensor],
    *,
    standalone: PPOWDrafter | None = None,
    max_new_tokens: int = 64,
    repeats: int = 1,
    command: str | None = None,
    rows: Sequence[str] | None = None,
    traces: dict[str, list[GenerationTrace]] | None = None,
) -> dict[str, Any]:
    """Generate greedily from every prompt in several ways, in turns, and compare them.

    Each prompt is run by every row before the next prompt is taken, in an order that rotates, so that a machine that
    gets slower meanwhile slows all rows alike; all rows are warmed up on the first prompt. Puts the models into eval
    mode. Counts and `seconds` are sums over all prompts and repeats.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): gives the padding token; `None` takes the target's.
        drafter ([`PPOWDrafter`]): the drafter of the rows `ppow_fixed_8` and `ppow_kl`.
        prompts (`list[torch.LongTensor]`): token ids `[1, n]` each.
        standalone ([`PPOWDrafter`], *optional*):
            A standalone drafter for transformers' own assisted generation, and, beside an eagle `drafter`, for the
            rows `ppow_standalone_fixed_8` and `ppow_standalone_kl`. A standalone `drafter` is its own default.
        max_new_tokens (`int`, *optional*, defaults to `64`): tokens generated from each prompt.
        repeats (`int`, *optional*, defaults to `1`): times that everything is run; the speed is the median.
        command (`str`, *optional*): the command that this run came from; file-system paths in it are cut to names.
        rows (`list[str]`, *optional*): names of the rows wanted, all by default; `plain` always runs.
        traces (`dict`, *optional*): filled with the traces of each row's first repeat, one per prompt.

    Returns:
        `dict`: the content of `benchmark.json`.

    Raises:
        `ValueError`: for no prompts, a prompt that is not `[1, n]` or does not fit the context, counts below 1,
        unknown rows, or a drafter of another target.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("repeats", repeats)
    check_prompts(target, prompts, max_new_tokens)
    if standalone is None and drafter.config.architecture == "standalone":
        standalone = drafter
    if standalone is not None and standalone.config.architecture != "standalone":
        raise ValueError(
            f"standalone: its architecture is {standalone.config.architecture!r}; pass a drafter of architecture "
            "'standalone', or none."
        )
    for model in (drafter, standalone):
        if model is not None:
            check_call(target, model, GenerationConfig())
            model.eval()
    target.eval()
    assistant_settings = None
    if standalone is not None:
        assistant_settings = copy.deepcopy(standalone.draft_model.model.generation_config)
    ways, left_out = _ways_to_generate(target, drafter, standalone)
    ways = _chosen(ways, rows, left_out)

    costs = measure_costs(target, drafter, sorted(prompts, key=lambda prompt: prompt.shape[1])[len(prompts) // 2])
    pad_token_id = next(
        (
            token
            for token in (getattr(tokenizer, "pad_token_id", None), target.generation_config.pad_token_id)
            if token is not None
        ),
        0,
    )
    names = list(ways)
    runs = {name: _Runs() for name in names}
    with ForwardRecorder(target) as recorder:

        def generate(name: str, prompt: torch.Tensor) -> tuple[torch.Tensor, float, GenerationTrace]:
            options = ways[name]()
            prompt = prompt.to(target.device)
            recorder.start()
            started = now(target.device)
            output = target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_token_id,
                **options,
            )
            seconds = now(target.device) - started
            ids = output[0].cpu()
            assistant = options.get("assistant_model")
            if isinstance(assistant, DrafterView):
                return ids, seconds, assistant.last_trace
            return ids, seconds, recorder.trace(prompt.shape[1], ids)

        for name in names:
            generate(name, prompts[0])
        turn = 0
        for repeat in range(repeats):
            for number, prompt in enumerate(with_progress(prompts, f"benchmark {repeat + 1}/{repeats}")):
                first = turn % len(names)
                turn += 1
                for name in names[first:] + names[:first]:
                    ids, seconds, trace = generate(name, prompt)
                    runs[name].add(repeat, number, prompt.shape[1], ids, seconds, trace)
    if assistant_settings is not None:
        standalone.draft_model.model.generation_config = assistant_settings  # type: ignore[union-attr]
    if traces is not None:
        traces.update({name: runs[name].traces[0] for name in names})

    plain = runs["plain"]
    described = [_describe_row(name, runs[name], plain) for name in names]
    ratios = [row["ratio_to_plain"] for row in described if row["name"].startswith("ppow_")]
    result = {
        "machine": describe_machine(target.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ppow_hf": own_version(),
        },
        "command": without_paths(command or ""),
        "cost_ratio": costs.cost_ratio,
        "draft_step_seconds": costs.draft_step_seconds,
        "target_forward_seconds": costs.target_forward_seconds,
        "verification_cost": costs.verification_cost,
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "dtype": str(target.dtype).removeprefix("torch."),
        "speculation_pays": bool(ratios) and max(ratios) > 1,
        "rows": described,
    }
    if left_out:
        result["left_out"] = left_out
    return result


# -- what a row is


def _ways_to_generate(
    target: PreTrainedModel, drafter: PPOWDrafter, standalone: PPOWDrafter | None
) -> tuple[dict[str, Callable[[], dict[str, Any]]], dict[str, str]]:
    """Row name -> function that gives the options of one `generate` call; and rows left out, with the reason."""

    def ours(model: PPOWDrafter, **settings) -> Callable[[], dict[str, Any]]:
        return lambda: {"assistant_model": model.with_settings(**settings)}

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        f"prompt_lookup_{PROMPT_LOOKUP_TOKENS}": lambda: {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS},
    }
    left_out = {}
    if standalone is not None:
        assistant = standalone.draft_model.model
        untouched = copy.deepcopy(assistant.generation_config)
        name = f"transformers_assisted_{_default_schedule(assistant)}"

        def assisted() -> dict[str, Any]:
            # Some schedules carry the number of draft tokens over to the next call; each prompt starts afresh here.
            assistant.generation_config = copy.deepcopy(untouched)
            return {"assistant_model": assistant}

        if target_width(assistant) == target_width(target):
            ways[name] = assisted
        else:
            left_out[name] = (
                f"transformers refuses an assistant of {target_width(assistant)} tokens for a target of "
                f"{target_width(target)}"
            )
    ways[f"ppow_fixed_{FIXED_WINDOW}"] = ours(drafter, window="fixed", max_window=FIXED_WINDOW)
    ways["ppow_kl"] = ours(drafter, window="kl")
    if standalone is not None and standalone is not drafter and drafter.config.architecture != "standalone":
        ways[f"ppow_standalone_fixed_{FIXED_WINDOW}"] = ours(standalone, window="fixed", max_window=FIXED_WINDOW)
        ways["ppow_standalone_kl"] = ours(standalone, window="kl")
    return ways, left_out


def _default_schedule(assistant: PreTrainedModel) -> str:
    """The schedule of draft lengths that transformers uses for this assistant when nobody chooses one."""
    return assistant.generation_config.num_assistant_tokens_schedule or "constant"


def _chosen(ways: dict, rows: Sequence[str] | None, left_out: dict[str, str]) -> dict:
    if rows is None:
        return ways
    unknown = [name for name in rows if name not in ways]
    if unknown:
        reason = f" ({left_out[unknown[0]]})" if unknown[0] in left_out else ""
        raise ValueError(f"rows: {unknown[0]!r} is not one of {list(ways)}{reason}.")
    return {name: way for name, way in ways.items() if name == "plain" or name in rows}


class ForwardRecorder:
    """Keeps the tokens that each forward of the target is given, from a hook on its input embeddings.

    On the embeddings, because `generate` of a PEFT-wrapped target calls the model inside the wrapper.
    """

    def __init__(self, target: PreTrainedModel):
        self._embeddings = target.get_input_embeddings()
        self._queries: list[torch.Tensor] = []
        self._handle: Any = None

    def __enter__(self) -> "ForwardRecorder":
        self._handle = self._embeddings.register_forward_pre_hook(
            lambda module, inputs: self._queries.append(inputs[0])
        )
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()

    def start(self) -> None:
        """Forget what was recorded."""
        self._queries = []

    def trace(self, prompt_length: int, output_ids: torch.Tensor) -> GenerationTrace:
        """The rounds of one greedy call, from the forwards since [`start`] and its output `[n + new]`."""
        return trace_from_forwards([query[0].tolist() for query in self._queries], prompt_length, output_ids.tolist())


def trace_from_forwards(
    queries: Sequence[Sequence[int]], prompt_length: int, output: Sequence[int]
) -> GenerationTrace:
    """Rounds of a greedy call, told from the tokens each target forward was given and from what came out.

    A forward reads the last committed token (the first one: the prompt) and the drafted ones behind it, and commits
    the drafted tokens that are in the output, and one more.
    """
    trace = GenerationTrace()
    committed = prompt_length
    for number, query in enumerate(queries):
        window = len(query) - (1 if number else prompt_length)
        draft_ids = list(query[len(query) - window :]) if window else []
        most = max(len(output) - committed - 1, 0)
        accepted = 0
        while accepted < min(window, most) and draft_ids[accepted] == output[committed + accepted]:
            accepted += 1
        trace.rounds.append(RoundTrace(window, window, draft_ids, accepted))
        committed += accepted + 1
    return trace


@dataclass
class _Runs:
    """All runs of one row, by repeat and prompt."""

    outputs: list[list[list[int]]] = field(default_factory=list)
    new_tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    traces: list[list[GenerationTrace]] = field(default_factory=list)

    def add(
        self, repeat: int, number: int, prompt_length: int, ids: torch.Tensor, seconds: float, trace: GenerationTrace
    ) -> None:
        if number == 0:
            for runs in (self.outputs, self.new_tokens, self.seconds, self.traces):
                runs.append([])
        self.outputs[repeat].append(ids.tolist())
        self.new_tokens[repeat].append(len(ids) - prompt_length)
        self.seconds[repeat].append(seconds)
        self.traces[repeat].append(trace)

    @property
    def speed(self) -> float:
        """Tokens per second, the median of the repeats."""
        return statistics.median(
            sum(tokens) / sum(seconds) for tokens, seconds in zip(self.new_tokens, self.seconds, strict=True)
        )

    def per_prompt(self) -> tuple[list[int], list[float]]:
        """New tokens and seconds of each prompt, summed over the repeats."""
        return [sum(one) for one in zip(*self.new_tokens, strict=True)], [
            sum(one) for one in zip(*self.seconds, strict=True)
        ]


def _describe_row(name: str, runs: _Runs, plain: _Runs) -> dict[str, Any]:
    every = [trace for repeat in runs.traces for trace in repeat]
    together = GenerationTrace(rounds=[one_round for trace in every for one_round in trace.rounds])
    reference = plain.outputs[0]
    different = {
        number for repeat in runs.outputs for number, output in enumerate(repeat) if output != reference[number]
    }
    row = {
        "name": name,
        "tokens_per_second": runs.speed,
        "acceptance_length": together.acceptance_length,
        "tokens_per_target_forward": together.tokens_per_target_forward,
        "drafted": together.drafted,
        "accepted": together.accepted,
        "wasted": together.wasted,
        "ratio_to_plain": runs.speed / plain.speed,
        "ratio_interval": None if runs is plain else ratio_interval(runs.per_prompt(), plain.per_prompt()),
        "identical_to_plain": not different,
        "different_prompts": len(different),
        "seconds": sum(map(sum, runs.seconds)),
        "new_tokens": sum(map(sum, runs.new_tokens)),
        "target_forwards": len(together.rounds),
    }
    if name.endswith("_kl"):
        # The rule's own account, at the end of each call: whether it would go on drafting.
        row["speculation_pays"] = 2 * sum(trace.speculation_pays for trace in every) > len(every)
    return row


def ratio_interval(
    runs: tuple[Sequence[int], Sequence[float]], plain: tuple[Sequence[int], Sequence[float]]
) -> list[float] | None:
    """95% interval of a row's speed over plain's, by resampling prompts; `None` for fewer than five prompts.

    Both arguments are new tokens and seconds by prompt; the same prompts are drawn for both.
    """
    import numpy

    count = len(runs[0])
    if count < FEWEST_PROMPTS_FOR_INTERVAL:
        return None
    drawn = numpy.random.default_rng(0).integers(count, size=(INTERVAL_SAMPLES, count))
    tokens, seconds, plain_tokens, plain_seconds = (
        numpy.asarray(values, dtype=float)[drawn].sum(axis=1) for values in (*runs, *plain)
    )
    low, high = numpy.percentile(tokens / seconds * plain_seconds / plain_tokens, [2.5, 97.5])
    return [float(low), float(high)]
