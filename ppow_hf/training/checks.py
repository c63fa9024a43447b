"""Whether a drafter, a target, a tokenizer and data belong together: clear errors before anything is computed."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from transformers import EarlyStoppingCallback, ProcessorMixin, Trainer, TrainerCallback, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..data.sequences import SequenceDataset
from ..data.targets import is_split
from ..measure.evaluation import EVALUATION_METRICS
from ..runtime.compatibility import check_layers, check_target, check_width, num_layers, rotary_change
from ..runtime.configuration_ppow import has_vocabulary, vocabulary_fingerprint
from ..runtime.modeling_ppow import PPOWDrafter
from ..runtime.target_weights import target_width
from .arguments import PPOWTrainingArguments
from .objective import WINDOW_TERMS
from .recorded_states import StateRecord
from .rollout import written_prefixes
from .target import FrozenTarget

logger = logging.get_logger(__name__)

LOOKED_AT = 500  # sequences, to estimate how many hold windows
ENOUGH_WITH_WINDOWS = 0.25  # of the sequences; below it is said
# Options of transformers' Trainer that have no meaning here.
UNSUPPORTED = {
    "compute_metrics": "evaluation decodes prompts with the drafter and has no predictions to hand to a function.",
    "preprocess_logits_for_metrics": "evaluation decodes prompts with the drafter and keeps no logits.",
    "compute_loss_func": "the loss is the objective's; choose its terms with `objective`.",
    "model_init": "the target's own drafter is trained; pass it as `model`.",
    "data_collator": "sequences are put together by `collate_sequences`.",
}


def check_pair(drafter: Any, target: Any, tokenizer: Any, args: Any) -> None:
    """Raise `ValueError` when drafter, target and tokenizer do not belong together, or `args` is of another class; the
    drafter's window is taken where `args` have none."""
    if not isinstance(drafter, PPOWDrafter):
        raise ValueError(
            f"model: a {type(drafter).__name__} given; PPOWTrainer trains a PPOWDrafter. Make one with "
            "PPOWDrafter.from_target(target)."
        )
    if not isinstance(args, PPOWTrainingArguments):
        raise ValueError(f"args: a {type(args).__name__} given; PPOWTrainer needs PPOWTrainingArguments.")
    args.choose_window(drafter.config)
    if isinstance(target, PPOWDrafter) or not isinstance(target, nn.Module):
        raise ValueError(
            f"target_model: a {type(target).__name__} given, not a target. Pass the causal language model that the "
            "drafter drafts for."
        )
    check_target(target)
    config, text = drafter.config, target.config.get_text_config()
    width = target_width(target)
    check_width(config.vocab_size, width)
    if config.target_layer_ids and config.target_hidden_size != text.hidden_size:
        raise ValueError(
            f"target_model: its hidden size is {text.hidden_size}, and this {config.architecture} drafter reads "
            f"states of {config.target_hidden_size}. Use the target it was made for, or make a drafter with "
            "from_target."
        )
    check_layers(config.target_layer_ids, num_layers(text), "model")
    if problems := drafter.weight_problems():
        raise ValueError(f"model: it cannot be trained: {'; '.join(problems)}. Load or make it again.")
    kind, border = rotary_change(target)
    longest = args.max_length + args.max_window
    if kind is not None and longest > border:
        raise ValueError(
            f"max_length: with max_window it gives {longest} tokens, and the target's rotary embedding ({kind}) "
            f"changes after {border}, so that shorter texts would not have the states of decoding. Lower max_length."
        )
    if tokenizer is None:
        return
    is_processor = isinstance(tokenizer, ProcessorMixin)
    if is_processor or not callable(getattr(tokenizer, "get_vocab", None)):
        whose = "processor.tokenizer" if is_processor else "AutoTokenizer.from_pretrained(...)"
        raise ValueError(
            f"processing_class: a {type(tokenizer).__name__} given, not a tokenizer. Pass processing_class={whose}."
        )
    if len(tokenizer) > width:
        raise ValueError(
            f"processing_class: the tokenizer has {len(tokenizer)} tokens and the target's logits only {width}. Pass "
            "the target's own tokenizer."
        )
    known = config.target_vocabulary_fingerprint
    if known and not has_vocabulary(tokenizer, known):
        raise ValueError(
            f"processing_class: its vocabulary ({vocabulary_fingerprint(tokenizer)}) is not the one that the drafter "
            f"was trained with ({known}). Pass the tokenizer of {config.target_name_or_path or 'its target'}."
        )


def check_supported(options: dict[str, Any]) -> None:
    """Raise `ValueError` for an option of Trainer that this trainer would take and ignore."""
    for name, reason in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}: {reason} Leave it out.")


