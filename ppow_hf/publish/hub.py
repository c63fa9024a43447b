"""A drafter's repository: what it holds, and how it gets to the Hub in one commit, whole or not at all.

Knows files and the Hub; loads weights only to check them. What is pushed runs without this package: the drafter's own
modules travel with it, and `custom_generate/generate.py` holds the repository's name. Large files go by LFS or by Xet,
as the client chooses; the tests speak LFS (HF_HUB_DISABLE_XET=1), and the way by Xet is untested.
"""

import errno
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import read_json
from ..data.weights import brief, error_chain, safetensors_header
from ..measure.provenance import public_name
from ..measure.redaction import redact_record, redact_text
from ..runtime.modeling_ppow import PPOWDrafter

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

# What is pushed from a folder. Never a pickle, an optimizer's state or a checkpoint.
PUSHED_FILES = (
    "*.safetensors", "*.safetensors.index.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "training_arguments.json", "training_log.json", "provenance.json", "benchmark*.json", "acceptance*.json",
    "LICENSE", "*.png",
)  # fmt: skip
RECORDS = ("training_arguments.json", "training_log.json", "provenance.json", "benchmark*.json", "acceptance*.json")
TEXTS = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
)
AUTO_MAP = {"AutoConfig": "configuration_ppow.PPOWDrafterConfig", "AutoModel": "modeling_ppow.PPOWDrafter"}
GENERATE = "custom_generate/generate.py"
# Weights of an earlier push that would lie beside the new ones, and what Trainer pickles.
STALE = re.compile(r"((model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|training_args\.bin)")
LONGEST_WAIT = 60.0  # seconds that a commit waits when the Hub says how long


class PushError(OSError):
    """A push that failed. The message says why, that nothing was committed, and what to do."""


# -- what a repository holds


def runtime_modules() -> list[Path]:
    """The modules that a drafter runs on: all of `ppow_hf/runtime`, and nothing else."""
    runtime = Path(__file__).parents[1] / "runtime"
    return sorted(path for path in runtime.glob("*.py") if path.name != "__init__.py")


def generate_script(repository: str, revision: str | None, files: Mapping[str, bytes | Path]) -> str:
    """`custom_generate/generate.py` for a repository, or for a local folder's absolute path.

    A commit cannot hold its own hash, so on the Hub the script knows the hashes of the modules among the `files`.
    """
    code = {
        name: hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
        for name, content in sorted(files.items())
        if name.endswith(".py") and not Path(repository).is_absolute()
    }
    text = (Path(__file__).parent / GENERATE).read_text(encoding="utf-8")
    text = text.replace('REPOSITORY = "user/name"', f"REPOSITORY = {json.dumps(repository)}")
    text = text.replace("REVISION: str | None = None", f"REVISION: str | None = {_literal(revision)}")
    lines = "".join(f"    {json.dumps(name)}: {json.dumps(digest)},\n" for name, digest in code.items())
    return text.replace("CODE: dict[str, str] = {}", f"CODE: dict[str, str] = {{\n{lines}}}")


