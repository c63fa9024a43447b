"""Arguments of PPOWTrainer, each with its source. Knows numbers and their ranges only."""

import os
from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..measure.evaluation import EVALUATION_METRICS
from .objectives import GROUP_TERMS, TEXT_TERMS, WINDOW_TERMS, objective_text, parse_objective

GROUP_REWARDS = ("own", "best", "marginal")


@dataclass
class PPOWTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`PPOWTrainer`], besides those of transformers' `TrainingArguments`.

    Args:
        > Parameters that control what is trained

        objective (`str`, *optional*, defaults to `"supervised; 0.7: tv + 0.3*kl"`):
            What is minimised; the default came out best in our comparisons. A name, a weighted sum (`"0.3*kl + tv"`;
            in Python also `{"kl": 0.3, "tv": 1.0}`), or a schedule of them (`"kl; 0.5: 0.3*kl + tv"`: the second one
            from half of the training on).
            Along the text, for every token: `"ce"` -log Q(text); `"kl"` KL(P||Q); `"tv"` TV(P, Q); `"lk"` -log alpha
            [2602.23881]; `"lk_hybrid"` KL and TV mixed by alpha [2602.23881; mixed position by position: ours];
            `"expected_length"` minus the share of a window that is kept, in expectation over what the drafter draws at
            `rollout_temperature`: the policy gradient of a window's accepted tokens without sampling one, as a window
            that goes on is on the text [ours]; of windows of `unroll_steps` (eagle) or `max_window` tokens;
            `"supervised"` the first two by their weights below, what continued supervised training (CST) goes on with.
            Along windows that the drafter drafts, verified by the target: `"ppow"` reinforcement learning on windows
            with the rewards and anchors below [paper]; `"token_rl"` a token's reward is its own agreement with the
            target [ours]; `"reinforce"` the accepted tokens from each token on, up to the first rejection, against the
            group's other windows [ours]; `"expected_acceptance"` the expected accepted tokens, exact over each next
            token [ours]; `"opd"`, `"opd_reverse"` on-policy distillation, KL(P||Q) or KL(Q||P) [2605.29343; which
            positions: ours]. Terms of the text that stand beside these follow the text behind the chosen prefixes.
        train_embeddings (`bool`, *optional*, defaults to `False`):
            Whether an eagle drafter's token embeddings are trained, as a copy of its own that is saved with it; as in
            EAGLE-3 they stay the target's, which are read where they are and not saved.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `256`): tokens in a training sequence.
        packing (`bool`, *optional*, defaults to `True`): whether `text` rows are joined and cut into full sequences.
        regenerate (`bool`, *optional*, defaults to `False`):
            Whether the target writes the completions itself first. Drafters must learn the target's own text.
        regenerate_temperature (`float` or `list[float]`, *optional*, defaults to `0.0`):
            At which temperature it writes; of several, prompts take one after the other in turn. Text at T = 0 teaches
            greedy decoding, `[0.0, 1.0]` sampling too; windows are verified by the text only where all of it is T = 0.
        max_new_tokens (`int`, *optional*, defaults to `128`), regenerate_batch_size (`int`, *optional*, defaults to
            `16`): tokens of a completion, and prompts completed at once.

        > Parameters of the supervised objective

        ce_weight (`float`, *optional*, defaults to `0.1`), kl_weight (`float`, *optional*, defaults to `1.0`):
            Weights of -log Q(text) and of KL(P||Q) [ours].
        unroll_steps (`int`, *optional*):
            Draft steps that an eagle drafter is unrolled on its own features (EAGLE-3's training-time test); `None`:
            `max_window`, so that what is drafted was learned. Fewer are faster, for the beginning of a training: one
            that had only seen 3 kept little behind them, and 10 in its last part raised that like PPOW did [ours].
        unroll_decay (`float`, *optional*, defaults to `0.9`): weight of each further step.
        text_weighting (`str`, *optional*):
            What counts in the terms along the text of an eagle or medusa drafter: `"visited"`, only what decoding it
            would draft with the drafter as it is, rounds beginning where others end: as deep as it gets, for less than
            half the work; or `"decay"`, windows behind every prefix, their steps by `unroll_decay` [ours].
            `expected_length`, which weighs steps itself, is of the whole windows that decoding begins, in tokens kept,
            or of those behind every prefix, in shares of a window. `None`: `"visited"`, but `"decay"` where it is
            among the terms. Not of the terms beside windows' ones, which follow the windows' prefixes.
        lk_decay (`float`, *optional*, defaults to `3.0`):
            How fast `lk_hybrid` goes from KL to TV as acceptance rises [2602.23881; its value is ours].

        > Parameters of the objectives on drafted windows

        max_window (`int`, *optional*, defaults to `10`): tokens in a window, K [paper].
        num_rollouts (`int`, *optional*, defaults to `8`): windows drafted from each chosen prefix, G [paper].
        num_prefixes (`int`, *optional*, defaults to `8`): prefixes chosen from each sequence, N [ours].
        rollout_temperature (`float`, *optional*, defaults to `0.3`):
            Temperature at which the drafter drafts; the literal method drafts at 1.0 [paper], which raised sampled and
            lowered greedy acceptance in our study [ours].
        target_temperature (`float`, *optional*, defaults to `0.0`):
            0: a draft token is kept if it is the target's choice; above 0: by rejection sampling.
        verify_text_as_written (`bool`, *optional*, defaults to `False`):
            Whether the windows that decoding a text visits, and `expected_length`, are at the text's own temperature:
            text that the target wrote at T = 0 is kept where it is the drafter's choice, other text as rejection
            sampling at T = 1 keeps drafts that are drawn at 1 [ours]. `False`: all of it is verified at
            `target_temperature`, which must be 0 where this is `True`.
        verify_with (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: on text that the target wrote at T = 0, drafts are verified by that text, with no further forward
            of the target, where nothing beyond a window's first rejected token is asked for (`target_temperature=0`
            and `proximity_weight=0`, or an objective without that reward) [ours]; `"target"`: always by the target.
        speedup_weight (`float`, *optional*, defaults to `1.0`): weight of k / (k * gamma + 1) [paper].
        throughput_weight (`float`, *optional*, defaults to `0.0`): weight of (k + 1) / (K * gamma + 1) [ours].
        group_reward (`str`, *optional*, defaults to `"own"`):
            `"own"`: a window earns what it yields alone [paper]; for decoders that verify `candidate_group` windows at
            once and keep the longest: `"best"`, every window earns what the best of its candidates yields, and
            `"marginal"`, what its candidates would lose without it [ours].
        candidate_group (`int`, *optional*):
            Windows verified at once, C; divides `num_rollouts`, and `None` means all of them [ours].
        expected_reward (`bool`, *optional*, defaults to `False`):
            At T > 0, rewards averaged over the target's verdicts, given the drafted tokens (Rao-Blackwell), in place
            of those of one sampled verdict [ours].
        on_policy_positions (`str`, *optional*, defaults to `"reached"`):
            Tokens of drafted windows that `opd` and `opd_reverse` learn: up to the first rejected one, or `"all"`
            [ours].
        proximity_weight (`float`, *optional*, defaults to `0.0`):
            eta; the literal method has the reward [paper], here with 0.5 [ours]. At 0 windows may need no forward of
            the target, see `verify_with`: for equal target-forward tokens that won more in our comparison [ours].
        proximity_threshold (`float`, *optional*, defaults to `5.0`): epsilon in nats [paper; its value is ours].
        advantages (`str`, *optional*, defaults to `"standardized"`): or `"leave_one_out"`.
        clip_range (`float`, *optional*, defaults to `0.2`): PPO's clip [paper; its value is ours].
        num_iterations (`int`, *optional*, defaults to `1`): gradient steps on each batch of rollouts.
        kl_coef (`float`, *optional*, defaults to `0.1`):
            Weight of KL(P||Q) to the target along the drafted windows [paper; its value is ours].
        text_kl_coef (`float`, *optional*, defaults to `1.0`):
            Weight of KL(P||Q) along the text; 0 in the literal method, 1 in our study's best variant [ours].
        adaw_start (`float`, *optional*, defaults to `0.3`):
            Share of the steps in which prefixes are chosen uniformly, before ADAW [paper; its value is ours]. 1 turns
            ADAW off.
        cost_ratio (`float`, *optional*): gamma of the rewards; measured at the start where it is not given.

        > Parameters of the optimizer, beside the Trainer's own

        muon (`float`, *optional*, defaults to `0.0`):
            Above 0, hidden matrices are trained by Muon, which orthogonalises their momentum, their steps this many
            times the size of AdamW's at `learning_rate`, and the rest by AdamW. 2 won most in our comparison [ours].
            Not with `optim`, FSDP or DeepSpeed.

        > Parameters that control memory and evaluation

        chunk_size (`int`, *optional*, defaults to `1024`): positions whose vocabulary-wide tensors are held at once.
        verify_tokens (`int`, *optional*, defaults to `4096`): draft tokens of a sequence in one packed target forward.
        eval_prompts (`int`, *optional*, defaults to `16`): held-out prompts that are decoded at each evaluation,
            `per_device_eval_batch_size` of them at once.
        eval_prompt_length (`int`, *optional*, defaults to `96`): tokens of a prompt taken from a `text` row.
        eval_new_tokens (`int`, *optional*, defaults to `64`): tokens decoded behind each.
        calibrate_at_end (`bool`, *optional*, defaults to `True`): whether training ends by fitting the window rule.
        metric_for_best_model (`str`, *optional*): the metric that says which checkpoint is best;
            `"eval_acceptance_length"` where one is needed and none is given.
        greater_is_better (`bool`, *optional*): whether more of that metric is better; by default not for
            `"eval_kl"`, `"eval_wasted"` and `"eval_repeated_8grams"`.
    """

    objective: str = field(
        default="supervised; 0.7: tv + 0.3*kl",
        metadata={
            "help": f"supervised, {', '.join(TEXT_TERMS)} (text) or {', '.join(WINDOW_TERMS)} (drafted windows); a "
            "weighted sum '0.3*kl + tv'; a schedule 'kl; 0.5: 0.3*kl + tv'."
        },
    )
    train_embeddings: bool = field(default=False, metadata={"help": "Train an eagle drafter's token embeddings too."})
    max_length: int = field(default=256, metadata={"help": "Tokens in a training sequence."})
    packing: bool = field(default=True, metadata={"help": "Join text rows and cut them into full sequences."})
    regenerate: bool = field(default=False, metadata={"help": "Let the target write the completions first."})
    regenerate_temperature: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "Temperature of those completions; several: in turn."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion of regenerate."})
    regenerate_batch_size: int = field(default=16, metadata={"help": "Prompts completed at once."})
    ce_weight: float = field(default=0.1, metadata={"help": "Weight of -log Q(text) (supervised)."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of KL(P||Q) (supervised)."})
    unroll_steps: int | None = field(
        default=None, metadata={"help": "Unrolled draft steps of an eagle drafter (supervised); None: max_window."}
    )
    unroll_decay: float = field(default=0.9, metadata={"help": "Weight of each further unrolled step."})
    text_weighting: str | None = field(
        default=None, metadata={"help": "'visited': what decoding would draft; 'decay': every window."}
    )
    lk_decay: float = field(default=3.0, metadata={"help": "How fast lk_hybrid goes from KL to TV."})
    max_window: int = field(default=10, metadata={"help": "Tokens in a window, K [paper]."})
    num_rollouts: int = field(default=8, metadata={"help": "Windows from each chosen prefix, G [paper]."})
    num_prefixes: int = field(default=8, metadata={"help": "Prefixes chosen from each sequence, N."})
    rollout_temperature: float = field(default=0.3, metadata={"help": "Temperature of drafting; literal: 1.0."})
    target_temperature: float = field(default=0.0, metadata={"help": "0: greedy verification, else sampling."})
    verify_text_as_written: bool = field(
        default=False, metadata={"help": "Verify text at the temperature it was written at, along the text."}
    )
    verify_with: str = field(default="auto", metadata={"help": "'auto': by the target's own text where it can be."})
    speedup_weight: float = field(default=1.0, metadata={"help": "Weight of k/(k*gamma+1) [paper]."})
    throughput_weight: float = field(default=0.0, metadata={"help": "Weight of (k+1)/(K*gamma+1) [ours]."})
    group_reward: str = field(default="own", metadata={"help": "'own' [paper], 'best' or 'marginal' of candidates."})
    candidate_group: int | None = field(default=None, metadata={"help": "Windows verified at once; None: all."})
    expected_reward: bool = field(default=False, metadata={"help": "Rewards averaged over verdicts (T > 0)."})
    on_policy_positions: str = field(default="reached", metadata={"help": "'reached' or 'all' (opd)."})
    proximity_weight: float = field(default=0.0, metadata={"help": "eta of the proximity reward; literal: 0.5."})
    proximity_threshold: float = field(default=5.0, metadata={"help": "epsilon of the proximity reward, nats."})
    advantages: str = field(default="standardized", metadata={"help": "'standardized' or 'leave_one_out'."})
    clip_range: float = field(default=0.2, metadata={"help": "PPO's clip."})
    num_iterations: int = field(default=1, metadata={"help": "Gradient steps on each batch of rollouts."})
    kl_coef: float = field(default=0.1, metadata={"help": "Weight of KL to the target along drafted windows."})
    text_kl_coef: float = field(default=1.0, metadata={"help": "Weight of KL to the target along the text."})
    adaw_start: float = field(default=0.3, metadata={"help": "Share of steps before ADAW; 1: never."})
    cost_ratio: float | None = field(default=None, metadata={"help": "gamma of the rewards; None: measured."})
    muon: float = field(
        default=0.0, metadata={"help": "Train hidden matrices by Muon; size of its steps in AdamW's. 0: AdamW alone."}
    )
    chunk_size: int = field(default=1024, metadata={"help": "Positions held vocabulary-wide at once."})
    verify_tokens: int = field(default=4096, metadata={"help": "Draft tokens in one packed target forward."})
    eval_prompts: int = field(default=16, metadata={"help": "Held-out prompts decoded at each evaluation."})
    eval_prompt_length: int = field(default=96, metadata={"help": "Tokens of a prompt taken from a text row."})
    eval_new_tokens: int = field(default=64, metadata={"help": "Tokens decoded behind each prompt."})
    calibrate_at_end: bool = field(default=True, metadata={"help": "Fit the window rule at the end."})
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": 'Evaluation metric; "eval_acceptance_length" where one is needed and none is given.'},
    )
    greater_is_better: bool | None = field(default=None, metadata={"help": "Follows metric_for_best_model."})

    def _choose_best_metric(self) -> None:
        """Acceptance length, where a metric is needed and none was given; there is no evaluation loss."""
        if self.metric_for_best_model is None:
            on_plateau = self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
            if not (self.load_best_model_at_end or on_plateau or self.save_strategy == SaveStrategy.BEST):
                return
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

    def __post_init__(self):
        # What the trainer's own data path needs; a drafter's forward takes none of the data's columns by name.
        self.remove_unused_columns = False
        self.dataloader_drop_last = True
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            self.ddp_find_unused_parameters = False
        self._choose_best_metric()
        super().__post_init__()
        if isinstance(self.objective, dict):
            self.objective = objective_text(self.objective)
        if self.text_weighting is None:
            self.text_weighting = "decay" if self._uses(("expected_length",)) else "visited"
        if isinstance(self.regenerate_temperature, int | float):
            self.regenerate_temperature = [float(self.regenerate_temperature)]
        self.weights_at(0.0)
        for name, accepted in (
            ("advantages", ("standardized", "leave_one_out")),
            ("group_reward", GROUP_REWARDS),
            ("on_policy_positions", ("reached", "all")),
            ("verify_with", ("auto", "target")),
            ("text_weighting", ("decay", "visited")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {list(accepted)}.")
        for name, least, meaning in (
            ("max_window", 1, "draft tokens (K)"),
            ("num_rollouts", 2 if self._uses(GROUP_TERMS) else 1, "windows of a group (G), which are compared"),
            ("num_prefixes", 1, "prefixes of a sequence (N)"),
            ("num_iterations", 1, "gradient steps"),
            ("unroll_steps", 1, "draft steps"),
            ("max_length", 4, "tokens"),
            ("max_new_tokens", 1, "tokens"),
            ("chunk_size", 1, "positions"),
            ("verify_tokens", 1, "tokens"),
            ("eval_prompts", 0, "prompts"),
            ("eval_prompt_length", 1, "tokens"),
            ("eval_new_tokens", 1, "tokens"),
        ):
            if (given := getattr(self, name)) is not None and given < least:
                raise ValueError(f"{name}: {given} given; at least {least} {meaning} are needed.")
        for name in ("rollout_temperature", "unroll_decay", "lk_decay", "proximity_threshold", "clip_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be above 0.")
        for name in (
            "target_temperature", "ce_weight", "kl_weight", "speedup_weight",
            "throughput_weight", "proximity_weight", "kl_coef", "text_kl_coef", "adaw_start", "muon",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must not be negative.")
        if self.verify_text_as_written and self.target_temperature > 0:
            raise ValueError(
                f"verify_text_as_written: True and target_temperature={self.target_temperature} given; leave out one: "
                "all text is verified at one temperature, or each at its own."
            )
        if not self.regenerate_temperature or min(self.regenerate_temperature) < 0:
            raise ValueError(
                f"regenerate_temperature: {self.regenerate_temperature} given; pass numbers that are not negative."
            )
        if self.cost_ratio is not None and not 0 <= self.cost_ratio < float("inf"):
            raise ValueError(f"cost_ratio: {self.cost_ratio} given; pass a finite number of at least 0, or None.")
        launched = [os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED")]
        if self.muon and (self.fsdp or self.deepspeed or "true" in map(str.lower, launched)):
            raise ValueError("muon: it orthogonalises whole matrices, which FSDP and DeepSpeed split. Leave it out.")
        if self.muon and self.optim != type(self).optim:
            raise ValueError(
                f"muon: given with optim={getattr(self.optim, 'value', self.optim)!r}. Leave one of them out."
            )
        if self.uses_rollouts and self.max_length <= self.max_window:
            raise ValueError(
                f"max_length: {self.max_length} tokens hold no window of max_window={self.max_window}; raise it."
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.group_reward == "own":
            if self.candidate_group is not None:
                raise ValueError('candidate_group: without effect with group_reward="own"; give "best" or "marginal".')
            return
        size = self.num_rollouts if self.candidate_group is None else self.candidate_group
        if size < 1 or self.num_rollouts % size or (self.group_reward == "best" and size == self.num_rollouts):
            raise ValueError(
                f"candidate_group: {size} candidates given with num_rollouts={self.num_rollouts} and "
                f"group_reward={self.group_reward!r}. It must divide num_rollouts, and leave something to compare: "
                "less than num_rollouts with 'best'."
            )
        if self.expected_reward:
            raise ValueError("expected_reward: the best of a group is taken from sampled verdicts; leave it out.")

    # -- the objective

    def weights_at(self, progress: float) -> dict[str, float]:
        """The terms minimised at a share of the training, with their weights."""
        phases = parse_objective(self.objective, self.ce_weight, self.kl_weight)
        return dict([phase for phase in phases if phase.start <= progress][-1].weights)

    def anchors(self, weights: dict[str, float]) -> dict[str, float]:
        """The terms along the text among `weights`; `ppow` brings its own, KL(P||Q) by `text_kl_coef`."""
        anchors = {name: weight for name, weight in weights.items() if name in TEXT_TERMS}
        own = weights.get("ppow", 0.0) * self.text_kl_coef
        if own > 0:
            anchors["kl"] = anchors.get("kl", 0.0) + own
        return {name: weight for name, weight in anchors.items() if weight > 0}

    @property
    def uses_rollouts(self) -> bool:
        """Whether any phase of the objective drafts windows and has them verified."""
        return self._uses(WINDOW_TERMS)

    def _uses(self, terms: tuple[str, ...]) -> bool:
        phases = parse_objective(self.objective, self.ce_weight, self.kl_weight)
        return any(name in terms for phase in phases for name in phase.weights)
