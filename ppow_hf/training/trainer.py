"""PPOWTrainer: transformers' Trainer for drafters, supervised or by window-level reinforcement learning (PPOW).

Reads top to bottom: what is set up, what a step does, what is evaluated, how a checkpoint is written so that it is
whole or not there. The mathematics is in losses.py, terms.py, rewards.py, rollout.py and window_sampling.py.
"""

import itertools
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
    rotate_checkpoints,
)
from transformers.utils import logging

from ..data.files import ensure_writable
from ..data.sequences import SequenceDataset, collate_sequences, padded_to
from ..data.targets import is_split
from ..measure.calibration import calibrate
from ..measure.costs import measure_costs
from ..measure.evaluation import decode, evaluation_metrics, report
from ..publish.hub import PushError, push_folder
from ..runtime.configuration_ppow import PPOWDrafterConfig, vocabulary_fingerprint
from ..runtime.modeling_ppow import PPOWDrafter, PPOWDrafterOutput
from .arguments import EVAL_PROMPTS, EVAL_SHARE, PPOWTrainingArguments
from .batch import Batch
from .batch_order import GroupedByLength, RepeatedBlocks
from .checkpoints import (
    STATE,
    check_complete,
    check_resumable,
    last_complete_checkpoint,
    seal_checkpoint,
)
from .checks import (
    check_batch,
    check_callbacks,
    check_confidence,
    check_evaluation,
    check_lengths,
    check_libraries,
    check_masks,
    check_noise,
    check_pair,
    check_prefixes,
    check_reach,
    check_recorded,
    check_schedule,
    check_supported,
    check_token_ids,
    is_placed,
    use_one_device,
)
from .curves import CurvesCallback
from .losses import text_objective, window_objective
from .objective import WINDOW_TERMS
from .optimizers import make_optimizer
from .preparation import evaluation_sequences, held_out_prompts, training_sequences
from .recorded_states import RecordedTarget, StateRecord, open_record
from .records import check_hub_strategy, write_records
from .rollout import Rollout, collect_rollout, text_can_verify
from .run_folder import (
    best_checkpoint,
    check_same_drafter,
    check_same_run,
    is_saved,
    lock_folder,
    run_record,
    stopped_early,
)
from .target import FrozenTarget, TrainingTarget

logger = logging.get_logger(__name__)

CALIBRATION_PROMPTS = 8  # held out, of several datasets in turn


def by_name(data: Any) -> dict[str, SequenceDataset]:
    """Evaluation data by name; a single dataset has none."""
    return data if isinstance(data, dict) else {"": data}


