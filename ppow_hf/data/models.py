"""Models, tokenizers and prompts by the names that a user types, or a clear error.

Knows names, files and the embedded models; heavy libraries are imported inside the functions, so that help is quick.
"""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..tiny import EMBEDDED_NAMES, REAL_DRAFTERS, drafter_path, embedded_path, is_embedded
from .sources import check_source, parse_source
from .weights import brief, folder_damage

if TYPE_CHECKING:
    import torch

    from ..runtime.modeling_ppow import PPOWDrafter

STDLIB_PROMPT_TOKENS = 128


def resolve(name: str) -> str:
    """The folder of an embedded model's name; any other name or path as it is."""
    return str(embedded_path(name)) if is_embedded(name) else os.path.expanduser(name)


def load_target(
    name: str,
    argument: str = "--target",
    dtype: str | None = None,
    device: str | None = None,
    placement: dict[str, str] | None = None,
) -> Any:
    """The causal language model that `name` stands for, in eval mode; float32 on a CPU by default.

    `placement`, a `device_map` or a `tp_plan` as of `from_pretrained`, places it in place of `device`.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, argument, dtype, device, placement)


def load_drafter(
    name: str, argument: str = "--drafter", dtype: str | None = None, device: str | None = None
) -> "PPOWDrafter":
    """The [`PPOWDrafter`] that `name` stands for; `ValueError` if it is another kind of model."""
    from transformers import AutoModel, PreTrainedConfig

    from ..runtime.modeling_ppow import PPOWDrafter

    try:  # before another model is made, perhaps of billions of weights
        kind = PreTrainedConfig.get_config_dict(_existing(name, argument)[0])[0]["model_type"]
    except (OSError, ValueError, LookupError, TypeError):  # loading says what is wrong
        kind = PPOWDrafter.config_class.model_type
    if kind != PPOWDrafter.config_class.model_type:
        raise ValueError(
            f"{argument}: {name!r} is a {kind!r} model, not a PPOWDrafter. Make one with `ppow train`, or use an "
            "embedded one (tiny-eagle, tiny-standalone)."
        )
    return _load(AutoModel, name, argument, dtype, device)


def load_tokenizer(name: str, argument: str = "--target") -> Any:
    """The tokenizer that lies with the model `name`."""
    from transformers import AutoTokenizer

    path, gguf = _existing(name, argument)
    try:
        return AutoTokenizer.from_pretrained(path, **gguf)
    except Exception as error:  # whatever transformers, tokenizers and jinja raise for the files that lie there
        raise ValueError(f"{argument}: no tokenizer could be loaded from {name!r}: {_why(path, error)}") from error


def load_config(name: str, argument: str = "--target") -> tuple[Any, Any]:
    """The configuration of the model `name`, and its generation configuration or `None`, without the model."""
    from transformers import AutoConfig, GenerationConfig

    path, gguf = _existing(name, argument)
    try:
        config = AutoConfig.from_pretrained(path, **gguf)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: no configuration could be loaded from {name!r}: {error}") from error
    try:
        return config, GenerationConfig.from_pretrained(path)
    except OSError:
        return config, None


def check_tokenizer(drafter: "PPOWDrafter", tokenizer: Any, argument: str = "--drafter") -> None:
    """Raise `ValueError` if the drafter was trained for a tokenizer with another vocabulary, appended tokens aside."""
    from ..runtime.configuration_ppow import has_vocabulary, vocabulary_fingerprint

    expected = drafter.config.target_vocabulary_fingerprint
    if expected is not None and not has_vocabulary(tokenizer, expected):
        of = f" ({drafter.config.target_name_or_path})" if drafter.config.target_name_or_path else ""
        raise ValueError(
            f"{argument}: it was trained for a target with another vocabulary{of}: fingerprint {expected}, and the "
            f"target's tokenizer has {vocabulary_fingerprint(tokenizer)}. Use a drafter of this target."
        )


def shipped_drafter(tokenizer: Any) -> str | None:
    """Name of the drafter that comes with the package for a target with this tokenizer; `None` if there is none."""
    from ..runtime.configuration_ppow import PPOWDrafterConfig, has_vocabulary

    for name in REAL_DRAFTERS:
        fingerprint = PPOWDrafterConfig.from_pretrained(drafter_path(name)).target_vocabulary_fingerprint
        if has_vocabulary(tokenizer, fingerprint):
            return name
    return None


def downloaded_pair() -> tuple[str, str] | None:
    """A target that lies in the Hub's cache, and the drafter that comes with the package for it; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    from ..runtime.configuration_ppow import PPOWDrafterConfig

    for name in REAL_DRAFTERS:
        target = PPOWDrafterConfig.from_pretrained(drafter_path(name)).target_name_or_path
        if isinstance(try_to_load_from_cache(target, "model.safetensors"), str):
            return target, name
    return None


