"""What a comparison trains and measures: read from YAML, checked before anything is computed."""

import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from ..data.rows import find_columns, read_rows
from ..data.sequences import PROMPT_COLUMNS
from ..measure.provenance import public_name
from ..runtime.configuration_ppow import check_settings
from ..tiny.recipe import TargetRecipe, recipe_of
from ..training import PPOWTrainingArguments
from ..training.checks import check_batch

CONFIGS = {name: Path(__file__).with_name(f"compare_{name}.yaml") for name in ("default", "100m", "smollm2")}

RESULTS = "results.jsonl"

BUDGET_UNITS = {"tokens": "target-forward tokens", "seconds": "seconds", "core_seconds": "seconds of a core"}

START_UNITS = ("seconds", "core_seconds")

OF_RUN = ("learning_rate", "max_steps", "num_train_epochs", "seed")  # training arguments that no recipe has
OF_TEXTS = ("regenerate", "packing", "max_new_tokens")  # those that only read what the comparison has read already

START = "start.json"  # what is known of the start, for the report


@dataclass
class CompareConfig:
    """What is compared, read from a YAML file ([`load_config`]).

    Args:
        target (`str` or `dict`): the target: a folder, a name on the Hub, or an embedded model; or, as a dict, what is
            trained first, in a folder within the comparison's: fields of [`TargetRecipe`]
            (`hidden_size`, by which heads and feed-forward layers grow, `num_layers`, `max_steps`, ...), and `texts`,
            a file of rows with `FILE:COLUMN,COLUMN`, in place of the source of the standard library.
        architecture (`str`): of the drafter that is trained.
        drafter (`str`, *optional*): a supervised drafter to start from, in place of training one.
        drafter_config (`dict`): fields of the drafter that is trained, as [`PPOWDrafter.from_target`] takes them; a
            standalone one is made as small here as wanted (`hidden_size`, `num_hidden_layers`, ...). The tokens of a
            `draft_vocab_size` are the most frequent ones of the training texts.
        workload (`dict`): `name`, and either nothing else for `stdlib` (excerpts of the standard library, modules held
            in for training and held out for evaluation) or `train` and `evaluation`, files of prompts.
        data (`dict`): `train_sequences`, `prompt_tokens`, `completion_tokens`, `validation_prompts`, `test_prompts`.
        target_states (`list[str]`, *optional*): folders of `ppow record`. Their texts and states train every recipe,
            in place of training prompts (neither `workload.train` nor `train_sequences` is read) and the target's
            forwards.
        start (`dict`): `seconds` or `core_seconds`, `learning_rate` and training arguments of the supervised start;
            not with `drafter`.
        budgets (`dict`): `tokens` (target-forward tokens), `seconds` and `core_seconds` (processor time, which other
            work on the machine does not change), one or several.
        seeds (`list[int]`), learning_rates (`list[float]`): the first seed chooses among the rates, the others follow.
        training (`dict`): training arguments of every recipe; without `muon` there, AdamW trains all parameters, and
            without `max_window` windows are the drafter's.
        recipes (`dict[str, dict]`): training arguments of each; `learning_rates` there takes the place of the common.
            `regenerate_temperature` there says how the target writes that recipe's text; the others' is of T = 0.
            `later` there is a dict of arguments that take the place of the recipe's own once the share `from` of the
            budget is spent: `{from: 0.75, unroll_steps: 10}`. Only those that a step reads, as the terms along the
            text do, have an effect; the learning rate and what a batch is made of stay.
        baselines (`list[str]`), reference (`str`): recipes that a winner has to beat, and the one of the first column.
        select_by (`list[str]`): metrics whose mean gain over the start chooses a learning rate.
        groups, cost_ratios, tree_nodes, verification_cost: see [`evaluate_drafter`]; all
            are measured on the test split, on the validation split those that choose and the middle group.
        slow_prompts (`int`): prompts on which groups and trees are measured, which take seconds each on a CPU.
        curve_points (`int`), curve_prompts (`int`): evaluations during a run, and their prompts.
        keep_gib (`float`): memory for kept target encodings.
        dtype (`str`): number format of the target.
    """

    target: str | dict[str, Any]
    architecture: str
    recipes: dict[str, dict[str, Any]]
    data: dict[str, int]
    budgets: dict[str, float]
    seeds: list[int]
    learning_rates: list[float]
    start: dict[str, Any] = field(default_factory=dict)
    drafter: str | None = None
    drafter_config: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=lambda: {"name": "stdlib"})
    target_states: list[str] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)
    reference: str = "cst"
    select_by: list[str] = field(default_factory=lambda: ["chain_t0_k10"])
    groups: list[int] = field(default_factory=lambda: [4, 8, 16])
    cost_ratios: list[float] = field(default_factory=lambda: [0.05, 0.12, 0.3])
    tree_nodes: list[int] = field(default_factory=list)
    verification_cost: float = 0.0
    slow_prompts: int = 32
    curve_points: int = 4
    curve_prompts: int = 8
    keep_gib: float = 2.0
    dtype: str = "float32"

    @property
    def target_name(self) -> str | None:
        """How the target is named in results: no path of this machine, and of what is trained here its shape."""
        if isinstance(self.target, dict):
            recipe = target_recipe(self.target)
            return f"{recipe.family}-{recipe.hidden_size}x{recipe.num_layers}"
        return public_name(self.target)

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and its completion together, at most."""
        return self.data["prompt_tokens"] + self.data["completion_tokens"]

    @property
    def start_settings(self) -> dict[str, Any]:
        """Training arguments of the supervised start."""
        common = {name: value for name, value in self.training.items() if name != "objective"}
        own = {name: value for name, value in self.start.items() if name not in (*START_UNITS, "learning_rate")}
        return {"objective": "supervised", **common, **own}

    def recipe_settings(self, name: str) -> dict[str, Any]:
        """Training arguments of a recipe, with `later`."""
        return {**self.training, **self.own_settings(name)}

    def own_settings(self, name: str) -> dict[str, Any]:
        """Those that are the recipe's alone."""
        return {key: value for key, value in self.recipes[name].items() if key != "learning_rates"}

    def learning_rates_of(self, name: str) -> list[float]:
        """The learning rates among which a recipe's is chosen."""
        return self.recipes[name].get("learning_rates", self.learning_rates)