class PPOWTrainer(Trainer):
    """Trains a [`PPOWDrafter`] for a frozen target.

    A subclass of transformers' Trainer: accelerate, mixed precision, gradient accumulation, callbacks, `report_to` and
    `push_to_hub` work as there. On a CPU set the environment variable `ONEDNN_PRIMITIVE_CACHE_CAPACITY=32` before the
    first forward, as `ppow train` does: else kernels of past batches' shapes make the memory of a long run grow.
    Two things are stricter: a checkpoint appears whole or not at all, and all randomness
    of rollouts is keyed by (seed, step, example), the same on one process, on several, and after a resume.

    Args:
        model ([`PPOWDrafter`]): the drafter.
        target_model (`PreTrainedModel`): the target; frozen while the drafter trains, and given back as it was.
            Quantised, `device_map`-sharded, offloaded or PEFT-wrapped are fine; a tensor-parallel one (`tp_plan`) is
            given whole embeddings and a whole head on every process. With `target_states` it is needed to evaluate
            only.
        args ([`PPOWTrainingArguments`]): the arguments.
        train_dataset, eval_dataset: what [`prepare_sequences`] reads: a `datasets.Dataset`, a path to JSON Lines, or
            a [`SequenceDataset`]; of `eval_dataset` also several by name, as in Trainer. By default the target
            completes rows with a `prompt` or `messages`, see `regenerate`.
        processing_class (`PreTrainedTokenizerBase`): the target's tokenizer.
        callbacks, optimizers: as in Trainer.
        target_states (`str`, `list[str]` or [`StateRecord`], *optional*): folder of `ppow record`, or several, which
            hold the training data too. The target is then not asked, so that only terms along the text can be
            trained, and windows that the text verifies.
    """

    train_dataset: Any
    eval_dataset: Any
    control: Any
    optimizer: Any

    def __init__(
        self,
        model: PPOWDrafter,
        target_model: PreTrainedModel | None = None,
        args: PPOWTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        target_states: str | os.PathLike | Sequence[str | os.PathLike] | StateRecord | None = None,
        **kwargs,
    ):
        record = open_record(target_states)
        for target in [target_model] if record is None else [record.target, target_model]:
            if record is None or target is not None:
                check_pair(model, target, processing_class, args)
        assert args is not None
        check_supported(kwargs)
        check_evaluation(args, eval_dataset)
        check_libraries(args, model)
        check_schedule(args)
        check_callbacks(args, callbacks or ())
        ensure_writable(args.output_dir, "output_dir")
        check_hub_strategy(args)
        use_one_device(args)
        self.target_model: Any = target_model
        if target_model is not None and not is_placed(target_model):
            target_model.to(args.device)
        self._target_is_split = target_model is not None and args.world_size > 1 and is_split(target_model)
        check_confidence(model, args)
        self.target = self._choose_target(record, model, args, train_dataset)
        if processing_class is not None:
            model.config.target_vocabulary_fingerprint = vocabulary_fingerprint(processing_class)
        self._read_by_drafter: Any = target_model if record is None else record.target
        model.attach_target(self._read_by_drafter)
        model.train_embeddings(args.train_embeddings)
        check_noise(model, self._read_by_drafter, args)
        pad = 0 if processing_class is None else (processing_class.pad_token_id or 0)
        super().__init__(
            model=model,
            args=args,
            eval_dataset=self._evaluation_sequences(eval_dataset, processing_class, args),
            processing_class=processing_class,
            data_collator=partial(collate_sequences, pad_token_id=pad),
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        # The last of all that can fail, because the target may write texts for hours.
        self.train_dataset = self._training_sequences(record, train_dataset, model, processing_class, args)
        if self.is_fsdp_enabled:  # one unit: how often a layer is called differs from process to process
            model._no_split_modules = []
        # The loss is divided by what the whole global batch holds, here, not by Trainer.
        self.model_accepts_loss_kwargs = True
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # until the loop counts them
        self.cost_ratio: float | None = args.cost_ratio
        self.eval_prompts: int | None = args.eval_prompts  # by default chosen at the first evaluation of a training
        self._train_began = 0.0
        self._rollouts: dict[tuple[int, ...], Rollout] = {}  # by block of gradient steps and rows of the data
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._staging: str | None = None
        self._run_record: dict[str, Any] = {}
        self.already_finished = False  # whether the last call of train found its run at its end
        self.add_callback(CurvesCallback())

    def _choose_target(self, record: StateRecord | None, model, args, train_dataset) -> TrainingTarget:
        """What tells the target's states and logits in training, once nothing speaks against it."""
        if record is not None:
            check_recorded(record, model, args, train_dataset, has_target=self.target_model is not None)
            return RecordedTarget(record, model.config.target_layer_ids, args.device)
        target = FrozenTarget(self.target_model, model.config.target_layer_ids)
        check_reach(target, args)
        check_masks(target, args)
        return target

    def _training_sequences(self, record: StateRecord | None, train_dataset, model, tokenizer, args):
        """The record's sequences, or those of `train_dataset`, which the target may write; `None` without either."""
        if record is not None:
            sequences = record.sequences
        elif train_dataset is not None:
            sequences = training_sequences(train_dataset, self.target_model, tokenizer, args)
        else:
            return None
        check_token_ids(sequences, self.target.vocab_size)
        check_lengths(sequences, args, model.config.context_length)
        check_prefixes(sequences, model.draft_model.first_prefix)
        check_batch(sequences, args)
        return sequences

    def _evaluation_sequences(self, eval_dataset, tokenizer, args):
        """The prompts of `eval_dataset`, with a warning where there is no target to decode them with."""
        sequences = evaluation_sequences(eval_dataset, tokenizer, args)
        if self.target_model is None and sequences is not None:
            logger.warning(
                "eval_dataset: evaluation decodes with the target, and only its recorded states are given; it is "
                "skipped. Pass the target too, or measure the drafter afterwards."
            )
        return sequences

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.muon and self.optimizer_cls_and_kwargs is None:
            self.optimizer = make_optimizer(self.accelerator.unwrap_model(self.model), self.args, self.args.muon)
        return super().create_optimizer(*args, **kwargs)

    def _get_learning_rate(self) -> float:
        """What is logged: `learning_rate` as scheduled, not Muon's multiple of it, whose group comes first."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if group.get("kind") == "adamw"]
        return rates[0] if rates else super()._get_learning_rate()

    # -- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As Trainer's; `resume_from_checkpoint=True` takes the last complete checkpoint, or starts without one.

        A run that is finished is not trained further: its drafter is loaded, and `already_finished` is true.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset: None given; training needs data.")
        with lock_folder(self.args.output_dir) if self.args.should_save else nullcontext(), self.target.frozen():
            return self._train_alone(resume_from_checkpoint, **kwargs)

    def _train_alone(self, resume_from_checkpoint: str | bool | None, **kwargs):
        """[`train`], with no other training in the folder."""
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_complete_checkpoint(self.args.output_dir)
        elif checkpoint is not None:
            check_complete(checkpoint)
        self.already_finished = False
        self.eval_prompts = self.args.eval_prompts
        self._run_record = run_record(self.args, self.train_dataset.fingerprint, self.target_model)
        result = None if checkpoint is None else self._take_over(Path(checkpoint))
        if self.already_finished:
            return result
        self.accelerator.unwrap_model(self.model).config.max_window = self.args.max_window
        if result is None:
            self._measure_cost_ratio()
            self._train_began = time.perf_counter()
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        calibrates = self.args.calibrate_at_end and self.target_model is not None
        if calibrates and self.eval_dataset is not None:
            if self.accelerator.is_main_process or self._in_step:
                self._with_whole_drafter(self._calibrate)
            self.accelerator.wait_for_everyone()
        return result

    def _inner_training_loop(self, *args, **kwargs):
        """As Trainer's, which with `auto_find_batch_size` begins again with smaller batches where memory runs out."""
        self._rollouts.clear()
        self._metrics.clear()
        return super()._inner_training_loop(*args, **kwargs)

    @property
    def _in_step(self) -> bool:
        """Whether all processes do, with the same inputs, what else one would: a target or a drafter is in parts."""
        return self.args.world_size > 1 and (self._target_is_split or self.is_fsdp_enabled)

    def _with_whole_drafter(self, function: Callable[[PPOWDrafter], Any]) -> Any:
        """`function(drafter)`, with a sharded drafter's parameters put together: inside its forward."""
        if self.is_fsdp_enabled:
            with torch.no_grad():
                return self.model_wrapped(inside=function)
        return function(self.accelerator.unwrap_model(self.model).to(self.args.device))

    def _calibrate(self, drafter: PPOWDrafter) -> None:
        parts = [self._eval_prompts(data) for data in by_name(self.eval_dataset).values()]
        in_turn = [prompt for row in itertools.zip_longest(*parts) for prompt in row if prompt is not None]
        drafter.config.calibration = calibrate(
            self.target_model, drafter, in_turn[:CALIBRATION_PROMPTS], self.args.eval_new_tokens, seed=self.args.seed
        )

    def _take_over(self, checkpoint: Path) -> TrainOutput | None:
        """What a resume takes from a checkpoint beside what Trainer loads; the outcome, where its run is over.

        Raises `ValueError` where the checkpoint is of another run, or cannot be gone on with.
        """
        check_same_run(checkpoint, self._run_record)
        trained = PPOWDrafterConfig.from_pretrained(checkpoint)
        config = self.accelerator.unwrap_model(self.model).config
        check_same_drafter(checkpoint, trained, config)
        # The checkpoint's weights go with its scales; those of a drafter made anew were measured again.
        config.state_scales = trained.state_scales
        stored = json.loads((checkpoint / STATE).read_text())
        if self.args.cost_ratio is None:
            self.cost_ratio = stored["cost_ratio"]
        if self.args.eval_prompts is None:
            self.eval_prompts = stored.get("eval_prompts")
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        by_epochs = self.args.max_steps <= 0
        left = state.epoch < self.args.num_train_epochs if by_epochs else state.global_step < self.args.max_steps
        if left and not stopped_early(state, self.callback_handler.callbacks):
            check_resumable(checkpoint)
            return None
        return self._load_finished(checkpoint, state, left)

    def _load_finished(self, checkpoint: Path, state: TrainerState, left: bool) -> TrainOutput:
        """Load the drafter of a run whose last step was taken, from `output_dir` if it was saved; `left`: of a run
        that was stopped early."""
        self.state = state
        self.already_finished = is_saved(self.args.output_dir, state.global_step)
        found = PPOWDrafter.from_pretrained(
            self.args.output_dir if self.already_finished else best_checkpoint(state, str(checkpoint), self.args)
        )
        drafter = self.accelerator.unwrap_model(self.model)
        drafter.load_state_dict(found.state_dict())
        if self.already_finished:
            drafter.config.calibration, drafter.config.max_window = found.config.calibration, found.config.max_window
            longer = "early_stopping_patience" if left else "max_steps or num_train_epochs"
            logger.warning(
                f"The training in {self.args.output_dir} is finished: {state.global_step} steps were taken, and "
                f"nothing is changed. Raise {longer} to go on, or train in another folder."
            )
        losses = [row["train_loss"] for row in state.log_history if "train_loss" in row]
        return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {})

    def _measure_cost_ratio(self) -> None:
        """gamma, measured on the main process unless given or resumed, and the same on all; rewards alone ask for it.

        Without a target it stays unknown, and `check_recorded` has seen to it that no reward asks for it.
        """
        if self.args.uses_rollouts and self.cost_ratio is None and self.target_model is not None:
            measured = [None]
            if self.accelerator.is_main_process or self._in_step:
                ids = self.train_dataset[0]["input_ids"][None, :64].to(self.args.device)
                drafter = self.accelerator.unwrap_model(self.model).to(self.args.device)
                costs = measure_costs(self.target_model, drafter, ids, max_window=self.args.max_window, repeats=10)
                measured = [costs.cost_ratio]
            self.cost_ratio = broadcast_object_list(measured)[0]

    def _get_train_sampler(self, *args, **kwargs):
        batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == "group_by_length":
            sampler = GroupedByLength(self.train_dataset.lengths, batch, seed)
        else:
            sampler = super()._get_train_sampler(*args, **kwargs)
        if not self.args.uses_rollouts or self.args.num_iterations == 1:
            return sampler
        return RepeatedBlocks(sampler, batch, self.args.num_iterations, seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss for a batch of `collate_sequences`, normalised over the global batch."""
        # Autocast for rollouts and the target too, which do not pass through the model's forward.
        with self.target.frozen(), self.accelerator.autocast():
            loss = self._global_loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"model: the loss is {loss.item()} at step {self.state.global_step}, so the drafter's logits are no "
                "longer finite. Lower learning_rate, or check the dtype; the last checkpoint is untouched."
            )
        return (loss, PPOWDrafterOutput(loss=loss)) if return_outputs else loss

    def _global_loss(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        args, drafter = self.args, self.accelerator.unwrap_model(model)
        drafter.attach_target(self._read_by_drafter)  # evaluation attached the target that it decoded with
        if self.target.is_tensor_parallel:
            inputs = padded_to(inputs, self._longest_anywhere(inputs["input_ids"].shape[1]))
        weights = args.weights_at(self.progress)
        if drafter.config.confidence_head:  # moved by nothing else, and moving nothing else
            weights.setdefault("confidence", 1.0)
        drafts_windows = any(name in WINDOW_TERMS for name in weights)
        by_text = drafts_windows and self._verified_by_text(drafter, weights, inputs)
        with_cache = drafts_windows and not by_text  # for the target to read the windows after it
        encoding = self.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache, inputs["index"])
        batch = Batch(drafter, self.target, args, inputs, encoding, self.state.global_step)
        if drafts_windows:
            rollout = self._next_rollout(model, batch, by_text)
            loss, metrics = window_objective(model, batch, weights, rollout)
            accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss / (len(inputs["index"]) * args.world_size * accumulated)
        else:
            self._rollouts.clear()
            windows = args.text_windows_at(self.progress, drafter.config.architecture)
            loss, metrics = text_objective(model, batch, weights, *windows)
            learned = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / torch.as_tensor(learned).clamp_min(1)  # a batch may have nothing to learn
        self._note(metrics)
        return loss * args.world_size

    def _verified_by_text(self, drafter, weights, inputs) -> bool:
        """Whether the text verifies this batch's windows, on every process or on none.

        Of recorded states it verifies all: sequences that the target did not write at T = 0 then give no windows.
        """
        if not self.target.verifies:
            return True
        limits = drafter.draft_model.first_prefix, drafter.config.context_length
        by_text = text_can_verify(self.args, weights, inputs, *limits)
        if self.args.world_size > 1:  # a sharded target's forwards must not be one process's alone
            agreed = self.accelerator.gather(torch.tensor([by_text], device=self.args.device))
            by_text = bool(agreed.all())
        return by_text

    def _longest_anywhere(self, length: int) -> int:
        """The greatest `length` of all processes."""
        return int(self.accelerator.gather(torch.tensor([length], device=self.args.device)).max())

    def _note(self, metrics: dict[str, float]) -> None:
        """Keep a step's metrics for the next log."""
        if self.args.logging_strategy != IntervalStrategy.NO:
            for name, value in metrics.items():
                self._metrics[name].append(value)

    @property
    def progress(self) -> float:
        """Share of the training that is done, which decides when ADAW begins."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _next_rollout(self, model, batch: Batch, by_text: bool) -> Rollout:
        """This micro-batch's rollouts: new ones, or those kept for a further gradient step on the same sequences."""
        block, iteration = divmod(self.state.global_step, self.args.num_iterations)
        key = (block, *batch.inputs["index"].tolist())
        if iteration and key in self._rollouts:
            return self._rollouts[key]
        self._rollouts = {kept: rollout for kept, rollout in self._rollouts.items() if kept[0] == block}
        started, tokens_before = time.perf_counter(), self.target.forward_tokens
        adaptive = self.progress >= self.args.adaw_start
        assert self.cost_ratio is not None
        with torch.no_grad():  # what DDP looks at, to expect no backward pass
            rollout = model(inside=lambda _: collect_rollout(batch, self.cost_ratio, adaptive, by_text))
        self._rollouts[key] = rollout
        self._note(
            {
                "verified_tokens_per_second": rollout.draft_ids.numel() / (time.perf_counter() - started),
                "target_forward_tokens": self.target.forward_tokens - tokens_before,
                "adaw": float(adaptive),
                "verified_by_text": float(by_text),
            }
        )
        if bool(rollout.has_prefix.any()):
            self._note(rollout.metrics())
        return rollout

    # -- evaluation

    def _eval_prompts(self, data: SequenceDataset) -> list[list[int]]:
        count = EVAL_PROMPTS if self.eval_prompts is None else self.eval_prompts
        return held_out_prompts(data, count, self.args.eval_prompt_length)

    def _choose_eval_prompts(self, parts: dict[str, SequenceDataset]) -> None:
        """As many whole batches as decode within a tenth of the time that the training took so far, at least one.

        Chosen by the main process at a training's first evaluation and kept, so that all evaluations compare.
        """
        budget = EVAL_SHARE * (time.perf_counter() - self._train_began)
        batch = self.args.per_device_eval_batch_size
        chosen = [EVAL_PROMPTS]
        if self.accelerator.is_main_process or self._in_step:
            first = self._eval_prompts(next(iter(parts.values())))[:batch]
            started = time.perf_counter()
            self._decode(first)
            seconds = (time.perf_counter() - started) * len(parts)
            shares = 1 if self._target_is_split else self.args.world_size  # each process decodes one
            batches = int(budget / seconds) * shares
            chosen = [min(max(batches, 1) * batch, EVAL_PROMPTS)]
        self.eval_prompts = broadcast_object_list(chosen)[0]

    def _decode(self, prompts: list[list[int]]) -> tuple[list, list]:
        """Outputs and traces of held-out prompts, with the drafter as it is."""

        def decoded(drafter: PPOWDrafter) -> tuple[list, list]:
            return decode(
                self.target_model,
                drafter,
                prompts,
                self.args.eval_new_tokens,
                self.args.target_temperature,
                self.args.seed,
                batch_size=self.args.per_device_eval_batch_size,
                window="fixed",
                max_window=self.args.max_window,
            )

        return self._with_whole_drafter(decoded)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Acceptance by real decoding of held-out prompts, with the code that `generate` runs; windows of max_window.

        Metrics (with the prefix): `acceptance_length`, `tokens_per_target_forward`, `wasted`, `kl`, `repeated_8grams`;
        of several datasets those of all their prompts, and each one's own (`eval_NAME_acceptance_length`).
        `eval_prompts` prompts are taken of each, by default as many as a tenth of the training's time allows.
        `eval_dataset` is for this call: data, or the name of one of the trainer's own.
        """
        if self.target_model is None:
            if self.is_in_train:
                return {}
            raise ValueError("target_model: None given; evaluation decodes with the target.")
        given: Any = self.eval_dataset
        if isinstance(eval_dataset, str) and isinstance(given, dict) and eval_dataset in given:
            given = given[eval_dataset]
        elif eval_dataset is not None:
            given = evaluation_sequences(eval_dataset, self.processing_class, self.args)
        if given is None:
            raise ValueError("eval_dataset: None given; evaluation decodes prompts taken from it.")
        return self._evaluate_parts(by_name(given), metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """The metrics of [`evaluate`] on `test_dataset`; a drafter predicts no labels."""
        metrics = self.evaluate(test_dataset, ignore_keys, metric_key_prefix)
        return PredictionOutput(predictions=None, label_ids=None, metrics=metrics)  # type: ignore[arg-type]

    def _evaluate_parts(self, parts: dict[str, SequenceDataset], prefix: str) -> dict[str, float]:
        started = time.perf_counter()
        rank, world = (0, 1) if self._target_is_split else (self.args.process_index, self.args.world_size)
        if self.eval_prompts is None and self.is_in_train and self.state.global_step > 0:
            self._choose_eval_prompts(parts)
        metrics: dict[str, float] = {}
        all_outputs: list = []
        all_traces: list = []
        for name, data in parts.items():
            outputs, traces = self._decode(self._eval_prompts(data)[rank::world])
            if world > 1:
                outputs, traces = gather_object(outputs), gather_object(traces)
            if name:
                metrics |= evaluation_metrics(report(outputs, traces), f"{prefix}_{name}")
            all_outputs += outputs
            all_traces += traces
        metrics |= evaluation_metrics(report(all_outputs, all_traces), prefix)
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means of the step metrics since the last log, over all processes."""
        if "loss" in logs and self._metrics:
            local = {name: (sum(values), len(values)) for name, values in self._metrics.items()}
            parts = gather_object([local]) if self.args.world_size > 1 else [local]
            for name in dict.fromkeys(name for part in parts for name in part):
                total = sum(part.get(name, (0.0, 0))[0] for part in parts)
                count = sum(part.get(name, (0.0, 0))[1] for part in parts)
                logs[name] = total / max(count, 1)
            self._metrics.clear()
        super().log(logs, *args, **kwargs)

    # -- records and the Hub

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer's, with arguments, log and provenance beside it as JSON in place of the pickled arguments."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_records(self, output_dir or self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options,
    ):
        """Save, and push `output_dir` as [`push_folder`] does; `options` are its own."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options |= {"token": token, "revision": revision, "private": private}
        return self._push(self.args.output_dir, commit_message or "End of training", blocking, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the drafter of a checkpoint; a push that fails is logged and does not end the training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except PushError as error:
            logger.warning(str(error))

    def _push(self, folder: str, commit_message: str, blocking: bool = True, **options):
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        args, given = self.args, {option: value for option, value in options.items() if value is not None}
        ours = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo}
        push = push_folder if blocking else partial(HfApi().run_as_future, push_folder)
        return push(folder, name, commit_message=commit_message, **ours | given)

    # -- checkpoints

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint beside its place and rename it: resume never takes half of one that a kill left."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / ".staging" / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / ".staging", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(run_dir / ".staging")
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        moved = self.state.best_model_checkpoint == str(staged)
        if moved:  # on every process: each loads the best one at the end
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            if moved:
                self.state.save_to_json(str(staged / "trainer_state.json"))
            state = {"cost_ratio": self.cost_ratio, "eval_prompts": self.eval_prompts, "run": self._run_record}
            (staged / STATE).write_text(json.dumps(state, indent=1))
            seal_checkpoint(staged, final)
            shutil.rmtree(run_dir / ".staging", ignore_errors=True)
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
