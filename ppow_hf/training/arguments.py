"""Arguments of PPOWTrainer, each with its source. Knows numbers, their ranges and what follows from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..measure.evaluation import EVALUATION_METRICS
from ..runtime.configuration_ppow import PPOWDrafterConfig, check_settings
from .launch import check_launch, is_sharded_by_launcher, take_zero_3_as_2
from .objective import GROUP_TERMS, TEXT_TERMS, WINDOW_TERMS, Phase, objective_text, parse_objective

logger = logging.get_logger(__name__)

MUON = 2.0  # the default of `muon` where Muon can be used
MAX_WINDOW = 10  # the default of `max_window` for drafters of any window
EVAL_PROMPTS = 16  # the most that are decoded by default
EVAL_SHARE = 0.1  # of the time between evaluations, which they take by default
ANCHOR_TOKENS = 10  # of a sequence, for each window that is learned by default
FIRST_UNROLL_STEPS = 3  # the default of `unroll_steps` in a phase that another one follows

ACCEPTED = {
    "verify_with": ("auto", "target"),
    "text_weighting": (None, "decay", "visited"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}
AT_LEAST = {
    "max_window": (1, "draft tokens (K)"),
    "num_rollouts": (1, "windows of a group (G)"),
    "num_prefixes": (1, "prefixes of a sequence (N)"),
    "num_anchors": (1, "windows of a sequence"),
    "num_iterations": (1, "gradient steps"),
    "unroll_steps": (1, "draft steps"),
    "per_device_train_batch_size": (1, "sequences"),
    "per_device_eval_batch_size": (1, "prompts"),
    "gradient_accumulation_steps": (1, "batches"),
    "regenerate_batch_size": (1, "prompts"),
    "max_length": (4, "tokens"),
    "max_new_tokens": (1, "tokens"),
    "chunk_size": (1, "positions"),
    "verify_tokens": (1, "tokens"),
    "eval_prompts": (1, "prompts"),
    "eval_prompt_length": (1, "tokens"),
    "eval_new_tokens": (1, "tokens"),
}
POSITIVE = ("rollout_temperature", "unroll_decay", "proximity_threshold", "clip_range")
NOT_NEGATIVE = (
    "target_temperature", "speedup_weight", "throughput_weight", "proximity_weight",
    "kl_coef", "text_kl_coef", "adaw_start", "seed",
)  # fmt: skip

# Arguments of transformers' TrainingArguments that this trainer would take and ignore: their value there, and why.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the losses compare whole distributions, not labels"),
    "torch_compile": (False, "windows change shape at every step, so that compiling takes longer than it saves"),
    "torch_compile_backend": (None, "nothing is compiled: windows change shape at every step"),
    "torch_compile_mode": (None, "nothing is compiled: windows change shape at every step"),
    "prediction_loss_only": (False, "evaluation decodes prompts and has no loss"),
    "include_for_metrics": ([], "evaluation decodes prompts and calls no compute_metrics"),
    "batch_eval_metrics": (False, "evaluation decodes prompts and calls no compute_metrics"),
    "eval_accumulation_steps": (None, "evaluation decodes prompts and keeps no predictions"),
    "bf16_full_eval": (False, "evaluation decodes in the number format of the models"),
    "fp16_full_eval": (False, "evaluation decodes in the number format of the models"),
    "average_tokens_across_devices": (True, "the loss is always divided by the tokens of all processes"),
    "label_names": (None, "batches have the columns of `collate_sequences`"),
    "use_liger_kernel": (False, "Liger has no kernels for a drafter's layers"),
    "debug": ("", "its hooks read numbers alone, and masks pass between a drafter's layers"),
}


def default_anchors(count: Any) -> Any:
    """The default of `num_anchors` for a sequence with `count` windows, an `int` or a tensor of them."""
    return -(-count // ANCHOR_TOKENS)


@dataclass
class PPOWTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`PPOWTrainer`], besides those of transformers' `TrainingArguments`.

    The defaults are one recipe for an eagle drafter: texts that the target writes, half of them at T = 0 and half at
    T = 1; three unrolled steps after every tenth prefix for the first 70% of the training, then TV and KL on windows
    that decoding visits; hidden matrices trained by Muon.

    Args:
        > Parameters that control what is trained

        objective (`str` or `dict[str, float]`, *optional*, defaults to `"supervised; 0.7: tv + 0.3*kl"`):
            Loss to minimize. One of:

            - the name of a term below;
            - a weighted sum of terms: `"0.3*kl + tv"`, in Python also `{"kl": 0.3, "tv": 1.0}`;
            - a schedule of phases: `"kl; 0.5: 0.3*kl + tv"` minimizes the second sum from half of the training on.

            Terms along the text, for every learned token:

            - `"ce"`: -log Q(token).
            - `"kl"`: KL(P||Q).
            - `"supervised"`: 0.1 * ce + kl [ours].
            - `"tv"`: total variation TV(P, Q) [2211.17192].
            - `"lk"`: -log of the acceptance rate [2602.23881].
            - `"expected_length"`: minus the expected share of a window that is accepted, in closed form along the
              text [ours].
            - `"confidence"`: binary cross-entropy of a block drafter's confidence head against the acceptance of its
              tokens: sum min(P, Q) at `target_temperature` [DSpark, 2607.05147], or at 0 whether both choose the same
              token [ours]. Only the head learns from it, with a weight of 1 in phases that do not name it [ours].

            Terms along windows that the drafter drafts and the target verifies:

            - `"ppow"`: clipped policy gradient of window rewards, with KL anchors [paper].
            - `"token_rl"`: policy gradient in which a token's reward is its own acceptance [ours].
            - `"opd"`: on-policy distillation, KL(P||Q) up to the first rejected token [2605.29343].

            Terms along the text that stand beside these follow the text after the windows' prefixes.
        train_embeddings (`bool`, *optional*, defaults to `False`):
            Whether to train an eagle or block drafter's token embeddings, as a copy of its own that is saved with it.
            By default they stay the target's, which are read where they are and not saved [EAGLE-3].

        > Parameters that control the data

        train_sampling_strategy (`str`, *optional*, defaults to `"group_by_length"`):
            Order of the sequences. `"group_by_length"` makes batches of similar lengths, in random order, so that
            little is computed for padding; `"random"` mixes all lengths.
        max_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens in a training sequence.
        packing (`bool`, *optional*, defaults to `True`):
            Whether to join `text` rows and cut them into sequences of `max_length` tokens.
        regenerate (`bool`, *optional*):
            Whether the target writes the completions. By default it does for rows with a `prompt` or `messages`, in
            place of completions in the data, and `text` rows are trained on as they are. `True` also writes after
            the beginning of each `text` row. `False` trains on the completions in the data.
        regenerate_temperature (`float` or `list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Temperature at which the target writes. Several take turns, prompt by prompt [ours].
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum number of tokens that the target writes after a prompt.
        regenerate_batch_size (`int`, *optional*, defaults to `16`):
            Number of prompts that the target completes at once.

        > Parameters that control the terms along the text

        unroll_steps (`int`, *optional*):
            Number of draft steps an eagle drafter is unrolled on its own features (training-time test [EAGLE-3]).
            Defaults to 3 in a phase that another one follows, and to `max_window` in the last one and for
            `expected_length` [ours].
        unroll_decay (`float`, *optional*, defaults to `0.9`):
            Weight of each token of a window relative to the one before it, with `text_weighting="decay"` [ours];
            exp(-1/4) = 0.78 in DSpark, exp(-1/7) = 0.87 for 16 tokens in DFlash.
        text_weighting (`str`, *optional*):
            Tokens of an eagle, medusa or block drafter's windows that are learned: `"decay"`, all of the windows
            after any prefix, weighted by `unroll_decay`; `"visited"`, only those that decoding the text would
            draft. Defaults to `"decay"` in a phase that another one follows and for `expected_length`, and to
            `"visited"` elsewhere [ours].
        num_anchors (`int`, *optional*):
            Number of windows of an eagle, medusa or block drafter that are learned along a sequence, drawn at random
            at each step where there are more [DFlash, 2602.06036]. Defaults to one for every ten of its tokens:
            windows of other texts teach more than more windows of one [ours]. An eagle drafter that is unrolled for
            one step learns every token.

        > Parameters that control the terms along drafted windows

        max_window (`int`, *optional*):
            Number of tokens in a window, K [paper]. Defaults to 10, and for a drafter with a longest window (block,
            medusa) to that.
        num_rollouts (`int`, *optional*, defaults to `8`):
            Number of windows drafted from each chosen prefix, G [paper].
        num_prefixes (`int`, *optional*, defaults to `8`):
            Number of prefixes chosen from each sequence, N [ours].
        rollout_temperature (`float`, *optional*, defaults to `0.3`):
            Temperature of the drafter [ours]; 1.0 in the literal method [paper].
        target_temperature (`float`, *optional*, defaults to `0.0`):
            Temperature used for verification. `0` accepts a draft token if it is the target's argmax; above `0`,
            rejection sampling.
        verify_with (`str`, *optional*, defaults to `"auto"`):
            What verifies the windows: `"target"`, a forward of the target over all of them; `"auto"`, the text itself
            where the target wrote it at T = 0 and no term asks for more (`target_temperature=0`, and
            `proximity_weight=0` with `ppow`), else the target [ours].
        speedup_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the reward k / (k * gamma + 1) of k accepted tokens [paper].
        throughput_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the reward (k + 1) / (K * gamma + 1) [ours].
        proximity_weight (`float`, *optional*, defaults to `0.0`):
            Reward eta of a window without accepted tokens that the target finds likely [paper]; 0.5 in the literal
            method [ours].
        proximity_threshold (`float`, *optional*, defaults to `5.0`):
            Nats epsilon by which such a window may be less likely than the target's own [paper; its value is ours].
        clip_range (`float`, *optional*, defaults to `0.2`):
            PPO's clip [paper; its value is ours]. It has no effect with `num_iterations=1`, where the drafter's
            probabilities are still those that it drafted with.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of gradient steps on each batch of rollouts.
        kl_coef (`float`, *optional*, defaults to `0.1`):
            Weight of KL(P||Q) along the drafted windows in `ppow` [paper; its value is ours].
        text_kl_coef (`float`, *optional*, defaults to `1.0`):
            Weight of KL(P||Q) along the text in `ppow` [ours]; 0 in the literal method [paper].
        adaw_start (`float`, *optional*, defaults to `0.3`):
            Share of the training after which ADAW chooses the prefixes; before, they are chosen uniformly [paper; its
            value is ours]. `1` turns ADAW off.
        cost_ratio (`float`, *optional*):
            Cost of a draft step in target forwards, gamma in the rewards. Measured before training by default.

        > Parameters that control the optimizer

        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Initial learning rate [ours]. It suits the terms along the text; use `1e-4` for `ppow`.
        adam_beta2 (`float`, *optional*, defaults to `0.95`):
            AdamW's beta2 [ours].
        warmup_steps (`float`, *optional*, defaults to `10`):
            Number of warm-up steps, or below 1 their share of the training [ours].
        muon (`float`, *optional*):
            Learning rate of the hidden matrices, which Muon (Jordan 2024) trains, relative to `learning_rate`; `0`
            trains all parameters by AdamW. Defaults to 2.0 [ours], and to 0.0 with another `optim`, FSDP or DeepSpeed,
            which Muon cannot be combined with.

        > Parameters that control memory

        chunk_size (`int`, *optional*, defaults to `1024`):
            Number of positions whose vocabulary-wide tensors are held at once.
        verify_tokens (`int`, *optional*, defaults to `4096`):
            Maximum number of draft tokens of a sequence in one forward of the target.

        > Parameters that control evaluation

        eval_prompts (`int`, *optional*):
            Number of held-out prompts that are decoded, `per_device_eval_batch_size` of them at once. Defaults to 16,
            or to fewer batches where these would take more than a tenth of the time that the training took to its
            first evaluation [ours].
        eval_prompt_length (`int`, *optional*, defaults to `96`):
            Number of tokens of a prompt taken from a `text` row.
        eval_new_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens decoded after each prompt.
        calibrate_at_end (`bool`, *optional*, defaults to `True`):
            Whether to fit the window rule to the held-out prompts after training [ours].
        metric_for_best_model (`str`, *optional*):
            Metric that chooses the best checkpoint. Defaults to `"eval_acceptance_length"` where one is needed.
        greater_is_better (`bool`, *optional*):
            Whether a larger metric is better. Defaults to `False` for `"eval_kl"`, `"eval_wasted"` and
            `"eval_repeated_8grams"`, else to `True`.
    """

    objective: str = field(
        default="supervised; 0.7: tv + 0.3*kl",
        metadata={
            "help": f"supervised, {', '.join(TEXT_TERMS)} (text) or {', '.join(WINDOW_TERMS)} (drafted windows); a "
            "weighted sum '0.3*kl + tv'; a schedule 'kl; 0.5: 0.3*kl + tv'."
        },
    )
    train_embeddings: bool = field(
        default=False, metadata={"help": "Train the token embeddings of an eagle or block drafter too."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the sequences: batches of similar lengths, in random order; or 'random'.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    max_length: int = field(default=256, metadata={"help": "Tokens in a training sequence."})
    packing: bool = field(default=True, metadata={"help": "Join text rows and cut them into full sequences."})
    regenerate: bool | None = field(
        default=None,
        metadata={"help": "Let the target write the completions; by default for rows with a prompt or messages."},
    )
    regenerate_temperature: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Temperature of those completions; several: in turn."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion that the target writes."})
    regenerate_batch_size: int = field(default=16, metadata={"help": "Prompts completed at once."})
    unroll_steps: int | None = field(
        default=None,
        metadata={"help": "Unrolled draft steps of an eagle drafter; by default 3, and max_window in the last phase."},
    )
    unroll_decay: float = field(default=0.9, metadata={"help": "Weight of each further token of a window."})
    text_weighting: str | None = field(
        default=None,
        metadata={
            "help": "'decay': every window; 'visited': what decoding would draft. By default 'decay', and 'visited' "
            "in the last phase."
        },
    )
    num_anchors: int | None = field(
        default=None,
        metadata={"help": "Windows learned along a sequence; by default one for every ten of its tokens."},
    )
    max_window: int = field(
        default=None,  # type: ignore[assignment]  # chosen with the drafter, see `choose_window`
        metadata={
            "help": "Tokens in a window, K [paper]; by default 10, or all that the drafter has heads or a block for."
        },
    )
    num_rollouts: int = field(default=8, metadata={"help": "Windows from each chosen prefix, G [paper]."})
    num_prefixes: int = field(default=8, metadata={"help": "Prefixes chosen from each sequence, N."})
    rollout_temperature: float = field(default=0.3, metadata={"help": "Temperature of drafting; literal: 1.0."})
    target_temperature: float = field(default=0.0, metadata={"help": "0: greedy verification, else sampling."})
    verify_with: str = field(default="auto", metadata={"help": "'auto': by the target's own text where it can be."})
    speedup_weight: float = field(default=1.0, metadata={"help": "Weight of k/(k*gamma+1) [paper]."})
    throughput_weight: float = field(default=0.0, metadata={"help": "Weight of (k+1)/(K*gamma+1) [ours]."})
    proximity_weight: float = field(default=0.0, metadata={"help": "eta of the proximity reward; literal: 0.5."})
    proximity_threshold: float = field(default=5.0, metadata={"help": "epsilon of the proximity reward, nats."})
    clip_range: float = field(default=0.2, metadata={"help": "PPO's clip."})
    num_iterations: int = field(default=1, metadata={"help": "Gradient steps on each batch of rollouts."})
    kl_coef: float = field(default=0.1, metadata={"help": "Weight of KL to the target along drafted windows."})
    text_kl_coef: float = field(default=1.0, metadata={"help": "Weight of KL to the target along the text."})
    adaw_start: float = field(default=0.3, metadata={"help": "Share of steps before ADAW; 1: never."})
    cost_ratio: float | None = field(default=None, metadata={"help": "gamma of the rewards; by default measured."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Initial learning rate; 1e-4 suits ppow."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2."})
    warmup_steps: float = field(default=10, metadata={"help": "Warm-up steps; below 1, their share of the training."})
    muon: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of hidden matrices, trained by Muon, relative to learning_rate; 0: AdamW alone. By "
            "default 2.0, and 0 with another optim, FSDP or DeepSpeed."
        },
    )
    chunk_size: int = field(default=1024, metadata={"help": "Positions held vocabulary-wide at once."})
    verify_tokens: int = field(default=4096, metadata={"help": "Draft tokens in one packed target forward."})
    eval_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Held-out prompts decoded at each evaluation; by default at most 16, in a tenth of the training's "
            "time."
        },
    )
    eval_prompt_length: int = field(default=96, metadata={"help": "Tokens of a prompt taken from a text row."})
    eval_new_tokens: int = field(default=64, metadata={"help": "Tokens decoded after each prompt."})
    calibrate_at_end: bool = field(default=True, metadata={"help": "Fit the window rule at the end."})
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": 'Evaluation metric; "eval_acceptance_length" where one is needed and none is given.'},
    )
    greater_is_better: bool | None = field(default=None, metadata={"help": "Follows metric_for_best_model."})

    _chosen_window = None  # the last drafter's, where no `max_window` was given

    def __post_init__(self):
        # What the trainer's own data path needs; a drafter's forward takes none of the data's columns by name.
        self.remove_unused_columns = False
        self.dataloader_drop_last = True
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            self.ddp_find_unused_parameters = False
        self._check_supported()
        by_metric = self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        wanted = self.load_best_model_at_end or by_metric or self.save_strategy == SaveStrategy.BEST
        if wanted or self.metric_for_best_model is not None:
            self.choose_best_metric()
        check_launch(self.fp16)
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it, transformers refuses bfloat16 where there is no accelerator
        super().__post_init__()
        take_zero_3_as_2(self.deepspeed_plugin)
        if isinstance(self.objective, dict):
            self.objective = objective_text(self.objective)
        if isinstance(self.regenerate_temperature, int | float):
            self.regenerate_temperature = [float(self.regenerate_temperature)]
        self._check_ranges()
        self._check_windows()
        self._choose_muon()

    def windows_learned(self, counts: torch.Tensor) -> torch.Tensor:
        """How many windows are learned at a step, at least 1, of sequences with `counts` of them."""
        wanted = default_anchors(counts) if self.num_anchors is None else counts.clamp_max(self.num_anchors)
        return wanted.clamp_min(1)

    def choose_window(self, config: PPOWDrafterConfig) -> None:
        """Take the drafter's longest window where no `max_window` was given, or 10 where it has none; of the next
        drafter again."""
        if self.max_window in (None, self._chosen_window):
            self.max_window = self._chosen_window = config.longest_window or MAX_WINDOW
            self._check_windows()
        config.check_window(self.max_window)

    def choose_best_metric(self) -> None:
        """Take acceptance length where no `metric_for_best_model` was given; there is no evaluation loss.

        Raises `ValueError` for a metric that evaluation does not give.
        """
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_acceptance_length"
        given = f"_{self.metric_for_best_model}"  # "eval_kl", "kl", and of evaluation data with names "code_kl"
        names = [name for name in EVALUATION_METRICS if given.endswith(f"_{name}")]
        if not names:
            raise ValueError(
                f"metric_for_best_model: {self.metric_for_best_model!r} given, and evaluation gives "
                f"{list(EVALUATION_METRICS)}. Pass one of them."
            )
        if self.greater_is_better is None:
            self.greater_is_better = EVALUATION_METRICS[names[0]]

    def _check_supported(self) -> None:
        """Raise `ValueError` for arguments without effect."""
        for name, (unset, reason) in UNSUPPORTED.items():
            if getattr(self, name, unset) not in (unset, None, []):
                raise ValueError(f"{name}: {getattr(self, name)!r} given, but {reason}. Leave it out.")

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: {value} given; a finite number is needed.")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            name = "max_steps" if self.max_steps == 0 else "num_train_epochs"
            raise ValueError(f"{name}: {getattr(self, name)} given; training takes at least one step.")
        for name, accepted in ACCEPTED.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {list(accepted)}.")
        for name, (least, meaning) in AT_LEAST.items():
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"{name}: {given} given; at least {least} {meaning} are needed.")
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be above 0.")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must not be negative.")
        if not self.regenerate_temperature or not all(0 <= t < math.inf for t in self.regenerate_temperature):
            raise ValueError(
                f"regenerate_temperature: {self.regenerate_temperature} given; pass finite numbers of at least 0."
            )
        if self.max_window is not None:
            check_settings(max_window=self.max_window)
        if self.cost_ratio is not None and not 0 <= self.cost_ratio < float("inf"):
            raise ValueError(f"cost_ratio: {self.cost_ratio} given; pass a finite number of at least 0, or None.")

    def _check_windows(self) -> None:
        """What the objective's terms on drafted windows need."""
        if self._uses(GROUP_TERMS) and self.num_rollouts < 2:
            raise ValueError(
                f"num_rollouts: {self.num_rollouts} given; {self.objective!r} compares the windows of a group (G). "
                "Pass at least 2."
            )
        if self.max_window is not None and self.uses_rollouts and self.max_length <= self.max_window:
            raise ValueError(
                f"max_length: {self.max_length} tokens hold no window of max_window={self.max_window}; raise it."
            )
        repeated = self.uses_rollouts and self.num_iterations > 1
        if repeated and self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                f"train_sampling_strategy: 'batch_rebalance' gives each step sequences of its own, and with "
                f"num_iterations={self.num_iterations} steps share theirs. Leave out one of them."
            )
        steps, given = self.save_steps, f"{self.save_steps}"
        if steps < 1:  # a share of the steps, which epochs do not tell yet
            steps = math.ceil(max(self.max_steps, 0) * steps)
            given = f"{self.save_steps} ({steps} of {self.max_steps} steps)"
        if repeated and self.save_strategy == SaveStrategy.STEPS and steps % self.num_iterations:
            raise ValueError(
                f"save_steps: {given} is no multiple of num_iterations={self.num_iterations}; a checkpoint "
                "between two gradient steps on the same rollouts could not be resumed exactly. Pass a multiple."
            )

    def _choose_muon(self) -> None:
        """Muon by default where it can be used; raises where it is asked for and cannot."""
        obstacle = None
        if self.fsdp or self.deepspeed or is_sharded_by_launcher():
            obstacle = "FSDP or DeepSpeed, which split the matrices that it orthogonalizes"
        elif self.optim != type(self).optim:
            obstacle = f"optim={getattr(self.optim, 'value', self.optim)!r}"
        if self.muon is None:
            self.muon = MUON if obstacle is None else 0.0
            if obstacle is not None:
                logger.warning(f"muon: not used, since it cannot be combined with {obstacle}.")
        elif self.muon < 0:
            raise ValueError(f"muon: {self.muon} given; it must not be negative.")
        elif self.muon > 0 and obstacle is not None:
            raise ValueError(f"muon: {self.muon} given, and it cannot be combined with {obstacle}. Leave it out.")

    # -- the objective

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The objective's phases, in their order."""
        return parse_objective(self.objective)

    def weights_at(self, progress: float) -> dict[str, float]:
        """The terms minimised at a share of the training, with their weights."""
        return dict([phase for phase in self.phases if phase.start <= progress][-1].weights)

    def text_windows_at(self, progress: float, architecture: str) -> tuple[int, str]:
        """Tokens of the windows along the text that are learned at a share of the training, and `text_weighting`.

        Medusa and block draft a whole window from one state and learn it whole. A standalone drafter's features along
        the text are those of its prefixes, so that windows of one token are all there is to learn.
        """
        unrolled, weighting = self.unrolling_at(progress)
        steps = {"eagle": unrolled, "medusa": self.max_window, "block": self.max_window}
        return steps.get(architecture, 1), weighting

    def unrolling_at(self, progress: float) -> tuple[int, str]:
        """Steps that an eagle drafter is unrolled along the text at a share of the training, and `text_weighting`."""
        steps, weighting = self.max_window, "visited"
        if "expected_length" in self.weights_at(progress):
            weighting = "decay"
        elif progress < self.phases[-1].start:
            steps, weighting = min(FIRST_UNROLL_STEPS, self.max_window), "decay"
        return self.unroll_steps or steps, self.text_weighting or weighting

    def anchors(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The terms along the text among `weights`; `ppow` brings its own, KL(P||Q) by `text_kl_coef`."""
        anchors = {name: weight for name, weight in weights.items() if name in TEXT_TERMS}
        ppow_anchor = weights.get("ppow", 0.0) * self.text_kl_coef
        if ppow_anchor > 0:
            anchors["kl"] = anchors.get("kl", 0.0) + ppow_anchor
        return {name: weight for name, weight in anchors.items() if weight > 0}

    def obstacle_to_text_verification(self, weights: Mapping[str, float]) -> str | None:
        """The argument for which the target has to read windows drafted for the terms `weights`; `None`: none has."""
        if self.verify_with == "target":
            return "verify_with='target'"
        if self.target_temperature > 0:
            return f"target_temperature={self.target_temperature}"
        if "ppow" in weights and self.proximity_weight > 0:
            return f"proximity_weight={self.proximity_weight}"
        return None

    @property
    def uses_rollouts(self) -> bool:
        """Whether any phase of the objective drafts windows and has them verified."""
        return self._uses(WINDOW_TERMS)

    def _uses(self, terms: tuple[str, ...]) -> bool:
        return any(name in terms for phase in self.phases for name in phase.weights)
