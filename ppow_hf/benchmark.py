"""Ways of generating, side by side in one run: how fast each is, what it drafts, and whether the text stays the same.

Knows generation and clocks; knows nothing about training. The rounds of our rows come from their traces; those of
transformers' own methods are told from the tokens that each target forward was given, so that all are counted alike.
"""

import copy
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .candidate_generator import check_call, target_width
from .drafting import cache_argument
from .modeling_ppow import DrafterView, PPOWDrafter, collect_target_states
from .trace import GenerationTrace, RoundTrace

PROMPT_LOOKUP_TOKENS = 10
FIXED_WINDOW = 8
INTERVAL_SAMPLES = 1000
FEWEST_PROMPTS_FOR_INTERVAL = 5


@dataclass(frozen=True)
class Costs:
    """What drafting and verifying cost on this machine.

    Args:
        draft_step_seconds (`float`): median time of one draft step, the choice of its token included.
        target_forward_seconds (`float`): median time of a one-token target forward behind a cached context.
        cost_ratio (`float`): gamma, the first over the second.
        verification_cost (`float`): slope of v(W) = 1 + verification_cost * W, the (W+1)-token target forward over the
            one-token one; at least 0.
    """

    draft_step_seconds: float
    target_forward_seconds: float
    cost_ratio: float
    verification_cost: float


@torch.inference_mode()
def measure_costs(
    target: PreTrainedModel,
    drafter: PPOWDrafter | DrafterView,
    input_ids: torch.Tensor,
    max_window: int = 10,
    repeats: int = 20,
) -> Costs:
    """Measure the costs of the cost model behind a cached context; every number is a median.

    Args:
        target (`PreTrainedModel`): the target.
        drafter ([`PPOWDrafter`] or [`DrafterView`]): the drafter.
        input_ids (`torch.LongTensor` of shape `(1, n)`): the context; cut at the left where the target's own context
            would not take `max_window` tokens more.
        max_window (`int`, *optional*, defaults to `10`): longest window timed; 2 and 5 are timed too.
        repeats (`int`, *optional*, defaults to `20`): timings of each kind, taken in turns.

    Raises:
        `ValueError`: if `input_ids` is not one sequence, or `max_window` or `repeats` is below 1.
    """
    _check_count("max_window", max_window)
    _check_count("repeats", repeats)
    _check_prompt("input_ids", input_ids)
    model = drafter.drafter if isinstance(drafter, DrafterView) else drafter
    context_length = _context_length(target)
    if context_length is not None:
        input_ids = input_ids[:, -max(context_length - max_window - 1, 1) :]
    if input_ids.shape[1] < 2:
        input_ids = input_ids.repeat(1, 2)  # an eagle drafter has nothing to say behind a single token
    input_ids = input_ids.to(target.device)
    length = input_ids.shape[1]

    cache = DynamicCache(config=target.config.get_text_config())
    outputs = target(input_ids, use_cache=True, output_hidden_states=True, **{cache_argument(target): cache})
    cache.activate_past_recording()  # without it a sliding-window cache cannot be cropped
    states = collect_target_states(outputs.hidden_states, model.config.target_layer_ids)

    def forward_seconds(tokens: torch.Tensor) -> float:
        started = _now(target.device)
        target(tokens, use_cache=True, **{cache_argument(target): cache})
        seconds = _now(target.device) - started
        cache.crop(-tokens.shape[1])
        return seconds

    def step_seconds() -> list[float]:
        first = model.draft_model.first_prefix
        session = model.start_session(target_width(target))
        read = None if states is None else states[:, : length - first].to(model.device)
        session.observe(input_ids[:, first:].to(model.device), read, first)
        token = session.first_logits().argmax(-1, keepdim=True)
        seconds = []
        for drafted in range(max(max_window - 1, 1)):
            started = _now(model.device)
            token = session.next_logits(token, drafted).argmax(-1, keepdim=True)
            seconds.append(_now(model.device) - started)
        return seconds

    windows = sorted({0, max_window} | {window for window in (2, 5) if window < max_window})
    tokens = input_ids.repeat(1, max_window // length + 1)
    timings: dict[int, list[float]] = {window: [] for window in windows}
    steps: list[float] = []
    for repeat in range(repeats + 2):  # the first two are warm-up
        new_timings = {window: forward_seconds(tokens[:, : window + 1]) for window in windows}
        new_steps = step_seconds()
        if repeat >= 2:
            steps.extend(new_steps)
            for window, seconds in new_timings.items():
                timings[window].append(seconds)
    one_token = statistics.median(timings[0])
    growth = {window: statistics.median(timings[window]) / one_token - 1 for window in windows}
    slope = sum(window * growth[window] for window in windows) / sum(window * window for window in windows)
    draft_step = statistics.median(steps)
    return Costs(draft_step, one_token, draft_step / one_token, max(slope, 0.0))


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
    _check_count("max_new_tokens", max_new_tokens)
    _check_count("repeats", repeats)
    _check_prompts(target, prompts, max_new_tokens)
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
            started = _now(target.device)
            output = target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_token_id,
                **options,
            )
            seconds = _now(target.device) - started
            ids = output[0].cpu()
            assistant = options.get("assistant_model")
            if isinstance(assistant, DrafterView):
                return ids, seconds, assistant.last_trace
            return ids, seconds, recorder.trace(prompt.shape[1], ids)

        for name in names:
            generate(name, prompts[0])
        turn = 0
        for repeat in range(repeats):
            for number, prompt in enumerate(_with_progress(prompts, f"benchmark {repeat + 1}/{repeats}")):
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
            "ppow_hf": _own_version(),
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


