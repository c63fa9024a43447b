"""Window rules: how many tokens to draft before the target is asked.

Knows numbers, token ids and small state; knows no models or caches. A rule may change how fast text comes, never
which.
Words: gamma = draft step / one-token target forward; v(W) = (W+1)-token / one-token target forward; alpha =
probability that the next draft token is kept.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .cost_model import OnlineCosts
from .estimator import AcceptanceEstimator, decayed_kl
from .lookup import TextMemory


class WindowRule:
    """How long the next window is: `max_window`, or as much as there is room for; subclasses choose otherwise.

    One object per generation call; the loop drives it in this order each round:

    `read(...)` of the tokens that are new in the text; `start(limit)` (in a batch by [`start_windows`]) -> longest
    window to consider (0: do not draft);
    then, for position j = 0, 1, ...: the drafter's distribution is computed and described by `describe(...)`,
    `include(...)` says whether a token is drawn and verified there, and `outlook(...)` what another draft step is
    worth, where `prefers_text(...)` does not take the text; `look_up(...)` gives tokens from the text to be verified
    after those; after the target's answer, `update(...)` and, where there were any, `update_looked_up(...)`.
    """

    reads_distributions = True  # whether `include` and `outlook` look at features; else only `start` decides

    def __init__(self, max_window: int, costs: OnlineCosts):
        self.max_window, self.costs, self.memory = max_window, costs, TextMemory()
        self._kl = 1.0

    def read(self, tokens: Sequence[int]) -> None:
        """Take in the text's new tokens: first the prompt, then what each round committed."""
        self.memory.read(tokens)

    def describe(
        self,
        max_probability: float,
        second_probability: float,
        entropy: float,
        likeliest: int,
        drafted: Sequence[int],
        predicted: float | None = None,
    ) -> list[float]:
        """Features of the distribution after `drafted`, this round's draft tokens so far; `likeliest` is its mode,
        `predicted` the confidence head's log-odds where there is one.

        Looks at nothing that is drawn there, so that sampling stays unbiased.
        """
        found = self.memory.look_up(drafted)
        return AcceptanceEstimator.features(
            max_probability,
            entropy,
            self.lagged_kl,
            len(drafted),
            second_probability,
            None if found is None else self.memory.acceptance.probability(found),
            found is not None and found.token == likeliest,
            predicted,
        )

    def start(self, limit: int) -> int:
        """Longest window to consider, at most `limit` tokens."""
        return min(self.max_window, limit)

    def include(self, position: int, features: Sequence[float]) -> bool:
        """Whether to draw a token at `position`; `features` describe the distribution it would be drawn from."""
        return True

    def outlook(self, position: int) -> tuple[float, float]:
        """Tokens that the draft step for `position` is expected to give, all earlier positions having been drawn, and
        the tokens that could be had for its cost otherwise."""
        return 1.0, 0.0

    def prefers_text(self, drafted: Sequence[int]) -> bool:
        """Whether the text is a better source than the drafter for what comes after this round's `drafted` tokens."""
        return False

    def look_up(self, drafted: Sequence[int], limit: int) -> list[int]:
        """Tokens from the text to be verified after the `drafted` ones, so many that there are at most `limit`.

        They depend on nothing that is not in the text or in `drafted`, so that sampling stays unbiased.
        """
        return []

    def update(self, window: int, draft_steps: int, accepted: int, kl: Sequence[float]) -> None:
        """Learn from a round: tokens drafted by the drafter, draft steps taken, how many of the tokens were accepted,
        [`RoundTrace.kl_with_outside`] at each position of theirs that was verified."""
        self._kl = decayed_kl(self._kl, kl)

    def update_looked_up(self, looked_up: int, accepted: int) -> None:
        """Learn from a round's tokens from the text, `accepted` of which were kept, after its [`update`]."""

    @property
    def lagged_kl(self) -> float:
        """Mean [`RoundTrace.kl_with_outside`] of recent verified positions, in nats."""
        return self._kl

    @property
    def pays(self) -> bool:
        """Whether, by this rule's own account, drafting is faster than not drafting."""
        return True


class FixedWindow(WindowRule):
    """Always `max_window` tokens, or as many as there is room for."""

    reads_distributions = False