def run_arguments(
    settings: Mapping[str, Any], learning_rate: float, max_length: int, **of_run: Any
) -> tuple[PPOWTrainingArguments, dict[str, Any], float]:
    """Training arguments of a run, the values that some of them have later, and from which share of the budget on.

    `settings` are training arguments, with `later` as in [`CompareConfig`]; without `muon` all is trained by AdamW.
    `of_run` are what the machine and the drafter give where `settings` do not, and the seed.
    """
    later = dict(settings.get("later", {}))
    share = later.pop("from", 1.0)
    own = {
        "max_length": max_length,
        "cost_ratio": 0.12,
        "per_device_train_batch_size": 8,
        "adam_beta2": 0.95,
        "muon": 0.0,
        "logging_steps": 5,
        "report_to": [],
        "disable_tqdm": True,
        **of_run,
        **{name: value for name, value in settings.items() if name != "later"},
        "max_steps": 10_000_000,
        "save_strategy": "steps",  # at the points of the budget, long before so many steps
        "save_steps": 10_000_000,
        "save_total_limit": 1,
        "save_only_model": False,
        "learning_rate": learning_rate,
        "seed": of_run.get("seed", 0),
    }
    try:
        args = PPOWTrainingArguments(**own)
        second = PPOWTrainingArguments(**{**own, **later}) if later else args
    except ValueError as error:
        if "max_length" not in str(error) or "max_length" in settings:
            raise
        raise ValueError(f"{error} Here max_length is prompt_tokens + completion_tokens of data.") from error
    return args, {name: getattr(second, name) for name in later}, share


def target_recipe(settings: Mapping[str, Any]) -> TargetRecipe:
    """The recipe that a configuration's `target` stands for. Raises `ValueError` for what is unknown or impossible."""
    given = {name: value for name, value in settings.items() if name != "texts"}
    unknown = sorted(set(given) - {f.name for f in fields(TargetRecipe)})
    if unknown:
        raise ValueError(f"target: {unknown} are not known; accepted are texts and the fields of TargetRecipe.")
    family = given.pop("family", "llama")
    for name, value in given.items():
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"target: {name} is {value!r}; give a number above 0.")
    return recipe_of(family, **given)


