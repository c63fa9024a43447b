"""What a text itself says comes next: the token that followed its last few tokens before, and how far to trust it.

Knows token ids and counts; knows no models, tensors or costs. The evidence that prompt lookup drafts from, used to
judge a drafter's token and, with `lookup=True`, to draft in its place.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

LOOKBACK = 4  # tokens before a draft token that are looked up in the text
LONGEST_MATCH = 32  # tokens before it that are compared with those before an earlier occurrence
MEMORY_TOKENS = 8192  # of a longer prompt, those at its end are looked up
NEW, DIFFERENT, REPEATED = 0, 1, 2  # a run had come once; twice, with other tokens after; with the same one


class LookupToken(NamedTuple):
    """The token that a text suggests next.

    Args:
        token (`int`): the one that followed the last few tokens where they came before, the last time if several.
        match (`int`): how many tokens are the same before both places, 1 to LONGEST_MATCH.
        history (`int`): REPEATED if that token followed the time before as well, DIFFERENT if another did, NEW if
            there was no such time.
    """

    token: int
    match: int
    history: int


class TextMemory:
    """What followed which short runs of tokens in a text, so that the next token can be looked up, and how often the
    token that was looked up came [ours]."""

    def __init__(self) -> None:
        self.acceptance = LookupAcceptance()
        self._text: list[int] = []
        # Runs of 1 to LOOKBACK tokens that something came after: the place of what came last, and its history.
        self._followed: dict[tuple[int, ...], tuple[int, int]] = {}

    def read(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that come next in the text: first the prompt, which was not the target's choice and is
        no evidence of what it keeps, then what was committed."""
        text, start = self._text, len(self._text)
        text += list(tokens)[-MEMORY_TOKENS:]
        for place in range(start, len(text)):
            if start:
                found = self.look_up(up_to=place)
                if found is not None:
                    self.acceptance.observe(found, text[place])
            for length in range(1, min(LOOKBACK, place) + 1):
                run = tuple(text[place - length : place])
                before, history = self._followed.get(run), NEW
                if before is not None:
                    history = REPEATED if text[before[0]] == text[place] else DIFFERENT
                self._followed[run] = place, history

    def look_up(self, drafted: Sequence[int] = (), up_to: int | None = None) -> LookupToken | None:
        """What followed the last occurrence of the longest run, of up to LOOKBACK tokens, that ends the text (its
        first `up_to` tokens) and `drafted`; `None` where even their last token is new."""
        text, end = self._text, len(self._text) if up_to is None else up_to
        recent = [*text[max(end - LONGEST_MATCH, 0) : end], *drafted]
        for match in range(min(LOOKBACK, len(recent)), 0, -1):
            found = self._followed.get(tuple(recent[-match:]))
            if found is not None:
                break
        else:
            return None
        place, history = found
        most = min(LONGEST_MATCH, len(recent), place)
        while match < most and recent[-match - 1] == text[place - match - 1]:
            match += 1
        return LookupToken(text[place], match, history)


class LookupAcceptance:
    """Probability that a token from the text is kept, learned from the text as it is written [ours].

    Beta counts for each length of the match and each history. Every token that was committed is evidence, whether
    drafted or not: would the text have suggested it? At T > 0 as well, since it is drawn from P and a token from the
    text is kept with its probability under P. Old evidence fades, so that the counts follow the text.
    """

    SHORTEST = (1, 2, 3, 4, 6, 9, 16)  # matches from here to the next one are counted together
    # What was seen on functions of Python's standard library, HumanEval and GSM8K, rounded; it counts as 8 tokens do.
    PRIORS = {
        NEW: (0.3, 0.5, 0.65, 0.75, 0.8, 0.87, 0.93),
        DIFFERENT: (0.3, 0.4, 0.4, 0.45, 0.5, 0.7, 0.8),
        REPEATED: (0.5, 0.65, 0.85, 0.9, 0.95, 0.95, 0.98),
    }
    PRIOR_WEIGHT, MOST_WEIGHT = 8.0, 40.0

    def __init__(self) -> None:
        weight = self.PRIOR_WEIGHT
        self._counts = {history: [[weight * p, weight] for p in row] for history, row in self.PRIORS.items()}

    def _count(self, found: LookupToken) -> list[float]:
        return self._counts[found.history][bisect_right(self.SHORTEST, found.match) - 1]

    def probability(self, found: LookupToken) -> float:
        """alpha of a token from the text, in (0, 1)."""
        kept, seen = self._count(found)
        return kept / seen

    def observe(self, found: LookupToken, token: int) -> None:
        """`token` was committed where the text had suggested `found`."""
        count = self._count(found)
        count[0] += found.token == token
        count[1] += 1
        if count[1] > self.MOST_WEIGHT:
            fade = self.MOST_WEIGHT / count[1]
            count[0], count[1] = count[0] * fade, count[1] * fade
