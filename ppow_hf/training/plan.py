"""What training a drafter takes before anything is bought or loaded: memory by part, disk, and tokens per second.

The drafter's training step, the target's forward and the optimizer's step run on meta tensors, which have shapes and
no numbers; their live storages and their products are counted. Knows configurations; reads no weights.
"""

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from ..runtime.modeling_ppow import PPOWDrafter, collect_target_states
from ..runtime.new_drafter import config_for
from .arguments import default_anchors
from .chunks import sum_over_chunks
from .losses import text_terms
from .optimizers import make_optimizer

WAYS = ("whole", "split", "recorded")  # the target on each GPU, over all of them, or its recorded states
LONGEST_COUNTED = 4096  # tokens
ROW_BYTES = 6  # of a recorded token: its id and two masks


@dataclass(frozen=True)
class Machine:
    """What a processor does in a second.

    Args:
        flops (`float`): floating-point operations of large matrix products.
        bandwidth (`float`): bytes of its memory, read or written.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Shape:
    """What is trained and how.

    Args:
        architecture (`str`): of the drafter, `"eagle"` or `"standalone"`.
        length (`int`): tokens of a sequence, S.
        batch (`int`, *optional*, defaults to `1`): sequences of a step on a GPU.
        draft_vocab_size (`int`, *optional*): of an eagle drafter.
        steps (`int`, *optional*, defaults to `3`): unrolled draft steps of the windows that are learned.
        chunk_size (`int`, *optional*, defaults to `1024`): positions whose logits are held at once.
        muon (`float`, *optional*, defaults to `2.0`): as of [`PPOWTrainingArguments`].
        mixed (`bool`, *optional*, defaults to `True`): whether products are in bfloat16, with weights in float32.
    """

    architecture: str
    length: int
    batch: int = 1
    draft_vocab_size: int | None = None
    steps: int = 3
    chunk_size: int = 1024
    muon: float = 2.0
    mixed: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Counted:
    """Of a computation on meta tensors: most bytes alive beyond those before it, and seconds on a machine."""

    peak: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a training takes, in parameters, bytes and seconds of a step.

    Args:
        target_parameters, drafter_parameters (`int`): all of the target's; the drafter's own that are trained.
        target (`int`): the target's weights. head (`int`): its embeddings and head, which are needed without it too.
        target_forward (`int`): what the target's forward holds at most beside its weights.
        weights, gradients, optimizer (`int`): the drafter's.
        states (`int`): the target's states of a step.
        activations, logits_chunk (`int`): the drafter's forward and backward pass, and the loss of one chunk in it.
        optimizer_step (`int`): what the optimizer's step holds beside its state.
        recorded_token (`int`): disk of a token's recorded states.
        target_seconds, drafter_seconds (`float`): of a step: the target's forward, and all that follows.
    """

    target_parameters: int
    drafter_parameters: int
    target: int
    head: int
    target_forward: int
    weights: int
    gradients: int
    optimizer: int
    states: int
    activations: int
    logits_chunk: int
    optimizer_step: int
    recorded_token: int
    target_seconds: float
    drafter_seconds: float

    def peak(self, way: str, gpus: int = 1, sharded: bool = False) -> int:
        """Peak bytes of a GPU that trains in one of the `WAYS`; a `sharded` drafter (FSDP) is gathered for a step.

        A target that is split runs in one process, whose drafter is on one of the GPUs.
        """
        share = gpus if sharded else 1
        target, forward = {
            "whole": (self.target, self.target_forward),
            "split": (self.target // gpus, self.target_forward // gpus),
            "recorded": (self.head, 0),
        }[way]
        fixed = target + (self.weights + self.optimizer) // share
        gathered = self.weights + self.gradients // share if sharded else 0
        training = self.states + self.activations + self.logits_chunk + self.gradients + gathered
        return fixed + max(forward, training, (self.gradients + self.optimizer_step) // share)

    def tokens_per_second(self, way: str, gpus: int, tokens: int) -> float:
        """Of all GPUs together, each of which trains on `tokens` in a step."""
        seconds = self.drafter_seconds + (0.0 if way == "recorded" else self.target_seconds)
        return (1 if way == "split" else gpus) * tokens / seconds


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive, their peak, and the seconds that the operations take on a machine:
    of each the longer of its products and of what it reads and writes."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine
        self.now = self.peak = 0
        self.seconds = 0.0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # what models ask of numbers is whether a mask is whole
        outputs = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        new = [storage for tensor in made if (storage := tensor.untyped_storage())._cdata not in known]
        for storage in new:
            self._hold(storage)
        if new or func._schema.is_mutable:  # no view
            moved = sum(tensor.numel() * tensor.element_size() for tensor in [*given, *made])
            count = flop_registry.get(func._overloadpacket)
            products = 0 if count is None else count(*args, **(kwargs or {}), out_val=outputs)
            self.seconds += max(products / self.machine.flops, moved / self.machine.bandwidth)
        return outputs

    def _hold(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel computes it, keeping no scores; on meta tensors torch would take the plain way."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        queries, keys, values = args[:3]
        groups = queries.shape[1] // keys.shape[1]
        if groups > 1:
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        mask = (kwargs or {}).get("attn_mask")
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(queries, keys, values, 0.0, mask is None, attn_mask=mask)[0]


@contextmanager
def counted(machine: Machine) -> Iterator[LiveBytes]:
    with FusedAttention(), LiveBytes(machine) as live:
        yield live


def make_plan(target_config: Any, shape: Shape, machine: Machine) -> Plan:
    """The plan for a target of `target_config`, a `PreTrainedConfig` whose `dtype` its weights are loaded in.

    Sequences longer than [`LONGEST_COUNTED`] are not counted through: bytes grow with the length, seconds with it and
    its square.
    """
    if shape.length <= LONGEST_COUNTED:
        return counted_plan(target_config, shape, machine)
    lengths = [LONGEST_COUNTED // 4, LONGEST_COUNTED // 2, LONGEST_COUNTED]
    plans = [vars(counted_plan(target_config, replace(shape, length=length), machine)) for length in lengths]
    found: dict[str, Any] = {}
    for name, last in plans[-1].items():
        values = [plan[name] for plan in plans]
        if isinstance(last, float):
            found[name] = through_points(lengths, values, shape.length)
        else:
            found[name] = round(through_points(lengths[1:], values[1:], shape.length))
    return Plan(**found)


def through_points(places: list[int], values: list[float], place: int) -> float:
    """The polynomial through the `values` at `places`, at `place` (Lagrange)."""
    total = 0.0
    for own, value in zip(places, values, strict=True):
        others = [other for other in places if other != own]
        total += value * math.prod((place - other) / (own - other) for other in others)
    return total


def counted_plan(target_config: Any, shape: Shape, machine: Machine) -> Plan:
    """[`make_plan`] of a sequence that is counted through."""
    dtype = getattr(target_config, "dtype", None) or torch.bfloat16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config, dtype=dtype)
        drafter = meta_drafter(target, shape)
    target.requires_grad_(False).eval()
    drafter.attach_target(target)
    count = sum(parameter.numel() for parameter in drafter.parameters() if parameter.requires_grad)
    states, forward = target_pass(target, drafter, shape, machine)
    chunk, step = drafter_pass(target, drafter, shape, machine)
    optimizer, optimizer_step = optimizer_pass(drafter, shape, machine)
    weights = gradients = 4 * count
    beyond = max(0, step.peak - gradients)  # the loss comes before the gradients
    of_chunk = min(chunk.peak, beyond)
    casts = 2 * count if shape.mixed else 0  # of the weights, which autocast keeps until the step ends
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in states)
    whole = list(target.parameters())  # tied ones once
    rows = [target.get_input_embeddings().weight, target.get_output_embeddings().weight]
    hidden = target_config.get_text_config().hidden_size
    layers = 3 if shape.architecture == "eagle" else 0
    return Plan(
        target_parameters=sum(p.numel() for p in whole),
        drafter_parameters=count,
        target=sum(p.numel() * p.element_size() for p in whole),
        head=sum(p.numel() * p.element_size() for p in {id(row): row for row in rows}.values()),
        target_forward=forward.peak,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        states=state_bytes,
        activations=beyond - of_chunk + casts,
        logits_chunk=of_chunk,
        optimizer_step=optimizer_step.peak,
        recorded_token=(layers + 1) * hidden * 2 + ROW_BYTES,
        target_seconds=forward.seconds,
        drafter_seconds=step.seconds + optimizer_step.seconds,
    )


def meta_drafter(target: Any, shape: Shape) -> PPOWDrafter:
    """The drafter as `from_target` makes it, without numbers."""
    known = {"shares_target_embeddings": True} if shape.architecture == "eagle" else {}
    config = config_for(target, shape.architecture, shape.draft_vocab_size, known)
    return PPOWDrafter(config).to(torch.bfloat16 if shape.mixed else torch.float32).train()


@torch.no_grad()
def target_pass(
    target: Any, drafter: PPOWDrafter, shape: Shape, machine: Machine
) -> tuple[list[torch.Tensor], Counted]:
    """The states that a step keeps, and the target's forward that gives them."""
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long, device="meta")
    with counted(machine) as live:
        nothing = torch.empty(0, dtype=torch.long, device="meta")
        outputs = target(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=nothing)
        states = collect_target_states(outputs.hidden_states, drafter.config.target_layer_ids)
    return [t for t in (states, outputs.hidden_states[-1]) if t is not None], Counted(live.peak, live.seconds)


def drafter_pass(target: Any, drafter: PPOWDrafter, shape: Shape, machine: Machine) -> tuple[Counted, Counted]:
    """One chunk's loss, and the forward and backward pass of a supervised step with it."""
    text = target.config.get_text_config()
    steps = 1 if shape.architecture == "standalone" else shape.steps
    first = drafter.draft_model.first_prefix
    count = shape.length - 1 - first
    windows_count = default_anchors(count) if steps > 1 else count
    share = count * (1 - (1 - windows_count / count) ** steps) / (windows_count * steps)  # of rows, at distinct places
    head = target.get_output_embeddings().weight[: shape.draft_vocab_size]

    def chunk(features, sources, labels):
        draft = drafter.draft_logits(features).float()
        goal = nn.functional.linear(sources[: math.ceil(len(features) * share)].to(head.dtype), head).float()
        goal_rows = (torch.arange(len(features), device="meta") * share).long()
        terms = text_terms(["ce", "kl"], draft, goal, labels, target_rows=goal_rows)
        loss = terms.sum()
        return torch.cat([loss[None], terms.detach().sum(-1)])

    def rows_loss(features: torch.Tensor, most: int | None = None) -> torch.Tensor:
        rows = features.flatten(0, -2)[:most]
        order = torch.arange(len(rows), device="meta")
        labels = torch.zeros(len(rows), dtype=torch.long, device="meta")
        sources = torch.empty(1, text.hidden_size, dtype=target.dtype, device="meta").expand(len(rows), -1)
        return sum_over_chunks(chunk, shape.chunk_size, drafter.parameters(), rows[order][order], sources, labels)[0]

    def loss_function(drafter, output):
        features = output.features[:, :-1] if output.window_features is None else output.window_features
        return rows_loss(features)

    hidden = text.hidden_size
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long, device="meta")
    layers = drafter.config.target_layer_ids
    states = None
    if layers is not None:
        states = torch.empty(shape.batch, shape.length, len(layers) * hidden, dtype=target.dtype, device="meta")
    windows = {}
    if steps > 1:
        prefixes = torch.arange(first, first + windows_count, device="meta").expand(shape.batch, -1)
        windows = {"prefixes": prefixes, "draft_ids": ids[:, :windows_count, None].expand(-1, -1, steps)}
    with counted(machine) as live:
        drafter(ids, states, loss_function=loss_function, **windows).loss.backward()
    drafter.zero_grad(set_to_none=True)
    width = drafter.config.draft_config.hidden_size
    rows = torch.empty(shape.chunk_size, width, dtype=drafter.dtype, device="meta", requires_grad=True)
    with counted(machine) as of_chunk:
        rows_loss(rows, min(shape.chunk_size, shape.batch * windows_count * steps))
    return Counted(of_chunk.peak, of_chunk.seconds), Counted(live.peak, live.seconds)


