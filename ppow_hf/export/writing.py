"""Write a PPOWDrafter as a directory or file that serving engines load as it is, and check what was written.

Knows formats, files and the limits of the engines; changes no weight. What the engines do with the directory is
tested against the engines themselves (tests/engines).
"""

import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.models import resolve
from ..measure.provenance import public_name
from ..runtime.configuration_ppow import EAGLE_NORMS
from ..runtime.modeling_ppow import PPOWDrafter
from ..tiny import is_embedded
from .block_checkpoint import read_block
from .block_formats import block_tensors, is_dspark, native_config, speculators_block_config
from .checkpoint import read_eagle3
from .engine_readme import engine_readme
from .engines import serving_notes
from .formats import (
    LAYER_NAMES,
    eagle3_config,
    eagle3_tensors,
    medusa_config,
    medusa_shapes,
    named_tensors,
    package_version,
    portable_rope,
    speculators_config,
)
from .gguf_files import NUMBER_FORMATS, gguf_name, write_causal_lm, write_eagle3

FORMATS = ("vllm", "sglang", "speculators", "standalone", "gguf", "openvino")


@dataclass
class ExportReport:
    """What [`export_drafter`] wrote.

    Args:
        folder (`Path`): the directory.
        layout (`str`):
            `"eagle3"`, `"speculators"`, `"standalone"`, `"medusa"`, `"gguf"`, `"dflash"`, `"dspark"`, or speculators'
            of the last two, `"speculators-dflash"` and `"speculators-dspark"`.
        files (`list[str]`): names of its files.
        tensors, parameters (`int`): counts.
        notes (`list[str]`): what an engine cannot serve, or what to know before it does.
    """

    folder: Path
    layout: str
    files: list[str]
    tensors: int
    parameters: int
    notes: list[str] = field(default_factory=list)


