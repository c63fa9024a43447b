"""`ppow compare`: recipes of training against each other, from one supervised checkpoint, on equal terms.

Every recipe gets the same budget (target-forward tokens, or seconds), the same learning rates to choose from on the
validation split, the same seeds; the test split is read once, when everything is chosen. One run is one line of
`results.jsonl`, written when it is done: a comparison that was interrupted goes on where it stopped. Knows what to run
and in which order; the texts are prepared in compare_data.py, what a drafter is worth is measured in
compare_evaluation.py, what came out is said in compare_report.py.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from .compare_data import SPLITS, longest_sequence, prepare, training_text, write_whole
from .compare_evaluation import EvaluationTexts, evaluate_drafter, mean_gain, target_entropy
from .data import SequenceDataset
from .modeling_ppow import PPOWDrafter
from .provenance import describe, public_name, shortened
from .tiny.recipe import TargetRecipe, bfloat16_pays, recipe_of
from .training import PPOWTrainingArguments
from .training.budget import Budget, BudgetTrainer
from .training.objectives import parse_objective
from .training.optimizers import make_optimizer

CONFIGS = {name: Path(__file__).with_name(f"compare_{name}.yaml") for name in ("default", "100m")}
RESULTS = "results.jsonl"
START = "start.json"  # what is known of the start, for the report


@dataclass
class CompareConfig:
    """What is compared, read from a YAML file ([`load_config`]).

    Args:
        target (`str` or `dict`): the target: a folder, a name on the Hub, or an embedded model; or, as a dict, what is
            trained first, in a folder within the comparison's: fields of [`~ppow_hf.tiny.recipe.TargetRecipe`]
            (`hidden_size`, by which heads and feed-forward layers grow, `num_layers`, `max_steps`, ...), and `texts`,
            a file of rows with `FILE:COLUMN,COLUMN`, in place of the source of the standard library.
        architecture (`str`): of the drafter that is trained.
        drafter (`str`, *optional*): a supervised drafter to start from, in place of training one.
        drafter_config (`dict`): fields of the drafter that is trained, as [`PPOWDrafter.from_target`] takes them; a
            standalone one is made as small here as wanted (`hidden_size`, `num_hidden_layers`, ...).
        workload (`dict`): `name`, and either nothing else for `stdlib` (excerpts of the standard library, modules held
            in for training and held out for evaluation) or `train` and `evaluation`, files of prompts.
        data (`dict`): `train_sequences`, `prompt_tokens`, `completion_tokens`, `validation_prompts`, `test_prompts`.
        start (`dict`): `seconds`, `learning_rate` and training arguments of the supervised start; not with `drafter`.
        budgets (`dict`): `tokens` (target-forward tokens) and `seconds`, one or both.
        seeds (`list[int]`), learning_rates (`list[float]`): the first seed chooses among the rates, the others follow.
        training (`dict`): training arguments of every recipe.
        recipes (`dict[str, dict]`): training arguments of each; `learning_rates` there takes the place of the common.
            `regenerate_temperature` there says how the target writes that recipe's text; the others' is of T = 0.
            `later` there is a dict of arguments that take the place of the recipe's own once the share `from` of the
            budget is spent: `{from: 0.75, unroll_steps: 10}`. Only those that a step reads, as the terms along the
            text do, have an effect; the learning rate and what a batch is made of stay.
        baselines (`list[str]`), reference (`str`): recipes that a winner has to beat, and the one of the first column.
        select_by (`list[str]`): metrics whose mean gain over the start chooses a learning rate.
        groups, cost_ratios, tree_nodes, verification_cost: see [`~ppow_hf.compare_evaluation.evaluate_drafter`]; all
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