class Prompts(NamedTuple):
    """Prompts that were read, and not yet encoded.

    Args:
        rows (`list[dict]`): of the data that was named.
        most_tokens (`int`, *optional*): of each prompt, its last ones.
    """

    rows: list[dict[str, Any]]
    most_tokens: int | None = None


def parse_workload(text: str) -> tuple[str, str]:
    """`[NAME=]SOURCE` -> name, and what [`read_prompts`] reads; raises as [`check_prompts`] does."""
    name, _, source = text.rpartition("=")
    check_prompts(source)
    return name or parse_source(source).short_name, source


def read_workloads(texts: list[str], count: int, argument: str = "--num-prompts") -> dict[str, Prompts]:
    """The prompts of several workloads by name, before anything is loaded; `ValueError` where two have one name."""
    sources: dict[str, str] = {}
    for name, source in map(parse_workload, texts):
        if name in sources:
            raise ValueError(
                f"--prompts: {sources[name]!r} and {source!r} are both called {name!r}. Give each a name of its own: "
                "NAME=DATA."
            )
        sources[name] = source
    return {name: read_prompts(source, count, argument) for name, source in sources.items()}


def check_prompts(source: str) -> None:
    """Raise where [`read_prompts`] would find nothing, before anything is loaded."""
    if source != "stdlib":
        check_source(source, "--prompts")


def read_prompts(source: str, count: int, argument: str = "--num-prompts") -> Prompts:
    """The prompts of a file or dataset (see [`parse_source`]), or `count` held-out functions of the standard library
    (`"stdlib"`), before anything is loaded; `argument` is what the count was given as."""
    check_prompts(source)
    if source == "stdlib":
        from ..tiny.corpus import function_prompts, held_in_and_out, standard_library

        _, held_out = held_in_and_out(standard_library())
        texts = function_prompts(held_out, count, argument=argument)
        return Prompts([{"prompt": text} for text in texts], STDLIB_PROMPT_TOKENS)
    from .writing import read_prompt_rows

    return Prompts(read_prompt_rows(source))


def load_prompts(
    prompts: str | Prompts, count: int, tokenizer: Any, target: Any, max_new_tokens: int, chat: bool = False
) -> list["torch.Tensor"]:
    """Token ids `[1, n]` of the first `count` of `prompts`, which are [`Prompts`] or what [`read_prompts`] reads; with
    `chat` each is a user's turn of a chat."""
    import torch

    from .sequences import extract_prompts

    if isinstance(prompts, str):
        prompts = read_prompts(prompts, count)
    room = min(prompt_room(target, max_new_tokens), prompts.most_tokens or 2**20)
    rows = [_as_chat(row) for row in prompts.rows] if chat else prompts.rows
    found = extract_prompts(rows[:count], tokenizer, room, argument="--prompts")
    if len(found) < min(count, len(rows)):  # some rows have none
        found = extract_prompts(rows, tokenizer, room, argument="--prompts")[:count]
    return [torch.tensor([prompt]) for prompt in found]