def repository_files(
    folder: str | Path, repository: str, revision: str | None = None, **card: Any
) -> dict[str, bytes | Path]:
    """Everything a drafter's repository holds: path in it -> content, or the local file that has it.

    Args:
        folder (`str` or `Path`): what `save_pretrained` wrote, with the measurements' files beside it.
        repository (`str`): its name on the Hub, or a local folder's absolute path.
        revision (`str`, *optional*): branch or tag that `custom_generate` loads the drafter from.
        card: what [`drafter_card`] cannot know from measurements (`license`, `language`, ...).

    Secrets are left out of records and texts, also where an older version wrote them.

    Raises `FileNotFoundError` or `ValueError` for a folder that holds no whole drafter, or a link out of it.
    """
    from .model_card import drafter_card

    folder = Path(folder)
    _check_links(folder)
    config = redact_record(_drafter_config(folder))
    _check_weights(folder)
    try:
        PPOWDrafter.from_pretrained(folder)
    except Exception as error:  # whatever transformers and safetensors raise for the files that lie there
        raise ValueError(f"folder: the drafter in {str(folder)!r} cannot be loaded: {brief(error)}") from error
    files: dict[str, bytes | Path] = {
        path.name: _without_secrets(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and _matches(path.name, PUSHED_FILES)
    }
    config = {**config, "auto_map": AUTO_MAP, "target_name_or_path": public_name(config.get("target_name_or_path"))}
    files["config.json"] = _json(config)
    if "generation_config.json" not in files:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        files["generation_config.json"] = _json(
            {name: config[name] for name in names if config.get(name) is not None}
            | {"transformers_version": config.get("transformers_version")}
        )
    for module in runtime_modules():
        files[module.name] = module
    files[GENERATE] = generate_script(repository, revision, files).encode()
    on_hub = None if Path(repository).is_absolute() else repository
    files["README.md"] = redact_text(str(drafter_card(folder, repository=on_hub, **card))).encode()
    return dict(sorted(files.items()))


def write_repository(folder: str | Path, output_dir: str | Path, **card: Any) -> Path:
    """Write what [`push_folder`] would push to `output_dir`, from where it runs without this package too.

    `custom_generate` loads the drafter by the folder's path, so write it again after moving it. Nothing is changed in
    `output_dir` before all of it lies on the disk.
    """
    output_dir = Path(output_dir).resolve()
    files = repository_files(folder, str(output_dir), **card)
    made = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".write-") as staging:
            for name, content in files.items():
                staged = Path(staging, name)
                staged.parent.mkdir(parents=True, exist_ok=True)
                staged.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
            for name in files:
                (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                Path(staging, name).replace(output_dir / name)
    except OSError:
        if made and not any(output_dir.iterdir()):
            output_dir.rmdir()
        raise
    return output_dir


# -- pushing


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    git_tag: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload drafter",
    commit_description: str | None = None,
    **card: Any,
) -> "CommitInfo":
    """Push the drafter in `folder` to the Hub as one commit; the folder is only read.

    Args:
        folder (`str` or `Path`): what `save_pretrained` or a training run wrote.
        repo_id (`str`): `user/name`; made if there is none. Without a user, the token's.
        private (`bool`, *optional*): whether a new repository is private; by default as the account has it.
        revision (`str`, *optional*): branch to push to; made if there is none.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of committing.
        git_tag (`str`, *optional*): name that the commit gets, such as `"v1"`. It must be new.
        token (`str` or `bool`, *optional*): by default the one of `hf auth login`.
        card: facts for the card that no measurement holds: `license`, `language`, `datasets`, `tags`.

    Raises:
        `PushError`: it failed; nothing was committed.
        `ValueError`, `FileNotFoundError`: the folder or an argument is wrong; nothing was sent.
    """
    if git_tag is not None and create_pr:
        raise ValueError("git_tag: a pull request has no commit to tag yet. Tag it when it is merged.")

    def make_files(name: str) -> dict[str, bytes | Path]:
        return repository_files(folder, name, git_tag or revision, **card)

    make_files("user/name")  # what is wrong with the folder is found before the Hub is asked for anything
    return commit_files(
        make_files, repo_id, private=private, revision=revision, create_pr=create_pr, git_tag=git_tag, token=token,
        commit_message=commit_message, commit_description=commit_description, stale=STALE,
    )  # fmt: skip


def push_drafter(
    drafter: Any, repo_id: str, *, tokenizer: Any = None, max_shard_size: int | str = "50GB", **options: Any
) -> "CommitInfo":
    """Push a drafter from memory: [`push_folder`] of what `save_pretrained` writes, with the tokenizer if given.

    There are no measurements beside it, so its card holds none: push the training's folder to have them.
    """
    with tempfile.TemporaryDirectory(prefix="ppow-push-") as folder:
        try:
            drafter.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except Exception as error:  # safetensors reports a full disk by an exception of its own
            raise PushError(
                f"The drafter could not be written to {folder!r} ({error}). Nothing was sent to the Hub. Free some "
                "disk space, or set TMPDIR to a folder that has it, and push again."
            ) from error
        return push_folder(folder, repo_id, **options)


def push_metric(repo_id: str, name: str = "acceptance_length", **options: Any) -> "CommitInfo":
    """Push a metric of [`ppow_hf.metrics`] as the Space that `evaluate.load(repo_id)` loads it from.

    The Space's name must be the metric's: `evaluate` looks for a script of that name.
    """
    from ..metrics import path

    if repo_id.split("/")[-1] != name:
        raise ValueError(
            f"repo_id: {repo_id!r} given, but evaluate loads {name}.py from a Space that is called {name}. Push to "
            f"{repo_id.split('/')[0]}/{name}."
        )
    files: dict[str, bytes | Path] = {
        file.name: file for file in sorted(Path(path(name)).iterdir()) if file.suffix in (".py", ".md", ".txt")
    }
    return commit_files(lambda _: files, repo_id, repo_type="space", **{"commit_message": f"Upload {name}", **options})