def optimizer_pass(drafter: PPOWDrafter, shape: Shape, machine: Machine) -> tuple[int, Counted]:
    """Bytes of the optimizer's state, and what its step takes beside it."""
    settings = SimpleNamespace(
        learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0, bf16=shape.mixed
    )
    drafter.float()
    for parameter in drafter.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer(drafter, settings, shape.muon)  # type: ignore[arg-type]
    with counted(machine) as live:
        optimizer.step()
        kept = live.now
    drafter.zero_grad(set_to_none=True)
    return kept, Counted(live.peak - kept, live.seconds)


def measure_machine(device: torch.device, mixed: bool) -> Machine:
    """Operations and bytes that `device` does in a second.

    Measured are a copy of 256 MB and a product of matrices that grow, up to 4,096 by 4,096, until one takes 20 ms.
    """
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)

    def fastest(function) -> float:
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    copying = fastest(lambda: copy.copy_(source))
    for width in (256, 512, 1024, 2048, 4096):
        matrix = torch.randn(width, width, device=device).to(torch.bfloat16 if mixed else torch.float32)
        product = fastest(lambda: matrix @ matrix)  # noqa: B023 (called at once)
        if product > 0.02:
            break
    return Machine(2 * width**3 / product, 2 * source.nbytes / copying)