# -- what it ran on


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and GPU; nothing that names a user, a host or a folder."""
    import psutil

    machine = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "device": device.type,
        "gpu": None,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name(device if device.type == "cuda" else None)
    return machine


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _own_version() -> str:
    from . import __version__

    return __version__


def without_paths(command: str) -> str:
    """`command` with every file-system path cut to its last part: a benchmark is published, a home folder is not."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(_without_path(word) for word in words)


def _without_path(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    is_path = value.startswith(("/", "~", "./", "../")) or (os.sep in value and Path(value).exists())
    return f"{option}{equals}{Path(value).name or '/'}" if is_path else word


# -- how it is shown


def format_table(result: dict[str, Any]) -> str:
    """The rows of a benchmark as text columns of at most 100 characters."""
    headings = (
        ("", "method"),
        ("tokens", "per second"),
        ("ratio to", "plain"),
        ("acceptance", "length"),
        ("tokens per", "forward"),
        ("wasted", "drafts"),
        ("outputs", "identical"),
    )
    cells = [[_shortened(row["name"], 34), *_row_cells(row, result["prompts"])] for row in result["rows"]]
    widths = [
        max(len(text) for text in (*heading, *(line[column] for line in cells)))
        for column, heading in enumerate(headings)
    ]

    def line(texts: Iterable[str]) -> str:
        first, *others = (
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        return " ".join([first, *others]).rstrip()

    rule = "-" * (sum(widths) + len(widths) - 1)
    return "\n".join([line(top for top, _ in headings), line(name for _, name in headings), rule, *map(line, cells)])


def _row_cells(row: dict[str, Any], prompts: int) -> list[str]:
    drafts = row["drafted"] > 0
    return [
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio_to_plain']:.2f}x",
        f"{row['acceptance_length']:.2f}",
        f"{row['tokens_per_target_forward']:.2f}",
        f"{row['wasted']:.0%}" if drafts else "-",
        "yes" if row["identical_to_plain"] else f"no ({row['different_prompts']}/{prompts})",
    ]


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def verdict(result: dict[str, Any]) -> str:
    """One sentence: whether speculation with our drafter paid on this run, and how it compares with the best other.

    Undecided where the 95% interval of the ratio to plain holds 1.
    """
    plain = next(row for row in result["rows"] if row["name"] == "plain")
    ours = [row for row in result["rows"] if row["name"].startswith("ppow_")]
    if not ours:
        return "No row of ppow_hf was run, so this run does not say whether its speculation pays."
    others = [row for row in result["rows"] if row not in ours]
    best = max(ours, key=lambda row: row["tokens_per_second"])
    rival = max(others, key=lambda row: row["tokens_per_second"])
    ratio, interval = best["ratio_to_plain"], best.get("ratio_interval")
    spread = f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    if interval and interval[0] <= 1 <= interval[1]:
        opening = "Whether speculation paid is undecided on this run"
    elif ratio > 1:
        opening = "Speculation paid on this run"
    else:
        opening = "Speculation did not pay on this run"
    sentence = f"{opening}: {best['name']} ran at {ratio:.2f} times the speed of plain generation{spread}"
    if rival is not plain:
        gain = best["tokens_per_second"] / rival["tokens_per_second"] - 1
        direction = "faster" if gain >= 0 else "slower"
        sentence += (
            f", {abs(gain):.0%} {direction} than the best of the others, {rival['name']} "
            f"({rival['ratio_to_plain']:.2f} times)"
        )
    elif len(others) > 1:
        sentence += ", and none of the others was faster than plain"
    different = [row["name"] for row in result["rows"] if not row["identical_to_plain"]]
    if different:
        return f"{sentence}; but outputs were not identical to plain in {', '.join(different)}."
    return f"{sentence}; all outputs were identical to plain."


def write_benchmark(result: dict[str, Any], path: str | Path) -> Path:
    """Write `result` as JSON to `path`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    staged.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    staged.replace(path)
    return path


def plot_windows(traces: Sequence[GenerationTrace], path: str | Path, max_rounds: int = 150) -> Path:
    """Draw window and accepted tokens of each round, and the divergence of the verified positions below, as a PNG.

    Args:
        traces (`list[GenerationTrace]`): one per prompt, drawn one behind the other.
        path (`str` or `Path`): the PNG.
        max_rounds (`int`, *optional*, defaults to `150`):
            Prompts are drawn as long as they stay within so many rounds; the first one always is.

    Raises:
        `ValueError`: if there is no round to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[GenerationTrace] = []
    for trace in traces:
        if shown and sum(len(one.rounds) for one in shown) + len(trace.rounds) > max_rounds:
            break
        shown.append(trace)
    rounds = [one_round for trace in shown for one_round in trace.rounds]
    if not rounds:
        raise ValueError(
            "traces: there is no round in them to draw; pass the traces of calls that generated something."
        )
    numbers = range(1, len(rounds) + 1)
    figure, (windows, divergence) = pyplot.subplots(
        2, 1, figsize=(10, 5), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [2, 1]}
    )
    windows.bar(numbers, [r.window for r in rounds], width=0.85, color="#c9d6ea", label="window W (drafted tokens)")
    windows.bar(numbers, [r.accepted for r in rounds], width=0.85, color="#2f5d9b", label="accepted k")
    longest = max(max(r.window for r in rounds), 1)
    windows.set_ylim(0, longest * 1.3)  # room for the legend above the bars
    windows.yaxis.get_major_locator().set_params(integer=True)
    windows.set_ylabel("tokens")
    windows.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    with_kl = [(number, sum(r.kl) / len(r.kl)) for number, r in zip(numbers, rounds, strict=True) if r.kl]
    if with_kl:
        divergence.plot(
            *zip(*with_kl, strict=True),
            color="#b5482e",
            linewidth=1.2,
            marker=".",
            label="KL(P||Q), mean of the round's verified positions",
        )
        divergence.set_ylim(0, max(1.4 * max(value for _, value in with_kl), 1e-3))
        divergence.legend(frameon=False, fontsize=9, loc="upper right")
    divergence.set_ylabel("nats")
    divergence.set_xlabel("round")
    start = 0
    for number, trace in enumerate(shown):
        if number:
            for axis in (windows, divergence):
                axis.axvline(start + 0.5, color="0.6", linewidth=0.8, linestyle=":")
        start += len(trace.rounds)
    for axis in (windows, divergence):
        axis.grid(alpha=0.25, axis="y")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    together = GenerationTrace(rounds=rounds)
    which = "one prompt" if len(traces) == 1 else f"{len(shown)} of {len(traces)} prompts, one behind the other"
    figure.suptitle(
        f"window of each round, {which}: acceptance length {together.acceptance_length:.2f}, "
        f"wasted drafts {together.wasted:.0%}",
        fontsize=11,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


# -- checks and clocks


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _with_progress(prompts: Sequence[torch.Tensor], description: str) -> Iterable[torch.Tensor]:
    from tqdm import tqdm

    return tqdm(prompts, desc=description, unit="prompt", disable=None, leave=False)


def _context_length(target: PreTrainedModel) -> int | None:
    return getattr(target.config.get_text_config(), "max_position_embeddings", None)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {value} given, at least 1 is needed.")


def _check_prompt(name: str, prompt: torch.Tensor) -> None:
    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] < 1:
        raise ValueError(f"{name}: token ids of shape [1, n] with n >= 1 are needed, given was {list(prompt.shape)}.")


def _check_prompts(target: PreTrainedModel, prompts: Sequence[torch.Tensor], max_new_tokens: int) -> None:
    if not prompts:
        raise ValueError("prompts: none given; at least one prompt is needed.")
    context_length = _context_length(target)
    for number, prompt in enumerate(prompts):
        _check_prompt(f"prompts[{number}]", prompt)
        if context_length is not None and prompt.shape[1] + max_new_tokens > context_length:
            raise ValueError(
                f"prompts[{number}]: {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} are more than the "
                f"target's context of {context_length}. Shorten the prompt, or generate fewer tokens."
            )
