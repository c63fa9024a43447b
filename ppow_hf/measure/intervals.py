"""95% intervals over prompts, by bootstrap: what other prompts of the same kind would have given.

Knows sums by prompt; knows no model.
"""

from collections.abc import Sequence

import numpy

SAMPLES = 1000
FEWEST_PROMPTS = 5

Sums = tuple[Sequence[float], Sequence[float]]  # numerators and denominators of a ratio, by prompt


def ratio_interval(sums: Sums, reference: Sums | None = None) -> list[float] | None:
    """95% interval of the ratio of the sums, or of how many times the `reference`'s ratio it is.

    The same prompts are drawn for both. `None` for fewer than five prompts, or where some draw has no ratio.
    """
    count = len(sums[0])
    if count < FEWEST_PROMPTS:
        return None
    drawn = numpy.random.default_rng(0).integers(count, size=(SAMPLES, count))

    def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> numpy.ndarray:
        above, below = (numpy.asarray(values, dtype=float)[drawn].sum(axis=1) for values in (numerators, denominators))
        return above / numpy.where(below > 0, below, numpy.nan)

    found = ratios(*sums) if reference is None else ratios(*sums) / ratios(*reference)
    low, high = numpy.percentile(found, [2.5, 97.5])
    return None if numpy.isnan(low) else [float(low), float(high)]
