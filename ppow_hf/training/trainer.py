"""PPOWTrainer: transformers' Trainer for drafters, supervised or by window-level reinforcement learning (PPOW).

Reads top to bottom: what is set up, what a step does, what is evaluated, how a checkpoint is written so that it is
whole or not there. The mathematics is in objectives.py, rewards.py, rollout.py and window_sampling.py.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..benchmark import measure_costs
from ..configuration_ppow import vocabulary_fingerprint
from ..data import SequenceDataset, collate_sequences, prepare_sequences, regenerate
from ..evaluation import AcceptanceReport, calibrate, decode, report
from ..modeling_ppow import PPOWDrafter, PPOWDrafterOutput, check_width
from ..plots import plot_curves
from .arguments import PPOWTrainingArguments
from .objectives import clipped_policy_loss, cross_entropy, forward_kl, sum_over_chunks
from .rewards import groups_without_spread
from .rollout import Rollout, collect_rollout
from .target import FrozenTarget, TargetEncoding

MANIFEST = "complete.json"
STATE = "ppow_state.json"


class PPOWTrainer(Trainer):
    """Trains a [`PPOWDrafter`] for a frozen target.

    A subclass of transformers' Trainer: accelerate, mixed precision, gradient accumulation, callbacks, `report_to` and
    `push_to_hub` work as there. Two things are stricter: a checkpoint appears whole or not at all, and all randomness
    of rollouts is keyed by (seed, step, example), the same on one process, on several, and after a resume.

    Args:
        model ([`PPOWDrafter`]): the drafter.
        target_model (`PreTrainedModel`): the target; frozen. Quantised, `device_map`-sharded or PEFT-wrapped are fine.
        args ([`PPOWTrainingArguments`]): the arguments.
        train_dataset, eval_dataset: what [`~ppow_hf.data.prepare_sequences`] reads: a `datasets.Dataset`, a path to
            JSON Lines, or a [`~ppow_hf.data.SequenceDataset`].
        processing_class (`PreTrainedTokenizerBase`): the target's tokenizer.
        callbacks, optimizers: as in Trainer.
    """

    train_dataset: Any
    eval_dataset: Any
    control: Any

    def __init__(
        self,
        model: PPOWDrafter,
        target_model: PreTrainedModel,
        args: PPOWTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        **kwargs,
    ):
        check_pair(model, target_model, processing_class)
        check_writable(args.output_dir)
        self.target_model = target_model
        if not hasattr(target_model, "hf_device_map") and not getattr(target_model, "is_quantized", False):
            target_model.to(args.device)
        self.target = FrozenTarget(target_model, model.config.target_layer_ids)
        if args.objective == "ppow" and (self.target.sliding_window or math.inf) < args.max_length + args.max_window:
            raise ValueError(
                f"max_length: the target attends to the last {self.target.sliding_window} tokens only, fewer than "
                f"max_length + max_window = {args.max_length + args.max_window}. Lower max_length."
            )
        if processing_class is not None:
            model.config.target_vocabulary_fingerprint = vocabulary_fingerprint(processing_class)
        if model.config.architecture == "eagle" and not args.train_embeddings:
            model.draft_model.embed_tokens.requires_grad_(False)
        pad = 0 if processing_class is None else (processing_class.pad_token_id or 0)
        train_sequences = self._prepare(train_dataset, processing_class, args, "train_dataset")
        eval_sequences = self._prepare(eval_dataset, processing_class, args, "eval_dataset")
        if train_sequences is not None:
            check_lengths(train_sequences, args, model.config.context_length)
            batch = args.per_device_train_batch_size * args.world_size
            if args.objective == "ppow" and args.num_iterations > 1:  # such batches are repeated whole
                batch *= args.gradient_accumulation_steps
            if len(train_sequences) < batch:
                raise ValueError(
                    f"train_dataset: {len(train_sequences)} sequences of up to {args.max_length} tokens do not fill "
                    f"one batch of {batch}. Give more data, or lower max_length or per_device_train_batch_size."
                )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_sequences,
            eval_dataset=eval_sequences,
            processing_class=processing_class,
            data_collator=lambda items: collate_sequences(items, pad),
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        # The loss is divided by what the whole global batch holds, here, not by Trainer.
        self.model_accepts_loss_kwargs = True
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # until the loop counts them
        self.cost_ratio: float | None = args.cost_ratio
        self._rollouts: dict[int, Rollout] = {}
        self._micro_step = 0
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._staging: str | None = None
        self.add_callback(CurvesCallback())

    def _prepare(self, source, tokenizer, args, argument) -> SequenceDataset | None:
        if source is None or isinstance(source, SequenceDataset):
            if source is not None and len(source) == 0:
                raise ValueError(f"{argument}: it holds no sequences. Pass data.")
            return source
        if args.regenerate:
            return regenerate(
                source,
                self.target_model,
                tokenizer,
                max_length=args.max_length,
                max_new_tokens=args.max_new_tokens,
                temperature=args.regenerate_temperature,
                batch_size=args.regenerate_batch_size,
                seed=args.seed,
                argument=argument,
            )
        return prepare_sequences(source, tokenizer, args.max_length, packing=args.packing, argument=argument)

    # -- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As Trainer's; `resume_from_checkpoint=True` takes the last complete checkpoint, or starts without one."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: None given; training needs data.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            check_complete(resume_from_checkpoint)
        if resume_from_checkpoint and self.args.cost_ratio is None:
            self.cost_ratio = json.loads((Path(resume_from_checkpoint) / STATE).read_text())["cost_ratio"]
        by_steps = self.args.objective == "ppow" and self.args.save_strategy == "steps"
        if by_steps and self.args.num_iterations > 1 and self.args.save_steps % self.args.num_iterations:
            raise ValueError(
                f"save_steps: {self.args.save_steps} is no multiple of num_iterations={self.args.num_iterations}; a "
                "checkpoint between two gradient steps on the same rollouts could not be resumed exactly."
            )
        self._micro_step = 0
        self._rollouts.clear()
        self._metrics.clear()
        self._measure_cost_ratio()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.calibrate_at_end and self.eval_dataset is not None and self.args.eval_prompts > 0:
            if self.accelerator.is_main_process:
                drafter = self.accelerator.unwrap_model(self.model)
                drafter.config.max_window = self.args.max_window
                prompts = self._eval_prompts()[:8]
                drafter.config.calibration = calibrate(
                    self.target_model, drafter, prompts, self.args.eval_new_tokens, seed=self.args.seed
                )
            self.accelerator.wait_for_everyone()
        return result

    def _measure_cost_ratio(self) -> None:
        """gamma, measured on the main process unless given or resumed, and the same on all."""
        if self.cost_ratio is None:
            measured = [None]
            if self.accelerator.is_main_process:
                ids = self.train_dataset[0]["input_ids"][None, :64].to(self.args.device)
                drafter = self.accelerator.unwrap_model(self.model).to(self.args.device)
                costs = measure_costs(self.target_model, drafter, ids, max_window=self.args.max_window, repeats=10)
                measured = [costs.cost_ratio]
            self.cost_ratio = broadcast_object_list(measured)[0]

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if self.args.objective != "ppow" or self.args.num_iterations == 1:
            return sampler
        block = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedBlocks(sampler, block, self.args.num_iterations, seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss for a batch of `collate_sequences`, normalised over the global batch."""
        supervised = self.args.objective == "supervised"
        encoding = self.target.encode(inputs["input_ids"], inputs["attention_mask"], with_cache=not supervised)
        if supervised:
            loss = self._supervised_loss(model, inputs, encoding)
            items = num_items_in_batch
            if items is None:
                items = (inputs["labels"] != -100).sum()
            loss = loss / items
        else:
            loss = self._ppow_loss(model, inputs, encoding)
            loss = loss / (len(inputs["index"]) * self.args.world_size)
            if self.model.training:
                loss = loss / self.current_gradient_accumulation_steps
        loss = loss * self.args.world_size
        if not torch.isfinite(loss):
            raise ValueError(
                f"model: the loss is {loss.item()} at step {self.state.global_step}, so the drafter's logits are no "
                "longer finite. Lower learning_rate, or check the dtype; the last checkpoint is untouched."
            )
        return (loss, PPOWDrafterOutput(loss=loss)) if return_outputs else loss

    # -- supervised

    def _supervised_loss(self, model, inputs, encoding: TargetEncoding) -> torch.Tensor:
        """Sum over positions of ce_weight * -log Q(text) + kl_weight * KL(P||Q), averaged over unrolled steps."""
        input_ids, mask = inputs["input_ids"], inputs["loss_mask"]
        drafter = self.accelerator.unwrap_model(model)
        first = drafter.draft_model.first_prefix
        length = input_ids.shape[1]
        if drafter.config.architecture == "eagle" and self.args.unroll_steps > 1:
            prefixes = torch.arange(first, length - 1, device=input_ids.device).expand(len(input_ids), -1)
            windows = text_windows(input_ids, prefixes, self.args.unroll_steps)
            call = {"prefixes": prefixes, "draft_ids": windows}
        else:
            prefixes = torch.arange(first, length - 1, device=input_ids.device).expand(len(input_ids), -1)
            call = {}

        def loss_function(drafter: PPOWDrafter, output: Any) -> torch.Tensor:
            features = output.features[:, first:-1, None] if not call else output.window_features
            return self._text_loss(drafter, features, prefixes, input_ids, mask, encoding.sources)

        return model(
            input_ids=input_ids,
            target_states=encoding.states,
            attention_mask=inputs["attention_mask"],
            loss_function=loss_function,
            **call,
        ).loss

    def _text_loss(self, drafter, features, prefixes, input_ids, mask, sources) -> torch.Tensor:
        """Weighted sum over `features` `[B, M, J, h]` along the text behind `prefixes` `[B, M]`."""
        steps = torch.arange(features.shape[2], device=input_ids.device)
        places = prefixes[..., None] + steps  # the prefix that ends where step j's distribution begins
        next_places = (places + 1).clamp_max(input_ids.shape[1] - 1)
        learned = (places + 1 < input_ids.shape[1]) & mask.gather(1, next_places.flatten(1)).view(places.shape)
        weights = (self.args.unroll_decay**steps).expand(places.shape) / (self.args.unroll_decay**steps).sum()
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None, None].expand(places.shape)[learned]
        totals = self._kl_and_ce(
            drafter,
            features[learned],
            sources[rows, places[learned]],
            input_ids[rows, next_places[learned]],
            weights[learned],
            learned.nonzero()[:, 2] == 0,
        )
        kl, ce, first_kl, agreed, count = totals.unbind()
        self._metrics["kl"].append((first_kl / count.clamp_min(1)).item())
        self._metrics["agreement"].append((agreed / count.clamp_min(1)).item())
        return self.args.kl_weight * kl + self.args.ce_weight * ce

    def _kl_and_ce(self, drafter, features, sources, labels, weights, is_first) -> torch.Tensor:
        """Sums over rows: weighted KL, weighted cross-entropy; over first steps: KL, agreements, count."""

        def chunk(features, sources, labels, weights, is_first):
            draft, target = self._paired_logits(drafter, features, sources)
            labels = self._draft_labels(drafter, labels, draft.shape[-1])
            kl = forward_kl(target, draft)
            ce = cross_entropy(draft, labels)
            agreed = draft.argmax(-1) == target.argmax(-1)
            first = is_first.float()
            return torch.stack(
                [
                    (weights * kl).sum(),
                    (weights * ce).sum(),
                    (first * kl.detach()).sum(),
                    (first * agreed).sum(),
                    first.sum(),
                ]
            )

        return sum_over_chunks(chunk, self.args.chunk_size, features, sources, labels, weights, is_first)

    def _paired_logits(self, drafter: PPOWDrafter, features, sources) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft and target logits `[R, DV]` on what the drafter can propose."""
        draft, target = drafter.draft_logits(features).float(), self.target.logits(sources)
        kept = drafter.kept_tokens
        if kept is not None:
            target = target[..., kept]
        width = min(draft.shape[-1], target.shape[-1])
        return draft[..., :width], target[..., :width]

    @staticmethod
    def _draft_labels(drafter: PPOWDrafter, labels: torch.Tensor, width: int) -> torch.Tensor:
        """Token ids of the target as ids of the draft vocabulary; -100 where it has no such token."""
        kept = drafter.kept_tokens
        if kept is not None:
            places = torch.searchsorted(kept, labels).clamp_max(len(kept) - 1)
            return torch.where(kept[places] == labels, places, -100)
        return torch.where(labels < width, labels, -100)

    # -- PPOW

    def _ppow_loss(self, model, inputs, encoding: TargetEncoding) -> torch.Tensor:
        """Sum over the batch's sequences of policy loss and anchors, each averaged over the sequence's windows."""
        drafter = self.accelerator.unwrap_model(model)
        rollout, slot = self._next_rollout(drafter, inputs, encoding)
        count = rollout.prefixes.shape[1]
        chosen = rollout.prefixes[:, :: self.args.num_rollouts]
        prefixes, draft_ids = rollout.prefixes, rollout.draft_ids
        with_text = self.args.text_kl_coef > 0
        if with_text:  # the same forward follows the text behind the chosen prefixes too
            prefixes = torch.cat([prefixes, chosen], dim=1)
            texts = text_windows(inputs["input_ids"], chosen, self.args.max_window)
            draft_ids = torch.cat([draft_ids, texts], dim=1)

        def loss_function(drafter: PPOWDrafter, output: Any) -> torch.Tensor:
            loss = self._policy_loss(drafter, output.window_features[:, :count], rollout, slot)
            if with_text:
                loss = loss + self.args.text_kl_coef * self._text_anchor(
                    drafter, output.window_features[:, count:], chosen, rollout.has_prefix, inputs, encoding.sources
                )
            return loss

        return model(
            input_ids=inputs["input_ids"],
            target_states=encoding.states,
            attention_mask=inputs["attention_mask"],
            prefixes=prefixes,
            draft_ids=draft_ids,
            loss_function=loss_function,
        ).loss

    @property
    def progress(self) -> float:
        """Share of the training that is done, which decides when ADAW begins."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _next_rollout(self, drafter, inputs, encoding) -> tuple[Rollout, int | None]:
        """This micro-batch's rollouts: new ones, or those kept for a further gradient step."""
        accumulation = self.args.gradient_accumulation_steps
        place = self._micro_step % (accumulation * self.args.num_iterations)
        slot = place % accumulation
        if self.model.training:
            self._micro_step += 1
        if place >= accumulation and slot in self._rollouts:
            return self._rollouts[slot], slot
        started, tokens_before = time.perf_counter(), self.target.forward_tokens
        adaptive = self.progress >= self.args.adaw_start
        assert self.cost_ratio is not None
        rollout = collect_rollout(
            drafter, self.target, encoding, inputs, self.args,
            step=self.state.global_step, cost_ratio=self.cost_ratio, adaptive=adaptive,
        )  # fmt: skip
        if not bool(rollout.has_prefix.any()):
            raise ValueError(
                f"train_dataset: no sequence of the batch at step {self.state.global_step} has a token to learn that "
                f"a window could begin with. Sequences need more than {drafter.draft_model.first_prefix + 1} tokens."
            )
        self._rollouts[slot] = rollout
        seconds = time.perf_counter() - started
        metrics = self._metrics
        for name in ("total", "speedup", "throughput", "proximity"):
            key = "reward/mean" if name == "total" else f"reward/{name}"
            metrics[key].append(rollout.rewards[name].mean().item())
        metrics["reward/std"].append(rollout.rewards["total"].std().item())
        metrics["accepted_length"].append(rollout.accepted.float().mean().item() + 1)
        metrics["groups_without_spread"].append(groups_without_spread(rollout.rewards["total"]).item())
        metrics["verified_tokens_per_second"].append(rollout.draft_ids.numel() / seconds)
        metrics["target_forward_tokens"].append(self.target.forward_tokens - tokens_before)
        metrics["adaw"].append(float(adaptive))
        return rollout, slot

    def _policy_loss(self, drafter, features, rollout: Rollout, slot: int | None) -> torch.Tensor:
        """Clipped policy loss plus kl_coef * KL(P||Q) over tokens up to and including the first rejected one.

        Divided by N * G * K, so that every sequence weighs the same and long windows are not favoured.
        """
        learned = rollout.learned
        windows, window = rollout.draft_ids.shape[1:]
        tokens = rollout.draft_ids[learned]
        advantages = rollout.advantages[..., None].expand(learned.shape)[learned]
        old = None if rollout.old_log_probs is None else rollout.old_log_probs[learned]
        kept_log_probs: list[torch.Tensor] = []

        def chunk(features, sources, tokens, advantages, old):
            logits = drafter.compute_logits(features, self.target.vocab_size).float()
            log_probs = (logits / self.args.rollout_temperature).log_softmax(-1)
            chosen = log_probs.gather(-1, tokens[:, None])[:, 0]
            if old is None:
                kept_log_probs.append(chosen.detach())
            before = chosen.detach() if old is None else old
            policy, clipped = clipped_policy_loss(chosen, before, advantages, self.args.clip_range)
            draft, target = self._paired_logits(drafter, features, sources)
            kl = forward_kl(target, draft)
            with torch.no_grad():
                probs = log_probs.exp()
                entropy = -(probs * log_probs.clamp_min(-1e4)).sum(-1)
            return torch.stack([policy.sum(), kl.sum(), clipped.float().sum(), entropy.sum()])

        policy, kl, clipped, entropy = sum_over_chunks(
            chunk, self.args.chunk_size, features[learned], rollout.target_sources[learned], tokens, advantages, old
        ).unbind()
        count = max(int(learned.sum()), 1)
        if rollout.old_log_probs is None and self.args.num_iterations > 1:
            rollout.old_log_probs = torch.zeros(learned.shape, device=learned.device)
            rollout.old_log_probs[learned] = torch.cat(kept_log_probs)[: int(learned.sum())]
        self._metrics["kl"].append((kl / count).item())
        self._metrics["clip_fraction"].append((clipped / count).item())
        self._metrics["entropy"].append((entropy / count).item())
        return (policy + self.args.kl_coef * kl) / (windows * window)

    def _text_anchor(self, drafter, features, chosen, has_prefix, inputs, sources) -> torch.Tensor:
        """KL(P||Q) along the learned text behind the prefixes `[B, N]`, divided by N * K; sum over sequences."""
        length = inputs["input_ids"].shape[1]
        places = chosen[..., None] + torch.arange(features.shape[2], device=chosen.device)
        next_places = (places + 1).clamp_max(length - 1)
        real = inputs["loss_mask"].gather(1, next_places.flatten(1)).view(places.shape)
        real = real & (places + 1 < length) & has_prefix[:, None, None]
        rows = torch.arange(len(chosen), device=chosen.device)[:, None, None].expand(places.shape)[real]

        def chunk(features, sources):
            draft, target = self._paired_logits(drafter, features, sources)
            return forward_kl(target, draft).sum()[None]

        total = sum_over_chunks(chunk, self.args.chunk_size, features[real], sources[rows, places[real]])[0]
        self._metrics["text_kl"].append((total / max(int(real.sum()), 1)).item())
        return total / (chosen.shape[1] * features.shape[2])

    # -- evaluation

    def _eval_prompts(self) -> list[list[int]]:
        """Held-out prompts: what stands before the first learned token, or the beginning of a text."""
        prompts = []
        assert self.eval_dataset is not None
        for index in range(len(self.eval_dataset)):  # type: ignore[arg-type]
            item = self.eval_dataset[index]
            learned = item["loss_mask"].nonzero()[:, 0]
            start = int(learned[0]) if len(learned) else len(item["input_ids"])
            if start <= 1:
                start = min(self.args.eval_prompt_length, len(item["input_ids"]) - 1)
            prompts.append(item["input_ids"][:start].tolist())
            if len(prompts) == self.args.eval_prompts:
                break
        return prompts

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Acceptance by real decoding of held-out prompts, with the code that `generate` runs; windows of max_window.

        Metrics (with the prefix): `acceptance_length`, `tokens_per_target_forward`, `wasted`, `kl`, `repeated_8grams`.
        """
        if eval_dataset is not None:
            self.eval_dataset = self._prepare(eval_dataset, self.processing_class, self.args, "eval_dataset")
        if self.eval_dataset is None:
            raise ValueError("eval_dataset: None given; evaluation decodes prompts taken from it.")
        started = time.perf_counter()
        drafter = self.accelerator.unwrap_model(self.model)
        rank, world = self.args.process_index, self.args.world_size
        outputs, traces = decode(
            self.target_model,
            drafter.to(self.args.device),
            self._eval_prompts()[rank::world],
            self.args.eval_new_tokens,
            self.args.target_temperature,
            self.args.seed,
            window="fixed",
            max_window=self.args.max_window,
        )
        if world > 1:
            outputs, traces = gather_object(outputs), gather_object(traces)
        result: AcceptanceReport = report(outputs, traces)
        metrics = {
            f"{metric_key_prefix}_{name}": float(getattr(result, name))
            for name in ("acceptance_length", "tokens_per_target_forward", "wasted", "kl", "repeated_8grams")
        }
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
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
            (staged / STATE).write_text(json.dumps({"cost_ratio": self.cost_ratio}))
            files = {str(p.relative_to(staged)): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
            (staged / MANIFEST).write_text(json.dumps(files, indent=1))
            for path in staged.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            if final.exists():
                shutil.rmtree(final)
            os.replace(staged, final)
            shutil.rmtree(run_dir / ".staging", ignore_errors=True)
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()


class RepeatedBlocks(Sampler):
    """Repeats each block of `block` indices `times` times, for several gradient steps on the same rollouts.

    A random sampler is made to depend on (seed, epoch) alone, as accelerate does with those that it sees: the order is
    then the same on every process and after a resume.
    """

    def __init__(self, sampler: Sampler, block: int, times: int, seed: int):
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, generator=torch.Generator(), data_seed=seed)
        self.sampler, self.block, self.times = sampler, block, times

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.sampler, SeedableRandomSampler):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.block * self.block * self.times  # type: ignore[arg-type]

    def __iter__(self):
        block = []
        for index in self.sampler:
            block.append(index)
            if len(block) == self.block:
                for _ in range(self.times):
                    yield from block
                block = []


class CurvesCallback(TrainerCallback):
    """Draws `training.png` beside the checkpoints at every save and at the end."""

    def on_save(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    @staticmethod
    def _draw(args, state) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "training.png"
            draw_curves(state.log_history, path, title=f"objective: {args.objective}")


def draw_curves(log_history: list[dict], path: Path, title: str = "") -> Path | None:
    """Loss, reward, KL and acceptance length of a run's log, as far as it has them."""

    def points(name):
        return [(row["step"], row[name]) for row in log_history if name in row]

    panels = [
        {"loss": points("loss")},
        {name: points(name) for name in ("reward/mean", "reward/speedup", "reward/proximity") if points(name)},
        {name: points(name) for name in ("kl", "text_kl", "entropy") if points(name)},
        {
            label: points(name)
            for label, name in (
                ("rollouts: k + 1", "accepted_length"),
                ("held-out greedy decoding: k + 1", "eval_acceptance_length"),
            )
            if points(name)
        },
    ]
    panels = [panel for panel in panels if any(panel.values())]
    return plot_curves(*panels, path, title=title) if panels else None