def export_drafter(
    drafter: PPOWDrafter,
    output_dir: str | Path,
    format: str = "vllm",
    *,
    target: Any = None,
    target_name: str | None = None,
    tokenizer: Any = None,
    share_embeddings: bool = False,
    speculative_tokens: int | None = None,
    gguf_dtype: str = "float16",
) -> ExportReport:
    """Write `drafter` as a directory for a serving engine, check it, and say how to serve it in its README.

    `"vllm"` and `"sglang"` write the same: an EAGLE-3, DFlash or DSpark checkpoint that both read, or, for a
    standalone drafter, a plain causal language model. `"openvino"` differs for a whole vocabulary only, where it adds
    `d2t` and `t2d`. Medusa heads are for vLLM alone. `"gguf"` writes one file for llama.cpp, of a standalone or an
    eagle drafter, with the tokenizer in it.

    Args:
        drafter ([`PPOWDrafter`]):
            The drafter; its weights are written in the number format they are in, but for GGUF.
        output_dir (`str` or `Path`): the directory; made if need be; an earlier export in it is replaced.
        format (`str`, *optional*, defaults to `"vllm"`): one of `FORMATS`.
        target (`PreTrainedModel`, *optional*):
            The target. Its embeddings are written for an eagle drafter that shares them, or compared for
            `share_embeddings`. A block drafter's export leaves out what it shares.
        target_name (`str`, *optional*):
            Folder or Hub name of the target for the README and for speculators; by default the one that the drafter
            was trained for. A folder's config.json is read to check that the drafter fits.
        tokenizer (*optional*): written beside a standalone drafter; for GGUF, the target's, which is needed.
        share_embeddings (`bool`, *optional*, defaults to `False`):
            Leave out the embeddings, so that engines take the target's: for a drafter that has the very same.
        speculative_tokens (`int`, *optional*):
            Window of the commands in the README, and of speculators' configuration; by default 5, or a whole block.
        gguf_dtype (`str`, *optional*, defaults to `"float16"`):
            Number format of a GGUF file's matrices: `"float32"`, `"float16"`, `"bfloat16"` or `"q8_0"`.

    Returns:
        [`ExportReport`]

    Raises:
        `ValueError`: if the drafter's architecture has no such format, an argument is out of range, the target is
        another one, or what was written does not read back as it should.
        `ImportError`: for `"gguf"` without the package of that name.
    """
    if not isinstance(drafter, PPOWDrafter):
        raise ValueError(
            f"drafter: a {type(drafter).__name__} given. Load it first: PPOWDrafter.from_pretrained(...)."
        )
    layout = _layout(drafter, format)
    if problems := drafter.weight_problems():
        raise ValueError(f"drafter: it cannot be exported: {'; '.join(problems)}. Train or load it again.")
    tokens = _speculative_tokens(drafter, speculative_tokens)
    name = target_name or drafter.config.target_name_or_path
    target_config = _target_config(target, name)
    if target_config is not None:
        _check_target(drafter, target_config)
    if drafter.config.architecture == "block":
        _check_block(drafter, format, target_config)
    if target is not None:
        drafter.attach_target(target)
    _check_embeddings(drafter, target, share_embeddings)
    folder = Path(output_dir)
    written_name = _written_name(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside and moved at the end: a directory that an engine may be reading never holds half of each.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
        written = Path(scratch)
        if layout == "gguf":
            tensors = _write_gguf(drafter, written, tokenizer, gguf_dtype, embeddings=not share_embeddings)
        elif layout == "standalone":
            tensors = _write_standalone(drafter, written, tokenizer)
        elif layout == "medusa":
            tensors = named_tensors(drafter)
            _write_medusa(written, tensors, medusa_config(drafter))
        elif drafter.config.architecture == "block":
            tensors = block_tensors(drafter, embeddings=not share_embeddings)
            _write_block(written, tensors, _fields(drafter, format, written_name, target_config, tokens), drafter)
        else:
            tables = format == "openvino"
            tensors = eagle3_tensors(drafter, LAYER_NAMES[layout], not share_embeddings, translation=tables)
            _write_eagle3(written, tensors, _fields(drafter, format, written_name, target_config, tokens))
        notes = serving_notes(drafter, layout, target_config, _has_own_embeddings(drafter, target))
        if format == "openvino" and "d2t" in tensors and drafter.d2t is None:
            notes.append(
                "vLLM does not load this directory: it refuses d2t for a whole vocabulary. Use --format vllm."
            )
        if format == "speculators":
            notes += _target_notes(name, str(written_name), folder)
        place = folder.resolve().name
        text = engine_readme(drafter, layout, place, written_name, notes, tokens, package_version(), gguf_dtype)
        (written / "README.md").write_text(text, encoding="utf-8")
        files = sorted(path.name for path in written.iterdir())
        _check_free(folder, files)
        for file in files:
            shutil.move(written / file, folder / file)
    return ExportReport(folder, layout, files, len(tensors), sum(tensor.numel() for tensor in tensors.values()), notes)


def _check_free(folder: Path, files: list[str]) -> None:
    """Raise `ValueError` for a folder with weights that would be lost, or that an engine would read as well."""
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "ppow_drafter":
        raise ValueError(
            f"output_dir: {str(folder)!r} holds a PPOW drafter, which would be lost. Pass another folder."
        )
    weights = {path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)}
    if weights - set(files):
        raise ValueError(
            f"output_dir: {str(folder)!r} holds other weights, {', '.join(sorted(weights - set(files)))}, which "
            "engines would read too. Pass an empty folder."
        )


