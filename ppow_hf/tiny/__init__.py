"""Where the models lie that come with the package: a tiny target with its drafters, and a drafter of a real target.

Knows folders only; imports nothing heavy, so that the command line can ask it before anything is loaded.
"""

from pathlib import Path

_ROOT = Path(__file__).parent
_TARGETS = {"tiny": "llama", "tiny-llama": "llama"}
_DRAFTERS = {"tiny-eagle": "eagle", "tiny-standalone": "standalone"}
_REAL_DRAFTERS = {"smollm2-135m-eagle": "smollm2-135m-eagle"}  # of targets that are named on the Hub
_TARGET_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_DRAFTER_FILES = ("config.json", "model.safetensors")

EMBEDDED_DRAFTERS = tuple(_DRAFTERS)
REAL_DRAFTERS = tuple(_REAL_DRAFTERS)
EMBEDDED_NAMES = (*_TARGETS, *_DRAFTERS, *_REAL_DRAFTERS)


def target_path(name: str = "tiny") -> Path:
    """Folder of the embedded target, `"tiny"` (Llama architecture), with its tokenizer.

    Raises `ValueError` for another name, `FileNotFoundError` (with what is missing and how to make it) when its files
    are not there.
    """
    family = _folder_name(name, _TARGETS)
    remake = f"Make it again with: ppow tiny-target --family {family} --output-dir ppow_hf/tiny/{family}"
    return _complete(_ROOT / family, name, _TARGET_FILES, remake)


def drafter_path(name: str) -> Path:
    """Folder of a drafter that comes with the package.

    `"tiny-eagle"` and `"tiny-standalone"` are of the target `tiny`, `"smollm2-135m-eagle"` is of
    HuggingFaceTB/SmolLM2-135M-Instruct. Raises as [`target_path`] does.
    """
    if name in _REAL_DRAFTERS:
        remake = "Install the package anew; the commands that trained it are in its card, README.md."
        return _complete(_ROOT / _REAL_DRAFTERS[name], name, _DRAFTER_FILES, remake)
    architecture = _folder_name(name, _DRAFTERS)
    remake = (
        f"Make it again with: ppow tiny-drafter --architecture {architecture} --output-dir ppow_hf/tiny/{architecture}"
    )
    return _complete(_ROOT / architecture, name, _DRAFTER_FILES, remake)


def is_embedded(name: str) -> bool:
    """Whether `name` is one of the embedded models' names on the command line (`tiny`, `tiny-eagle`, ...)."""
    return name in EMBEDDED_NAMES


def embedded_path(name: str) -> Path:
    """Folder of an embedded target or drafter; raises as [`target_path`] does."""
    return target_path(name) if name in _TARGETS else drafter_path(name)


def _folder_name(name: str, folders: dict[str, str]) -> str:
    if name in folders.values():
        return name
    if name not in folders:
        raise ValueError(f"name: {name!r} is not one of {sorted({*folders, *folders.values()})}.")
    return folders[name]


def _complete(folder: Path, name: str, files: tuple[str, ...], remake: str) -> Path:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name}: the embedded model is not in this installation, {folder.name}/{missing[0]} is missing under "
            f"{str(_ROOT)!r}. {remake}"
        )
    return folder
