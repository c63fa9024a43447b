"""PPOWDrafter: every architecture of drafter behind one interface, as a transformers model.

Knows how to turn known tokens (and, for eagle, the target's states) into features, features into next-token logits,
and how to draft on from there. Knows nothing about verification, windows or training objectives.

Words: a *prefix* p of a sequence is its tokens 0..p; the drafter's *feature* of prefix p gives its distribution of
token p + 1. A standalone drafter has a feature for every prefix, an eagle drafter from prefix 1 on, since it reads the
target's state of token p - 1 together with the embedding of token p. A block drafter has features along windows only;
its feature of a prefix is the last token itself, the anchor of a window after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import ModelOutput

from .block_model import BlockDrafter, BlockSession
from .compatibility import check_target, check_width, num_layers
from .configuration_ppow import ARCHITECTURES, PPOWDrafterConfig, check_settings
from .draft_models import EagleDrafter, MedusaDrafter, StandaloneDrafter, WindowKeys, rows_at
from .draft_session import DraftSession, collect_target_states, packed_allowed, still_drafted
from .generation import DrafterView
from .new_drafter import config_for
from .start_weights import check_init_layers, measured_state_scales, start_from_target
from .target_weights import target_width


@dataclass
class PPOWDrafterOutput(ModelOutput):
    """What a drafter's forward returns.

    Args:
        loss (`torch.Tensor`, *optional*): what `loss_function` returned.
        logits (`torch.Tensor` of shape `(B, S, V)`, *optional*):
            Distribution of token p + 1 after every prefix p, on the target's vocabulary; undefined for prefixes
            before `first_prefix`. Not computed when `loss_function` or windows are given, and not by a block drafter.
        features (`torch.Tensor` of shape `(B, S, h)`, *optional*): features of all prefixes, without windows.
        window_features (`torch.Tensor` of shape `(B, M, K, h)`, *optional*):
            Features along the windows of `draft_ids`: entry j gives the distribution of the window's token j.
        block_states (`torch.Tensor` of shape `(B, M, K, h)`, *optional*):
            States of a block drafter after `prefixes`, where no `draft_ids` were given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    features: torch.Tensor | None = None
    window_features: torch.Tensor | None = None
    block_states: torch.Tensor | None = None


DRAFT_MODELS: dict[str, Any] = {
    "eagle": EagleDrafter,
    "standalone": StandaloneDrafter,
    "medusa": MedusaDrafter,
    "block": BlockDrafter,
}