def _layout(drafter: PPOWDrafter, format: str) -> str:
    architecture, block = drafter.config.architecture, "dspark" if is_dspark(drafter) else "dflash"
    layouts = {
        "eagle": {
            "vllm": "eagle3",
            "sglang": "eagle3",
            "speculators": "speculators",
            "gguf": "gguf",
            "openvino": "eagle3",
        },
        "standalone": {
            "vllm": "standalone",
            "sglang": "standalone",
            "standalone": "standalone",
            "gguf": "gguf",
            "openvino": "standalone",
        },
        "medusa": {"vllm": "medusa"},
        "block": {"vllm": block, "sglang": block, "speculators": f"speculators-{block}"},
    }[architecture]
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is not one of {list(FORMATS)}.")
    if format not in layouts:
        raise ValueError(f"format: {format!r} is not for {architecture} drafters; take one of {list(layouts)}.")
    norms = [name for name in EAGLE_NORMS if getattr(drafter.config, name)]
    if norms and format != "speculators":
        raise ValueError(
            f"format: {format!r} given, and this drafter has {' and '.join(norms)}, which not every reader of that "
            "format knows. Take 'speculators', which vLLM serves."
        )
    return layouts[format]


def _speculative_tokens(drafter: PPOWDrafter, given: int | None) -> int:
    """The window of the commands: the given one, or as long as the drafter's forward gives for nothing more."""
    longest = drafter.config.longest_window if drafter.config.architecture == "block" else None
    tokens = (longest or 5) if given is None else given
    if not 1 <= tokens <= (longest or 64):
        limit = f"{longest}, the block of this drafter" if longest else "64"
        raise ValueError(f"speculative_tokens: {given} given; a window of 1 to {limit} tokens is needed.")
    return tokens


def _check_block(drafter: PPOWDrafter, format: str, target_config: Any) -> None:
    """Raise `ValueError` for a block drafter that the engine would not load, or not as it was trained."""
    config = drafter.config
    problem = None
    layers = None if target_config is None else target_config.get_text_config().num_hidden_layers
    ids = config.target_layer_ids or []
    if 0 in ids:
        problem = "it reads the target's embeddings (0 of target_layer_ids), which engines do not hand out as a state"
    elif layers is not None and max(ids, default=0) >= layers:
        problem = (
            f"it reads the state after the target's last layer, {layers}, which vLLM hands out before the final norm "
            "and transformers after it"
        )
    elif config.sample_from_anchor and not is_dspark(drafter):
        problem = "sample_from_anchor goes with a Markov head in the engines (markov_rank above 0)"
    elif config.confidence_head and not is_dspark(drafter):
        problem = "a confidence head goes with a Markov head in the engines (markov_rank above 0)"
    elif format == "sglang" and not (config.shares_target_head and config.shares_target_embeddings):
        raise ValueError(
            "format: 'sglang' given, and SGLang reads neither a head nor embeddings of a block drafter's own, by its "
            "source. Take 'vllm'."
        )
    if problem is not None:
        raise ValueError(f"drafter: it cannot be exported: {problem}. Train another one.")


# -- the target


def _target_config(target: Any, name: str | None) -> Any:
    """The target's own configuration where it is at hand: from the model, an embedded target or a folder."""
    if target is not None:
        return target.config
    if name is None:
        return None
    folder = Path(resolve(name))
    if not (folder / "config.json").is_file():
        return None  # a name on the Hub: nothing is fetched for a check
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _is_local(name: str | None) -> bool:
    return name is not None and (is_embedded(name) or Path(name).expanduser().is_dir())


def _written_name(name: str | None, folder: Path) -> str | None:
    """The target as files may name it: by its place beside the export, or by its own name alone."""
    if name is None or is_embedded(name) or not _is_local(name):
        return public_name(name)
    target, beside = Path(name).expanduser().resolve(), folder.resolve().parent
    return target.relative_to(beside).as_posix() if target.is_relative_to(beside) else public_name(str(target))


def _target_notes(name: str | None, written_name: str, folder: Path) -> list[str]:
    if not _is_local(name) or Path(folder.resolve().parent, written_name).is_dir():
        return []
    return [
        f"`config.json` names the target {written_name!r} without its folder, since a directory may be published. "
        "Serve it from where the target lies, or write its path into `verifier.name_or_path`."
    ]


