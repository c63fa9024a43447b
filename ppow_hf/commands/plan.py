"""`ppow plan`: what training a drafter for a target takes, before the target is loaded or a GPU is rented."""

import argparse
from typing import Any

from ..data.models import default_device, load_config
from .options import add_max_length, add_number, add_target, check_options

MILLION = 10**6


def register(commands: Any) -> None:
    """Add the parser of `ppow plan`."""
    parser = commands.add_parser(
        "plan",
        help="compute what a training takes: memory, disk, time",
        description="Compute parameters, peak memory of a training step, disk of recorded states and tokens per "
        "second from the target's configuration. No weights are read.",
    )
    add_target(parser)
    parser.add_argument(
        "--architecture",
        choices=["eagle", "standalone"],
        default="eagle",
        help="of the drafter (default: %(default)s)",
    )
    add_max_length(parser)
    add_number(parser, "--gpus", 1, "GPUs that train together")
    add_number(parser, "--batch-size", 1, "sequences of a step on each")
    parser.add_argument("--draft-vocab-size", type=int, help="reduced vocabulary of an eagle drafter")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="bfloat16: products in it and weights in float32, as with --bf16 true (default: %(default)s)",
    )
    parser.add_argument("--gpu-gigabytes", type=float, help="memory of a GPU (default: this machine's)")
    parser.add_argument("--teraflops", type=float, help="10^12 operations a GPU does in a second (default: measured)")
    parser.add_argument("--bandwidth", type=float, help="GB a GPU's memory moves in a second (default: measured)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """`ppow plan`."""
    check_options(
        arguments, "max_length", "gpus", "batch_size", "draft_vocab_size", "gpu_gigabytes", "teraflops", "bandwidth"
    )
    if arguments.max_length < 4:  # as in training
        raise ValueError(f"--max-length: {arguments.max_length} given; at least 4 tokens are needed.")
    if arguments.draft_vocab_size is not None and arguments.architecture != "eagle":
        raise ValueError(f"--draft-vocab-size: a {arguments.architecture} drafter has the target's. Leave it out.")
    config, _ = load_config(arguments.target, "--target")
    if config.model_type == "ppow_drafter":
        raise ValueError(f"--target: {arguments.target!r} is a drafter. Name the model that it is to draft for.")
    import torch

    from ..training.plan import Shape, make_plan

    mixed = arguments.dtype == "bfloat16"
    config.dtype = getattr(torch, arguments.dtype)
    shape = Shape(
        arguments.architecture,
        arguments.max_length,
        arguments.batch_size,
        arguments.draft_vocab_size,
        mixed=mixed,
    )
    plan = make_plan(config, shape, machine_of(arguments, mixed))
    for line in describe(plan, shape, arguments.gpus, gpu_bytes(arguments)):
        print(line)
    return 0


def machine_of(arguments: argparse.Namespace, mixed: bool) -> Any:
    """The given speeds, or those measured here."""
    import torch

    from ..training.plan import Machine, measure_machine

    machine = Machine((arguments.teraflops or 0) * 1e12, (arguments.bandwidth or 0) * 1e9)
    if machine.flops and machine.bandwidth:
        return machine
    measured = measure_machine(torch.device(default_device()), mixed)
    return Machine(machine.flops or measured.flops, machine.bandwidth or measured.bandwidth)


def gpu_bytes(arguments: argparse.Namespace) -> float:
    """Memory of a GPU: given, or this machine's."""
    import psutil
    import torch

    if arguments.gpu_gigabytes is not None:
        return arguments.gpu_gigabytes * 1e9
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def describe(plan: Any, shape: Any, gpus: int, limit: float) -> list[str]:
    """The plan in lines: parts of a GPU's memory, what fits, disk and speed."""
    from ..training.plan import WAYS

    titles = {"whole": "target on each", "split": "target split", "recorded": "recorded states"}
    lines = [
        f"target: {plan.target_parameters / 1e9:.2f} billion parameters; {shape.architecture} drafter: "
        f"{plan.drafter_parameters / 1e6:.0f} million trained",
        f"GB of each of {gpus} GPUs, {shape.batch} x {shape.length} tokens a step",
        row("", [titles[way] for way in WAYS]),
    ]
    parts = {
        "target, or its head": (plan.target, plan.target / gpus, plan.head),
        "target's forward": (plan.target_forward, plan.target_forward / gpus, 0),
        "states": (plan.states,) * 3,
        "drafter's weights": (plan.weights,) * 3,
        "gradients": (plan.gradients,) * 3,
        "optimizer": (plan.optimizer,) * 3,
        "activations": (plan.activations,) * 3,
        "logits chunk": (plan.logits_chunk,) * 3,
    }
    lines += [row(name, [f"{value / 1e9:.2f}" for value in values]) for name, values in parts.items()]
    for name, sharded in (("peak", False), ("peak, drafter sharded", True)):
        verdicts = []
        for way in WAYS:
            peak = plan.peak(way, gpus, sharded)
            verdict = f"{peak / 1e9:.2f} {'fits' if peak <= limit else 'too large'}"
            verdicts.append("" if sharded and way == "split" else verdict)
        lines.append(row(name, verdicts))
    speeds = [f"{plan.tokens_per_second(way, gpus, shape.tokens):.0f}" for way in WAYS]
    lines.append(row("tokens/s of all, at most", speeds))
    recording = gpus * shape.tokens / plan.target_seconds
    lines.append(
        f"recorded states: {plan.recorded_token} bytes a token, {plan.recorded_token * MILLION / 1e9:.1f} GB for a "
        f"million tokens; recording: {recording:.0f} tokens/s at most"
    )
    return lines


def row(name: str, values: list[str]) -> str:
    return f"{name:<26}" + "".join(f"{value:>20}" for value in values)
