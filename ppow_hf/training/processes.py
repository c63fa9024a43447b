"""The end of several processes that train or record together."""

import time

import torch

RELEASE_SECONDS = 0.5


def end_processes() -> None:
    """End the group of processes, if this one is in a group, so that the interpreter can end too.

    Gloo's threads hold the tensors of a collective a little longer than it takes, also of a group that is destroyed. A
    tensor that is released while the interpreter ends aborts the process, so the threads get time for it first.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(RELEASE_SECONDS)