def _check_target(drafter: PPOWDrafter, target_config: Any) -> None:
    if target_config.model_type == drafter.config.model_type:
        raise ValueError("target: a drafter given; pass the causal language model that it drafts for.")
    config, text = drafter.config, target_config.get_text_config()
    differences = []
    if config.target_hidden_size not in (None, text.hidden_size):
        differences.append(f"states of {config.target_hidden_size} numbers where the target's have {text.hidden_size}")
    if config.target_model_type not in (None, text.model_type):
        differences.append(f"a {config.target_model_type} target where this is {text.model_type}")
    if max(config.target_layer_ids or [0]) > text.num_hidden_layers:
        differences.append(f"layers {config.target_layer_ids} of a target with {text.num_hidden_layers}")
    if config.vocab_size != text.vocab_size:
        differences.append(f"{config.vocab_size} tokens where the target has {text.vocab_size}")
    if differences:
        raise ValueError(
            f"target: the drafter was made for another one: {'; '.join(differences)}. Name the target that it was "
            "trained for; engines refuse other sizes or draft badly."
        )


def _has_own_embeddings(drafter: PPOWDrafter, target: Any) -> bool | None:
    """Whether the drafter's embeddings differ from the target's; `None` if the target is not at hand."""
    if drafter.config.shares_target_embeddings:
        return False
    if target is None or drafter.get_input_embeddings() is None:
        return None
    own = drafter.get_input_embeddings().weight.detach()
    theirs = target.get_input_embeddings().weight.detach().to(own)
    return theirs.shape != own.shape or not torch.equal(theirs, own)


def _check_embeddings(drafter: PPOWDrafter, target: Any, share_embeddings: bool) -> None:
    """Raise `ValueError` where embeddings that belong into the export are not there, or those left out are others."""
    config = drafter.config
    if share_embeddings and config.architecture in ("eagle", "block"):
        _check_shared(drafter, target)
    missing = config.shares_target_embeddings and drafter.get_input_embeddings() is None
    if missing and config.architecture == "eagle" and not share_embeddings:  # a block drafter's stay the target's
        raise ValueError(
            "target: the drafter shares its target's embeddings, which belong into the export; pass the target, or "
            "share_embeddings to leave them out."
        )


def _check_shared(drafter: PPOWDrafter, target: Any) -> None:
    if target is None and not drafter.config.shares_target_embeddings:
        raise ValueError("target: share_embeddings needs the target itself, to compare its embeddings.")
    if _has_own_embeddings(drafter, target):
        raise ValueError(
            "share_embeddings: the drafter's embeddings are not the target's (training changed them), so that an "
            "engine would draft with others. Export without it."
        )


# -- the layouts