class HeuristicWindow(FixedWindow):
    """transformers' `num_assistant_tokens_schedule="heuristic"`: +2 after a fully accepted window, -1 otherwise.

    It starts at 5, as transformers 4 did; transformers 5 starts at 20, which costs more until it has come down.
    """

    def __init__(self, max_window: int, costs: OnlineCosts):
        super().__init__(max_window, costs)
        self._current = min(5, max_window)

    def start(self, limit: int) -> int:
        return min(self._current, limit)

    def update(self, window: int, draft_steps: int, accepted: int, kl: Sequence[float]) -> None:
        super().update(window, draft_steps, accepted, kl)
        if window > 0:
            change = 2 if accepted == window else -1
            self._current = min(max(self._current + change, 1), self.max_window)


class KLAdaptiveWindow(WindowRule):
    """Draft position j while the probability that it is reached and kept is worth its cost [ours].

    The stopping rule of renewal-reward: with S_j the product of the estimated acceptances up to j and lambda the
    tokens per unit of cost reached so far, a draft step for position j is taken while S_(j-1) * E[alpha_j] >= lambda *
    (gamma + slope), and a token whose distribution is known is verified while S_j >= lambda * slope. Before a round,
    a window is only begun when drafting has paid lately; otherwise rounds go without (window 0), with a probe after 1,
    2, 4, ... up to `probe_every` rounds, so that a poor drafter costs next to nothing and one that gets better is
    noticed.

    Where one draft step gives the whole window (block drafters), gamma is the price of a window and not of a token: a
    window is begun when its tokens together, of the running acceptances, are worth it; then each distribution is
    there, and a token is verified while S_j >= lambda * slope.

    E[alpha_j], before its distribution is known, is half way between alpha_(j-1) and the running acceptance. (A second
    logistic regression for it, from the features of position j - 1, did no better: the running acceptance follows the
    text, and it does not.)

    The estimator was fitted elsewhere, if at all. Its log-odds are shifted by what this text shows: an intercept with
    a Gaussian prior, filtered over the reached positions (one extended-Kalman step a round), so that a drafter that
    is sure and wrong is found out within a few rounds.
    """

    def __init__(
        self,
        max_window: int,
        costs: OnlineCosts,
        estimator: AcceptanceEstimator | None = None,
        prior_acceptance: float = 0.7,
        probe_every: int = 64,
    ):
        super().__init__(max_window, costs)
        self.estimator = estimator or AcceptanceEstimator()
        self.probe_every = probe_every
        self._first_acceptance = prior_acceptance  # running share of first draft tokens that were kept
        self._acceptance = prior_acceptance  # running share of reached draft tokens that were kept
        self._evidence = 4.0
        self._drafting_rounds = 0
        self._shift, self._shift_variance = 0.0, 1.0  # of the estimator's log-odds
        self._tokens, self._cost = 0.0, 0.0
        self._cost_model = costs.model
        self._reached = 1.0
        self._estimates: list[float] = []  # alpha at this round's positions
        self._next_estimate = prior_acceptance
        self._rest, self._wait = 0, 1
        self._worth = True

    def acceptance_probability(self, features: Sequence[float]) -> float:
        return self.estimator.probability(features, self._shift)

    def start(self, limit: int, pays: bool | None = None) -> int:
        """See [`WindowRule`]; `pays` says whether drafting is worth it to the batch that the row is in."""
        self._cost_model = self.costs.model
        self._reached, self._next_estimate, self._estimates = 1.0, self._acceptance, []
        if limit < 1:
            return 0
        longest = min(self.max_window, limit)
        if pays is None:
            gain, price = self.first_outlook(longest)
            pays = gain >= price
        self._worth = pays
        if self._worth:
            self._rest, self._wait = 0, 1
            return longest
        if self._rest < self._wait:
            self._rest += 1
            return 0
        self._rest, self._wait = 0, min(self._wait * 2, self.probe_every)
        return longest if self._cost_model.one_step else 1

    def first_outlook(self, limit: int) -> tuple[float, float]:
        """[`outlook`] of the first draft step of a window of at most `limit` tokens."""
        self._cost_model = self.costs.model
        first_token = self._price(self._cost_model.token_cost)
        if not self._cost_model.one_step:
            return self._first_acceptance if limit > 0 else 0.0, first_token
        gain = window_gain(self._first_acceptance, self._acceptance, first_token, min(self.max_window, limit))
        return gain, self._price(self._cost_model.start_cost)

    def _price(self, cost: float) -> float:
        """Tokens that could be had for `cost` otherwise; rounds without a draft always can."""
        return max(self._speed, 1.0) * cost

    def include(self, position: int, features: Sequence[float]) -> bool:
        alpha = self.acceptance_probability(features)
        reached = self._reached * alpha
        if position > 0 and reached < self._cost_model.verification_cost * self._speed:
            return False
        self._estimates.append(alpha)
        self._reached = reached
        self._next_estimate = 0.5 * (alpha + self._acceptance)
        return True

    def outlook(self, position: int) -> tuple[float, float]:
        if self._cost_model.one_step:  # the distribution is there: `include` looks at it
            return 1.0, 0.0
        return self._reached * self._next_estimate, self._cost_model.token_cost * self._speed

    def update(self, window: int, draft_steps: int, accepted: int, kl: Sequence[float]) -> None:
        super().update(window, draft_steps, accepted, kl)
        decay = 0.97
        self._tokens = decay * self._tokens + accepted + 1
        self._cost = decay * self._cost + self._cost_model.round_cost(window, draft_steps)
        if window > 0:
            reached = accepted + (accepted < window)
            self._evidence = min(self._evidence + reached, 40.0)
            self._acceptance += (accepted / reached - self._acceptance) * reached / self._evidence
            self._shift_estimates(accepted, self._estimates[:reached])
            # The prior counts as two rounds. A probe after a rest says more about now than what was seen before it.
            self._drafting_rounds += 1
            rate = 0.3 if not self._worth else max(1 / (2 + self._drafting_rounds), 0.1)
            self._first_acceptance += rate * (float(accepted > 0) - self._first_acceptance)

    def _shift_estimates(self, accepted: int, estimates: Sequence[float]) -> None:
        """One step of the filter over the reached positions, the first `accepted` of which were kept."""
        information = sum(alpha * (1 - alpha) for alpha in estimates)
        self._shift_variance = 1 / (1 / (self._shift_variance + 0.01) + information)
        shift = self._shift + self._shift_variance * (accepted - sum(estimates))
        self._shift = min(max(shift, -6.0), 6.0)

    @property
    def _speed(self) -> float:
        """lambda: tokens per one-token target forward of recent rounds; the cost model's own guess at the start."""
        prior = self._cost_model.speedup(self._acceptance, 4)
        return (self._tokens + 4 * prior) / (self._cost + 4)

    @property
    def pays(self) -> bool:
        return self._worth