def commit_files(
    make_files: Any,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    git_tag: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload",
    commit_description: str | None = None,
    stale: re.Pattern[str] | None = None,
) -> "CommitInfo":
    """One commit of `make_files(full_repo_id)`, on top of the head that was seen when it began, or none.

    `stale` matches the files of the repository that are deleted in the same commit unless they are made anew.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # httpx's in 1.x, httpx2's in 2.x

    _check_name("repo_id", repo_id)
    api = HfApi(token=token)
    step = "asking for the repository"
    name = repo_id
    try:
        name = api.create_repo(
            repo_id, private=private, exist_ok=True, repo_type=repo_type,
            space_sdk="static" if repo_type == "space" else None,
        ).repo_id  # fmt: skip
        if git_tag is not None and git_tag in {ref.name for ref in api.list_repo_refs(name, repo_type=repo_type).tags}:
            raise ValueError(f"git_tag: {name} has a tag {git_tag!r} already. Choose another name; nothing was sent.")
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
        info = api.repo_info(name, revision=revision, repo_type=repo_type)
        step = "uploading"
        operations = _operations(make_files(name), [file.rfilename for file in info.siblings or []], stale)
        commit = _commit(
            api, name, operations, info.sha, repo_type=repo_type, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"repo_id: {repo_id!r} cannot be a repository's name: {error}") from error
    except (OSError, HTTPError, RuntimeError) as error:
        raise PushError(
            f"{name} was not pushed ({step}): {_reason(error)} Nothing was committed, and the local files are as they "
            f"were. {_remedy(error, name)}"
        ) from error
    if git_tag is not None:
        try:
            api.create_tag(name, tag=git_tag, revision=commit.oid, repo_type=repo_type)
        except (OSError, HTTPError) as error:
            raise PushError(
                f"{name}: commit {commit.oid} was made, but it could not be tagged {git_tag!r}: {_reason(error)} Tag "
                f"it with: hf repos tag create {name} {git_tag} --revision {commit.oid}"
            ) from error
    return commit


def _operations(files: dict[str, bytes | Path], there: Sequence[str], stale: re.Pattern[str] | None) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    old = [name for name in there if stale is not None and stale.fullmatch(name) and name not in files]
    return [*added, *(CommitOperationDelete(name) for name in old)]


def _commit(
    api: "HfApi", name: str, operations: list[Any], parent: str | None, *, revision: str | None, **options: Any
) -> "CommitInfo":
    """The commit; waits once where the Hub says how long, and looks whether it was made when its answer got lost."""
    from huggingface_hub.errors import HTTPError

    def attempt() -> "CommitInfo":
        return api.create_commit(name, operations, revision=revision, parent_commit=parent, **options)

    try:
        return attempt()
    except (OSError, HTTPError) as error:
        status, wait = _status(error), _retry_after(error)
        if status == 429 and wait is not None and wait <= LONGEST_WAIT:
            time.sleep(wait)
            return attempt()
        if (status is None or status >= 500) and not options["create_pr"]:
            made = _made_all_the_same(api, name, parent, revision, options)
            if made is not None:
                return made
        raise


def _made_all_the_same(
    api: "HfApi", name: str, parent: str | None, revision: str | None, options: dict[str, Any]
) -> "CommitInfo | None":
    """The branch's head, if it is our commit on top of `parent`: the connection broke after it was made."""
    from huggingface_hub import CommitInfo
    from huggingface_hub.errors import HTTPError

    try:
        commits = api.list_repo_commits(name, revision=revision, repo_type=options["repo_type"])
    except (OSError, HTTPError):
        return None
    ours = len(commits) > 1 and commits[1].commit_id == parent and commits[0].title == options["commit_message"]
    if not ours:
        return None
    prefix = "" if options["repo_type"] == "model" else f"{options['repo_type']}s/"
    return CommitInfo(
        commit_url=f"{api.endpoint}/{prefix}{name}/commit/{commits[0].commit_id}",
        commit_message=options["commit_message"],
        commit_description=options["commit_description"] or "",
        oid=commits[0].commit_id,
    )


# -- what went wrong


