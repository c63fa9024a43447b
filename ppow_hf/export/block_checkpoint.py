"""A DFlash or DSpark checkpoint on disk, native or speculators', and everything that can be wrong with it.

The one reader behind both the export, which checks what it wrote, and the import of what others published. Knows files
and formats; knows nothing about drafters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .block_formats import DFLASH, DSPARK, SPECULATORS_DSPARK, block_shapes
from .checkpoint import Checkpoint, check_fields, named_target, read_config, read_tensors

logger = logging.get_logger(__name__)

OPTIONAL_TENSORS = ("embed_tokens.weight", "lm_head.weight", "t2d")  # absent: the target's; t2d follows from d2t
# What computes something else than DFlash and DSpark do, by the config field, and the values that do not.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, False),
    "causal": (None, False),
    "use_swa": (None, False),
    "is_neox_style": (None, True),
    "attention_value_scale": (None, 1.0),
    "attention_sink_bias": (None, False),
    "add_swa_attention_sink_bias": (None, False),
    "logit_scale": (None, 1.0),
    "use_aux_hidden_state": (None, True),
    "use_sliding_window": (None, False),
    "markov_head_type": (None, "vanilla"),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "projector_type": (None, "dspark"),
}
BLOCK_ARCHITECTURES = (DFLASH, DSPARK, SPECULATORS_DSPARK)


@dataclass
class BlockCheckpoint(Checkpoint):
    """What [`read_block`] found; `fields` are those of Qwen3.

    Args:
        mask_token_id, block_size, markov_rank, confidence_head, sample_from_anchor:
            As [`PPOWDrafterConfig`] means them, but for `block_size`, the published one.
    """

    mask_token_id: int | None
    block_size: int | None
    markov_rank: int
    confidence_head: bool
    sample_from_anchor: bool

    @property
    def drafted(self) -> int:
        """Tokens that a block drafts."""
        return (self.block_size or 0) - (not self.sample_from_anchor)

    def problems(self) -> list[str]:
        """Each way in which this is not a checkpoint that engines serve as it was trained; empty if none."""
        expected = block_shapes(self.fields, self.draft_vocab_size, self.markov_rank, self.confidence_head)
        optional = OPTIONAL_TENSORS if self.draft_vocab_size == self.vocab_size else ("embed_tokens.weight", "t2d")
        return [*self._config_problems(), *self.tensor_problems(expected, optional, "DFlash or DSpark")]

    def _config_problems(self) -> list[str]:
        found = []
        for name, usual in VARIANTS.items():
            given = _looked_up(self.config, self.fields, name)
            if given not in usual:
                found.append(f"{name}: {given!r}, a variant whose computation differs")
        kinds = set(self.fields.get("layer_types") or ["full_attention"])
        if kinds != {"full_attention"}:
            found.append(f"layer_types: {sorted(kinds)}, where every layer sees all of the text")
        if self.confidence_head and not _looked_up(self.config, self.fields, "confidence_head_with_markov"):
            found.append("confidence_head_with_markov: not true, where the head reads the Markov embedding as well")
        if self.drafted < 1:
            found.append(f"block_size: {self.block_size}, of which no token is drafted")
        if self.mask_token_id is None or not 0 <= self.mask_token_id < self.vocab_size:
            found.append(f"mask_token_id: {self.mask_token_id}, no token of the vocabulary")
        ids = self.layer_ids
        if not ids or list(ids) != sorted(set(ids)) or min(ids) < 1:
            found.append(f"target_layer_ids: {ids} as hidden_states, where ascending ids from 1 on are needed")
        return found


def _looked_up(config: dict[str, Any], fields: dict[str, Any], name: str) -> Any:
    """A field wherever it may stand."""
    for place in (config.get("dflash_config") or {}, config, fields):
        if place.get(name) is not None:
            return place[name]
    return None


def is_block_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a DFlash or DSpark drafter."""
    named = set(config.get("architectures") or []) & set(BLOCK_ARCHITECTURES)
    return bool(named) or config.get("speculators_model_type") in ("dflash", "dspark")


def read_block(folder: str | Path, argument: str = "checkpoint") -> BlockCheckpoint:
    """Read config.json and all tensors of a DFlash or DSpark checkpoint of either format.

    Raises `FileNotFoundError` or `ValueError` naming `argument` if `folder` holds no such checkpoint.
    """
    folder = Path(folder)
    config = read_config(folder, argument)
    if not is_block_config(config):
        raise ValueError(
            f"{argument}: {str(folder)!r} is a {config.get('architectures') or config.get('model_type')}, not a "
            f"DFlash or DSpark drafter. Accepted are {', '.join(BLOCK_ARCHITECTURES)}."
        )
    speculators = "speculators_model_type" in config
    fields = (config.get("transformer_layer_config") or {}) if speculators else config
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    check_fields(folder, fields, needed, argument)
    if speculators:
        is_dspark = config["speculators_model_type"] == "dspark"
        ids = config.get("aux_hidden_state_layer_ids")
    else:
        is_dspark = DFLASH not in config["architectures"]
        ids = _looked_up(config, fields, "target_layer_ids")
        ids = None if ids is None else [layer + 1 for layer in ids]
    from_anchor = _looked_up(config, fields, "sample_from_anchor")
    if from_anchor is None and is_dspark:
        logger.warning(
            f"{argument}: config.json of {str(folder)!r} does not say sample_from_anchor, whether the anchor's own "
            "place in a block drafts a token (some of speculators' earlier versions: false). True is taken; if next "
            "to nothing is accepted, write false there."
        )
    return BlockCheckpoint(
        config=config,
        fields=fields,
        tensors=read_tensors(folder, argument),
        layer_ids=None if ids is None else [int(layer) for layer in ids],
        mask_token_id=_looked_up(config, fields, "mask_token_id"),
        block_size=_looked_up(config, fields, "block_size"),
        markov_rank=int(_looked_up(config, fields, "markov_rank") or 0) if is_dspark else 0,
        confidence_head=bool(_looked_up(config, fields, "enable_confidence_head")) and is_dspark,
        sample_from_anchor=is_dspark if from_anchor is None else bool(from_anchor),
        target_name=named_target(config),
    )
