"""One visitor's call: our loop's rounds as they come, the fixed window beside them, and plain generation.

Knows models, traces and clocks; knows nothing about pages. A visitor's run has its own trace, caches and random
numbers; models are shared and never changed.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..data.targets import sampling_options
from ..runtime.acceptance import exact_dtype, greedy_accepted_counts, rejection_sample_chain, sample_from_uniform
from ..runtime.compatibility import common_context_length, target_width
from ..runtime.cost_model import OnlineCosts
from ..runtime.draft_session import cache_argument
from ..runtime.draft_window import DrafterDistributions, Window, draft_windows
from ..runtime.modeling_ppow import collect_target_states
from ..runtime.trace import GenerationTrace, RoundTrace
from ..runtime.windowing import FixedWindow

FIXED_WINDOW = 8


@dataclass(frozen=True)
class RunSettings:
    """What a visitor chose for one call.

    Args:
        window (`str`), max_window (`int`): the window rule and its longest window.
        temperature (`float`): 0 is greedy.
        max_new_tokens (`int`): most tokens to generate.
        seconds (`float`): time limit of the whole call; plain generation gets what speculation left of it.
    """

    window: str = "kl"
    max_window: int = 10
    temperature: float = 0.0
    max_new_tokens: int = 96
    seconds: float = 60.0


@dataclass(frozen=True)
class ShadowRound:
    """What the fixed window drafted from a round's prefix, and how many of those tokens the target keeps."""

    draft_ids: list[int]
    accepted: int


@dataclass(frozen=True)
class RunRound:
    """A round of the loop as it was committed.

    Args:
        trace ([`RoundTrace`]): the loop's own record of it.
        committed (`list[int]`): the tokens that it added to the text.
        shadow ([`ShadowRound`], *optional*): the fixed window from the same prefix; none in the prompt's round.
        seconds (`float`): time of the call up to here, without that of the fixed window and of showing the rounds.
    """

    trace: RoundTrace
    committed: list[int]
    shadow: ShadowRound | None
    seconds: float

    @property
    def kept(self) -> int:
        """Draft tokens that became text."""
        return min(self.trace.accepted, len(self.committed))


@dataclass
class RunResult:
    """What is known at the end of a call.

    Args:
        new_ids (`list[int]`), seconds (`float`): the text and the time speculative decoding took for it.
        plain_ids (`list[int]`), plain_seconds (`float`): the same of plain generation, where there was time for it.
        stopped (`bool`): whether the time limit cut the text.
    """

    new_ids: list[int] = field(default_factory=list)
    seconds: float = 0.0
    plain_ids: list[int] = field(default_factory=list)
    plain_seconds: float = 0.0
    plain_finished: bool = False
    stopped: bool = False
    trace: GenerationTrace | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.new_ids) / self.seconds if self.seconds else 0.0

    @property
    def plain_tokens_per_second(self) -> float | None:
        return len(self.plain_ids) / self.plain_seconds if self.plain_seconds else None

    @property
    def ratio(self) -> float | None:
        """Speed over plain generation's, both measured in this call; `None` where plain generation had no time."""
        plain = self.plain_tokens_per_second
        return self.tokens_per_second / plain if plain else None

    @property
    def identical(self) -> bool | None:
        """Whether both texts are the same as far as both go (a time limit may have cut either); `None` without one."""
        if not self.plain_ids:
            return None
        if self.plain_finished and not self.stopped:
            return self.plain_ids == self.new_ids
        both = min(len(self.plain_ids), len(self.new_ids))
        return self.plain_ids[:both] == self.new_ids[:both]