SMOKE: dict[str, Any] = {
    "data": {"train_sequences": 16, "validation_prompts": 3, "test_prompts": 4, "completion_tokens": 24},
    "start": {"seconds": 4.0},
    "budgets": {"tokens": 4000},
    "learning_rates": [3e-4, 1e-3],
    "groups": [8],
    "tree_nodes": [],
    "curve_points": 1,
    "curve_prompts": 2,
    "training": {"per_device_train_batch_size": 4, "num_prefixes": 2, "num_rollouts": 4},
}


SMOKE_TARGET = {"hidden_size": 128, "num_layers": 2, "max_steps": 2}


def load_config(
    path: str | Path | None,
    smoke: bool = False,
    recipes: list[str] | None = None,
    target_states: list[str] | None = None,
) -> CompareConfig:
    """The configuration in a YAML file or of a name in `CONFIGS`, by default `"default"`; `smoke` makes it all small.

    `recipes` and `target_states`, where given, take the place of the file's.

    Raises `ValueError` naming what is unknown, missing or out of range, `FileNotFoundError` without the file.
    """
    import yaml  # type: ignore[import-untyped]

    path = Path(path or "default")
    if not path.is_file():
        if str(path) not in CONFIGS:
            raise FileNotFoundError(
                f"--config: there is no file {str(path)!r}; without a file there are {', '.join(CONFIGS)}."
            )
        path = CONFIGS[str(path)]
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path.name} is not YAML: {error}") from error
    known = {f.name for f in fields(CompareConfig)}
    if not isinstance(given, dict) or set(given) - known:
        unknown = sorted(set(given) - known) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"--config: {unknown} in {path.name} is not known; accepted are {sorted(known)}.")
    if target_states is not None:
        given["target_states"] = target_states
    if smoke:
        given["start"] = {name: value for name, value in given.get("start", {}).items() if name not in START_UNITS}
        for name, value in SMOKE.items():
            given[name] = {**given.get(name, {}), **value} if isinstance(value, dict) and name != "budgets" else value
        given["seeds"] = given.get("seeds", [0])[:1]
        if isinstance(given.get("target"), dict):
            given["target"] |= SMOKE_TARGET
    try:
        config = CompareConfig(**given)
    except TypeError as error:
        raise ValueError(f"--config: {path.name} is not complete: {error}.") from error
    if recipes is not None:
        missing = sorted(set(recipes) - set(config.recipes))
        if missing:
            raise ValueError(f"--recipes: {missing} are not among {sorted(config.recipes)}.")
        config.recipes = {name: config.recipes[name] for name in recipes}
    with named(where(path)):
        _check(config)
    return config


def where(path: str | Path | None) -> str:
    """What an error about a configuration's value begins with."""
    return f"--config: in {Path(path or 'default').name}, "


@contextmanager
def named(place: str, *more: type[Exception]) -> Iterator[None]:
    """What is refused inside, by errors of these kinds too, is refused with `place` before it."""
    kinds: tuple[type[Exception], ...] = (FileNotFoundError, ValueError, *more)
    try:
        yield
    except kinds as error:
        raise ValueError(f"{place}{error}") from error


def _check(config: CompareConfig) -> None:
    """Raise `ValueError` or `FileNotFoundError`, naming the key, for what could not be run."""
    if not config.recipes or not config.seeds or not config.learning_rates or not config.select_by:
        raise ValueError("recipes, seeds, learning_rates and select_by must each have something in them.")
    for name, kind in get_type_hints(CompareConfig).items():
        if name != "learning_rates":  # texts that are numbers will do, as YAML reads 1e-3
            _check_kind(name, getattr(config, name), kind)
    check_settings(architecture=config.architecture)
    if config.dtype != "auto" and not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise ValueError(f"dtype: {config.dtype!r} given; give float32, bfloat16 or auto.")
    if isinstance(config.target, dict):
        target_recipe(config.target)
    _check_amounts(config)
    _check_metrics(config)
    sequences = _check_workload(config)
    _check_start(config)
    for name, recipe in config.recipes.items():
        if config.target_states is not None and "regenerate_temperature" in recipe:
            raise ValueError(
                f"recipes.{name}: regenerate_temperature is given, and with target_states the texts are written. Drop "
                "it."
            )
    _check_runs(config, sequences)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that YAML gave is what a field is annotated with."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(one, parts[1]) for one in value.values())
    return kind is Any or isinstance(value, (int, float) if kind is float else kind)


