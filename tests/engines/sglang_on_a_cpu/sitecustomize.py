"""Lets SGLang start on a CPU without its compiled library, in every process of an interpreter that finds this folder.

SGLang starts its scheduler as a new process, so that what its import needs cannot wait for a script's first line.
"""

import os

import torch

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

# A torchvision made for CUDA defines these only where it finds its GPU library, and fails to import without them.
TORCHVISION = torch.library.Library("torchvision", "DEF")
TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt.runtime_context import override_platform  # noqa: E402

# Keeps the attention backend that drafts; its kernels are the stand-in's. Layers are SGLang's torch code all the same.
override_platform(has_amx=True).install()