def _response(error: BaseException) -> Any:
    return next((r for e in error_chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error came from; `None` where there was no answer."""
    response = _response(error)
    return None if response is None else response.status_code


def _retry_after(error: BaseException) -> float | None:
    response = _response(error)
    value = None if response is None else response.headers.get("Retry-After")
    return float(value) if value is not None and value.isdigit() else None


def _reason(error: BaseException) -> str:
    deepest = next((e for e in error_chain(error) if getattr(e, "response", None) is not None), error_chain(error)[-1])
    lines = [line.strip() for line in str(deepest).splitlines() if line.strip()]
    text = " ".join(lines[:3]) or type(deepest).__name__
    return text if text.endswith(".") else text + "."


def _remedy(error: BaseException, name: str) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status, numbers = _status(error), [getattr(e, "errno", None) for e in error_chain(error)]
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "The Hub does not accept the token: log in with `hf auth login`, or pass token=."
    if status == 403:
        return f"The token may not write to {name}: use one with write permission, or create_pr=True (--create-pr)."
    if status == 404:
        return f"There is no such repository, or the token may not see it, or revision is wrong: look at {name}."
    if status in (409, 412):
        return f"Somebody else changed {name} meanwhile: look at what they did, and push again."
    if status == 429:
        wait = _retry_after(error)
        return f"The Hub allows no more requests for now: push again in {f'{wait:.0f} s' if wait else 'some minutes'}."
    if status is not None and status >= 500:
        return "The Hub had a fault: push again later; what was uploaded already is not sent twice."
    if errno.ENOSPC in numbers or errno.EFBIG in numbers or errno.EDQUOT in numbers:
        return "The disk is full: free some space and push again."
    if status is None:
        return "The connection broke: push again; what was uploaded already is not sent twice."
    return "Fix that and push again."


# -- what is checked before anything is sent


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_links(folder: Path) -> None:
    """Raise `ValueError` for a file to be read that is a link to somewhere else; a snapshot's links are its own."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {str(folder)!r}.")
    root = folder.resolve()
    if root.parent.name == "snapshots":  # in the Hub's cache: models--user--name/snapshots/COMMIT -> ../../blobs
        root = root.parent.parent
    for path in sorted(folder.iterdir()):
        read = _matches(path.name, (*PUSHED_FILES, "config.json", "README.md"))
        if read and path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(
                f"folder: {path.name} in {str(folder)!r} is a link to a file outside of it, which would be published. "
                "Put the file itself there, or remove the link."
            )


def _without_secrets(path: Path) -> bytes | Path:
    """The file, or its content without the secrets; weights, pictures and vocabularies are taken as they are."""
    if _matches(path.name, RECORDS):
        record = read_json(path)
        redacted = redact_record(record)
        return path if redacted == record else _json(redacted)
    if path.name in TEXTS:
        text = path.read_text(encoding="utf-8", errors="replace")
        redacted = redact_text(text)
        return path if redacted == text else redacted.encode()
    return path


def _drafter_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"folder: {str(folder)!r} has no config.json. Pass one that save_pretrained wrote.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"folder: config.json in {str(folder)!r} holds a {type(config).__name__}, not an object.")
    if config.get("model_type") != "ppow_drafter":
        raise ValueError(
            f"folder: {str(folder)!r} holds a model of type {config.get('model_type')!r}, not a PPOWDrafter. Pass a "
            "drafter's folder."
        )
    return config


def _check_weights(folder: Path) -> None:
    """Raise if there are no safetensors, or if one is shorter or longer than its header says (a save that was cut)."""
    names = [path.name for path in folder.glob("*.safetensors")]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = _weight_files(index)
    else:
        wanted = {"model.safetensors"}
    missing = sorted(wanted - set(names))
    if missing:
        raise FileNotFoundError(
            f"folder: {str(folder)!r} lacks {missing[0]}. Only safetensors are pushed: save_pretrained writes them."
        )
    for name in sorted(wanted):
        header, size = safetensors_header(folder / name), (folder / name).stat().st_size
        ends = [entry["data_offsets"][1] for entry in header["tensors"].values()]
        if size != header["bytes"] + max(ends, default=0):
            raise ValueError(
                f"folder: {name} in {str(folder)!r} is damaged: {size} bytes, and its header announces "
                f"{header['bytes'] + max(ends, default=0)}. Save the drafter again."
            )


def _weight_files(index: Path) -> set[str]:
    found = read_json(index)
    named = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"folder: {index.name} in {str(index.parent)!r} names no files. Save the drafter again.")
    return set(named.values())


def _check_name(argument: str, name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{argument}: {name!r} is not a repository's name. Pass user/name, such as ada/my-drafter."
        ) from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _literal(text: str | None) -> str:
    return "None" if text is None else json.dumps(text)