class LookupWindow(KLAdaptiveWindow):
    """[`KLAdaptiveWindow`] that drafts from the text as well, in the drafter's place or after its tokens [ours].

    A token from the text costs no draft step, only its share of the verification: a chain of them goes on while S_j >=
    lambda * slope, S_j the product of the acceptances that [`LookupAcceptance`] estimates. What a
    chain gains over a round without is the sum of S_j - lambda * (cost of position j). Before each draft step the
    text's chain, as far as it is worth its cost, is weighed against the best window of further draft steps, whose
    acceptances are the running ones; the better one goes on.

    The drafter's statistics come from its own tokens alone. It drafts at the latest after `passed_over` rounds in
    which the text was preferred, so that one that gets better is noticed.
    """

    passed_over = 16

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._limit = 0
        self._text_rounds = 0  # in a row

    def start(self, limit: int, pays: bool | None = None) -> int:
        longest = super().start(limit, pays)
        self._limit = min(self.max_window, limit)
        if longest and self._worth and self._text_rounds < self.passed_over and self.prefers_text([]):
            self._text_rounds += 1
            return 0
        if longest:
            self._text_rounds = 0
        return longest

    def prefers_text(self, drafted: Sequence[int]) -> bool:
        _, reaches = self._chain(drafted, self._limit)
        text_gain = sum(reaches) - len(reaches) * self.column_price
        alpha = self._next_estimate if drafted else self._first_acceptance
        price = self._price(self._cost_model.token_cost)
        gain = window_gain(self._reached * alpha, self._acceptance, price, self._limit - len(drafted))
        if not drafted:
            gain = max(gain - self._price(self._cost_model.start_cost), 0.0)
        return text_gain > gain

    def look_up(self, drafted: Sequence[int], limit: int) -> list[int]:
        return self._chain(drafted, min(self.max_window, limit))[0]

    def text_reaches(self, drafted: Sequence[int], limit: int) -> list[float]:
        """Probability that each token of [`look_up`] is kept."""
        return self._chain(drafted, min(self.max_window, limit))[1]

    @property
    def column_price(self) -> float:
        """Tokens that could be had otherwise for the verification of one."""
        return self._price(self._cost_model.verification_cost)

    def _chain(self, drafted: Sequence[int], limit: int) -> tuple[list[int], list[float]]:
        """Tokens from the text after `drafted` that are worth their verification, and how likely each is kept."""
        chain: list[int] = []
        reaches: list[float] = []
        price, reached = self.column_price, self._reached
        while len(drafted) + len(chain) < limit:
            found = self.memory.look_up([*drafted, *chain])
            if found is None:
                break
            reached *= self.memory.acceptance.probability(found)
            if reached < price:
                break
            chain.append(found.token)
            reaches.append(reached)
        return chain, reaches

    def update_looked_up(self, looked_up: int, accepted: int) -> None:
        self._tokens += accepted
        self._cost += self._cost_model.verification_cost * looked_up

    @property
    def pays(self) -> bool:
        return self._worth or self._tokens > self._cost