class FixedShadow:
    """A fixed window drafted and verified from the prefixes of another run, with caches of its own.

    Args:
        target, drafter: the models.
        prompt_ids (`list[int]`): the prompt's tokens.
        processors (`LogitsProcessorList`): those of the call; draft and target distributions pass through them.
        do_sample (`bool`): whether drafts are sampled, and verified by rejection sampling; else greedy.
        seed (`int`): of its own random numbers, so that it draws none of the run's.
    """

    def __init__(
        self,
        target: Any,
        drafter: Any,
        prompt_ids: list[int],
        processors: LogitsProcessorList | None = None,
        do_sample: bool = False,
        window: int = FIXED_WINDOW,
        eos_ids: frozenset[int] = frozenset(),
        seed: int = 0,
    ):
        self.target, self.drafter = target, drafter
        self.window = min(window, drafter.config.longest_window or window)
        self.ids = list(prompt_ids)
        self.processors = processors or LogitsProcessorList()
        self.do_sample, self.eos_ids = do_sample, eos_ids
        self.generator = torch.Generator().manual_seed(seed)
        self.context_length = common_context_length(target.config, drafter.config)
        drafter.attach_target(target)
        self.session = drafter.start_session(target_width(target))
        self.first_prefix = drafter.draft_model.first_prefix
        self.cache = DynamicCache()
        self.states: torch.Tensor | None = None  # of the tokens that the drafter will be told of next
        self.observed = self.first_prefix  # tokens that the drafter has read, the skipped first one counted
        self.last_draft: list[int] = []

    @torch.inference_mode()
    def round(self, room: int) -> ShadowRound:
        """Draft from `ids` as far as `room` goes, and let the target verify it."""
        window = min(self.window, room)
        if self.context_length is not None:
            window = min(window, self.context_length - len(self.ids))
        self._read_prefix()
        drafts, draft_probs = self._draft(window) if window > 0 else ([], [])
        scores = self._verify(drafts)
        accepted = 0
        if drafts and self.do_sample:
            accepted = self._accepted_sampled(drafts, draft_probs, scores)
        elif drafts:
            choices = scores[: len(drafts)].argmax(-1)
            accepted = int(greedy_accepted_counts(torch.tensor(drafts, device=choices.device), choices))
        self.last_draft = drafts
        return ShadowRound(drafts, accepted)

    def commit(self, tokens: list[int]) -> None:
        """Go on after `tokens`, which the other run has committed. What the target has read of them stays read."""
        drafted, self.last_draft = self.last_draft, []
        if self.cache.get_seq_length():
            known = 0
            while known < min(len(drafted), len(tokens) - 1) and drafted[known] == tokens[known]:
                known += 1
            if len(drafted) > known:
                self.cache.crop(known - len(drafted))
                if self.states is not None:
                    self.states = self.states[:, : self.states.shape[1] - (len(drafted) - known)]
        self.ids += tokens

    def _read_prefix(self) -> None:
        """Target: all tokens but the last. Drafter: all of them, each with the target's state of the one before."""
        self._forward(self.ids[self.cache.get_seq_length() : -1])
        if len(self.ids) > self.observed:
            unread = torch.tensor([self.ids[self.observed :]], device=self.drafter.device)
            states = self.states
            if states is not None:
                states = states[:, -unread.shape[1] :].to(self.drafter.device)
            self.session.observe(unread, states, self.observed)
            self.observed, self.states = len(self.ids), None

    def _draft(self, longest: int) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens, and the distributions `[V]` that they were drawn from."""
        record = RoundTrace(0, 0, [])
        rule = FixedWindow(longest, OnlineCosts())
        window = Window(rule, record, longest, lambda draft_ids: draft_ids[-1] in self.eos_ids)
        distributions = DrafterDistributions(
            self.session,
            lambda logits, drafts: self._process(logits, drafts[0]),
            self._draw if self.do_sample else None,
            looks=False,
        )
        draft_windows([window], distributions)
        return record.draft_ids, [scores[0].softmax(-1) for scores in distributions.scores]

    def _draw(self, log_probs: torch.Tensor) -> torch.Tensor:
        """`[1, V]` -> `[1, 1]`, by the row's own random numbers."""
        dtype = exact_dtype(log_probs.device)
        uniform = torch.rand(1, generator=self.generator, dtype=dtype).to(log_probs.device)
        return sample_from_uniform(log_probs.exp(), uniform)[:, None]

    def _verify(self, drafts: list[int]) -> torch.Tensor:
        """The target's processed scores after the last token and after each drafted one, `[W + 1, V]`."""
        logits = self._forward([self.ids[-1], *drafts])
        rows = [self._process(logits[position : position + 1], drafts[:position]) for position in range(len(logits))]
        return torch.cat(rows)

    def _accepted_sampled(self, drafts: list[int], draft_probs: list[torch.Tensor], scores: torch.Tensor) -> int:
        dtype = exact_dtype(scores.device)
        uniforms = torch.rand(len(drafts) + 1, generator=self.generator, dtype=dtype).to(scores.device)
        counts, _ = rejection_sample_chain(
            torch.tensor(drafts, device=scores.device),
            torch.stack(draft_probs).to(scores.device),
            scores.softmax(-1),
            uniforms[:-1],
            uniforms[-1],
        )
        return int(counts)

    def _process(self, logits: torch.Tensor, drafts: list[int]) -> torch.Tensor:
        """`[1, V]` after the prefix and `drafts` -> processed scores `[1, V]`."""
        if not self.processors:
            return logits
        return self.processors(torch.tensor([self.ids + drafts], device=logits.device), logits)

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """Tokens after the cache -> logits `[T, V]` in float32; states are kept for the drafter."""
        if not tokens:
            return torch.empty(0)
        layers = self.drafter.config.target_layer_ids
        outputs = self.target(
            input_ids=torch.tensor([tokens], device=self.target.device),
            use_cache=True,
            return_dict=True,
            output_hidden_states=bool(layers),
            **{cache_argument(self.target): self.cache},
        )
        states = collect_target_states(outputs.hidden_states, layers)
        if states is not None:
            self.states = states if self.states is None else torch.cat([self.states, states], dim=1)
        return outputs.logits[0].float()


