"""What a comparison trains and measures: read from YAML, checked before anything is computed."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..measure.provenance import public_name
from ..tiny.recipe import TargetRecipe, recipe_of
from ..training import PPOWTrainingArguments
from ..training.objectives import parse_objective

CONFIGS = {name: Path(__file__).with_name(f"compare_{name}.yaml") for name in ("default", "100m", "smollm2")}

RESULTS = "results.jsonl"

BUDGET_UNITS = {"tokens": "target-forward tokens", "seconds": "seconds", "core_seconds": "seconds of a core"}

START_UNITS = ("seconds", "core_seconds")

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
    _check(config, path.name)
    return config


def _check(config: CompareConfig, source: str) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"--config: in {source}, {what}")

    if not config.recipes or not config.seeds or not config.learning_rates:
        refuse("recipes, seeds and learning_rates must each have something in them.")
    if not config.budgets or set(config.budgets) - set(BUDGET_UNITS) or min(config.budgets.values()) <= 0:
        refuse(f"budgets: {config.budgets} given; give one or several of {', '.join(BUDGET_UNITS)}, above 0.")
    if isinstance(config.target, dict):
        try:
            target_recipe(config.target)
        except ValueError as error:
            refuse(str(error))
    counts = ["prompt_tokens", "completion_tokens", "validation_prompts", "test_prompts"]
    if config.target_states is None:
        counts.append("train_sequences")
    for name in counts:
        if not isinstance(config.data.get(name), int) or config.data[name] < 1:
            refuse(f"data: {name} is {config.data.get(name)!r}; a whole number of at least 1 is needed.")
    own = {f.name for f in fields(PPOWTrainingArguments)}
    for name, recipe in config.recipes.items():
        later = recipe.get("later", {"from": 0.5})
        if not isinstance(later, dict) or not isinstance(later.get("from"), int | float):
            refuse(f"recipes: later of {name} is {later}; give settings and from, a share: {{from: 0.5, ...}}.")
        unknown = sorted((set(recipe) - own - {"learning_rates", "later"}) | (set(later) - own - {"from"}))
        if unknown:
            refuse(f"recipes: {name} has {unknown}, which are no training arguments.")
        if not 0 < later["from"] < 1:
            refuse(f"recipes: later of {name} begins from {later['from']}; give a share between 0 and 1.")
        if config.target_states is not None and "regenerate_temperature" in recipe:
            refuse(f"recipes: {name} has regenerate_temperature; with target_states the texts are written. Drop it.")
        parse_objective(recipe.get("objective", PPOWTrainingArguments.objective), 0.1, 1.0)
    counted = {f"group_t0_c{count}" for count in config.groups} | {f"speed_t0_{c:g}" for c in config.cost_ratios}
    counted |= {f"tree_t{t}_n{count}" for count in config.tree_nodes for t in (0, 1)}
    for name in config.select_by:
        if name not in counted and not name.startswith(("chain_t0_k", "chain_t1_k", "greedy_t1_k")):
            refuse(f"select_by: {name!r} is not measured; beside chains there are {sorted(counted)}.")
    if config.drafter is not None and config.drafter_config:
        refuse("drafter_config: it is of a drafter that is made; leave it out where drafter names one.")
    if config.drafter is None:
        units = [unit for unit in START_UNITS if unit in config.start]
        if len(units) != 1 or "learning_rate" not in config.start:
            refuse(
                f"start: {config.start} given; give one of {' and '.join(START_UNITS)}, and learning_rate, of the "
                "supervised start, or drafter to start from."
            )


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
    """Append a line in one write, on a line of its own also behind one that was cut off.

    Several processes may append to one file: none ever rewrites what another has written.
    """
    text = (json.dumps(line, separators=(",", ":")) + "\n").encode()
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            text = b"\n" + text
        file.write(text)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that an interruption leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