def text_windows(input_ids: torch.Tensor, prefixes: torch.Tensor, window: int) -> torch.Tensor:
    """The text's own windows behind prefixes, `[B, M, K]`; what lies beyond the sequence repeats its last token."""
    places = prefixes[..., None] + 1 + torch.arange(window, device=prefixes.device)
    clamped = places.clamp_max(input_ids.shape[1] - 1)
    return input_ids.gather(1, clamped.flatten(1)).view(places.shape)


def check_pair(drafter: Any, target: PreTrainedModel, tokenizer: Any) -> None:
    """Raise `ValueError` when drafter, target and tokenizer do not belong together."""
    if not isinstance(drafter, PPOWDrafter):
        raise ValueError(
            f"model: a {type(drafter).__name__} given; PPOWTrainer trains a PPOWDrafter. Make one with "
            "PPOWDrafter.from_target(target)."
        )
    config, text = drafter.config, target.config.get_text_config()
    width = target.get_output_embeddings().weight.shape[0]
    check_width(config.vocab_size, width)
    if config.target_layer_ids and config.target_hidden_size != text.hidden_size:
        raise ValueError(
            f"target_model: its hidden size is {text.hidden_size}, and this eagle drafter reads states of "
            f"{config.target_hidden_size}. Use the target it was made for, or make a drafter with from_target."
        )
    if tokenizer is None:
        return
    if len(tokenizer) > width:
        raise ValueError(
            f"processing_class: the tokenizer has {len(tokenizer)} tokens and the target's logits only {width}. Pass "
            "the target's own tokenizer."
        )
    known = config.target_vocabulary_fingerprint
    if known and known != vocabulary_fingerprint(tokenizer):
        raise ValueError(
            f"processing_class: its vocabulary ({vocabulary_fingerprint(tokenizer)}) is not the one that the drafter "
            f"was trained with ({known}). Pass the tokenizer of {config.target_name_or_path or 'its target'}."
        )


