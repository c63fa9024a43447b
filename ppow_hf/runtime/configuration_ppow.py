"""The drafter's configuration: what it is, which target it belongs to, and how its windows are chosen.

Knows no tensors. Travels to the Hub with the drafter's code, so it imports transformers only.
"""

import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

ARCHITECTURES = ("eagle", "standalone", "medusa", "block")
WINDOWS = ("kl", "fixed", "heuristic")
EAGLE_NORMS = ("norm_before_fc", "norm_before_residual", "norm_output")
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
MAX_APPENDED = 64  # tokens that may stand after a known vocabulary; each takes one more fingerprint to find out


def vocabulary_fingerprint(tokenizer) -> str:
    """Sixteen hexadecimal digits that stand for a tokenizer's vocabulary (tokens and their ids)."""
    return _fingerprint(tokenizer.get_vocab())


def _fingerprint(vocabulary: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def has_vocabulary(tokenizer, fingerprint: str) -> bool:
    """Whether a tokenizer's vocabulary has this `fingerprint`, or has it without added tokens at its end."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    last_first = sorted(vocabulary, key=vocabulary.__getitem__, reverse=True)
    for token in last_first[: MAX_APPENDED + 1]:
        if _fingerprint(vocabulary) == fingerprint:
            return True
        if token not in added:
            return False
        del vocabulary[token]
    return False


def warn_of_other_target(config: Any, target_name: str | None = None, tokenizer: Any = None) -> None:
    """Warn if a drafter of this `config` is used with a target of another name, or with another vocabulary.

    It works all the same and changes no token; it drafts worse. Names are compared without the folders they lie in.
    """
    trained = config.target_name_or_path
    if trained and target_name:
        places = [part.lower() for part in Path(target_name).parts]  # of a snapshot: models--user--name/snapshots/...
        last = trained.rstrip("/").split("/")[-1].lower()
        if last not in places and not any(place.endswith(f"--{last}") for place in places if "--" in place):
            warnings.warn(
                f"This drafter was trained for {trained!r} and is used with {target_name!r}. The output is the "
                "target's own all the same, but fewer drafts will be accepted: use a drafter of this target.",
                stacklevel=2,
            )
    expected = config.target_vocabulary_fingerprint
    if expected and tokenizer is not None and not has_vocabulary(tokenizer, expected):
        warnings.warn(
            f"This drafter was trained for a vocabulary with the fingerprint {expected}, and the tokenizer's is "
            f"{vocabulary_fingerprint(tokenizer)}: use the tokenizer of {trained or 'its target'}, or a drafter of "
            "this target.",
            stacklevel=2,
        )


def default_target_layers(num_layers: int) -> list[int]:
    """The three target layers an eagle drafter reads: k means the output of k decoder layers, `hidden_states[k]`.

    (2, N//2, N-3) as in EAGLE-3 for eight layers and more; spread evenly below the last layer on smaller targets. The
    last id N is avoided: it is after the final norm in transformers and before it in vLLM.
    """
    if num_layers >= 8:
        return [2, num_layers // 2, num_layers - 3]
    top = max(num_layers - 1, 0)
    return [top // 3, (2 * top) // 3, top]


def default_block_layers(num_layers: int) -> list[int]:
    """The target layers a block drafter reads: an eagle drafter's, each once, without the embeddings (0) if it can."""
    layers = sorted(set(default_target_layers(num_layers)))
    return layers[1:] if layers[0] == 0 and len(layers) > 1 else layers


class PPOWDrafterConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PPOWDrafter`].

    Args:
        architecture (`str`, *optional*, defaults to `"eagle"`):
            `"eagle"`: the EAGLE-3 computation over the target's hidden states; `"standalone"`: a causal language model
            of its own; `"medusa"`: heads on the target's last state, one for each token of a window; `"block"`: a
            window in one forward over the target's states, as DFlash (2602.06036) and DSpark (2607.05147) do.
        draft_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the drafter's own transformer. For `"eagle"` a Llama configuration whose one layer's shape
            is used; for `"block"` a Qwen3 configuration; for `"standalone"` the configuration of any causal language
            model; not used by `"medusa"`.
        vocab_size (`int`, *optional*, defaults to `32000`):
            Width of the target's logits.
        draft_vocab_size (`int`, *optional*):
            Width of the drafter's own logits. `eagle` and `block` may have fewer tokens than the target (`d2t` maps
            them).
        target_hidden_size (`int`, *optional*): width of the target's hidden states (eagle, medusa, block).
        target_layer_ids (`list[int]`, *optional*):
            Target states that the drafter reads; id k is transformers' `hidden_states[k]`. Three for eagle; one or
            more, ascending, for block; for medusa the last one, after the final norm.
        shares_target_embeddings (`bool`, *optional*, defaults to `False`):
            Read the target's own token embeddings and hold none (eagle, block): they are neither saved nor trained,
            and are there once [`PPOWDrafter.attach_target`] was called, as generation and training do.
        shares_target_head (`bool`, *optional*, defaults to `False`):
            The same for the target's output head (block, without `draft_vocab_size`).
        norm_before_fc, norm_before_residual, norm_output (`bool`, *optional*, defaults to `False`):
            What speculators' eagle drafters do beside EAGLE-3's: normalize the target's states before `fc`; add to the
            layer's normalized state in place of the state; feed draft steps what is after the final norm.
        state_scales (`list[float]`, *optional*):
            What each of the target's states is multiplied by before `fc` (eagle), so that all come to it about as
            large, and the layer's additions count beside what they are added to [ours]. Exports multiply `fc` by them.
            `None`: nothing.
        medusa_heads (`int`, *optional*):
            Heads of a medusa drafter, the longest window it can draft; `None`: as many as `max_window`.
        medusa_layers (`int`, *optional*, defaults to `1`): residual layers of each head.
        block_size (`int`, *optional*):
            Tokens K that a block drafter drafts in one forward, its longest window; `None`: as many as `max_window`.
            The published fields of this name count the block: K + 1 in DFlash, where the anchor drafts nothing.
        sample_from_anchor (`bool`, *optional*, defaults to `False`):
            Whether the anchor, the newest token, drafts the window's first token (DSpark), and K - 1 mask tokens the
            others. Else K mask tokens draft (DFlash).
        mask_token_id (`int`, *optional*, defaults to `0`): token whose embedding stands for a token to be drafted.
        markov_rank (`int`, *optional*, defaults to `0`):
            Rank of the bias that a token adds to the next one's logits (DSpark's vanilla Markov head); 0: none.
        confidence_head (`bool`, *optional*, defaults to `False`):
            Whether a block drafter estimates each token's acceptance with a head of its own (DSpark). The window rule
            reads it.
        target_name_or_path, target_revision, target_model_type (`str`, *optional*): the target it was trained for.
        target_vocabulary_fingerprint (`str`, *optional*): see [`vocabulary_fingerprint`].
        context_length (`int`, *optional*): longest sequence that drafter and target take together.

        > Settings of the window; each can be overridden for a call with [`PPOWDrafter.with_settings`].

        window (`str`, *optional*, defaults to `"kl"`):
            `"kl"`: adaptive, by calibrated acceptance probabilities and cost [ours]; `"fixed"`: always `max_window`;
            `"heuristic"`: transformers' rule, two more after a fully accepted window and one fewer otherwise.
        max_window (`int`, *optional*, defaults to `10`): longest window K [paper].
        cost_ratio (`float`, *optional*):
            gamma, seconds of a draft step over seconds of a one-token target forward; of a block drafter the step that
            gives the whole window. `None`: measured while decoding.
        verification_cost (`float`, *optional*):
            How much each further token adds to a target forward, in one-token forwards: v(W) = 1 + verification_cost *
            W. `None`: measured while decoding.
        lookup (`bool`, *optional*, defaults to `False`):
            Draft from the text as well: what followed its last few tokens where they came before (`window="kl"` and
            chains only; a call with another window, or with trees, goes without).
        calibration (`dict`, *optional*):
            Weights of the acceptance estimate for `"greedy"` and `"sampling"`, fitted at the end of training, see
            [`AcceptanceEstimator`].
    """

    model_type = "ppow_drafter"
    sub_configs = {"draft_config": AutoConfig}

    def __init__(
        self,
        architecture: str = "eagle",
        draft_config: PreTrainedConfig | dict[str, Any] | None = None,
        vocab_size: int = 32000,
        draft_vocab_size: int | None = None,
        target_hidden_size: int | None = None,
        target_layer_ids: list[int] | None = None,
        shares_target_embeddings: bool = False,
        shares_target_head: bool = False,
        norm_before_fc: bool = False,
        norm_before_residual: bool = False,
        norm_output: bool = False,
        state_scales: list[float] | None = None,
        medusa_heads: int | None = None,
        medusa_layers: int = 1,
        block_size: int | None = None,
        sample_from_anchor: bool = False,
        mask_token_id: int = 0,
        markov_rank: int = 0,
        confidence_head: bool = False,
        target_name_or_path: str | None = None,
        target_revision: str | None = None,
        target_model_type: str | None = None,
        target_vocabulary_fingerprint: str | None = None,
        context_length: int | None = None,
        window: str = "kl",
        max_window: int = 10,
        cost_ratio: float | None = None,
        verification_cost: float | None = None,
        lookup: bool = False,
        calibration: dict[str, Any] | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs,
    ):
        if isinstance(draft_config, dict) and "model_type" in draft_config:
            draft_config = AutoConfig.for_model(**draft_config)
        elif draft_config is None:
            family = "qwen3" if architecture == "block" else "llama"
            draft_config = AutoConfig.for_model(family, num_hidden_layers=1, vocab_size=vocab_size)
        if not isinstance(draft_config, PreTrainedConfig):
            raise ValueError(f"draft_config: {draft_config!r} is no configuration of a model, with its model_type.")
        self.architecture = architecture
        self.draft_config: Any = draft_config
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.target_hidden_size = target_hidden_size
        self.target_layer_ids = target_layer_ids
        self.shares_target_embeddings = shares_target_embeddings
        self.shares_target_head = shares_target_head
        self.norm_before_fc = norm_before_fc
        self.norm_before_residual = norm_before_residual
        self.norm_output = norm_output
        self.state_scales = state_scales
        # What is not given is `max_window` now, and stays that where `max_window` is changed later.
        self.medusa_heads = max_window if architecture == "medusa" and medusa_heads is None else medusa_heads
        self.medusa_layers = medusa_layers
        self.block_size = max_window if architecture == "block" and block_size is None else block_size
        self.sample_from_anchor = sample_from_anchor
        self.mask_token_id = mask_token_id
        self.markov_rank = markov_rank
        self.confidence_head = confidence_head
        self.target_name_or_path = target_name_or_path
        self.target_revision = target_revision
        self.target_model_type = target_model_type
        self.target_vocabulary_fingerprint = target_vocabulary_fingerprint
        self.context_length = context_length
        self.window = window
        self.max_window = max_window
        self.cost_ratio = cost_ratio
        self.verification_cost = verification_cost
        self.lookup = lookup
        self.calibration = calibration
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        kwargs.setdefault("tie_word_embeddings", bool(getattr(draft_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        check_settings(architecture=self.architecture)
        if self.shares_target_embeddings and self.architecture not in ("eagle", "block"):
            raise ValueError(
                "shares_target_embeddings: only an eagle or block drafter can share them, not a "
                f"{self.architecture} one. Leave it out."
            )
        self.check_sizes()
        check_settings(**{name: getattr(self, name) for name in CALL_SETTINGS if hasattr(self, name)})
        call_settings(self, {"lookup": self.lookup})
        self.check_transformer()
        self.check_window(self.max_window)
        self.check_layers()
        self.check_switches()
        self.check_scales()
        self.check_block()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers', but `ValueError` for the configuration of another model."""
        given = config_dict.get("model_type", cls.model_type)
        if given != cls.model_type:
            raise ValueError(f"model_type: a {given!r} given, not a drafter ({cls.model_type!r}). Pass a drafter.")
        return super().from_dict(config_dict, **kwargs)

    def check_sizes(self) -> None:
        """Raise `ValueError` for sizes that are no positive whole numbers, and for fields of another kind."""
        check_whole("vocab_size", self.vocab_size)
        sizes = (
            "draft_vocab_size",
            "target_hidden_size",
            "context_length",
            "medusa_heads",
            "medusa_layers",
            "block_size",
        )
        for name in sizes:
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=2 if name == "draft_vocab_size" else 1)
        for name, owner in {"medusa_heads": "medusa", "block_size": "block"}.items():
            value = getattr(self, name)
            if value is None:
                continue
            if self.architecture != owner:
                raise ValueError(
                    f"{name}: only a {owner} drafter has it. Leave it out, or take architecture={owner!r}."
                )
            if value > LONGEST["max_window"]:
                raise ValueError(f"{name}: {value} given; at most {LONGEST['max_window']} are drafted in a round.")
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size: {self.draft_vocab_size} given, and the target has {self.vocab_size} tokens only. "
                "Give fewer, or leave it out."
            )
        fitted = self.calibration
        if fitted is not None and not (isinstance(fitted, dict) and all(isinstance(v, dict) for v in fitted.values())):
            raise ValueError("calibration: it is not what training fits. Remove it, or calibrate again.")

    def check_transformer(self) -> None:
        """Raise `ValueError` for a shape that the layers of an eagle or block drafter cannot have."""
        if self.architecture not in ("eagle", "block"):
            return
        draft = self.draft_config
        for name in SHAPE:
            check_whole(name, getattr(draft, name, None))
        if draft.num_attention_heads % draft.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {draft.num_key_value_heads} given; num_attention_heads, "
                f"{draft.num_attention_heads}, must be a multiple of it."
            )
        if draft.head_dim % 2:
            raise ValueError(f"head_dim: {draft.head_dim} given; rotary positions need an even number.")
        if draft.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act: {draft.hidden_act!r} given, which transformers does not know; 'silu' is usual."
            )

    def check_layers(self) -> None:
        """Raise `ValueError` for layer ids that no target can have, or not as many as the architecture reads."""
        ids = self.target_layer_ids
        if ids is None:
            return
        whole = isinstance(ids, list | tuple) and all(map(is_whole, ids))
        if self.architecture == "block":
            if not whole or not ids or min(ids) < 0 or list(ids) != sorted(set(ids)):
                raise ValueError(
                    f"target_layer_ids: {ids!r} given; a block drafter reads one or more of the target's states, "
                    "numbered from 0, in ascending order."
                )
            return
        count = {"eagle": 3, "medusa": 1, "standalone": 0}[self.architecture]
        if not whole or min(ids, default=0) < 0 or len(ids) != count:
            raise ValueError(
                f"target_layer_ids: {ids!r} given; a {self.architecture} drafter reads {count} of the target's "
                "states, numbered from 0."
            )

    def check_switches(self) -> None:
        """Raise `ValueError` for what is on or off and is neither, or is on in a drafter of another architecture."""
        of_block = ("shares_target_head", "sample_from_anchor", "confidence_head")
        for name in (*of_block, *EAGLE_NORMS):
            value, owner = getattr(self, name), "a block" if name in of_block else "an eagle"
            _check_flag(name, value)
            if value and self.architecture != owner.split()[1]:
                raise ValueError(f"{name}: only {owner} drafter has it, not a {self.architecture} one. Leave it out.")

    def check_scales(self) -> None:
        """Raise `ValueError` for `state_scales` that are not one positive number for each of the target's states."""
        scales = self.state_scales
        if scales is None:
            return
        if self.architecture != "eagle" or self.norm_before_fc:
            other = "norm_before_fc" if self.norm_before_fc else f"a {self.architecture} drafter"
            raise ValueError(f"state_scales: only an eagle drafter without norm_before_fc has them, not {other}.")
        numbers = isinstance(scales, list | tuple) and all(isinstance(s, float) or is_whole(s) for s in scales)
        if not numbers or len(scales) != 3 or not all(0 < scale < float("inf") for scale in scales):
            raise ValueError(f"state_scales: {scales!r} given; pass a positive number for each of the three states.")

    def check_block(self) -> None:
        """Raise `ValueError` for fields of a block drafter that are out of range, or given to another one."""
        block = self.architecture == "block"
        rank, mask = self.markov_rank, self.mask_token_id
        check_whole("markov_rank", rank, least=0, meaning=" (0: no Markov head)")
        if rank and not block:
            raise ValueError(f"markov_rank: only a block drafter has it, not a {self.architecture} one. Leave it out.")
        if not is_whole(mask) or not 0 <= mask < self.vocab_size:
            raise ValueError(
                f"mask_token_id: {mask!r} given; it is one of the target's {self.vocab_size} tokens, counted from 0."
            )
        if self.shares_target_head and self.draft_vocab_size is not None:
            raise ValueError(
                f"shares_target_head: the target's head gives all {self.vocab_size} tokens, and draft_vocab_size is "
                f"{self.draft_vocab_size}. Leave out one of the two."
            )

    @property
    def hidden_size(self) -> int:
        """Width of the draft model's states, from which DeepSpeed's `auto` settings are computed."""
        return self.draft_config.hidden_size

    @property
    def one_step(self) -> bool:
        """Whether the drafter gives a whole window in one step."""
        return self.architecture == "block"

    @property
    def longest_window(self) -> int | None:
        """The longest window that can be drafted at all: a medusa drafter's heads, a block; `None`: no limit."""
        return {"medusa": self.medusa_heads, "block": self.block_size}.get(self.architecture)

    def check_window(self, max_window: int) -> None:
        """Raise `ValueError` when a drafter of this configuration cannot draft windows of `max_window` tokens."""
        longest = self.longest_window
        if longest is None or max_window <= longest:
            return
        if self.architecture == "block":
            raise ValueError(
                f"max_window: {max_window} given, but this block drafter drafts {longest} tokens in its one forward. "
                "Give at most that many, or make a drafter for longer windows."
            )
        raise ValueError(
            f"max_window: {max_window} given, but this medusa drafter has {longest} heads, one for each token of a "
            "window. Give at most that many, or make a drafter for longer windows."
        )


# What a call may set, and what the longest of it are: beyond, a round never pays.
CALL_SETTINGS = ("window", "max_window", "cost_ratio", "verification_cost", "lookup", "tree_nodes", "tree_branches")
LONGEST = {"max_window": 1024, "tree_nodes": 4096, "tree_branches": 256}


def check_settings(**settings: Any) -> None:
    """Raise `ValueError` for a setting that is unknown or out of range, naming it and what is accepted."""
    for name, value in settings.items():
        if name in LONGEST and isinstance(value, int) and value > LONGEST[name]:
            raise ValueError(f"{name}: {value} given; at most {LONGEST[name]} are drafted in a round.")
        if name in ("architecture", "window"):
            accepted = {"architecture": ARCHITECTURES, "window": WINDOWS}[name]
            if value not in accepted:
                raise ValueError(f"{name}: {value!r} is not one of {list(accepted)}.")
        elif name == "max_window":
            check_whole(name, value, meaning=" draft token")
        elif name in ("cost_ratio", "verification_cost"):
            number = isinstance(value, float) or is_whole(value)
            if value is not None and not (number and 0 <= value < float("inf")):
                raise ValueError(f"{name}: {value!r} is not a finite number of at least 0 (or None: measured).")
        elif name == "lookup":
            _check_flag(name, value)
        elif name == "tree_nodes":
            if value is not None:
                check_whole(name, value, meaning=" node (or None: chains)")
        elif name == "tree_branches":
            check_whole(name, value, meaning=" branch")
        else:
            raise ValueError(f"{name}: not a setting of a call; accepted are {', '.join(CALL_SETTINGS)}.")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int = 1, meaning: str = "") -> None:
    if not is_whole(value) or value < least:
        raise ValueError(f"{name}: {value!r} is not a whole number of at least {least}{meaning}.")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not True or False.")


def call_settings(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The window settings of a call: the `given` ones, and the configuration's where a call gives none.

    Raises `ValueError` where look-up is asked for together with another window than `"kl"` or with trees, and for
    branches without trees.
    """
    if given.get("tree_branches") is not None and given.get("tree_nodes") is None:
        raise ValueError(
            f"tree_branches: {given['tree_branches']} given without tree_nodes, so that chains are drafted. Give both."
        )
    names = ("window", "max_window", "cost_ratio", "verification_cost")
    settings = {name: given.get(name, getattr(config, name)) for name in names}
    adaptive_chains = settings["window"] == "kl" and given.get("tree_nodes") is None
    lookup = given.get("lookup", config.lookup and adaptive_chains)
    if lookup and not adaptive_chains:
        other = f"window={settings['window']!r}" if settings["window"] != "kl" else f"tree_nodes={given['tree_nodes']}"
        raise ValueError(
            f"lookup: it goes with window='kl' and chains only, and {other} was given. Leave out one of the two."
        )
    return settings | {"lookup": lookup}