class PPOWDrafter(PreTrainedModel):
    """A drafter for speculative decoding, trained with PPOW (arXiv 2605.14978) or supervised.

    Make one with [`PPOWDrafter.from_target`], load one with `from_pretrained`, give it to
    `target.generate(assistant_model=drafter)`.
    """

    config: PPOWDrafterConfig
    config_class = PPOWDrafterConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["EagleDecoderLayer", "MedusaBlock", "BlockLayer"]

    def __init__(self, config: PPOWDrafterConfig):
        super().__init__(config)
        config.draft_config._attn_implementation = config._attn_implementation
        self.draft_model: Any = DRAFT_MODELS[config.architecture](config)
        width = config.draft_vocab_size
        if width is not None and config.architecture in ("eagle", "block"):
            # Named and meant as in published EAGLE-3 checkpoints: target id = draft id + d2t[draft id].
            self.register_buffer("d2t", torch.zeros(width, dtype=torch.long))
            kept = torch.zeros(config.vocab_size, dtype=torch.bool)
            kept[:width] = True
            self.register_buffer("t2d", kept)
        else:
            self.d2t: Any = None
            self.t2d: Any = None
        self.last_trace: Any = None
        self.last_traces: list[Any] = []
        inner = getattr(self.draft_model, "model", None)
        if inner is not None:
            tied = inner.all_tied_weights_keys.items()
            self._tied_weights_keys = {f"draft_model.model.{name}": f"draft_model.model.{to}" for name, to in tied}
        self.post_init()

    def _init_weights(self, module):
        std = getattr(self.config.draft_config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LlamaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PPOWDrafter) and module.d2t is not None:
            module.set_draft_vocabulary(torch.arange(len(module.d2t)))
        else:
            super()._init_weights(module)

    # -- the vocabulary

    def set_draft_vocabulary(self, kept_tokens: torch.Tensor) -> None:
        """Set `d2t` and `t2d` from the target's token ids that the drafter can propose, ascending `[DV]`."""
        kept_tokens = kept_tokens.sort().values.to(self.d2t.device)
        self.d2t.copy_(kept_tokens - torch.arange(len(kept_tokens), device=kept_tokens.device))
        self.t2d.zero_()
        self.t2d[kept_tokens] = True

    @property
    def kept_tokens(self) -> torch.Tensor | None:
        """The target's ids of the draft vocabulary `[DV]`, or `None` where both vocabularies are the same."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def draft_logits(self, features: torch.Tensor, place: int | None = None) -> torch.Tensor:
        """Features `[..., h]` -> logits on the drafter's own vocabulary `[..., DV]`; `place` as of
        [`compute_logits`]."""
        return self.draft_model.logits(features, place)

    def to_target_width(self, draft_logits: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """Logits `[..., DV]` -> `[..., width]` on the target's vocabulary; what the drafter cannot propose is -inf."""
        width = width or self.config.vocab_size
        if self.d2t is not None:
            full = draft_logits.new_full((*draft_logits.shape[:-1], self.config.vocab_size), -torch.inf)
            full[..., self.kept_tokens] = draft_logits
            draft_logits = full
        return match_width(draft_logits, width)

    def compute_logits(
        self, features: torch.Tensor, width: int | None = None, place: int | None = None
    ) -> torch.Tensor:
        """Features `[..., h]` -> logits on the target's vocabulary `[..., V]`.

        `place` is the place in the window of the token that they are of, counted from 0, where all share one: medusa
        then need not ask the device which head is meant.
        """
        return self.to_target_width(self.draft_logits(features, place), width)

    def proposable_logits(self, features: torch.Tensor, width: int) -> torch.Tensor:
        """Features `[..., h]` -> logits in float32 of what can be proposed: the `kept_tokens`, or, where the drafter's
        vocabulary is the target's, its `width` tokens."""
        whole = self.kept_tokens is None
        return (self.compute_logits(features, width) if whole else self.draft_logits(features)).float()

    def get_input_embeddings(self):
        """The token embeddings that the drafter reads, its own or its target's.

        `None` for medusa, which reads states only, and for shared ones before [`attach_target`].
        """
        draft = self.draft_model
        if isinstance(draft, MedusaDrafter):
            return None
        if isinstance(draft, StandaloneDrafter):
            return draft.model.get_input_embeddings()
        return draft.target_embeddings.module if draft.embed_tokens is None else draft.embed_tokens

    def set_input_embeddings(self, value):
        if isinstance(self.draft_model, EagleDrafter | BlockDrafter):
            self.draft_model.embed_tokens = value
            self.config.shares_target_embeddings = False
        elif isinstance(self.draft_model, StandaloneDrafter):
            self.draft_model.model.set_input_embeddings(value)
        else:
            raise ValueError("value: a medusa drafter has no token embeddings; it reads the target's states.")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_, **__
    ):
        """The embeddings as they are; another number is refused: the rows may be the target's own."""
        if pad_to_multiple_of is None and new_num_tokens in (None, self.config.vocab_size):
            return self.get_input_embeddings()
        raise ValueError(
            f"new_num_tokens: {new_num_tokens} given, but a drafter's vocabulary is its target's. Resize the target, "
            "and make a new drafter with from_target where generate then refuses this one."
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Until its end the drafter is in eval mode; then in the mode that it was in."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def attach_target(self, target: PreTrainedModel) -> None:
        """Read `target`'s token embeddings and head from now on, where the drafter shares them; others need nothing.

        Generation, training, measurements and exports call it. Raises `ValueError` where the target's are of another
        size.
        """
        if self.config.shares_target_head:
            self._attach_head(target)
        if not self.config.shares_target_embeddings:
            return
        module: Any = target.get_input_embeddings()
        # Its weight may be packed, and PEFT's adapters of embeddings do not know their size: what they wrap does.
        sized = getattr(module, "base_layer", getattr(module, "original_module", module))
        rows, hidden = sized.num_embeddings, sized.embedding_dim
        own_hidden = self.config.draft_config.hidden_size
        if hidden != own_hidden:
            raise ValueError(
                f"target: this drafter shares its target's token embeddings, of width {own_hidden}, and this target's "
                f"are {hidden} wide. Use {self.config.target_name_or_path or 'the target it was made for'}."
            )
        check_width(self.config.vocab_size, rows)
        self.draft_model.target_embeddings.module = module

    def _attach_head(self, target: PreTrainedModel) -> None:
        head: Any = target.get_output_embeddings()
        hidden, own_hidden = getattr(head, "in_features", None), self.config.draft_config.hidden_size
        if hidden != own_hidden or target_width(target) != self.config.vocab_size:
            raise ValueError(
                f"target: this drafter shares its target's output head, {self.config.vocab_size} tokens from "
                f"{own_hidden} numbers, and this target's has {target_width(target)} from {hidden}. Use "
                f"{self.config.target_name_or_path or 'the target it was made for'} as it was then, or make another."
            )
        self.draft_model.target_head.module = head

    def train_embeddings(self, trained: bool) -> None:
        """Whether the token embeddings of an eagle or block drafter are trained: a copy of shared ones if so."""
        draft = self.draft_model
        if not isinstance(draft, EagleDrafter | BlockDrafter):
            return
        if trained and draft.embed_tokens is None:
            tokens = torch.arange(self.config.vocab_size, device=self.device)
            rows = draft.target_embeddings.rows(tokens, draft.fc.weight.dtype)
            self.set_input_embeddings(nn.Embedding.from_pretrained(rows.clone(), freeze=False))
        elif not trained and draft.embed_tokens is not None:
            draft.embed_tokens.requires_grad_(False)

    # -- whole sequences (training, evaluation)

    def prefix_features(
        self, input_ids: torch.Tensor, target_states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Features of all prefixes `[B, S, h]` and the cache after them.

        Rows are padded on the right, where no token sees the padding; its features mean nothing.

        `target_states` `[B, S, 3*h_target]` are needed but by a standalone drafter; entry i is the target's state of
        token i.
        """
        features, cache = self._encoded(input_ids, target_states)
        return nn.functional.pad(features, (0, 0, self.draft_model.first_prefix, 0)), cache

    def _encoded(self, input_ids: torch.Tensor, target_states: torch.Tensor | None, **at) -> tuple[torch.Tensor, Any]:
        """The draft model's `encode` of whole sequences: features from `first_prefix` on, and the cache."""
        batch, length = input_ids.shape
        first = self.draft_model.first_prefix
        positions = torch.arange(first, length, device=input_ids.device).expand(batch, -1) - first
        states = None
        if first:
            if target_states is None:
                raise ValueError(
                    f"target_states: this {self.config.architecture} drafter reads the target's hidden states "
                    f"{self.config.target_layer_ids}; pass them (see collect_target_states)."
                )
            states = target_states[:, :-1]
        return self.draft_model.encode(input_ids[:, first:], states, None, positions, None, **at)

    def unroll(
        self,
        features: torch.Tensor,
        cache: Any,
        prefixes: torch.Tensor,
        choose: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
        window: int,
        goes_on: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Draft `window` tokens from M prefixes of each sequence at once, over the shared cache.

        Args:
            features (`torch.Tensor` of shape `(B, S, h)`), cache: what [`prefix_features`] returned.
            prefixes (`torch.LongTensor` of shape `(B, M)`): the prefix each window starts from; may repeat.
            choose (`Callable`): `choose(j, features [B, A, h], windows [B, A]) -> LongTensor [B, A]` gives token j of
                the windows that have come to it, the last token too; `windows` are their places among the M.
            window (`int`): number of distributions wanted, K.
            goes_on (`Callable`, *optional*): `goes_on(j, features, windows) -> BoolTensor [B, A]`, asked when token j
                is chosen, the last excepted: which windows are drafted further; others cost nothing from there on. A
                row in which fewer go on than in another is filled up with windows that do not.

        Returns:
            `torch.Tensor` of shape `(B, M, K, h)`: entry j gives the distribution of the window's token j; 0 where a
            window did not come to it.
        """
        draft = self.draft_model
        if isinstance(draft, BlockDrafter):
            anchors, states = features[..., 0].gather(1, prefixes), self.block_states(features, cache, prefixes)
            along = draft.along(states, anchors, choose, window, goes_on)
        else:
            if isinstance(draft, EagleDrafter):
                cache = WindowKeys(cache, prefixes - draft.first_prefix)
            along = self._step_by_step(rows_at(features, prefixes), cache, prefixes, choose, window, goes_on)
        return features_along(along, prefixes.shape[1], window, goes_on is None)

    def _step_by_step(self, current, cache, prefixes, choose, window, goes_on):
        """[`unroll`] by a draft step for each token, from the features `[B, M, h]` of the prefixes: windows `[B, A]`
        that come to it, their features `[B, A, h]`."""
        draft = self.draft_model
        batch, count = prefixes.shape
        windows = torch.arange(count, device=prefixes.device).expand(batch, -1)  # [B, A]: those that are drafted
        alive = torch.ones_like(windows, dtype=torch.bool)
        positions, along = prefixes - draft.first_prefix, [(windows, current)]
        allowed: torch.Tensor | None = None
        if isinstance(draft, StandaloneDrafter):
            key_prefixes = torch.arange(draft.cache_length(cache), device=prefixes.device)
            allowed = (key_prefixes <= prefixes[..., None])[:, None]  # [B, 1, M, S]
        for j in range(window):
            tokens = choose(j, current, windows)
            if j == window - 1:
                break
            if goes_on is not None:
                alive = alive & goes_on(j, current, windows)
                order = still_drafted(alive)
                if order.shape[1] == 0:
                    break
                windows, alive, positions, tokens = (x.gather(1, order) for x in (windows, alive, positions, tokens))
                current = current.gather(1, order[..., None].expand(-1, -1, current.shape[-1]))
                if allowed is not None:
                    allowed = allowed.gather(2, order[:, None, :, None].expand(-1, 1, -1, allowed.shape[-1]))
                cache = cache.of_windows(order) if isinstance(cache, WindowKeys) else cache
            if allowed is not None:
                itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device).expand(batch, 1, -1, -1)
                allowed = torch.cat([allowed, itself], dim=-1)
            places = draft.embed_positions(positions + 1 + j)
            current, cache = draft.advance(tokens, current, cache, places, allowed)
            along.append((windows, current))
        return along

    def block_states(self, features: torch.Tensor, cache: Any, prefixes: torch.Tensor) -> torch.Tensor:
        """A block drafter's states `[B, M, K, h]` after M prefixes of each sequence.

        Windows of one prefix share a block. Blocks are computed so many at once as have about as many tokens as the
        text: they see nothing of each other, and a mask over all of them would grow with the square of their number.

        Args:
            features (`torch.Tensor` of shape `(B, S, 1)`), cache: what [`prefix_features`] returned.
            prefixes (`torch.LongTensor` of shape `(B, M)`): of each block the prefix whose last token is its anchor.
        """
        draft, length = self.draft_model, features.shape[1]
        distinct, places = distinct_in_rows(prefixes)
        text = torch.arange(1, length, device=prefixes.device)  # the state of token p - 1 is prefix p's
        parts = []
        for part in distinct.split(max(length // draft.block_size, 1), dim=1):
            to_text = (text <= part[..., None])[:, None]
            parts.append(draft.block_states(features[..., 0].gather(1, part), part, cache, to_text))
        states = torch.cat(parts, dim=1)
        return states.gather(1, places[..., None, None].expand(-1, -1, *states.shape[2:]))

    def window_features(
        self,
        input_ids: torch.Tensor,
        target_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        prefixes: torch.Tensor,
        draft_ids: torch.Tensor,
        goes_on: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Features along given windows `[B, M, K, h]`, with gradients.

        An eagle drafter computes of the other prefixes keys and values alone. `goes_on` as of [`unroll`]; a
        standalone drafter reads windows whole.
        """
        draft, window = self.draft_model, draft_ids.shape[-1]
        if isinstance(draft, StandaloneDrafter):
            return self._packed_features(input_ids, attention_mask, prefixes, draft_ids)

        def given(j: int, _, windows: torch.Tensor) -> torch.Tensor:
            return draft_ids[:, :, j].gather(1, windows)

        if not isinstance(draft, EagleDrafter):
            features, cache = self.prefix_features(input_ids, target_states)
            return self.unroll(features, cache, prefixes, given, window, goes_on)
        distinct, places = distinct_in_rows(prefixes)
        features, cache = self._encoded(input_ids, target_states, places=distinct - draft.first_prefix)
        starts = rows_at(features, places), cache.of_windows(places)
        along = self._step_by_step(*starts, prefixes, given, window, goes_on)
        return features_along(along, prefixes.shape[1], window, goes_on is None)

    def _packed_features(self, input_ids, attention_mask, prefixes, draft_ids):
        """The same for a standalone drafter: one forward over the sequence and all windows after it."""
        (batch, length), (count, window) = input_ids.shape, draft_ids.shape[1:]
        tail = draft_ids[:, :, : window - 1]
        allowed = packed_allowed(length, prefixes, window - 1)
        if attention_mask is not None:
            keys = nn.functional.pad(attention_mask.bool(), (0, tail[0].numel()), value=True)
            allowed = (allowed & keys[:, None, None]) | torch.eye(allowed.shape[-1], dtype=torch.bool).to(keys.device)
        positions = torch.arange(length, device=input_ids.device).expand(batch, -1)
        tail_positions = prefixes[..., None] + 1 + torch.arange(window - 1, device=input_ids.device)
        everything, _ = self.draft_model.advance(
            torch.cat([input_ids, tail.flatten(1)], dim=1),
            None,
            None,
            self.draft_model.embed_positions(torch.cat([positions, tail_positions.flatten(1)], dim=1)),
            allowed,
        )
        starts = rows_at(everything[:, :length], prefixes)[:, :, None]
        if window == 1:
            return starts
        return torch.cat([starts, everything[:, length:].unflatten(1, (count, window - 1))], dim=2)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        target_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prefixes: torch.LongTensor | None = None,
        draft_ids: torch.LongTensor | None = None,
        loss_function: Callable[["PPOWDrafter", PPOWDrafterOutput], torch.Tensor] | None = None,
        goes_on: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        inside: Callable[["PPOWDrafter"], Any] | None = None,
    ) -> PPOWDrafterOutput:
        """Features of all prefixes, or along given windows.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): right-padded sequences.
            target_states (`torch.Tensor` of shape `(B, S, 3*h_target)`, *optional*):
                the target's states, which every architecture but standalone needs.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 at padding.
            prefixes (`torch.LongTensor` of shape `(B, M)`, *optional*), draft_ids (`(B, M, K)`, *optional*):
                windows to follow; both or neither (block: `prefixes` alone give `block_states`).
            loss_function (`Callable`, *optional*):
                `loss_function(drafter, output)` is evaluated here, inside forward, so that DDP and FSDP see every use
                of a parameter.
            goes_on (`Callable`, *optional*): which windows are followed further, see [`unroll`].
            inside (`Callable`, *optional*):
                `inside(drafter)` is evaluated in place of all else and returned: what is drafted without gradients,
                inside forward for the same reason.
        """
        if inside is not None:
            return inside(self)
        assert input_ids is not None
        output = PPOWDrafterOutput()
        is_block = isinstance(self.draft_model, BlockDrafter)
        if prefixes is not None and draft_ids is not None:
            output.window_features = self.window_features(
                input_ids, target_states, attention_mask, prefixes, draft_ids, goes_on
            )
        else:
            output.features, cache = self.prefix_features(input_ids, target_states)
            if is_block and prefixes is not None:
                output.block_states = self.block_states(output.features, cache, prefixes)
        if loss_function is not None:
            output.loss = loss_function(self, output)
        elif output.features is not None and not is_block:
            output.logits = self.compute_logits(output.features)
        return output

    # -- one sequence, token by token (decoding)

    def start_session(self, width: int | None = None) -> DraftSession:
        """A [`DraftSession`]: the drafter's side of one generation call; `width` is that of the target's logits."""
        return (BlockSession if isinstance(self.draft_model, BlockDrafter) else DraftSession)(self, width)

    def with_settings(self, **settings) -> DrafterView:
        """This drafter with other window settings, for one call: `assistant_model=drafter.with_settings(window=...)`.

        Accepts `window`, `max_window`, `cost_ratio`, `verification_cost`, `lookup` (`bool`: draft from the text itself
        too, see [`PPOWDrafterConfig`]), and for trees of drafted tokens in place of
        chains `tree_nodes` (`int`: most nodes of a round's tree, at most `max_window` deep) and `tree_branches`
        (`int`, defaults to `4`: most children of a node, and nodes expanded in a level). The view's `last_trace` is
        its own.

        Unless both costs are given, or the window is fixed without trees, windows follow times measured on this
        machine: sampled texts keep their distribution, but a seed does not write the same text again.
        """
        return DrafterView(self, settings)

    def generate_with(self, **options):
        """`target.generate(**inputs, custom_generate=drafter.generate_with())`: our own loop, for batches too.

        See [`SpeculativeDecoding`] for the options (`streamer`, `tokenizer`, `stop_strings`) and
        [`with_settings`] for the window settings, which may be given here as well.
        """
        return self.with_settings().generate_with(**options)

    # -- making one

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', but `ValueError` where weights are missing, left over, of another shape, or not finite."""
        kwargs["ignore_mismatched_sizes"] = True  # named below with the rest, where transformers points to a table
        drafter, found = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        problems = loading_problems(found) + drafter.weight_problems()
        if problems:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} is no whole drafter: {'; '.join(problems)}. Save or download "
                "it again."
            )
        return (drafter, found) if output_loading_info else drafter

    def weight_problems(self) -> list[str]:
        """What is wrong with the weights as they are: numbers that are not finite, a damaged draft vocabulary."""
        broken = [
            name
            for name, tensor in self.named_parameters()
            if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all())
        ]
        problems = [f"infinite or undefined numbers in {shortened_list(broken)}"] if broken else []
        kept = self.kept_tokens
        if kept is not None and not kept.is_meta:
            inside = bool((kept[1:] > kept[:-1]).all()) and int(kept[0]) >= 0 and int(kept[-1]) < len(self.t2d)
            if not inside or self.t2d.nonzero()[:, 0].tolist() != kept.tolist():
                problems.append("d2t and t2d name no ascending tokens of the target's vocabulary, or not the same")
        return problems

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        architecture: str = "eagle",
        draft_vocab_size: int | None = None,
        token_counts: torch.Tensor | None = None,
        init_layers: Sequence[int] | None = None,
        **overrides,
    ) -> "PPOWDrafter":
        """An untrained drafter for `target`, started from the target's own embeddings and head; a narrower one (eagle,
        block: `hidden_size`) from what their main directions keep of them.

        Args:
            target (`PreTrainedModel`): the causal language model to be drafted for.
            architecture (`str`, *optional*, defaults to `"eagle"`):
                `"eagle"`, `"standalone"`, `"medusa"` or `"block"`.
            draft_vocab_size (`int`, *optional*): size of a reduced draft vocabulary (eagle, block).
            token_counts (`torch.Tensor` of shape `(V,)`, *optional*):
                How often each token occurs in the training data; needed with `draft_vocab_size`, whose tokens are the
                most frequent ones.
            init_layers (`list[int]`, *optional*):
                Layers of the target whose weights the drafter's own layers begin with, counted from 0: one for an
                eagle drafter, in the target's shape; as many as it has for a standalone one [ours]. Without it they
                begin at random.
            overrides: fields of [`PPOWDrafterConfig`] (`max_window`, `target_layer_ids`, ...) or of the drafter's own
                transformer (`num_hidden_layers`, `intermediate_size`, ...). Unless `state_scales` is given, `None` for
                none, an eagle drafter's are measured by one forward of the target (a record's target cannot: give it
                the record's `state_scales()`).
        """
        check_settings(architecture=architecture)
        if isinstance(target, PPOWDrafter):
            raise ValueError("target: a PPOWDrafter given; pass the causal language model that it is to draft for.")
        check_target(target)
        if architecture not in ("eagle", "block") and draft_vocab_size is not None:
            raise ValueError("draft_vocab_size: only an eagle or block drafter has a reduced vocabulary.")
        if init_layers is not None:
            check_init_layers(architecture, init_layers, num_layers(target.config.get_text_config()))
            if architecture == "standalone":
                overrides.setdefault("num_hidden_layers", len(init_layers))
        measures_scales = architecture == "eagle" and "state_scales" not in overrides
        config = config_for(target, architecture, draft_vocab_size, overrides)
        if measures_scales and not config.norm_before_fc:
            config.state_scales = measured_state_scales(target, config.target_layer_ids or [])
        drafter = cls(config)
        if isinstance(drafter.draft_model, StandaloneDrafter):
            drafter.draft_model.check_runs()
        start_from_target(drafter, target, token_counts, init_layers)
        if target.dtype.is_floating_point:
            for parameter in drafter.parameters():  # not the rotary frequencies, which stay in float32 as on loading
                parameter.data = parameter.data.to(target.dtype)
        return drafter