def _save(folder: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    let_others_read(folder)


def let_others_read(folder: Path) -> None:
    """Give weights the configuration's mode: safetensors writes for its user alone, and an engine may be another."""
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # a file system that knows no modes
            path.chmod((folder / "config.json").stat().st_mode & 0o777)


def _write_medusa(folder: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    _save(folder, tensors, fields)
    found = load_file(folder / "model.safetensors")
    expected = medusa_shapes(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    problems = [f"{name}: missing or not expected" for name in sorted(expected.keys() ^ found.keys())]
    for name in expected.keys() & found.keys():
        if tuple(found[name].shape) != expected[name] or not torch.equal(found[name], tensors[name]):
            problems.append(f"{name}: reads back otherwise than it was written, or of a wrong shape")
    _raise_problems(problems)


def _write_eagle3(folder: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    _save(folder, tensors, fields)
    found = read_eagle3(folder, "output_dir")
    problems = found.problems()
    if found.layer_ids is None:
        problems.append("eagle_aux_hidden_state_layer_ids: missing")
    _raise_problems(problems + _differences(found.tensors, tensors))


def _write_block(folder: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any], drafter: PPOWDrafter) -> None:
    _save(folder, tensors, fields)
    found = read_block(folder, "output_dir")
    config = drafter.config
    problems = found.problems() + _differences(found.tensors, tensors)
    wanted = {
        "target_layer_ids": (found.layer_ids, config.target_layer_ids),
        "block_size": (found.drafted, config.longest_window),
        "mask_token_id": (found.mask_token_id, config.mask_token_id),
        "markov_rank": (found.markov_rank, config.markov_rank),
    }
    problems += [f"{name}: reads back as {read}, not {own}" for name, (read, own) in wanted.items() if read != own]
    _raise_problems(problems)


def _fields(
    drafter: PPOWDrafter, format: str, target_name: str | None, target_config: Any, tokens: int
) -> dict[str, Any]:
    """config.json of an eagle or block drafter."""
    if format == "speculators":
        return _speculators_fields(drafter, target_name, target_config, tokens)
    if drafter.config.architecture == "block":
        return native_config(drafter, target_config)
    return eagle3_config(drafter)


def _speculators_fields(drafter, name, target_config, speculative_tokens) -> dict[str, Any]:
    if name is None or target_config is None:
        raise ValueError(
            f"target_name: {name!r} given; the speculators format names its target, and that target's architecture is "
            "read from it. Pass the target's folder, or the target itself and its name on the Hub."
        )
    write = speculators_block_config if drafter.config.architecture == "block" else speculators_config
    return write(drafter, name, list(target_config.architectures or []), speculative_tokens)


def _write_standalone(drafter: PPOWDrafter, folder: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = drafter.draft_model.model
    if model.config.get_text_config().vocab_size != drafter.config.vocab_size:
        raise ValueError(
            f"drafter: its vocabulary has {model.config.get_text_config().vocab_size} tokens and the target's "
            f"{drafter.config.vocab_size}; engines need both of one size."
        )
    model.save_pretrained(folder)
    let_others_read(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    fields = portable_rope(json.loads(path.read_text(encoding="utf-8")))
    fields["torch_dtype"] = fields.pop("dtype", None) or str(drafter.dtype).removeprefix("torch.")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Read back by the library itself, which is also what the engines' loaders are made after.
    found, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    problems = [f"{name}: {kind}" for kind in ("missing_keys", "unexpected_keys") for name in loading[kind]]
    ours, theirs = model.state_dict(), found.state_dict()
    problems += [
        f"{name}: reads back as other numbers"
        for name in ours
        if name not in theirs or not torch.equal(ours[name].cpu(), theirs[name])
    ]
    if getattr(found.config, "rope_parameters", None) != getattr(model.config, "rope_parameters", None):
        problems.append(f"rope_parameters: read back as {found.config.rope_parameters}")
    _raise_problems(problems)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def _write_gguf(
    drafter: PPOWDrafter, folder: Path, tokenizer: Any, gguf_dtype: str, embeddings: bool
) -> dict[str, torch.Tensor]:
    if gguf_dtype not in NUMBER_FORMATS:
        raise ValueError(f"gguf_dtype: {gguf_dtype!r} is not one of {list(NUMBER_FORMATS)}.")
    if tokenizer is None:
        raise ValueError("tokenizer: a GGUF file holds its tokenizer; pass the target's.")
    path = folder / gguf_name(gguf_dtype)
    if drafter.config.architecture == "standalone":
        return write_causal_lm(path, drafter.draft_model.model, tokenizer, gguf_dtype)
    return write_eagle3(path, drafter, tokenizer, gguf_dtype, embeddings)


def _differences(found: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> list[str]:
    """In what tensors that were read back are not those that were written."""
    names = [f"tensors: {sorted(found.keys() ^ written.keys())} differ from what was written"]
    return (names if found.keys() != written.keys() else []) + [
        f"{name}: reads back as other numbers"
        for name in found.keys() & written.keys()
        if not torch.equal(found[name], written[name])
    ]


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ValueError(f"output_dir: what was written is not what engines read: {'; '.join(problems)}.")