class _Stopped(Exception):
    """The visitor left, or time is up: ends the loop from inside its streamer."""


class _StopWhen(StoppingCriteria):
    """Ends plain generation when time is up or the visitor has left."""

    def __init__(self, deadline: float, left: threading.Event):
        self.deadline, self.left = deadline, left

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = time.perf_counter() > self.deadline or self.left.is_set()
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)


class _Observer:
    """The streamer that the loop calls after each round: hands rounds over and stops the clock meanwhile."""

    def __init__(self, run: "Run"):
        self.run = run
        self.prompt_seen = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        entered = time.perf_counter()
        self.run.hand_over(tokens.tolist(), entered)
        self.run.paused += time.perf_counter() - entered

    def end(self) -> None:
        pass


class Run:
    """One call. Iterate over it for its [`RunRound`]s; `result` is complete when the iteration has ended.

    The models compute in a thread of their own, which waits at each round until the reader asks for the next: what
    the reader does with a round never overlaps with the time that is measured. Leaving early ends the thread.
    """

    def __init__(self, target: Any, drafter: Any, prompt_ids: list[int], settings: RunSettings):
        self.target, self.settings = target, settings
        self.drafter = drafter
        self.prompt_ids = prompt_ids
        self.result = RunResult()
        self.paused = 0.0
        self.started = 0.0
        self._shadow: FixedShadow | None = None
        self._rounds: queue.Queue = queue.Queue()
        self._asked = threading.Semaphore(0)
        self._left = threading.Event()
        longest = min(settings.max_window, drafter.config.longest_window or settings.max_window)
        view = drafter.with_settings(window=settings.window, max_window=longest)
        self._decoding = view.generate_with(streamer=_Observer(self))
        self._deadline = time.perf_counter() + settings.seconds

    def __iter__(self) -> Iterator[RunRound]:
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        try:
            while True:
                self._asked.release()
                item = self._rounds.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._left.set()
            self._asked.release()

    def hand_over(self, committed: list[int], now: float) -> None:
        """Called by the loop after each round, the clock being stopped."""
        seconds = now - self.started - self.paused
        trace = self._decoding.last_trace
        record = trace.rounds[-1]
        self.result.trace, self.result.seconds = trace, seconds
        shadow = self._shadow
        assert shadow is not None
        first = len(trace.rounds) == 1
        drafted = None if first else shadow.round(self.settings.max_new_tokens - len(self.result.new_ids) - 1)
        shadow.commit(committed)
        self.result.new_ids = self.result.new_ids + committed
        self._rounds.put(RunRound(record, committed, drafted, seconds))
        self._asked.acquire()
        if self._left.is_set():
            raise _Stopped
        if time.perf_counter() > self._deadline - 0.4 * self.settings.seconds:
            self.result.stopped = True
            raise _Stopped

    def _work(self) -> None:
        try:
            self._asked.acquire()
            inputs = torch.tensor([self.prompt_ids], device=self.target.device)
            options = {**sampling_options(self.settings.temperature), "max_new_tokens": self.settings.max_new_tokens}
            options["attention_mask"] = torch.ones_like(inputs)
            try:
                self.started = time.perf_counter()
                self.target.generate(inputs, custom_generate=self._decode, **options)
                self.result.seconds = time.perf_counter() - self.started - self.paused
            except _Stopped:
                if self._left.is_set():
                    return
            self._plain(inputs, options)
            self._rounds.put(None)
        except BaseException as error:  # the reader raises it
            self._rounds.put(error)

    def _decode(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ):
        """Our loop, as `generate` calls it; what it is called with tells how the fixed window must draw."""
        eos = getattr(generation_config, "_eos_token_tensor", None)
        self._shadow = FixedShadow(
            model,
            self.drafter,
            self.prompt_ids,
            LogitsProcessorList(logits_processor or []),
            bool(generation_config.do_sample),
            eos_ids=frozenset([] if eos is None else eos.reshape(-1).tolist()),
            seed=int(time.time_ns() % 2**31),
        )
        return self._decoding(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    def _plain(self, inputs: torch.Tensor, options: dict[str, Any]) -> None:
        """Plain generation from the same prompt: what the ratio and `identical` compare with."""
        if time.perf_counter() > self._deadline:
            return
        criteria = StoppingCriteriaList([_StopWhen(self._deadline, self._left)])
        started = time.perf_counter()
        output = self.target.generate(inputs, stopping_criteria=criteria, **options)
        self.result.plain_ids = output[0, inputs.shape[1] :].tolist()
        self.result.plain_seconds = time.perf_counter() - started  # the tokens are here: the device has finished
        self.result.plain_finished = time.perf_counter() < self._deadline and not self._left.is_set()