def prompt_room(target: Any, max_new_tokens: int) -> int:
    """Tokens that a prompt may have before `max_new_tokens` in the target's context; `ValueError` where none fits."""
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None) or 2**20
    if context <= max_new_tokens:
        raise ValueError(f"--max-new-tokens: {max_new_tokens} leaves no room for a prompt in a context of {context}.")
    return context - max_new_tokens


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A row's prompt as a user's turn; rows of messages are chats already."""
    text = row.get("prompt", row.get("text"))
    return row if "messages" in row or not text else {"messages": [{"role": "user", "content": text}]}


def _load(
    auto_class: Any,
    name: str,
    argument: str,
    dtype: str | None,
    device: str | None,
    placement: dict[str, str] | None = None,
) -> Any:
    from ..runtime.modeling_ppow import loading_problems

    path, gguf = _existing(name, argument)
    device = device or default_device()
    if not placement:
        check_device(device)
    if dtype is None:
        dtype = "float32" if device == "cpu" else "auto"
    try:
        model, found = auto_class.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **gguf, **_dequantized(gguf),
            **(placement or {}),
        )  # fmt: skip
        found["unexpected_keys"] = []  # heads for other tasks, say; a drafter refuses its own
        if problems := loading_problems(found):
            raise ValueError(f"{'; '.join(problems)}. Save or download it again.")
    except Exception as error:  # whatever transformers, torch and safetensors raise for the files that lie there
        raise ValueError(f"{argument}: {name!r} could not be loaded: {_why(path, error)}") from error
    if gguf:  # its weights are plain ones now: without this, transformers neither casts nor saves the model
        model.config.__dict__.pop("quantization_config", None)
        model.__dict__.pop("quantization_method", None)
        model.is_quantized, model.hf_quantizer = False, None
    try:
        return model.eval() if placement else model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {device!r} cannot be used: {error}") from error


def _why(path: str, error: Exception) -> str:
    """What is wrong with the files of a model, or else what the library that read them said."""
    return (folder_damage(Path(path)) if Path(path).is_dir() else None) or brief(error)


def _existing(name: str, argument: str) -> tuple[str, dict[str, str]]:
    """`name` resolved, and `{"gguf_file": FILE}` where it names one; a path that is not there is said to be missing
    before the Hub is asked for it."""
    alike = difflib.get_close_matches(name, EMBEDDED_NAMES, n=1, cutoff=0.75)
    if alike and resolve(name) == name and not Path(name).exists():
        raise FileNotFoundError(f"{argument}: there is no model {name!r}. Did you mean {alike[0]!r}?")
    path, file = split_gguf(resolve(name))
    if file is not None and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{argument}: reading the GGUF file {name!r} takes `pip install gguf`.")
    if file is not None and ":" not in name and not Path(path, file).is_file():
        raise FileNotFoundError(f"{argument}: there is no file {name!r}. One on the Hub is REPOSITORY:FILE.gguf.")
    looks_like_path = path.startswith((".", os.sep)) or path.count("/") > 1
    if looks_like_path and not Path(path).is_dir():
        raise FileNotFoundError(f"{argument}: there is no folder {path!r}.")
    return path, {} if file is None else {"gguf_file": file}


def split_gguf(name: str) -> tuple[str, str | None]:
    """`FOLDER/FILE.gguf`, or `REPOSITORY:FILE.gguf` on the Hub, as folder or repository and file; else no file."""
    if not name.endswith(".gguf"):
        return name, None
    repository, _, file = name.rpartition(":")
    if repository and not Path(name).is_file():
        return repository, file
    return str(Path(name).parent), Path(name).name


def _dequantized(gguf: dict[str, str]) -> dict[str, Any]:
    """What makes newer releases of transformers unpack a GGUF file's weights; older ones always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if gguf and config is not None else {}


def default_device() -> str:
    """Where models are loaded unless something else is asked for."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise `ValueError` for a device that torch does not know, or that this machine lacks."""
    import torch

    if device.partition(":")[0] == "meta":
        raise ValueError("--device: 'meta' holds no numbers. Pass cpu, cuda or another device that computes.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {device!r} cannot be used: {brief(error)}") from error