def start_windows(rules: Sequence[WindowRule], limits: Sequence[int]) -> list[int]:
    """[`WindowRule.start`] of each row of a batch, whose rows share their draft steps and the target's forward [ours].

    Adaptive rows begin together: when the tokens that all expect are worth what all could have otherwise. What a
    batch costs nobody knows before it is measured, so that its first windows are short.
    """
    adaptive = [rule for rule in rules if isinstance(rule, KLAdaptiveWindow)]
    if len(rules) == 1 or len(adaptive) < len(rules):
        return [rule.start(limit) for rule, limit in zip(rules, limits, strict=True)]
    outlooks = [rule.first_outlook(limit) for rule, limit in zip(adaptive, limits, strict=True)]
    pays = batch_pays(outlooks)
    starts = [rule.start(limit, pays) for rule, limit in zip(adaptive, limits, strict=True)]
    return [int(min(longest, rule.costs.trial_window)) for rule, longest in zip(adaptive, starts, strict=True)]


def batch_pays(outlooks: Sequence[tuple[float, float]]) -> bool:
    """Whether a step that all rows of a batch pay for gives them more than they could have otherwise."""
    return sum(gain for gain, _ in outlooks) >= sum(price for _, price in outlooks)


def text_limit(rules: Sequence[WindowRule], drafts: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Longest window to which tokens from the text are worth their verification to a batch, all rows of which pay for
    the longest one [ours]; `drafts` are the tokens drawn, `limits` the longest windows of each row."""
    length = max(map(len, drafts))
    readers = [rule for rule in rules if isinstance(rule, LookupWindow)]
    if len(rules) == 1 or len(readers) < len(rules):
        return max(limits)
    given = zip(readers, drafts, limits, strict=True)
    chains = [(len(drafted), rule.text_reaches(drafted, limit)) for rule, drafted, limit in given]
    price = sum(rule.column_price for rule in readers)
    while True:
        column = [reaches[length - start] for start, reaches in chains if 0 <= length - start < len(reaches)]
        if not column or sum(column) < price:
            return length
        length += 1


def window_gain(reached: float, acceptance: float, price: float, longest: int) -> float:
    """Tokens that the best window of at most `longest` tokens gives beyond their price, where the first is kept with
    probability `reached` and each further one with `acceptance` more."""
    gain = 0.0
    for _ in range(longest):
        if reached < price:
            break
        gain += reached - price
        reached *= acceptance
    return gain


def rule_of_call(config: Any, settings: dict[str, Any], costs: OnlineCosts, sampling: bool) -> WindowRule:
    """The rule of a call with a drafter of this `config`; `settings` are those of [`call_settings`]."""
    window, longest, lookup = settings["window"], settings["max_window"], settings["lookup"]
    return make_window_rule(window, longest, costs, config.calibration, sampling, lookup, config.confidence_head)


def make_window_rule(
    window: str,
    max_window: int,
    costs: OnlineCosts,
    calibration: dict | None = None,
    sampling: bool = False,
    lookup: bool = False,
    confidence_head: bool = False,
) -> WindowRule:
    """The rule that the settings name: `"kl"`, `"fixed"` or `"heuristic"`. The others are for `"kl"`: its estimator is
    as calibrated, and `confidence_head` says whether the drafter has one."""
    if window == "fixed":
        return FixedWindow(max_window, costs)
    if window == "heuristic":
        return HeuristicWindow(max_window, costs)
    if window != "kl":
        raise ValueError(f"window: {window!r} is not one of ['kl', 'fixed', 'heuristic'].")
    stored = (calibration or {}).get("sampling" if sampling else "greedy") or {}
    weights = stored.get("weights", {})
    known = {"foretold", *(one.name for one in fields(AcceptanceEstimator))}
    if weights and set(weights) <= known:
        estimator = AcceptanceEstimator.from_weights(weights)
    else:  # none, or fitted to other features, once
        estimator = AcceptanceEstimator.default(confidence_head)
    rule = LookupWindow if lookup else KLAdaptiveWindow
    return rule(max_window, costs, estimator, prior_acceptance=stored.get("acceptance", 0.7))
