"""The order in which sequences are read: by (seed, epoch) alone, so the same on every process and after a resume."""

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler

GROUPED_BATCHES = 8  # sorted together: little padding is left, and texts still meet others in every epoch


class GroupedByLength(Sampler[int]):
    """Batches of sequences of similar lengths, in random order: the computation spends less on padding.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`): tokens of each sequence.
        batch (`int`): sequences of a gradient step, over all processes.
        seed (`int`): of the order.

    The sequences are shuffled, and each [`GROUPED_BATCHES`] batches sorted among themselves. The last batch may be
    smaller; it comes last.
    """

    def __init__(self, lengths: torch.Tensor, batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        whole = len(order) // self.batch * self.batch
        batches = []
        for group in order[:whole].split(self.batch * GROUPED_BATCHES):
            batches += group[self.lengths[group].argsort()].split(self.batch)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place].tolist()
        yield from order[whole:].tolist()


class RepeatedBlocks(Sampler[int]):
    """Repeats each block of `block` indices `times` times, for several gradient steps on the same rollouts."""

    def __init__(self, sampler: Sampler, block: int, times: int, seed: int):
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, generator=torch.Generator(), data_seed=seed)
        self.sampler, self.block, self.times = sampler, block, times

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.block * self.block * self.times  # type: ignore[arg-type]

    def __iter__(self):
        block = []
        for index in self.sampler:
            block.append(index)
            if len(block) == self.block:
                for _ in range(self.times):
                    yield from block
                block = []