def check_evaluation(args: PPOWTrainingArguments, eval_dataset: Any) -> None:
    """Raise `ValueError` for evaluations without data, and for a best metric that they do not give."""
    if eval_dataset is None and args.eval_strategy != IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy: {args.eval_strategy.value!r} given without data to evaluate on. Pass eval_dataset, or "
            "leave it out."
        )
    parts = eval_dataset if isinstance(eval_dataset, Mapping) else ()
    names = [*EVALUATION_METRICS, *(f"{part}_{name}" for part in parts for name in EVALUATION_METRICS)]
    best = args.metric_for_best_model
    if eval_dataset is not None and best is not None and best.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model: {best!r} given, and evaluation gives {names}. Pass one of them.")


def check_libraries(args: PPOWTrainingArguments, drafter: PPOWDrafter) -> None:
    """Raise as transformers does, but before texts are written, for a library of `report_to` or `optim` that is
    missing."""
    for callback in get_reporting_integration_callbacks(args.report_to):
        callback()
    Trainer.get_optimizer_cls_and_kwargs(args, drafter)


def check_schedule(args: PPOWTrainingArguments) -> None:
    """Raise `ValueError` for a schedule of the learning rate that transformers cannot make as it is asked for."""
    if not isinstance(args.lr_scheduler_kwargs, dict | None):
        raise ValueError(
            f"lr_scheduler_kwargs: {args.lr_scheduler_kwargs!r} given; pass a dictionary, or JSON of one."
        )
    given, optimizer = args.lr_scheduler_kwargs, SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 2, scheduler_specific_kwargs=dict(given or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs: {given} given for the schedule {str(args.lr_scheduler_type.value)!r}: {error}. "
            "Pass what that schedule takes."
        ) from error


def check_callbacks(args: PPOWTrainingArguments, callbacks: Iterable[Any]) -> None:
    """Raise `ValueError` for what is no callback, and for early stopping without evaluations; it stops by acceptance
    length where `metric_for_best_model` was not given."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ValueError(f"callbacks: {callback!r} is no TrainerCallback. Pass objects or classes of that.")
        if not issubclass(kind, EarlyStoppingCallback):
            continue
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError("callbacks: an EarlyStoppingCallback given without evaluations. Set eval_strategy.")
        args.choose_best_metric()


def check_confidence(drafter: PPOWDrafter, args: PPOWTrainingArguments) -> None:
    """Raise `ValueError` when a confidence head is to be trained that is not there; warn of one for no engine."""
    if drafter.config.confidence_head and not drafter.config.markov_rank:
        logger.warning(
            "confidence_head: no engine serves one without a Markov head, so that this drafter cannot be exported. "
            "Give markov_rank too, or leave it out."
        )
    if not drafter.config.confidence_head and any("confidence" in phase.weights for phase in args.phases):
        raise ValueError(
            f"objective: {args.objective!r} trains a confidence head, and this {drafter.config.architecture} drafter "
            'has none. Make one with architecture="block" and confidence_head=True, or leave the term out.'
        )


def check_noise(drafter: PPOWDrafter, target: Any, args: PPOWTrainingArguments) -> None:
    """Raise `ValueError` for noise on embeddings where the drafter has none, or reads its target's."""
    own = drafter.get_input_embeddings()
    if args.neftune_noise_alpha is not None and own in (None, target.get_input_embeddings()):
        raise ValueError(
            f"neftune_noise_alpha: {args.neftune_noise_alpha} given, but this drafter has no token embeddings of its "
            "own to add noise to. Leave it out, or pass train_embeddings=True with an eagle or block drafter."
        )


def check_token_ids(sequences: SequenceDataset, width: int) -> None:
    """Raise `ValueError` for token ids that the target does not have."""
    if sequences.largest_token_id >= width:
        raise ValueError(
            f"train_dataset: it holds the token id {sequences.largest_token_id}, and the target has 0 to {width - 1}. "
            "Prepare the data with the target's own tokenizer."
        )


def check_lengths(sequences: SequenceDataset, args: PPOWTrainingArguments, context_length: int | None) -> None:
    """Raise `ValueError` when a training sequence is longer than `max_length` or than the models' context, or holds no
    token after another."""
    shortest = int(sequences.lengths.argmin())
    if sequences.lengths[shortest] < 2:
        raise ValueError(
            f"train_dataset: sequence {shortest} has {int(sequences.lengths[shortest])} tokens, so that none "
            "follows another. Leave out sequences of fewer than 2."
        )
    longest = int(sequences.lengths.max())
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


def check_prefixes(sequences: SequenceDataset, first_prefix: int) -> None:
    """Raise `ValueError` when no sequence has a token to learn after a prefix that can be drafted from."""
    if not any(bool(sequences[row]["loss_mask"][first_prefix + 1 :].any()) for row in range(len(sequences))):
        raise ValueError(
            f"train_dataset: no sequence has a token to learn after its first {first_prefix + 1}, where windows of "
            "this drafter begin. Give longer sequences, or others to learn."
        )