def _check_kind(name: str, value: Any, kind: Any) -> None:
    if not _fits(value, kind):
        written = inspect.formatannotation(kind).replace("typing.", "")
        note = " YAML reads 1e-3 as a text and 1.0e-3 as a number." if "float" in written else ""
        raise ValueError(f"{name}: {value!r} given; it must be of the kind {written}.{note}")


def _check_amounts(config: CompareConfig) -> None:
    if not config.budgets or set(config.budgets) - set(BUDGET_UNITS) or min(config.budgets.values()) <= 0:
        raise ValueError(
            f"budgets: {config.budgets} given; give one or several of {', '.join(BUDGET_UNITS)}, above 0."
        )
    counts = ["prompt_tokens", "completion_tokens", "validation_prompts", "test_prompts"]
    if config.target_states is None:
        counts.append("train_sequences")
    for name in counts:
        if config.data.get(name, 0) < 1:
            raise ValueError(f"data: {name} is {config.data.get(name)!r}; a whole number of at least 1 is needed.")
    least = {"groups": 1, "tree_nodes": 1, "slow_prompts": 1, "curve_prompts": 1, "curve_points": 0, "seeds": 0,
             "cost_ratios": 0, "verification_cost": 0, "keep_gib": 0}  # fmt: skip
    for name, lowest in least.items():
        given = getattr(config, name)
        if not all(lowest <= number < math.inf for number in (given if isinstance(given, list) else [given])):
            raise ValueError(f"{name}: {given} given; {lowest} or more is needed.")


def _check_metrics(config: CompareConfig) -> None:
    counted = {f"group_t0_c{count}" for count in config.groups} | {f"speed_t0_{c:g}" for c in config.cost_ratios}
    counted |= {f"tree_t{t}_n{count}" for count in config.tree_nodes for t in (0, 1)}
    for name in config.select_by:
        if name not in counted and not name.startswith(("chain_t0_k", "chain_t1_k", "greedy_t1_k")):
            raise ValueError(f"select_by: {name!r} is not measured; beside chains there are {sorted(counted)}.")


def _check_workload(config: CompareConfig) -> int | None:
    """How many sequences it gives to train on; `None` for those of recorded states."""
    data, workload = config.data, config.workload
    if not all(isinstance(workload.get(name, ""), str) for name in ("train", "evaluation")) or "name" not in workload:
        raise ValueError(f"workload: {workload} given; give a name, and train and evaluation, files of prompts.")
    trained = config.target_states is None
    if workload["name"] == "stdlib" and "train" not in workload:
        return data["train_sequences"] if trained else None
    needed = {"train", "evaluation"} if trained else {"evaluation"}
    if not needed <= set(workload):
        raise ValueError(f"workload: it needs {' and '.join(sorted(needed))}, files of prompts, or the name stdlib.")
    prompts = {name: read_rows(workload[name], f"workload.{name}") for name in sorted(needed)}
    for name, rows in prompts.items():
        find_columns(rows, PROMPT_COLUMNS, f"workload.{name}")
    found = len(prompts["evaluation"])
    wanted = data["validation_prompts"] + data["test_prompts"]
    if found < wanted:
        raise ValueError(
            f"workload.evaluation: it has {found} prompts, fewer than validation_prompts + test_prompts = {wanted}. "
            "Give more of them, or lower those numbers."
        )
    return min(data["train_sequences"], len(prompts["train"])) if trained else None


def _check_start(config: CompareConfig) -> None:
    if config.drafter is not None:
        if config.drafter_config:
            raise ValueError("drafter_config: it is of a drafter that is made; leave it out where drafter names one.")
        return
    units = [unit for unit in START_UNITS if unit in config.start]
    if len(units) != 1 or "learning_rate" not in config.start:
        raise ValueError(
            f"start: {config.start} given; give one of {' and '.join(START_UNITS)}, and learning_rate, of the "
            "supervised start, or drafter to start from."
        )
    _check_kind(f"start: {units[0]}", config.start[units[0]], float)
    if not config.start[units[0]] > 0:
        raise ValueError(f"start: {units[0]} is {config.start[units[0]]}; it must be above 0.")


