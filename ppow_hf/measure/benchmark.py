"""Ways of generating, side by side in one run: how fast each is, what it drafts, and whether the text stays the same.

Knows generation and clocks; knows nothing about training. The rounds of our rows come from their traces; those of
transformers' own methods are told from the tokens that each target forward was given, so that all are counted alike.
"""

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..data.targets import eos_of, left_padded, plain_distribution, random_state_kept, sampling_options, until_end
from ..runtime.compatibility import check_call, target_width
from ..runtime.draft_session import now
from ..runtime.generation import DrafterView, SpeculativeDecoding
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.target_weights import input_device
from ..runtime.trace import GenerationTrace, RoundTrace
from .costs import check_count, check_prompts, measure_costs, with_progress
from .intervals import ratio_interval
from .provenance import describe_machine, public_command, versions

PROMPT_LOOKUP_TOKENS = 10
FIXED_WINDOW = 8
TREE_NODES = 16

Ways = dict[str, Callable[[], dict[str, Any]]]  # row -> the options of its next call of `generate`


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
    thorough: bool = False,
    temperature: float = 0.0,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Generate from every prompt in several ways, in turns, and compare them.

    Each prompt is run by every row before the next prompt is taken, in an order that rotates, so that a machine that
    gets slower meanwhile slows all rows alike; all rows are warmed up on the first prompt. Puts the models into eval
    mode. Counts and `seconds` are sums over all prompts and repeats.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): gives the padding token; `None` takes the target's.
        drafter ([`PPOWDrafter`]):
            The drafter of the rows `ppow_fixed_8`, `ppow_kl` and `ppow_kl_lookup`, which drafts from the text as well.
        prompts (`list[torch.LongTensor]`): token ids `[1, n]` each.
        standalone ([`PPOWDrafter`], *optional*):
            A standalone drafter for transformers' own assisted generation, and, beside an eagle `drafter`, for the
            rows `ppow_standalone_fixed_8`, `ppow_standalone_kl` and `ppow_standalone_kl_lookup`. A standalone
            `drafter` is its own default.
        max_new_tokens (`int`, *optional*, defaults to `64`): tokens generated from each prompt.
        repeats (`int`, *optional*, defaults to `1`): times that everything is run; the speed is the median.
        command (`str`, *optional*): the command that this run came from; file-system paths in it are cut to names.
        rows (`list[str]`, *optional*): names of the rows wanted, all by default; `plain` always runs.
        traces (`dict`, *optional*): filled with the traces of each row's first repeat, one per prompt.
        thorough (`bool`, *optional*, defaults to `False`):
            Also prompt lookup of 5 tokens, each of transformers' schedules and 3, 5 and 8 draft tokens, and our own
            loop with chains and with trees.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 takes the likeliest token; above, every row samples with seeds of its own, so that texts differ.
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts of one call. Above 1 only plain generation and ours run: transformers' own take one at a time.

    Returns:
        `dict`: the content of `benchmark.json`.

    Raises:
        `ValueError`: for no prompts, a prompt that is not `[1, n]` or does not fit the context, counts below 1,
        unknown rows, or a drafter of another target.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("repeats", repeats)
    check_count("batch_size", batch_size)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} given; 0 (greedy) or a positive number is needed.")
    check_prompts(target, prompts, max_new_tokens)
    standalone = _ready(target, drafter, standalone)
    ways, left_out = _ways_to_generate(target, drafter, standalone, thorough, batch_size)
    ways = _chosen(ways, rows, left_out)
    costs = measure_costs(target, drafter, sorted(prompts, key=lambda prompt: prompt.shape[1])[len(prompts) // 2])
    decoding = Decoding(max_new_tokens, temperature, batch_size, _padding_token(tokenizer, target))
    calls = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    with _generation_config_kept(standalone):
        runs = _run_in_turns(target, ways, calls, decoding, repeats)
    if traces is not None:
        traces.update({name: runs[name].traces[0] for name in runs})

    described = [_describe_row(name, row, runs["plain"], temperature == 0) for name, row in runs.items()]
    ratios = [row["ratio_to_plain"] for row in described if row["name"].startswith("ppow_")]
    result = {
        "machine": describe_machine(target.device),
        "versions": versions(),
        "command": public_command(command or ""),
        "cost_ratio": costs.cost_ratio,
        "draft_step_seconds": costs.draft_step_seconds,
        "target_forward_seconds": costs.target_forward_seconds,
        "verification_cost": costs.verification_cost,
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "temperature": temperature,
        "batch_size": batch_size,
        "dtype": str(target.dtype).removeprefix("torch."),
        "speculation_pays": bool(ratios) and max(ratios) > 1,
        "rows": described,
    }
    if left_out:
        result["left_out"] = left_out
    return result


def _ready(target: PreTrainedModel, drafter: PPOWDrafter, standalone: PPOWDrafter | None) -> PPOWDrafter | None:
    """Check the drafters, put the models into eval mode, and return the standalone drafter there is, if any."""
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
    return standalone


def _padding_token(tokenizer: Any, target: PreTrainedModel) -> int:
    """The tokenizer's padding token, else the target's, else any: the attention mask hides it."""
    tokens = (getattr(tokenizer, "pad_token_id", None), target.generation_config.pad_token_id)
    return next((token for token in tokens if token is not None), 0)


@contextlib.contextmanager
def _generation_config_kept(standalone: PPOWDrafter | None) -> Iterator[None]:
    """Give the assistant inside `standalone` its generation config back, which the rows change."""
    if standalone is None:
        yield
        return
    assistant = standalone.draft_model.model
    kept = copy.deepcopy(assistant.generation_config)
    try:
        yield
    finally:
        assistant.generation_config = kept


# -- running


@dataclass(frozen=True)
class Decoding:
    """What every row is called with; at temperature 0 greedy, above it sampling from the whole distribution."""

    max_new_tokens: int
    temperature: float
    batch_size: int
    pad_token_id: int

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": 1,
            "pad_token_id": self.pad_token_id,
            **sampling_options(self.temperature),
        }


def _run_in_turns(
    target: PreTrainedModel,
    ways: Ways,
    calls: Sequence[Sequence[torch.Tensor]],
    decoding: Decoding,
    repeats: int,
) -> dict[str, "_Runs"]:
    """Every row runs each call before the next is taken, in an order that rotates; the first call warms all up."""
    names = list(ways)
    runs = {name: _Runs() for name in names}
    with ForwardRecorder(target) as recorder, random_state_kept():
        for name in names:
            _generate(target, ways[name](), calls[0], decoding, recorder, seed=0)
        turn = 0
        for repeat in range(repeats):
            for number, call in enumerate(with_progress(calls, f"benchmark {repeat + 1}/{repeats}")):
                first = turn % len(names)
                turn += 1
                for place, name in enumerate(names[first:] + names[:first]):
                    seed = turn * len(names) + place
                    outcome = _generate(target, ways[name](), call, decoding, recorder, seed)
                    runs[name].add(repeat, number, outcome)
    return runs


def _generate(
    target: PreTrainedModel,
    options: dict[str, Any],
    call: Sequence[torch.Tensor],
    decoding: Decoding,
    recorder: "ForwardRecorder",
    seed: int,
) -> "Outcome":
    """Generate from the prompts `[1, n]` of one call with a row's `options`; times `generate` alone."""
    ids, mask = left_padded([prompt[0].tolist() for prompt in call], decoding.pad_token_id)
    torch.manual_seed(seed)
    recorder.start()
    place = input_device(target)
    with plain_distribution(target):
        started = now(place)
        output = target.generate(ids.to(place), attention_mask=mask.to(place), **decoding.options, **options)
        seconds = now(place) - started
    eos = eos_of(target)
    new_ids = [until_end(row, eos) for row in output[:, ids.shape[1] :].tolist()]
    decoder = options.get("assistant_model", options.get("custom_generate"))
    if isinstance(decoder, DrafterView | SpeculativeDecoding):
        traces = decoder.last_traces
    elif decoding.batch_size > 1:
        traces = [GenerationTrace([RoundTrace(0, 0, []) for _ in tokens]) for tokens in new_ids]
    else:
        traces = [recorder.trace(ids.shape[1], output[0].cpu())]
    return Outcome(new_ids, seconds, traces)


# -- what a row is


def _ways_to_generate(
    target: PreTrainedModel,
    drafter: PPOWDrafter,
    standalone: PPOWDrafter | None,
    thorough: bool,
    batch_size: int,
) -> tuple[Ways, dict[str, str]]:
    """The rows there can be, and those left out, with the reason."""

    def ours(model: PPOWDrafter, **settings) -> Callable[[], dict[str, Any]]:
        return lambda: {"assistant_model": model.with_settings(**settings)}

    ways: Ways = {"plain": dict}
    for tokens in (5, PROMPT_LOOKUP_TOKENS) if thorough else (PROMPT_LOOKUP_TOKENS,):
        ways[f"prompt_lookup_{tokens}"] = partial(dict, prompt_lookup_num_tokens=tokens)
    left_out: dict[str, str] = {}
    if standalone is not None:
        assisted, left_out = _assisted_generation(target, standalone.draft_model.model, thorough)
        ways |= assisted
    ways[f"ppow_fixed_{FIXED_WINDOW}"] = ours(drafter, window="fixed", max_window=FIXED_WINDOW)
    ways["ppow_kl"] = ours(drafter, window="kl", lookup=False)
    ways["ppow_kl_lookup"] = ours(drafter, window="kl", lookup=True)
    if thorough:
        ways["ppow_loop_kl"] = lambda: {"custom_generate": drafter.generate_with(window="kl", lookup=False)}
        if drafter.config.architecture != "medusa":
            ways["ppow_tree"] = lambda: {"custom_generate": drafter.generate_with(window="kl", tree_nodes=TREE_NODES)}
    if standalone is not None and standalone is not drafter and drafter.config.architecture != "standalone":
        ways[f"ppow_standalone_fixed_{FIXED_WINDOW}"] = ours(standalone, window="fixed", max_window=FIXED_WINDOW)
        ways["ppow_standalone_kl"] = ours(standalone, window="kl", lookup=False)
        ways["ppow_standalone_kl_lookup"] = ours(standalone, window="kl", lookup=True)
    if batch_size > 1:
        one_at_a_time = [name for name in ways if name.startswith(("prompt_lookup", "transformers"))]
        left_out |= dict.fromkeys(one_at_a_time, "transformers takes one prompt at a time here")
        ways = {name: way for name, way in ways.items() if name not in one_at_a_time}
    return ways, left_out


def _assisted_generation(
    target: PreTrainedModel, assistant: PreTrainedModel, thorough: bool
) -> tuple[Ways, dict[str, str]]:
    """transformers' own assisted generation: the rows there can be, and those left out, with the reason."""
    untouched = copy.deepcopy(assistant.generation_config)

    def assisted(**changes: Any) -> dict[str, Any]:
        # Some schedules carry the number of draft tokens over to the next call; each prompt starts afresh here.
        assistant.generation_config = copy.deepcopy(untouched)
        assistant.generation_config.update(**changes)
        return {"assistant_model": assistant}

    schedules: dict[str, dict[str, Any]] = {f"transformers_assisted_{_default_schedule(assistant)}": {}}
    if thorough:
        for schedule in ("constant", "heuristic", "heuristic_transient"):
            schedules.setdefault(f"transformers_assisted_{schedule}", {"num_assistant_tokens_schedule": schedule})
        for tokens in (3, 5, 8):
            schedules[f"transformers_assisted_{tokens}"] = {
                "num_assistant_tokens_schedule": "constant",
                "num_assistant_tokens": tokens,
            }
    if target_width(assistant) == target_width(target):
        return {name: partial(assisted, **changes) for name, changes in schedules.items()}, {}
    reason = (
        f"transformers refuses an assistant of {target_width(assistant)} tokens for a target of {target_width(target)}"
    )
    return {}, dict.fromkeys(schedules, reason)


def _default_schedule(assistant: PreTrainedModel) -> str:
    """The schedule of draft lengths that transformers uses for this assistant when nobody chooses one."""
    return assistant.generation_config.num_assistant_tokens_schedule or "constant"


def _chosen(ways: Ways, rows: Sequence[str] | None, left_out: dict[str, str]) -> Ways:
    """The rows wanted, plain among them; all for `None`."""
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

    A forward reads the last committed token (the first one: the prompt) and the drafted ones after it, and commits
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


@dataclass(frozen=True)
class Outcome:
    """One call: new tokens of each prompt, seconds, and each prompt's trace."""

    new_ids: list[list[int]]
    seconds: float
    traces: list[GenerationTrace]


@dataclass
class _Runs:
    """All runs of one row, by repeat, and then: outputs and traces by prompt, new tokens and seconds by call."""

    outputs: list[list[list[int]]] = field(default_factory=list)
    new_tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    traces: list[list[GenerationTrace]] = field(default_factory=list)

    def add(self, repeat: int, number: int, outcome: Outcome) -> None:
        if number == 0:
            for runs in (self.outputs, self.new_tokens, self.seconds, self.traces):
                runs.append([])
        self.outputs[repeat] += outcome.new_ids
        self.new_tokens[repeat].append(sum(map(len, outcome.new_ids)))
        self.seconds[repeat].append(outcome.seconds)
        self.traces[repeat] += outcome.traces

    @property
    def speed(self) -> float:
        """Tokens per second, the median of the repeats."""
        return statistics.median(self.speeds)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [sum(tokens) / sum(seconds) for tokens, seconds in zip(self.new_tokens, self.seconds, strict=True)]

    def per_call(self) -> tuple[list[int], list[float]]:
        """New tokens and seconds of each call, summed over the repeats."""
        return [sum(one) for one in zip(*self.new_tokens, strict=True)], [
            sum(one) for one in zip(*self.seconds, strict=True)
        ]


def _describe_row(name: str, runs: _Runs, plain: _Runs, greedy: bool) -> dict[str, Any]:
    every = [trace for repeat in runs.traces for trace in repeat]
    together = GenerationTrace(rounds=[one_round for trace in every for one_round in trace.rounds])
    reference = plain.outputs[0]
    different = {
        number for repeat in runs.outputs for number, output in enumerate(repeat) if output != reference[number]
    }
    row = {
        "name": name,
        "tokens_per_second": runs.speed,
        "tokens_per_second_range": [min(runs.speeds), max(runs.speeds)],
        "acceptance_length": together.acceptance_length,
        "tokens_per_target_forward": together.tokens_per_target_forward,
        "drafted": together.drafted,
        "accepted": together.accepted,
        "wasted": together.wasted,
        "ratio_to_plain": runs.speed / plain.speed,
        "ratio_interval": None if runs is plain else ratio_interval(runs.per_call(), plain.per_call()),
        "identical_to_plain": not different if greedy else None,  # samples differ by their seeds
        "different_prompts": len(different) if greedy else None,
        "seconds": sum(map(sum, runs.seconds)),
        "new_tokens": sum(map(sum, runs.new_tokens)),
        "target_forwards": len(together.rounds),
    }
    if name.endswith(("_kl", "_kl_lookup")):
        # The rule's own account, at the end of each call: whether it would go on drafting.
        row["speculation_pays"] = 2 * sum(trace.speculation_pays for trace in every) > len(every)
    return row