def load_config(path: str | Path | None, smoke: bool = False, recipes: list[str] | None = None) -> CompareConfig:
    """The configuration in a YAML file or of a name in `CONFIGS`, by default `"default"`; `smoke` makes it all small.

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
    if smoke:
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
    if not config.budgets or set(config.budgets) - {"tokens", "seconds"} or min(config.budgets.values()) <= 0:
        refuse(f"budgets: {config.budgets} given; give tokens, seconds or both, above 0.")
    if isinstance(config.target, dict):
        try:
            target_recipe(config.target)
        except ValueError as error:
            refuse(str(error))
    counts = ("train_sequences", "prompt_tokens", "completion_tokens", "validation_prompts", "test_prompts")
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
        parse_objective(recipe.get("objective", PPOWTrainingArguments.objective), 0.1, 1.0)
    counted = {f"group_t0_c{count}" for count in config.groups} | {f"speed_t0_{c:g}" for c in config.cost_ratios}
    counted |= {f"tree_t{t}_n{count}" for count in config.tree_nodes for t in (0, 1)}
    for name in config.select_by:
        if name not in counted and not name.startswith(("chain_t0_k", "chain_t1_k", "greedy_t1_k")):
            refuse(f"select_by: {name!r} is not measured; beside chains there are {sorted(counted)}.")
    if config.drafter is not None and config.drafter_config:
        refuse("drafter_config: it is of a drafter that is made; leave it out where drafter names one.")
    if config.drafter is None and not {"seconds", "learning_rate"} <= set(config.start):
        refuse("start: give seconds and learning_rate of the supervised start, or drafter to start from.")


# -- one run


def train(
    drafter: PPOWDrafter,
    target: Any,
    data: SequenceDataset,
    settings: Mapping[str, Any],
    budget: Budget,
    learning_rate: float,
    seed: int,
    folder: Path,
    max_length: int,
    keep_bytes: int,
) -> BudgetTrainer:
    """Train until the budget is spent; the learning rate falls to a twentieth over it, after ten steps of warm-up.

    `settings` are training arguments, with `later` as in [`CompareConfig`].
    """
    later = dict(settings.get("later", {}))
    share = later.pop("from", 1.0)
    own = {
        "output_dir": str(folder),
        "max_length": max_length,
        "cost_ratio": 0.12,
        "per_device_train_batch_size": 8,
        "adam_beta2": 0.95,
        "logging_steps": 5,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": target.device.type == "cpu",
        "bf16": bfloat16_pays(target.device.type),
        **{name: value for name, value in settings.items() if name != "later"},
        "max_steps": 10_000_000,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    args = PPOWTrainingArguments(**own)
    second = PPOWTrainingArguments(**{**own, **later})  # refused before any work, if it must be
    switch = _Switch(budget, share, {name: getattr(second, name) for name in later})
    set_seed(seed)
    if drafter.config.architecture == "eagle" and not args.train_embeddings:
        drafter.draft_model.embed_tokens.requires_grad_(False)
    optimizer = make_optimizer(drafter, args, args.muon)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * max(1 - budget.fraction, 0.05)
    )
    trainer = BudgetTrainer(
        budget, model=drafter, target_model=target, args=args, train_dataset=data, callbacks=[budget, switch],
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.target.keep_encodings(keep_bytes)
    trainer.train()
    return trainer


class _Switch(TrainerCallback):
    """Gives training arguments other values once a share of the budget is spent."""

    def __init__(self, budget: Budget, share: float, values: dict[str, Any]):
        self.budget, self.share, self.values = budget, share, values

    def on_step_begin(self, args, state, control, **kwargs):
        if self.budget.fraction >= self.share:
            for name, value in self.values.items():
                setattr(args, name, value)


# -- the comparison


def claim_folder(config: CompareConfig, folder: Path) -> None:
    """Write the configuration into `folder`, which belongs to one; recipes may be added, baselines, budgets and seeds.

    Raises `ValueError` naming what differs if the folder holds a comparison with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    mine = json.loads(json.dumps(vars(config)))
    # Where something lies on this machine is nobody else's.
    mine["drafter"] = public_name(mine["drafter"])
    if not isinstance(mine["target"], dict):
        mine["target"] = public_name(mine["target"])
    elif "texts" in mine["target"]:
        mine["target"]["texts"] = Path(mine["target"]["texts"]).name
    mine["workload"] = {
        name: value if name == "name" else Path(value).name for name, value in mine["workload"].items()
    }
    if path.is_file():
        before = json.loads(path.read_text())
        open_ended = ("recipes", "baselines", "budgets", "seeds")
        changed = [name for name in mine if name not in open_ended and before.get(name) != mine[name]]
        changed += [f"recipes.{name}" for name, recipe in mine["recipes"].items()
                    if before["recipes"].get(name, recipe) != recipe]  # fmt: skip
        if changed:
            raise ValueError(
                f"--output-dir: {folder.name!r} holds a comparison with other settings "
                f"({', '.join(changed)}). Pass another folder, or the configuration it was begun with."
            )
        mine["recipes"] = {**before["recipes"], **mine["recipes"]}
    path.write_text(json.dumps(mine, indent=1) + "\n")