def _check_runs(config: CompareConfig, sequences: int | None) -> None:
    """Raise `ValueError` for training arguments that the start or a recipe could not be run with."""
    runs = {f"recipes.{name}": config.recipe_settings(name) for name in config.recipes}
    given = {f"recipes.{name}": own for name, own in config.recipes.items()} | {"training": config.training}
    rates = {f"recipes.{name}": config.learning_rates_of(name) for name in config.recipes}
    if config.drafter is None:
        runs["start"] = given["start"] = config.start_settings
        rates["start"] = [config.start["learning_rate"]]
    for place, settings in given.items():
        _check_arguments(place, settings)
    for place, settings in runs.items():
        _check_rates(place, rates[place])
        refusal = _refusal(config, settings, sequences)
        if refusal is not None:  # said of `training` where it is all of that
            shared = refusal == _refusal(config, config.training, sequences)
            raise ValueError(f"{'training' if shared else place}: {refusal}")


def _check_arguments(place: str, settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for names that are no training arguments, and for what stands where a number belongs."""
    kinds = get_type_hints(PPOWTrainingArguments)
    later = settings.get("later", {"from": 0.5})
    if not isinstance(later, dict) or not isinstance(later.get("from"), int | float):
        raise ValueError(f"{place}: later is {later}; give settings and from, a share: {{from: 0.5, ...}}.")
    if not 0 < later["from"] < 1:
        raise ValueError(f"{place}: later begins from {later['from']}; give a share between 0 and 1.")
    ours = sorted((set(settings) | set(later)) & set(OF_RUN))
    if ours:
        raise ValueError(
            f"{place}: {ours} are given, which the comparison sets: drop them, and see seeds, "
            "learning_rates and budgets."
        )
    unused = sorted((set(settings) | set(later)) & set(OF_TEXTS))
    if unused:
        raise ValueError(f"{place}: {unused} are given, and the comparison's texts are made by data. Drop them.")
    if "regenerate_temperature" in later or ("regenerate_temperature" in settings and not place.startswith("recipes")):
        raise ValueError(f"{place}: regenerate_temperature is given; it belongs to a recipe, from its beginning on.")
    unknown = sorted((set(settings) - set(kinds) - {"learning_rates", "later"}) | (set(later) - set(kinds) - {"from"}))
    if unknown:
        raise ValueError(f"{place}: {unknown} are no training arguments; `ppow train --help` lists them.")
    for name, value in (*settings.items(), *later.items()):
        if set(get_args(kinds.get(name)) or [kinds.get(name)]) <= {int, float, bool, NoneType}:
            _check_kind(f"{place}: {name}", value, kinds[name])


def _check_rates(place: str, rates: Any) -> None:
    try:
        numbers = [float(rate) for rate in rates]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{place}: the learning rates {rates} given; give numbers above 0.")


def _refusal(config: CompareConfig, settings: Mapping[str, Any], sequences: int | None) -> str | None:
    """What speaks against training arguments, whatever the target and drafter; `None` if nothing does."""
    longest = config.longest_sequence if sequences is not None else 2**20  # a record's length is not known here
    try:
        args, _, _ = run_arguments(settings, 1e-3, longest, output_dir=os.devnull, use_cpu=True, max_window=1)
    except (AttributeError, TypeError, ValueError) as error:
        return str(error)
    if sequences is not None:
        _check_batch(sequences, args)
    return None


def _check_batch(sequences: int, args: PPOWTrainingArguments) -> None:
    try:
        check_batch(range(sequences), args)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"data.train_sequences: {sequences} texts to train on do not fill one batch. Give more, in workload.train "
            f"too if it is there, or lower per_device_train_batch_size ({args.per_device_train_batch_size})."
        ) from error


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, which is only read; a line that an interruption cut off counts nothing."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def append_result(path: Path, line: dict[str, Any]) -> None:
    """Append a line in one write, on a line of its own also after one that was cut off.

    Several processes may append to one file: none ever rewrites what another has written.
    """
    text = (json.dumps(line, separators=(",", ":")) + "\n").encode()
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            text = b"\n" + text
        file.write(text)
