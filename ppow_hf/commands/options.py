"""Options that several commands have, and what is checked of them before anything is loaded.

Knows argparse and the names of options; models are loaded by [`ppow_hf.data.models`].
"""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..data.models import check_tokenizer, load_drafter, load_target, load_tokenizer
from ..serving.vllm_runner import PYTHON_VARIABLE
from ..tiny import EMBEDDED_NAMES

if TYPE_CHECKING:
    from ..runtime.modeling_ppow import PPOWDrafter

LARGEST_SEED = 2**32 - 1  # numpy's, which `set_seed` sets too
FEWEST_DRAFTED = 3  # new tokens: the first comes with the prompt, and a round's last is no draft
NUMBER_FORMATS = ["auto", "float32", "bfloat16", "float16"]
MODEL_HELP = f"a folder, a name on the Hub, or an embedded model ({', '.join(EMBEDDED_NAMES)})"
TARGET_HELP = f"{MODEL_HELP}, or a .gguf file (on the Hub: REPOSITORY:FILE.gguf)"


# -- options


def add_models(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a target and a drafter."""
    add_target(parser)
    parser.add_argument("--drafter", required=True, metavar="MODEL", help=f"the drafter: {MODEL_HELP}")
    parser.add_argument(
        "--dtype",
        choices=NUMBER_FORMATS,
        help="number format of the models (default: float32 on a CPU, the model's own on a GPU)",
    )
    add_device(parser, "the models")


def add_device(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument("--device", help=f"device of {whose} (default: cuda where there is one, else cpu)")


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, metavar="MODEL", help=f"the target: {TARGET_HELP}")


def add_target_dtype(parser: argparse.ArgumentParser) -> None:
    """The number format of a target that only reads or writes texts, see [`faster_dtype`]."""
    parser.add_argument(
        "--dtype",
        choices=NUMBER_FORMATS,
        help="number format of the target (default: on a CPU bfloat16 where this machine computes it faster, else "
        "float32; on a GPU the model's own)",
    )


def add_number(parser: argparse.ArgumentParser, option: str, default: float, meaning: str) -> None:
    """A number of the default's type."""
    parser.add_argument(option, type=type(default), default=default, help=f"{meaning} (default: %(default)s)")


def add_max_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-length", "--max_length", type=int, default=256, help="tokens of a sequence (default: %(default)s)"
    )


def add_engine_python(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine-python",
        metavar="FILE",
        help=f"the interpreter of the engine's own environment (default: ${PYTHON_VARIABLE})",
    )


def add_prompts(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Prompts of one kind, and whether they are asked as turns of a chat."""
    parser.add_argument(
        "--prompts",
        default="stdlib",
        metavar="DATA",
        help=f"prompts as for `ppow bench`{note} (default: %(default)s)",
    )
    add_chat(parser)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """The argument by which [`load_prompts`] asks prompts as turns of a chat."""
    parser.add_argument("--chat", action="store_true", help="ask each prompt as a user's turn of a chat")


# -- checks


def check_options(arguments: argparse.Namespace, *names: str) -> None:
    """Raise `ValueError` unless the options with these names, of a list each value, are finite and above 0; one that
    was not given is left out."""
    for name in names:
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')}: {value} given; a finite number above 0 is needed.")


def check_not_negative(argument: str, values: Iterable[float]) -> None:
    """Raise `ValueError` unless all `values` are finite and 0 or more."""
    for value in values:
        if not 0 <= value < float("inf"):
            raise ValueError(f"{argument}: {value} given; 0 or a finite number above it is needed.")


def check_seed(seed: int) -> None:
    """Raise `ValueError` for a seed that the random generators do not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed: {seed} given; a number from 0 to {LARGEST_SEED} is needed.")


def check_drafts(max_new_tokens: int) -> None:
    """Raise `ValueError` for so few tokens that nothing is drafted."""
    if max_new_tokens < FEWEST_DRAFTED:
        raise ValueError(
            f"--max-new-tokens: {max_new_tokens} given, which leaves nothing to draft. Pass {FEWEST_DRAFTED} or more."
        )


def check_needs(arguments: argparse.Namespace, name: str, needed: str) -> None:
    """Raise `ValueError` for an option that was given without the one that it goes with."""
    if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
        option, other = (f"--{one.replace('_', '-')}" for one in (name, needed))
        raise ValueError(f"{option}: {getattr(arguments, name)!r} given without {other}. Give both, or neither.")


def check_fits(argument: str, prompt_length: int, max_new_tokens: int, target: Any) -> None:
    """Raise `ValueError` for an empty prompt, or one that leaves no room for `max_new_tokens` in the context."""
    if prompt_length < 1:
        raise ValueError(f"{argument}: it is empty; at least one token is needed to continue.")
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_length + max_new_tokens > context:
        raise ValueError(
            f"{argument}: {prompt_length} tokens and --max-new-tokens {max_new_tokens} are more than the target's "
            f"context of {context}. Shorten the prompt, or generate fewer tokens."
        )


# -- loading


def load_pair(arguments: argparse.Namespace) -> tuple[Any, Any, "PPOWDrafter"]:
    """Target, its tokenizer and the drafter that the arguments of [`add_models`] name."""
    from ..runtime.target_weights import target_width

    target = load_target(arguments.target, "--target", arguments.dtype, arguments.device)
    tokenizer = load_tokenizer(arguments.target, "--target")
    drafter = load_drafter(arguments.drafter, "--drafter", arguments.dtype, arguments.device)
    check_tokenizer(drafter, tokenizer)
    width = target_width(target)
    if len(tokenizer) > width:
        raise ValueError(
            f"--target: its tokenizer has {len(tokenizer)} tokens and its logits only {width}. Use the tokenizer that "
            "belongs to it."
        )
    return target, tokenizer, drafter
