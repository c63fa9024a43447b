"""`ppow record`: a target's states along texts, on disk, so that drafters train without the target."""

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..data.files import ensure_writable
from ..data.models import default_device, load_target, load_tokenizer, resolve
from ..data.sources import DATA_HELP, check_source
from ..runtime.compatibility import num_layers
from ..serving.vllm_runner import vllm_python
from .options import (
    add_device,
    add_engine_python,
    add_max_length,
    add_target,
    add_target_dtype,
    check_needs,
    check_options,
)


def register(commands: Any) -> None:
    """Add the parser of `ppow record`."""
    parser = commands.add_parser(
        "record",
        help="record a target's states, to train drafters without it",
        description="Read texts with the target once and keep the states that drafters learn from. Run again with the "
        "same folder, it goes on where it was; run several times at once, the processes share the work. Train with "
        "`ppow train --target_states FOLDER`; more texts are recorded into a folder of their own, and trained on with "
        "`--target_states FOLDER FOLDER2`.",
    )
    add_target(parser)
    parser.add_argument("--data", required=True, metavar="DATA", help=f"training data as of ppow train: {DATA_HELP}")
    parser.add_argument("--output-dir", required=True, metavar="FOLDER", help="folder to record into or to go on with")
    add_max_length(parser)
    parser.add_argument(
        "--regenerate",
        choices=["true", "false"],
        help="whether the target writes the completions, half of them at T = 0; false keeps those in the data "
        "(default: as of ppow train, for rows with prompt or messages)",
    )
    parser.add_argument(
        "--architecture",
        choices=["eagle", "standalone", "medusa", "block"],
        default="eagle",
        help="whose states are kept: eagle reads those of three layers and the last, block of some and the last, "
        "others the last alone (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="the layers (default: those of a new eagle or block drafter)",
    )
    parser.add_argument(
        "--states-dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="number format of the states on disk (default: %(default)s)",
    )
    parser.add_argument("--max-gigabytes", type=float, help="most disk taken; texts beyond it are left out")
    _add_reading(parser)
    parser.set_defaults(run=run)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """The arguments that say by what, and on what, the target reads."""
    add_target_dtype(parser)
    parser.add_argument(
        "--device-map",
        choices=["auto", "balanced", "sequential"],
        help="spread the target over this machine's devices, as transformers' device_map",
    )
    parser.add_argument(
        "--tp-plan",
        choices=["auto"],
        help="split the target over processes (tensor parallel): torchrun --nproc_per_node 8 -m ppow_hf.cli record",
    )
    add_device(parser, "the target")
    parser.add_argument(
        "--engine",
        choices=["vllm"],
        help="read the texts with this engine, in an environment of its own; the target is loaded on the CPU",
    )
    add_engine_python(parser)


def run(arguments: argparse.Namespace) -> int:
    """`ppow record`."""
    check_options(arguments, "max_length", "max_gigabytes")
    check_needs(arguments, "engine_python", "engine")
    if arguments.layers is not None and arguments.architecture not in ("eagle", "block"):
        raise ValueError(f"--layers: a {arguments.architecture} drafter reads the last state alone. Leave it out.")
    folder = ensure_writable(arguments.output_dir, "--output-dir")
    check_source(arguments.data, "--data")
    import torch

    from ..measure.costs import faster_dtype
    from ..runtime.new_drafter import target_layers_for
    from ..serving.vllm_states import VLLMStates
    from ..training import PPOWTrainingArguments
    from ..training.preparation import training_sequences
    from ..training.processes import end_processes
    from ..training.recording import Recording

    if arguments.engine:
        vllm_python(arguments.engine_python)
    device = arguments.device or ("cpu" if arguments.engine else default_device())
    placement = chosen_placement(arguments)
    regenerate = None if arguments.regenerate is None else arguments.regenerate == "true"
    settings = PPOWTrainingArguments(
        str(folder), max_length=arguments.max_length, regenerate=regenerate, use_cpu=device == "cpu", report_to=[]
    )
    target = load_target(arguments.target, "--target", arguments.dtype or faster_dtype(device), device, placement)
    tokenizer = load_tokenizer(arguments.target, "--target")
    layers: list[int] = []
    if arguments.architecture in ("eagle", "block"):
        count = num_layers(target.config.get_text_config())
        layers = target_layers_for(arguments.architecture, arguments.layers, count) or []
    sequences = training_sequences(arguments.data, target, tokenizer, settings, "--data")
    reader: Any = None
    if arguments.engine:
        reader = VLLMStates(target, resolve(arguments.target), layers, arguments.max_length, arguments.engine_python)
    recording = Recording(
        target,
        tokenizer,
        sequences,
        layers,
        arguments.max_length,
        getattr(torch, arguments.states_dtype),
        arguments.max_gigabytes,
        read=reader,
    )
    recording.manifest["target"] = arguments.target
    if recording.is_split and torch.distributed.get_rank() > 0:
        recording.follow()
    else:
        print(describe(recording))
        write(recording, folder, reader or nullcontext())
    end_processes()
    return 0


def write(recording: Any, folder: Path, reader: AbstractContextManager) -> None:
    """Record what is missing, within `reader`, and say how fast that was."""
    from tqdm.auto import tqdm

    missing = recording.open_folder(folder)
    bar = tqdm(total=sum(recording.lengths), unit="token", unit_scale=True, disable=None)
    with reader, bar:
        started = time.perf_counter()
        tokens = recording.record(folder, missing, bar.update)
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)")
    left = recording.missing_shards(folder)
    if left:
        print(f"{len(left)} shards are being recorded by other processes", file=sys.stderr)


def chosen_placement(arguments: argparse.Namespace) -> dict[str, str]:
    """Where the target's layers go, as of `from_pretrained`; `ValueError` for what does not go together."""
    given = [name for name in ("device", "device_map", "tp_plan", "engine") if getattr(arguments, name) is not None]
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--{given[1].replace('_', '-')}: {options} given. Pass one of them.")
    if arguments.tp_plan is not None and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            f"--tp-plan: {arguments.tp_plan!r} given to one process. Start several: torchrun --nproc_per_node 2 -m "
            "ppow_hf.cli record ..."
        )
    return {name: getattr(arguments, name) for name in given if name in ("device_map", "tp_plan")}


def describe(recording: Any) -> str:
    """What will be recorded, and the disk that it takes."""
    left_out = f"; {recording.left_out} are left out" if recording.left_out else ""
    return (
        f"{len(recording.lengths)} sequences of {sum(recording.lengths)} tokens{left_out}: "
        f"{recording.bytes_per_token} bytes a token, {recording.total_bytes / 1e9:.2f} GB with head and embeddings"
    )