def check_lengths(sequences: SequenceDataset, args: PPOWTrainingArguments, context_length: int | None) -> None:
    """Raise `ValueError` when a training sequence is longer than `max_length` or than the models' context."""
    longest = max(len(sequences[index]["input_ids"]) for index in range(len(sequences)))
    if longest > args.max_length:
        raise ValueError(
            f"train_dataset: its longest sequence has {longest} tokens, more than max_length={args.max_length}. Raise "
            "max_length, or cut the sequences."
        )
    if context_length is not None and longest > context_length:
        raise ValueError(
            f"max_length: {args.max_length} given and a sequence of {longest} tokens found, but drafter and target "
            f"take {context_length} (max_position_embeddings). Lower max_length."
        )


def check_writable(output_dir: str | Path) -> None:
    """Raise `ValueError` when nothing can be written to `output_dir`, before any work is lost."""
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable"):  # several processes check at once
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write to {str(path)!r} ({error.strerror}). Name a folder that can be written."
        ) from error


def check_complete(checkpoint: str | Path) -> None:
    """Raise `ValueError` when a checkpoint's files are missing or of another size than when it was written."""
    folder = Path(checkpoint)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {str(folder)!r} has no {MANIFEST}, so it is not a checkpoint that was written "
            "to its end. Pass another, or True to take the last complete one."
        )
    try:
        sizes = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {MANIFEST} in {str(folder)!r} is damaged ({error}). Pass another checkpoint, or "
            "True to take the last complete one."
        ) from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            raise ValueError(
                f"resume_from_checkpoint: {name} in {str(folder)!r} is damaged ({found}, {size} bytes written). Pass "
                "another checkpoint, or True to take the last complete one."
            )


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the highest step in `output_dir`, or `None`."""
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            check_complete(folder)
        except ValueError:
            continue
        return str(folder)
    return None