class Comparison:
    """One comparison in one folder: data, the start, the runs, and the lines of what came out.

    Args:
        config ([`CompareConfig`]): what to compare.
        folder (`Path`): gets everything; the same folder again goes on.
        target, tokenizer: the loaded target and its tokenizer.
        start (`PPOWDrafter`, *optional*): the supervised drafter that the configuration names.
        command (`str`, *optional*): recorded in the provenance.
    """

    def __init__(
        self, config: CompareConfig, folder: Path, target: Any, tokenizer: Any, start: PPOWDrafter | None = None,
        command: str | None = None,
    ):  # fmt: skip
        self.config, self.folder, self.target, self.tokenizer = config, Path(folder), target, tokenizer
        self.given_start, self.command = start, command
        claim_folder(config, self.folder)
        self.max_length = longest_sequence(config)
        self.lines = read_results(self.folder / RESULTS)
        self.data: SequenceDataset
        self.texts: dict[str, EvaluationTexts] = {}

    def run(self) -> None:
        """Everything that is not done yet, then the report's files."""
        from .compare_report import write_report

        self.data, self.texts = prepare(self.config, self.folder, self.target, self.tokenizer)
        start = self._start()
        self._evaluate_once(start, {"recipe": "start", "seed": None, "budget": None, "learning_rate": None}, SPLITS[0])
        chosen: list[dict[str, Any]] = []
        for kind, amount in self.config.budgets.items():
            budget = {"kind": kind, "amount": amount}
            for recipe, settings in self.config.recipes.items():
                rates = settings.get("learning_rates", self.config.learning_rates)
                first = self.config.seeds[0]
                tried = [self._train_once(start, recipe, first, budget, float(rate)) for rate in rates]
                best = max(tried, key=self._gain)
                chosen.append(best)
                chosen += [
                    self._train_once(start, recipe, seed, budget, best["learning_rate"])
                    for seed in self.config.seeds[1:]
                ]
                self._forget([line for line in tried if line is not best])
        # The test split is read here for the first time, when nothing is left to choose.
        self._evaluate_once(start, {"recipe": "start", "seed": None, "budget": None, "learning_rate": None}, SPLITS[1])
        for line in chosen:
            self._test(line)
        write_report(self.folder)

    # -- the start

    def _start(self) -> PPOWDrafter:
        folder = self.folder / "start"
        if (folder / "config.json").is_file():
            return PPOWDrafter.from_pretrained(folder, dtype=torch.float32).to(self.target.device)
        curve: list[list[float]] = []
        if self.given_start is not None:
            drafter = self.given_start.float()
        else:
            set_seed(0)
            name = self.config.target_name
            drafter = PPOWDrafter.from_target(
                self.target, self.config.architecture, target_name_or_path=name, **self.config.drafter_config
            ).float()
            drafter = drafter.to(self.target.device)
            settings = dict(self.config.start)
            seconds, rate = settings.pop("seconds"), float(settings.pop("learning_rate"))
            common = {name: value for name, value in self.config.training.items() if name != "objective"}
            # Twice as many points: whether it reached its plateau is read off them.
            budget = Budget(
                "seconds", seconds, 2 * self.config.curve_points, lambda: self._point(drafter, budget, curve)
            )
            self._point(drafter, budget, curve)
            train(
                drafter, self.target, self.data, {"objective": "supervised", **common, **settings}, budget, rate,
                seed=0, folder=folder / "training", max_length=self.max_length, keep_bytes=self._keep_bytes,
            )  # fmt: skip
        summary = {
            "curve": curve,
            "plateau_gain": plateau_gain(curve),
            "drafter": public_name(self.config.drafter),
            "target_entropy": target_entropy(self.target, self.texts[SPLITS[0]]),
        }
        write_whole(self.folder / START, json.dumps(summary, indent=1) + "\n")
        drafter.save_pretrained(self.folder / "start.part")
        shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "start.part").rename(folder)
        return drafter

    @property
    def _keep_bytes(self) -> int:
        return int(self.config.keep_gib * 2**30)

    def _point(self, drafter: PPOWDrafter, budget: Budget, curve: list[list[float]]) -> None:
        """One point of a run's curve: target-forward tokens, seconds, acceptance length of the greedy chain."""
        found = evaluate_drafter(
            self.target, drafter, self.texts[SPLITS[0]].first(self.config.curve_prompts), groups=(), cost_ratios=()
        )
        longest = max((name for name in found["metrics"] if name.startswith("chain_t0")), key=lambda n: int(n[10:]))
        curve.append([budget.tokens, round(budget.seconds, 2), round(found["metrics"][longest], 4)])

    # -- runs

    def _train_once(
        self, start: PPOWDrafter, recipe: str, seed: int, budget: dict[str, Any], rate: float
    ) -> dict[str, Any]:
        """The validation line of a run: read from the results, or trained for and evaluated."""
        facts = {"recipe": recipe, "seed": seed, "budget": budget, "learning_rate": rate}
        done = self._line(facts, SPLITS[0])
        if done is not None:
            return done
        folder = self._run_folder(facts)
        drafter = PPOWDrafter.from_pretrained(self.folder / "start", dtype=torch.float32).to(self.target.device)
        settings = {k: v for k, v in self.config.recipes[recipe].items() if k != "learning_rates"}
        data = self.data
        if "regenerate_temperature" in settings:
            temperature = settings["regenerate_temperature"]
            data = training_text(self.config, self.folder, self.target, self.tokenizer, temperature=temperature)
        curve: list[list[float]] = []
        counter = Budget(
            budget["kind"], budget["amount"], self.config.curve_points, lambda: self._point(drafter, counter, curve)
        )
        trainer = train(
            drafter, self.target, data, {**self.config.training, **settings}, counter, rate, seed, folder,
            self.max_length, self._keep_bytes,
        )  # fmt: skip
        names = ("step", "loss", "kl", "text_kl", "reward/mean", "accepted_length", "entropy", "adaw")
        log = [{n: row[n] for n in names if n in row} for row in trainer.state.log_history if "loss" in row]
        training = {
            "target_forward_tokens": counter.tokens, "seconds": round(counter.seconds, 2),
            "steps": trainer.state.global_step, "curve": curve, "log": log, "settings": settings,
        }  # fmt: skip
        drafter.save_pretrained(folder)
        return self._evaluate_once(drafter, facts, SPLITS[0], training=training)

    def _test(self, line: dict[str, Any]) -> None:
        facts = {name: line[name] for name in ("recipe", "seed", "budget", "learning_rate")}
        if self._line(facts, SPLITS[1]) is None:
            drafter = PPOWDrafter.from_pretrained(self._run_folder(facts), dtype=torch.float32)
            self._evaluate_once(drafter.to(self.target.device), facts, SPLITS[1], fit=line["fit"])

    def _evaluate_once(
        self, drafter: PPOWDrafter, facts: dict[str, Any], split: str, training: dict | None = None, fit: Any = None
    ) -> dict[str, Any]:
        done = self._line(facts, split)
        if done is not None:
            return done
        if fit is None and split == SPLITS[1]:
            validation = self._line(facts, SPLITS[0])
            fit = None if validation is None else validation["fit"]
        groups, ratios, trees = self.config.groups, self.config.cost_ratios, self.config.tree_nodes
        if split == SPLITS[0]:  # what chooses, and the group that stands in the first table
            names, middle = self.config.select_by, groups[len(groups) // 2 : len(groups) // 2 + 1]
            groups = [count for count in groups if f"group_t0_c{count}" in names or count in middle]
            ratios = [ratio for ratio in ratios if f"speed_t0_{ratio:g}" in names]
            trees = [count for count in trees if {f"tree_t0_n{count}", f"tree_t1_n{count}"} & set(names)]
        found = evaluate_drafter(
            self.target, drafter, self.texts[split], groups, ratios, trees, self.config.slow_prompts,
            self.config.verification_cost, calibration=fit,
        )  # fmt: skip
        line = shortened({
            **facts,
            "target": self.config.target_name,
            "architecture": self.config.architecture,
            "workload": self.config.workload["name"],
            "split": split,
            **found,
            **({} if training is None else {"training": training}),
            "provenance": describe(self.target.device, self.command),
        })  # fmt: skip
        self.lines.append(line)
        with open(self.folder / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        shown = ", ".join(f"{name} {found['metrics'][name]:.3f}" for name in self.config.select_by)
        print(f"{_label(facts)} [{split}]: {shown}", flush=True)
        return line

    def _line(self, facts: dict[str, Any], split: str) -> dict[str, Any] | None:
        wanted = {**facts, "split": split}
        return next((x for x in self.lines if all(x.get(name) == value for name, value in wanted.items())), None)

    def _gain(self, line: dict[str, Any]) -> float:
        start = self._line({"recipe": "start"}, SPLITS[0])
        assert start is not None
        return mean_gain(line, start, self.config.select_by)

    def _run_folder(self, facts: dict[str, Any]) -> Path:
        return self.folder / "runs" / _label(facts)

    def _forget(self, lines: list[dict[str, Any]]) -> None:
        """Drop the weights of runs that were not chosen; their lines stay."""
        for line in lines:
            shutil.rmtree(self._run_folder(line), ignore_errors=True)


def _label(facts: Mapping[str, Any]) -> str:
    if facts["budget"] is None:
        return str(facts["recipe"])
    budget = facts["budget"]
    return f"{facts['recipe']}-{budget['kind']}{budget['amount']:g}-lr{facts['learning_rate']:g}-seed{facts['seed']}"


def plateau_gain(curve: list[list[float]]) -> float | None:
    """Relative gain over the last quarter of a curve's points; `None` without at least five of them."""
    if len(curve) < 5:
        return None
    return curve[-1][2] / curve[-1 - max(len(curve) // 4, 1)][2] - 1


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; a last line that was cut off by an interruption is dropped from the file."""
    if not path.is_file():
        return []
    lines, whole = [], []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
        whole.append(text)
    write_whole(path, "".join(text + "\n" for text in whole))
    return lines
