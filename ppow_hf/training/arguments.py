"""Arguments of PPOWTrainer, each with its source. Knows numbers and their ranges only."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

OBJECTIVES = ("supervised", "ppow")


@dataclass
class PPOWTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`PPOWTrainer`], besides those of transformers' `TrainingArguments`.

    Args:
        > Parameters that control what is trained

        objective (`str`, *optional*, defaults to `"ppow"`):
            `"supervised"`: cross-entropy and forward KL on text; `"ppow"`: reinforcement learning on windows [paper].
        train_embeddings (`bool`, *optional*, defaults to `False`):
            Whether an eagle drafter's token embeddings are trained; as in EAGLE-3 they stay the target's.

        > Parameters that control the data

        max_length (`int`, *optional*, defaults to `256`): tokens in a training sequence.
        packing (`bool`, *optional*, defaults to `True`): whether `text` rows are joined and cut into full sequences.
        regenerate (`bool`, *optional*, defaults to `False`):
            Whether the target writes the completions itself first. Drafters must learn the target's own text.
        regenerate_temperature (`float`, *optional*, defaults to `0.0`), max_new_tokens (`int`, *optional*, defaults to
            `128`), regenerate_batch_size (`int`, *optional*, defaults to `16`): how it writes them.

        > Parameters of the supervised objective

        ce_weight (`float`, *optional*, defaults to `0.1`), kl_weight (`float`, *optional*, defaults to `1.0`):
            Weights of -log Q(text) and of KL(P||Q) [ours].
        unroll_steps (`int`, *optional*, defaults to `4`):
            Draft steps that an eagle drafter is unrolled on its own features (EAGLE-3's training-time test).
        unroll_decay (`float`, *optional*, defaults to `0.9`): weight of each further step.

        > Parameters of the PPOW objective

        max_window (`int`, *optional*, defaults to `10`): tokens in a window, K [paper].
        num_rollouts (`int`, *optional*, defaults to `8`): windows drafted from each chosen prefix, G [paper].
        num_prefixes (`int`, *optional*, defaults to `8`): prefixes chosen from each sequence, N [ours].
        rollout_temperature (`float`, *optional*, defaults to `0.3`):
            Temperature at which the drafter drafts; the literal method drafts at 1.0 [paper], which raised sampled and
            lowered greedy acceptance in our study [ours].
        target_temperature (`float`, *optional*, defaults to `0.0`):
            0: a draft token is kept if it is the target's choice; above 0: by rejection sampling.
        speedup_weight (`float`, *optional*, defaults to `1.0`): weight of k / (k * gamma + 1) [paper].
        throughput_weight (`float`, *optional*, defaults to `0.0`): weight of (k + 1) / (K * gamma + 1) [ours].
        proximity_weight (`float`, *optional*, defaults to `0.5`): eta [paper; its value is ours].
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

        > Parameters that control memory and evaluation

        chunk_size (`int`, *optional*, defaults to `1024`): positions whose vocabulary-wide tensors are held at once.
        verify_tokens (`int`, *optional*, defaults to `4096`): draft tokens of a sequence in one packed target forward.
        eval_prompts (`int`, *optional*, defaults to `16`): held-out prompts that are decoded at each evaluation.
        eval_prompt_length (`int`, *optional*, defaults to `96`): tokens of a prompt taken from a `text` row.
        eval_new_tokens (`int`, *optional*, defaults to `64`): tokens decoded behind each.
        calibrate_at_end (`bool`, *optional*, defaults to `True`): whether training ends by fitting the window rule.
    """

    objective: str = field(default="ppow", metadata={"help": "'supervised' or 'ppow'."})
    train_embeddings: bool = field(default=False, metadata={"help": "Train an eagle drafter's token embeddings too."})
    max_length: int = field(default=256, metadata={"help": "Tokens in a training sequence."})
    packing: bool = field(default=True, metadata={"help": "Join text rows and cut them into full sequences."})
    regenerate: bool = field(default=False, metadata={"help": "Let the target write the completions first."})
    regenerate_temperature: float = field(default=0.0, metadata={"help": "Temperature of those completions."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion of regenerate."})
    regenerate_batch_size: int = field(default=16, metadata={"help": "Prompts completed at once."})
    ce_weight: float = field(default=0.1, metadata={"help": "Weight of -log Q(text) (supervised)."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of KL(P||Q) (supervised)."})
    unroll_steps: int = field(default=4, metadata={"help": "Unrolled draft steps of an eagle drafter (supervised)."})
    unroll_decay: float = field(default=0.9, metadata={"help": "Weight of each further unrolled step."})
    max_window: int = field(default=10, metadata={"help": "Tokens in a window, K [paper]."})
    num_rollouts: int = field(default=8, metadata={"help": "Windows from each chosen prefix, G [paper]."})
    num_prefixes: int = field(default=8, metadata={"help": "Prefixes chosen from each sequence, N."})
    rollout_temperature: float = field(default=0.3, metadata={"help": "Temperature of drafting; literal: 1.0."})
    target_temperature: float = field(default=0.0, metadata={"help": "0: greedy verification, else sampling."})
    speedup_weight: float = field(default=1.0, metadata={"help": "Weight of k/(k*gamma+1) [paper]."})
    throughput_weight: float = field(default=0.0, metadata={"help": "Weight of (k+1)/(K*gamma+1) [ours]."})
    proximity_weight: float = field(default=0.5, metadata={"help": "eta of the proximity reward."})
    proximity_threshold: float = field(default=5.0, metadata={"help": "epsilon of the proximity reward, nats."})
    advantages: str = field(default="standardized", metadata={"help": "'standardized' or 'leave_one_out'."})
    clip_range: float = field(default=0.2, metadata={"help": "PPO's clip."})
    num_iterations: int = field(default=1, metadata={"help": "Gradient steps on each batch of rollouts."})
    kl_coef: float = field(default=0.1, metadata={"help": "Weight of KL to the target along drafted windows."})
    text_kl_coef: float = field(default=1.0, metadata={"help": "Weight of KL to the target along the text."})
    adaw_start: float = field(default=0.3, metadata={"help": "Share of steps before ADAW; 1: never."})
    cost_ratio: float | None = field(default=None, metadata={"help": "gamma of the rewards; None: measured."})
    chunk_size: int = field(default=1024, metadata={"help": "Positions held vocabulary-wide at once."})
    verify_tokens: int = field(default=4096, metadata={"help": "Draft tokens in one packed target forward."})
    eval_prompts: int = field(default=16, metadata={"help": "Held-out prompts decoded at each evaluation."})
    eval_prompt_length: int = field(default=96, metadata={"help": "Tokens of a prompt taken from a text row."})
    eval_new_tokens: int = field(default=64, metadata={"help": "Tokens decoded behind each prompt."})
    calibrate_at_end: bool = field(default=True, metadata={"help": "Fit the window rule at the end."})

    def __post_init__(self):
        # What the trainer's own data path needs; a drafter's forward takes none of the data's columns by name.
        self.remove_unused_columns = False
        self.dataloader_drop_last = True
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: {self.objective!r} is not one of {list(OBJECTIVES)}.")
        if self.advantages not in ("standardized", "leave_one_out"):
            raise ValueError(f"advantages: {self.advantages!r} is not one of ['standardized', 'leave_one_out'].")
        for name, least, meaning in (
            ("max_window", 1, "draft tokens (K)"),
            ("num_rollouts", 2 if self.objective == "ppow" else 1, "windows of a group (G), which are compared"),
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
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} given; at least {least} {meaning} are needed.")
        for name in ("rollout_temperature", "unroll_decay", "proximity_threshold", "clip_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be above 0.")
        for name in (
            "target_temperature", "regenerate_temperature", "ce_weight", "kl_weight", "speedup_weight",
            "throughput_weight", "proximity_weight", "kl_coef", "text_kl_coef", "adaw_start",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must not be negative.")
        if self.cost_ratio is not None and not 0 <= self.cost_ratio < float("inf"):
            raise ValueError(f"cost_ratio: {self.cost_ratio} given; pass a finite number of at least 0, or None.")
        if self.objective == "ppow" and self.max_length <= self.max_window:
            raise ValueError(
                f"max_length: {self.max_length} tokens hold no window of max_window={self.max_window}; raise it."
            )
