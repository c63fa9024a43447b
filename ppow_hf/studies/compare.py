"""`ppow compare`: recipes of training against each other, from one supervised checkpoint, on equal terms.

Every recipe gets the same budget (target-forward tokens, or time), the same learning rates to choose from on the
validation split, the same seeds; the test split is read once, when everything is chosen. One run is one line of
`results.jsonl`, written when it is done: a comparison that was interrupted goes on with the last checkpoint of the run
that it was in. Knows what to run and in which order; the texts are prepared in texts.py, what a drafter is worth is
measured in evaluation.py, what came out is said in report.py.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainerCallback, TrainerState, set_seed

from ..data.files import write_whole
from ..data.sequences import SequenceDataset
from ..measure.costs import bfloat16_pays
from ..measure.provenance import describe, public_name, shortened
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.target_weights import target_width
from ..training.budget import Budget, BudgetTrainer
from ..training.recorded_states import StateRecord
from .configuration import (
    RESULTS,
    START,
    START_UNITS,
    CompareConfig,
    append_result,
    named,
    read_results,
    run_arguments,
)
from .evaluation import EvaluationTexts, chain_names, evaluate_drafter, gain_over_start, longest_window, target_entropy
from .report import write_report
from .texts import SPLITS, evaluation_texts, training_text

START_FACTS: dict[str, Any] = {"recipe": "start", "seed": None, "budget": None, "learning_rate": None}
TRAINING = "training"  # in the folder of the start or of a run, until it is done

# -- one run


def make_trainer(
    drafter: PPOWDrafter,
    target: Any,
    data: SequenceDataset | StateRecord,
    settings: Mapping[str, Any],
    budget: Budget,
    learning_rate: float,
    seed: int,
    folder: Path,
    max_length: int,
    keep_bytes: int = 0,
) -> BudgetTrainer:
    """The trainer of a run.

    `data` are sequences for the target to read, or recorded states; `settings` as of [`run_arguments`].
    """
    args, later, share = run_arguments(
        settings, learning_rate, max_length, seed=seed, output_dir=str(folder), max_window=drafter.config.max_window,
        use_cpu=target.device.type == "cpu", bf16=bfloat16_pays(target.device.type),
    )  # fmt: skip
    set_seed(seed)
    record = data if isinstance(data, StateRecord) else None
    trainer = BudgetTrainer(
        budget, model=drafter, target_model=target, args=args, train_dataset=None if record else data,
        target_states=record, callbacks=[_Switch(budget, share, later)],
    )  # fmt: skip
    trainer.target.keep_encodings(keep_bytes)
    return trainer


class _Switch(TrainerCallback):
    """Gives training arguments other values once a share of the budget is spent."""

    def __init__(self, budget: Budget, share: float, values: dict[str, Any]):
        self.budget, self.share, self.values = budget, share, values

    def on_step_begin(self, args, state, control, **kwargs):
        if self.budget.fraction >= self.share:
            for name, value in self.values.items():
                setattr(args, name, value)


def new_drafter(config: CompareConfig, target: Any, token_counts: torch.Tensor) -> PPOWDrafter:
    """An untrained drafter; a reduced vocabulary has the most frequent tokens, by `token_counts` `[vocab_size]`."""
    set_seed(0)
    drafter = PPOWDrafter.from_target(
        target, config.architecture, target_name_or_path=config.target_name, token_counts=token_counts,
        **config.drafter_config,
    )  # fmt: skip
    return drafter.float().to(target.device)


def rehearse(
    config: CompareConfig, target: Any, record: StateRecord | None = None, start: PPOWDrafter | None = None
) -> None:
    """Make the drafter and every run's trainer, without the texts: what would be refused is refused before any work.

    `target` may be one that is not trained yet. Raises `ValueError` that names the key.
    """
    runs = {f"recipes.{name}: ": config.recipe_settings(name) for name in config.recipes}
    if start is None:
        runs = {"start: ": config.start_settings} | runs
        with named("drafter_config: ", TypeError, StrictDataclassError):
            drafter = new_drafter(config, target, torch.ones(target_width(target)))
    else:
        drafter = copy.deepcopy(start)
    chains = chain_names(longest_window(drafter))
    for name in config.select_by:
        if name.startswith(("chain", "greedy")) and name not in chains:
            raise ValueError(f"select_by: {name!r} is not measured of this drafter; of its chains there are {chains}.")
    count, max_length = config.data.get("train_sequences", 0), config.longest_sequence
    data: SequenceDataset | StateRecord = SequenceDataset([[0] * 4] * count, [[True] * 4] * count)
    if record is not None:
        data, max_length = record, max(max_length, record.max_length)
    with tempfile.TemporaryDirectory() as folder:
        for place, settings in runs.items():
            with named(place):
                budget = Budget("tokens", 1)
                trainer = make_trainer(drafter, target, data, settings, budget, 1e-3, 0, Path(folder), max_length)
                trainer.create_optimizer()


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
    mine["target_states"] = mine["target_states"] and [public_name(name) for name in mine["target_states"]]
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
    write_whole(path, json.dumps(mine, indent=1) + "\n")


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
        self.max_length = config.longest_sequence
        self.lines = read_results(self.folder / RESULTS)
        self.data: SequenceDataset | StateRecord
        self.texts: dict[str, EvaluationTexts] = {}

    def run(self) -> None:
        """Everything that is not done yet, then the report's files."""
        if self.config.target_states is not None:
            self.data = StateRecord(*self.config.target_states)
            self.max_length = max(self.max_length, self.data.max_length)
        else:
            self.data = training_text(self.config, self.folder, self.target, self.tokenizer)
        self.texts = evaluation_texts(self.config, self.folder, self.target, self.tokenizer)
        start = self._start()
        self._evaluate_once(start, START_FACTS, SPLITS[0])
        chosen: list[dict[str, Any]] = []
        for kind, amount in self.config.budgets.items():
            budget = {"kind": kind, "amount": amount}
            for recipe in self.config.recipes:
                rates, first = self.config.learning_rates_of(recipe), self.config.seeds[0]
                tried = [self._train_once(start, recipe, first, budget, float(rate)) for rate in rates]
                best = max(tried, key=self._gain)
                chosen.append(best)
                chosen += [
                    self._train_once(start, recipe, seed, budget, best["learning_rate"])
                    for seed in self.config.seeds[1:]
                ]
                self._forget([line for line in tried if line is not best])
        # The test split is read here for the first time, when nothing is left to choose.
        self._evaluate_once(start, START_FACTS, SPLITS[1])
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
            sequences = self.data.sequences if isinstance(self.data, StateRecord) else self.data
            drafter = new_drafter(self.config, self.target, sequences.count_tokens(target_width(self.target)))
            given = self.config.start
            kind = next(kind for kind in START_UNITS if kind in given)
            untrained, window = [0, 0.0, self._point(drafter)["acceptance_length"]], drafter.config.max_window
            # Twice as many points: whether it reached its plateau is read off them.
            budget = Budget(kind, given[kind], 2 * self.config.curve_points, lambda: self._point(drafter))
            trainer = self._train(
                drafter, self.data, self.config.start_settings, budget, float(given["learning_rate"]), 0, folder
            )
            drafter.config.max_window = window  # that of the start's training is not every recipe's
            curve = [untrained, *curve_of(trainer.state)]
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

    def _point(self, drafter: PPOWDrafter) -> dict[str, float]:
        """One point of a run's curve: the acceptance length of the longest greedy chain."""
        found = evaluate_drafter(
            self.target, drafter, self.texts[SPLITS[0]].first(self.config.curve_prompts), groups=(), cost_ratios=()
        )
        longest = max((name for name in found["metrics"] if name.startswith("chain_t0")), key=lambda n: int(n[10:]))
        return {"acceptance_length": round(found["metrics"][longest], 4)}

    def _train(
        self, drafter: PPOWDrafter, data: SequenceDataset | StateRecord, settings: Mapping[str, Any], budget: Budget,
        rate: float, seed: int, folder: Path,
    ) -> BudgetTrainer:  # fmt: skip
        """Train `drafter`, from the last checkpoint in `folder / TRAINING` where an interruption left one.

        A checkpoint that was trained otherwise, by another version or in another number format, is dropped.
        """
        trainer = make_trainer(
            drafter, self.target, data, settings, budget, rate, seed, folder / TRAINING, self.max_length,
            int(self.config.keep_gib * 2**30),
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=True)
        except ValueError as error:
            if not str(error).startswith("resume_from_checkpoint: "):
                raise
            print(f"{folder.name}: begun anew, since its checkpoint cannot be gone on with ({error})", flush=True)
            for checkpoint in (folder / TRAINING).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            trainer.train()
        return trainer

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
        settings = self.config.own_settings(recipe)
        data = self.data
        if "regenerate_temperature" in settings:
            temperature = settings["regenerate_temperature"]
            data = training_text(self.config, self.folder, self.target, self.tokenizer, temperature=temperature)
        counter = Budget(budget["kind"], budget["amount"], self.config.curve_points, lambda: self._point(drafter))
        interrupted = (folder / TRAINING).is_dir()
        trainer = self._train(drafter, data, self.config.recipe_settings(recipe), counter, rate, seed, folder)
        names = ("step", "loss", "kl", "text_kl", "reward/mean", "accepted_length", "entropy", "adaw")
        log = [{n: row[n] for n in names if n in row} for row in trainer.state.log_history if "loss" in row]
        training = {
            "target_forward_tokens": counter.tokens, "seconds": round(counter.seconds, 2),
            "steps": trainer.state.global_step, "curve": curve_of(trainer.state), "log": log, "settings": settings,
        }  # fmt: skip
        if interrupted:  # of seconds it had fewer: the target read texts again that it had kept in memory
            training["interrupted"] = True
        drafter.save_pretrained(folder)
        line = self._evaluate_once(drafter, facts, SPLITS[0], training=training)
        shutil.rmtree(folder / TRAINING, ignore_errors=True)
        return line

    def _test(self, line: dict[str, Any]) -> None:
        facts = {name: line[name] for name in ("recipe", "seed", "budget", "learning_rate")}
        if self._line(facts, SPLITS[1]) is None:
            drafter = PPOWDrafter.from_pretrained(self._run_folder(facts), dtype=torch.float32)
            self._evaluate_once(drafter.to(self.target.device), facts, SPLITS[1])

    def _evaluate_once(
        self, drafter: PPOWDrafter, facts: dict[str, Any], split: str, training: dict | None = None
    ) -> dict[str, Any]:
        done = self._line(facts, split)
        if done is not None:
            return done
        validation = self._line(facts, SPLITS[0])  # whose fit the test split takes
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
        append_result(self.folder / RESULTS, line)
        shown = ", ".join(f"{name} {found['metrics'][name]:.3f}" for name in self.config.select_by)
        print(f"{_label(facts)} [{split}]: {shown}", flush=True)
        return line

    def _line(self, facts: dict[str, Any], split: str) -> dict[str, Any] | None:
        wanted = {**facts, "split": split}
        return next((x for x in self.lines if all(x.get(name) == value for name, value in wanted.items())), None)

    def _gain(self, line: dict[str, Any]) -> float:
        start = self._line({"recipe": "start"}, SPLITS[0])
        assert start is not None
        return gain_over_start(line, start, self.config.select_by)

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


def curve_of(state: TrainerState) -> list[list[float]]:
    """Target-forward tokens, seconds and acceptance length at each point of a run's budget."""
    return [
        [row["spent_tokens"], round(row["spent_seconds"], 2), row["acceptance_length"]]
        for row in state.log_history
        if "spent_tokens" in row
    ]


def plateau_gain(curve: list[list[float]]) -> float | None:
    """Relative gain over the last quarter of a curve's points; `None` without at least five of them."""
    if len(curve) < 5:
        return None
    return curve[-1][2] / curve[-1 - max(len(curve) // 4, 1)][2] - 1