def check_masks(target: FrozenTarget, args: PPOWTrainingArguments) -> None:
    """Raise `ValueError` when drafted windows would be read by a target whose attention takes no masks of ours."""
    attention = target.model.config._attn_implementation
    if args.uses_rollouts and attention not in ("eager", "sdpa"):
        raise ValueError(
            f"target_model: loaded with attn_implementation={attention!r}, which takes no masks of our own, and "
            f"objective={args.objective!r} has drafted windows read under one. Load the target with "
            'attn_implementation="sdpa", or train by terms along the text, such as objective="supervised".'
        )


def check_recorded(
    record: StateRecord, drafter: PPOWDrafter, args: PPOWTrainingArguments, train_dataset: Any, has_target: bool
) -> None:
    """Raise `ValueError` for what takes a forward of the target, where its recorded states are trained from."""
    if train_dataset is not None:
        raise ValueError("train_dataset: recorded states come with the texts that they are of. Leave it out.")
    if args.metric_for_best_model is not None and not has_target:
        raise ValueError(
            f"metric_for_best_model: {args.metric_for_best_model!r} is measured by decoding with the target, and only "
            "its recorded states are given. Pass the target too, or leave it out."
        )
    if not args.uses_rollouts:
        return
    weights = {name: weight for phase in args.phases for name, weight in phase.weights.items() if name in WINDOW_TERMS}
    names, reason = " + ".join(weights), args.obstacle_to_text_verification(weights)
    if reason is None:
        share = share_with_windows(record.sequences, drafter, args)
        if share == 0:
            reason = "no sequence that holds a window that the target wrote at T = 0"
        elif share < ENOUGH_WITH_WINDOWS:
            logger.warning(
                f"objective: {names} learns from windows that the text verifies, and {share:.1%} of the sequences "
                "hold one that the target wrote at T = 0; the others teach nothing. Record more of `ppow write "
                "--temperature 0`, or leave the others out."
            )
    if reason is not None:
        raise ValueError(
            f"objective: {names} with {reason} has windows verified by new forwards of the target, which recorded "
            "states do not give. Train with the target, or by terms along the text, such as objective='supervised'."
        )
    if args.cost_ratio is None and not has_target:
        raise ValueError(
            f"cost_ratio: None given; the rewards of {names} weigh it, and it is measured with the target. Pass it "
            "(0.1, say), or the target too."
        )


def share_with_windows(sequences: SequenceDataset, drafter: PPOWDrafter, args: PPOWTrainingArguments) -> float:
    """The share of sequences, of some hundred that lie evenly, with a window that the target wrote at T = 0; 0 only
    where none of all has one."""
    limits = drafter.draft_model.first_prefix, args.max_window, drafter.config.context_length

    def has_windows(row: int) -> bool:
        return bool(written_prefixes(as_batch(sequences[row]), *limits).any())

    rows = range(len(sequences))
    looked_at = rows[:: max(len(rows) // LOOKED_AT, 1)]
    found = sum(map(has_windows, looked_at))
    return (found or any(map(has_windows, rows))) / len(looked_at)


def as_batch(item: dict[str, Any]) -> dict[str, Any]:
    """A sequence of a dataset as a batch of one."""
    return {name: value[None] for name, value in item.items() if name != "index"}


def is_placed(target: Any) -> bool:
    """Whether a target stays where it is: its device map, its number format or its processes have placed it."""
    return hasattr(target, "hf_device_map") or getattr(target, "is_quantized", False) or is_split(target)


def use_one_device(args: PPOWTrainingArguments) -> None:
    """Train on one of several visible devices, and say so: Trainer would split the batch in `DataParallel`, while the
    loss holds it whole."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible and one is used. Use them all with accelerate launch --num_processes "
            f"{args.n_gpu} -m ppow_hf.cli train ..."
        )
        args._n_gpu = 1


def check_reach(target: FrozenTarget, args: PPOWTrainingArguments) -> None:
    """Raise `ValueError` when drafted windows would be longer than a target with sliding windows attends."""
    if args.uses_rollouts and (target.sliding_window or math.inf) < args.max_length + args.max_window:
        raise ValueError(
            f"max_length: the target attends to the last {target.sliding_window} tokens only, fewer than "
            f"max_length + max_window = {args.max_length + args.max_window}. Lower max_length."
        )


def check_batch(sequences: SequenceDataset, args: PPOWTrainingArguments) -> None:
    """Raise `ValueError` when the sequences do not fill one batch."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.uses_rollouts and args.num_iterations > 1:  # such batches are repeated whole
        batch *= args.gradient_accumulation_steps
    if len(sequences) < batch:
        raise ValueError(
            f"train_dataset: {len(sequences)} sequences do not fill one batch of {batch}. Give more texts, or lower "
            "per_device_train_batch_size."
        )