def shortened_list(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def loading_problems(found: dict[str, Any]) -> list[str]:
    """What transformers' loading report says went wrong, in words."""
    mismatched = [name if isinstance(name, str) else name[0] for name in found["mismatched_keys"]]
    kinds = {
        "missing weights": sorted(found["missing_keys"]),
        "weights of another model": sorted(found["unexpected_keys"]),
        "weights of another shape": sorted(mismatched),
        "errors": list(found.get("error_msgs") or []),
    }
    return [f"{kind}: {shortened_list(names)}" for kind, names in kinds.items() if names]


def distinct_in_rows(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct `numbers` `[B, M]` of each row, ascending, `[B, D]`, and each number's place among them `[B, M]`.

    Rows with fewer than others are filled up with their smallest.
    """
    ascending, order = numbers.sort(dim=1)
    ranks = nn.functional.pad((ascending[:, 1:] != ascending[:, :-1]).long(), (1, 0)).cumsum(1)
    distinct = ascending[:, :1].repeat(1, int(ranks.max()) + 1).scatter(1, ranks, ascending)
    return distinct, torch.empty_like(order).scatter(1, order, ranks)


def features_along(
    along: list[tuple[torch.Tensor, torch.Tensor]], count: int, window: int, whole: bool
) -> torch.Tensor:
    """`[B, count, window, h]` from the windows `[B, A]` that came to each token and their features `[B, A, h]`; 0
    where a window did not come to a token. `whole`: all windows came to every token, in order."""
    if whole:
        return torch.stack([reached for _, reached in along], dim=2)
    spread = []
    for windows, features in along:
        nothing = features.new_zeros(len(features), count, features.shape[-1])
        spread.append(nothing.scatter(1, windows[..., None].expand(-1, -1, features.shape[-1]), features))
    return torch.stack(spread + [torch.zeros_like(spread[0])] * (window - len(spread)), dim=2)


def match_width(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Logits `[..., V]` cut, or padded with -inf, to `width`: both are padded vocabularies of one tokenizer."""
    surplus = logits.shape[-1] - width
    if surplus > 0:
        return logits[..., :width]
    return nn.functional.pad(logits, (0, -surplus), value=-torch.inf) if surplus else logits


AutoConfig.register("ppow_drafter", PPOWDrafterConfig, exist_ok=True)
AutoModel.register(PPOWDrafterConfig, PPOWDrafter, exist_ok=True)

__all__ = [
    "ARCHITECTURES",
    "DraftSession",
    "DrafterView",
    "PPOWDrafter",
    "PPOWDrafterConfig",
    "PPOWDrafterOutput",
    "collect_target_states",
]
