"""How a training was started: by accelerate, with DeepSpeed, in which precision.

Knows the environment and accelerate's plugins; knows no models.
"""

import os
from typing import Any

from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_launch(fp16: bool) -> None:
    """Raise `ValueError` for a launcher's options that no training here can have, and warn where accelerate started
    fewer processes than it was told."""
    compiled = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiled.lower() != "no":
        raise ValueError(
            f"--dynamo_backend: {compiled!r} given, but windows change shape at every step, so that compiling takes "
            "longer than it saves. Leave it out."
        )
    # The loss takes its gradients in its forward, before a scaler of fp16 could keep them from underflowing.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
    if fp16 or launched:
        raise ValueError(
            f"{'--mixed_precision' if launched and not fp16 else 'fp16'}: fp16 given; a drafter's loss takes "
            "gradients before they can be scaled, and small ones would be lost. Pass bf16=True, or train in float32."
        )
    one_of_several = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    ranks = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if one_of_several and not any(name in os.environ for name in ranks):
        logger.warning(
            "accelerate launch: several processes were asked for and one was started, as accelerate does without "
            "several GPUs. Add --multi_gpu, also on a CPU, or use torchrun --nproc_per_node."
        )


def is_sharded_by_launcher() -> bool:
    """Whether accelerate was told to use FSDP or DeepSpeed."""
    launched = [os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED")]
    return "true" in map(str.lower, launched)


def take_zero_3_as_2(plugin: Any) -> None:
    """Lower ZeRO stage 3 of a DeepSpeed `plugin` to 2: a drafter is whole during a step in either, since its processes
    call its layers in different numbers."""
    if plugin is None or plugin.zero_stage != 3:
        return
    unset_hf_deepspeed_config()  # else models made from now on would be in parts
    plugin.zero_stage, plugin.zero3_init_flag = 2, False
    config = plugin.hf_ds_config.config
    kept = {k: v for k, v in config["zero_optimization"].items() if not k.startswith(("stage3_", "offload_param"))}
    config["zero_optimization"] = kept | {"stage": 2}
    plugin.hf_ds_config.set_stage_and_offload()
    logger.warning(
        "deepspeed: ZeRO stage 3 given, stage 2 taken: a step needs the whole drafter's weights in either, and stage "
        "2 splits its optimizer and gradients too. To split the weights between steps, take FSDP2."
    )
