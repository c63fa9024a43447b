"""The target's side of a generation call: its cache, which columns of it are whose, and its forwards.

Knows the target's inputs and attention masks; knows nothing about drafters, distributions or window rules.

Rows of a batch share one cache. Draft tokens that were rejected stay in it unseen (attention_mask 0, explicit
position_ids) until they are too many, when the cache is compacted.
"""

import functools
import inspect
from typing import Any

import torch
from transformers import DynamicCache

from .compatibility import check_preparation
from .draft_session import (
    additive_mask,
    cache_argument,
    collect_target_states,
    compacting_columns,
    gather_columns,
    rearrange_cache,
)

COMPACT_AT = 0.25  # share of a cache's columns that no row can see
ALIBI = {"bloom", "mpt"}  # families with linear biases whose configuration does not say so
ATTENTION_KINDS = {"full_attention", "sliding_attention"}  # those whose masks we can make


def sliding_window(text: Any) -> int | None:
    """Tokens that sliding-window layers of a target with this text configuration attend to; `None` without any."""
    if getattr(text, "use_sliding_window", True) is False:
        return None
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return None
    return getattr(text, "sliding_window", None) or None


class TargetSession:
    """The target, its cache and its rows' columns, for one generation call.

    Args:
        target (`PreTrainedModel`): the target.
        state_layers (`list[int]`, *optional*): the hidden states that the drafter reads.
        input_ids (`[B, n]`), visible (`[B, n]` bool): the prompts, padded on the left where `visible` is False.
        cache (`DynamicCache`, *optional*): the one that `generate` made, or a filled one to go on from (one prompt).
        extra_inputs (`dict`): what else `generate` hands to the target's forwards (images and the like).
        trees (`bool`): whether trees will be verified, which takes masks of our own and a cache that forgets nothing.
        position_ids (`[1 or B, n]` or `[axes, B, n]`, *optional*): the prompts', as `generate` prepared them.
    """

    def __init__(self, target, state_layers, input_ids, visible, cache, extra_inputs, trees: bool, position_ids=None):
        self.target, self.state_layers, self.device = target, state_layers, input_ids.device
        self.visible = visible  # [B, columns of the cache and, before the prompt is read, of the prompt]
        self.positions = visible.sum(1)  # [B]: position of the token after everything in the cache
        self.ragged = len(input_ids) > 1 or not bool(visible.all())
        text = target.config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        self.layer_kinds = set(kinds) if kinds is not None else None
        self.window = sliding_window(text)
        # Layers that drop what slid out of their window count columns, holes too: keep all, and mask by position.
        self.by_position = self.window is not None and (self.ragged or trees)
        self._check_layers(trees)
        self.past = tokens_in_cache(cache, input_ids.shape[1])
        self._check_cache(cache, self.past, trees)
        self.cache: Any = cache if cache is not None and not self.by_position else DynamicCache()
        self._alone = not (self.ragged or self.by_position)  # the target can make its own masks and positions
        self.cache.activate_past_recording()
        self.extra_inputs = extra_inputs
        self._check_inputs(trees, position_ids)
        # What the target is given as position_ids, where they are not counted: [..., B, n] and, after them, [..., B]
        self.prompt_places = position_ids
        if position_ids is not None:
            self.prompt_places = position_ids.expand(*position_ids.shape[:-2], len(input_ids), -1)
            self.next_places = self.prompt_places[..., -1] + 1
        takes = inspect.signature(target.forward).parameters
        optional = ("position_ids", "logits_to_keep", "attention_mask", "output_router_logits")
        self.takes = {name: name in takes for name in optional}
        # ALiBi counts the mask's tokens (Bloom, Falcon) or the cache's columns (MPT), as do local layers (GPT-Neo):
        # holes must not stay among them.
        local = "local" in getattr(text, "attention_layers", ())
        self.by_columns = local or text.model_type in ALIBI or bool(getattr(text, "alibi", False))
        self._check_places(trees)
        self.cache_name = cache_argument(target)
        self.adapter_hooks = adapter_hooks(target) if self.ragged else []

    def _check_layers(self, trees: bool) -> None:
        name, kinds = type(self.target).__name__, self.layer_kinds or set()
        if (trees or self.ragged) and not kinds <= ATTENTION_KINDS:
            raise ValueError(
                f"{name} has layers of the kinds {sorted(kinds - ATTENTION_KINDS)}, whose masks only the model itself "
                "can make. Generate for one prompt at a time, without padding and without tree_nodes."
            )
        attention = self.target.config._attn_implementation
        if (trees or self.by_position) and attention not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation: {attention!r} takes no masks of our own, which trees and batches with sliding "
                'windows need. Load the target with attn_implementation="sdpa".'
            )

    def _check_places(self, trees: bool) -> None:
        name, placed = type(self.target).__name__, self.takes["position_ids"]
        if trees and (self.by_columns or not placed or not self.takes["attention_mask"]):
            raise ValueError(
                f"tree_nodes: {name} places tokens by their order in the cache, where branches of a tree come one "
                "after the other. Leave out tree_nodes."
            )
        if self.ragged and not (self.by_columns or placed):
            raise ValueError(
                f"input_ids: {name} takes no position_ids, so rows of a batch and padded prompts cannot be told where "
                "their tokens stand. Pass one prompt without padding, or generate without a drafter."
            )

    def _check_cache(self, cache: Any, past: int, trees: bool) -> None:
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"cache_implementation: a {type(cache).__name__} was given, but rejected draft tokens are taken back "
                "from a dynamic cache. Leave out cache_implementation and past_key_values."
            )
        if past and len(self.visible) > 1:
            raise ValueError("past_key_values: a filled cache can be gone on from with one prompt only, not a batch.")
        if past and self.by_position:
            raise ValueError(
                f"past_key_values: {type(self.target).__name__} has layers with a sliding window, whose filled cache "
                "cannot verify trees. Leave out tree_nodes, or past_key_values."
            )

    def _check_inputs(self, trees: bool, position_ids: torch.Tensor | None) -> None:
        tensors = [name for name, value in self.extra_inputs.items() if isinstance(value, torch.Tensor)]
        check_preparation(self.target, trees or self.by_position, self.ragged, tensors)
        if self.by_position and position_ids is not None and position_ids.ndim == 3:
            raise ValueError(
                f"position_ids: {type(self.target).__name__} places tokens along several axes and has sliding "
                "windows, whose masks only the model itself can make. Generate for one prompt at a time, without "
                "tree_nodes."
            )

    # -- forwards

    def read_prompt(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `[B, 1, V]` after the prompts and the states of the tokens that were not in the cache."""
        unread = input_ids[:, self.past :]
        places = None if self.prompt_places is None else self.prompt_places[..., self.past :]
        if self._alone:
            read = self._forward(unread, places, None, only_last=True)
            self._forget()
            return read
        positions = (self.visible.long().cumsum(1) - 1).clamp_min(0)[:, self.past :]
        mask = self._chain_mask(self.visible, positions)
        return self._forward(unread, positions if places is None else places, mask, only_last=True)

    def read_window(self, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `[B, W + 1, V]` and states after the last committed token and a window, `tokens` `[B, W + 1]`.

        `valid` `[B, W]` tells which draft tokens are a row's own.
        """
        steps = torch.arange(tokens.shape[1], device=self.device)
        if self._alone:
            return self._forward(tokens, self._places(steps), None)
        seen = torch.cat([self.visible, self.visible.new_ones(len(tokens), 1), valid], dim=1)
        positions = self.positions[:, None] + steps
        return self._forward(tokens, self._places(steps, positions), self._chain_mask(seen, positions))

    def read_tree(
        self, tokens: torch.Tensor, depths: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `[B, N + 1, V]` and states after the last committed token and each node of a tree.

        `tokens`, `depths` `[B, N + 1]` begin with the last committed token, of depth 0; `seen` `[B, N + 1, N + 1]`
        tells which of them each attends to.
        """
        positions = self.positions[:, None] + depths
        allowed = torch.cat([self.visible[:, None].expand(-1, tokens.shape[1], -1), seen], dim=2)
        cached = self.visible.long().cumsum(1) - 1
        masks = self._masks(allowed, positions, torch.cat([cached, positions], dim=1))
        return self._forward(tokens, self._places(depths, positions), masks)

    def _places(self, steps: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor | None:
        """position_ids `[..., B, T]` of new tokens, `steps` `[T]` or `[B, T]` after the last; else `positions`."""
        return positions if self.prompt_places is None else self.next_places[..., None] + steps

    def _forward(self, tokens, positions, mask, only_last: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `[B, T, V]` in float32 and the drafter's states of new tokens after the cache.

        The target prepares its inputs itself, as in `generate`; it is given new tokens only.
        """
        inputs = self._inputs_along(tokens, only_last) | {self.cache_name: self.cache}
        if mask is not None and self.takes["attention_mask"]:
            inputs["attention_mask"] = mask
        if positions is not None and self.takes["position_ids"]:
            inputs["position_ids"] = positions
        prepared = self.target.prepare_inputs_for_generation(
            tokens, is_first_iteration=only_last, use_cache=True, **inputs
        )
        if only_last and self.takes["logits_to_keep"]:
            prepared["logits_to_keep"] = 1
        if self.takes["output_router_logits"]:  # whose balancing loss takes masks of whole texts alone
            prepared["output_router_logits"] = False
        outputs = self.target(**prepared, return_dict=True, output_hidden_states=bool(self.state_layers))
        if outputs.get(self.cache_name, self.cache) is not self.cache:  # phi3 begins a long prompt with a new one
            self.cache = outputs[self.cache_name]
            self.cache.activate_past_recording()
        logits = outputs.logits[:, -1:] if only_last else outputs.logits
        states = collect_target_states(outputs.hidden_states, self.state_layers)
        return logits.to(device=self.device, dtype=torch.float32), states

    def _inputs_along(self, tokens: torch.Tensor, prompt: bool) -> dict[str, Any]:
        """What goes along with tokens `[B, T]`: all of it with the prompt, then what plain `generate` goes on with."""
        if prompt:
            return dict(self.extra_inputs)
        along = {}
        for name, value in self.extra_inputs.items():
            if name in ("token_type_ids", "mm_token_type_ids"):  # the last one goes on; new tokens are text
                last = value[:, -1:] if name == "token_type_ids" else torch.zeros_like(value[:, -1:])
                along[name] = last.expand(-1, tokens.shape[1])
            elif not (self.ragged and isinstance(value, torch.Tensor)):
                along[name] = value
        return along

    def _chain_mask(self, seen: torch.Tensor, positions: torch.Tensor) -> Any:
        """The mask of rows that are chains: columns seen; by position where the model's own would count holes."""
        if not self.by_position:
            return seen.long()
        length, columns = positions.shape[1], seen.shape[1]
        new_columns = torch.arange(columns - length, columns, device=self.device)
        causal = torch.arange(columns, device=self.device) <= new_columns[:, None]
        return self._masks(causal[None] & seen[:, None], positions, seen.long().cumsum(1) - 1)

    def _masks(self, allowed: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor) -> Any:
        """Additive masks of the columns `[B, T, columns]` that new tokens may see, for each kind of layer."""
        length, columns = allowed.shape[1:]
        itself = torch.eye(length, columns, dtype=torch.bool, device=self.device).roll(columns - length, dims=1)

        def additive(columns_seen: torch.Tensor) -> torch.Tensor:
            return additive_mask((columns_seen | itself)[:, None], self.target.dtype)

        if self.window is None:
            return additive(allowed)
        near = additive(allowed & (positions[..., None] - key_positions[:, None] < self.window))
        if self.layer_kinds is None or self.layer_kinds == {"sliding_attention"}:
            return near
        return {"full_attention": additive(allowed), "sliding_attention": near}

    # -- what stays in the cache

    def _forget(self) -> None:
        """Let layers with a sliding window drop what slid out of it, kept until now for a crop."""
        self.cache.crop(0)

    def keep(self, width: int, counts: torch.Tensor, most: int) -> None:
        """After a forward of `width` tokens: the first `counts` `[B]` (at most `most`) after the first are kept.

        What others kept and a row did not stays in the cache, unseen by that row.
        """
        if most + 1 < width:
            self.cache.crop(-(width - most - 1))
        else:
            self._forget()
        if self.ragged:
            arrived = torch.arange(most + 1, device=counts.device) <= counts[:, None]
        else:
            arrived = self.visible.new_ones(1, most + 1)
        self.visible = torch.cat([self.visible, arrived], dim=1)
        self.positions = self.positions + counts + 1
        if self.prompt_places is not None:
            self.next_places = self.next_places + counts + 1

    def gather_paths(self, nodes: int, paths: torch.Tensor) -> None:
        """Bring the accepted path of each row's tree, `paths` `[B, most]`, to the front of its `nodes` columns."""
        most = paths.shape[1]
        if most == 0 or bool((paths == torch.arange(most, device=paths.device)).all()):
            return
        for layer in self.cache.layers:
            if layer.keys is None or not layer.keys.numel():
                continue
            first = layer.keys.shape[2] - nodes
            change = gather_columns(first + paths)
            layer.keys[:, :, first : first + most] = change(layer.keys)
            layer.values[:, :, first : first + most] = change(layer.values)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows `[B']` alone."""
        rearrange_cache(self.cache, lambda tensor: tensor[rows.to(tensor.device)])
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        if self.prompt_places is not None:
            self.next_places = self.next_places[..., rows]
        for name in {"token_type_ids", "mm_token_type_ids"} & set(self.extra_inputs):
            self.extra_inputs[name] = self.extra_inputs[name][rows]
        for hook in self.adapter_hooks:
            hook.keywords["adapter_names"] = [hook.keywords["adapter_names"][row] for row in rows.tolist()]

    def compact(self) -> None:
        """Forget the columns that no row can see, when they are many; all of a row's holes, where columns count."""
        if not self.ragged:
            return
        waste = 1 - int(self.visible.sum(1).max()) / self.visible.shape[1]
        has_holes = self.by_columns and bool((self.visible[:, 1:] < self.visible[:, :-1]).any())
        if has_holes or waste > COMPACT_AT:
            columns = compacting_columns(self.visible)
            rearrange_cache(self.cache, gather_columns(columns))
            self.visible = self.visible.gather(1, columns)

    def finished_cache(self, length: int) -> Any:
        """The cache as plain `generate` returns it, without the last of `length` tokens; `None` for padded rows."""
        if self.ragged:
            return None
        surplus = self.cache.get_seq_length() - (length - 1)
        if surplus > 0:
            self.cache.crop(-surplus)
        return self.cache


def adapter_hooks(target: Any) -> list[functools.partial]:
    """PEFT's hooks that, during a call of `generate`, hand its `adapter_names`, one for each row, to the layers."""
    hooks = [hook for module in target.modules() for hook in module._forward_pre_hooks.values()]
    own = [hook for hook in hooks if isinstance(hook, functools.partial) and "adapter_names" in hook.keywords]
    return list({id(hook): hook for hook in own}.values())


def tokens_in_cache(cache: Any, length: int) -> int:
    """How many of a text's `length` tokens a cache handed to `generate` holds; `ValueError` unless one is left."""
    past = cache.get_seq_length() if cache is not None else 0
    if past >= length:
        raise ValueError(
            f"past_key_values: the cache holds {past} tokens and input_ids {length}, which leaves none to read. Pass "
            "the whole text as input_ids, with at least one token after those in the cache."
        )
    return past


def unread_prompt(
    input_ids: torch.Tensor, model_kwargs: dict[str, Any], mask_length: int | None
) -> dict[str, torch.Tensor]:
    """The prompt's part that a cache handed to `generate` does not hold, as inputs of the target's first forward.

    Plain decoding cuts the prompt like this; the assisted loop of transformers (5.17 to 5.23) feeds it all again.
    `mask_length` is the length of a mask of ones that was left out of `model_kwargs`.
    """
    cache, length = model_kwargs.get("cache", model_kwargs.get("past_key_values")), input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    mask_length = mask.shape[-1] if mask is not None else mask_length or length
    if mask_length != length:
        raise ValueError(
            f"input_ids: {length} tokens given with an attention_mask of {mask_length}. With past_key_values, "
            "pass the whole sequence as input_ids, tokens in the cache included: the drafter has not read them."
        )
    past = tokens_in_cache(cache, length)
    if past == 0:
        return {}
    along = ("position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
    parts = {name: model_kwargs[name] for name in along if model_kwargs.get(name) is not None}
    parts = {name: value[..., past:] for name, value in parts.items() if value.shape[-1] == length}
    return {"input_ids": input_ids[:, past:]} | parts
