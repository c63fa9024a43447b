"""What the demo shows: the models, limits and stored results that its owner names. A visitor chooses none of these.

Knows names, files and environment variables; loads models through `ppow_hf.data.models`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.models import (
    check_tokenizer,
    downloaded_pair,
    load_drafter,
    load_target,
    load_tokenizer,
    resolve,
    shipped_drafter,
)
from ..tiny import is_embedded

MAX_NEW_TOKENS = 512
MAX_PROMPT_CHARACTERS = 2000

CODE_EXAMPLES = (
    (
        "a test class",
        "class TestQueue(unittest.TestCase):\n"
        "    def test_empty(self):\n"
        "        queue = Queue()\n"
        "        self.assertEqual(len(queue), 0)\n\n"
        "    def test_put(self):\n"
        "        queue = Queue()\n",
    ),
    (
        "a class",
        "class Queue:\n"
        '    """A simple queue."""\n\n'
        "    def __init__(self, maxsize=0):\n"
        "        self.maxsize = maxsize\n"
        "        self.",
    ),
    (
        "a function",
        'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file as a list."""\n    with open(path',
    ),
    ("a licence header", "# Copyright (c) 2001-2024 Python Software Foundation\n# All rights reserved.\n#\n"),
)
PROSE_EXAMPLES = (
    ("an explanation", "Explain in three sentences how speculative decoding makes a language model faster."),
    ("code", "Write a Python function that merges two sorted lists into one sorted list."),
    ("a sum", "Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?"),
)


@dataclass(frozen=True)
class DemoSettings:
    """What the owner of the page sets.

    Args:
        target (`str`): a folder, a name on the Hub, or an embedded model.
        drafter (`str`): the same; `""` is the one that comes with the package for this target.
        compare (`str`, *optional*): the drafter that the second tab sets beside it, such as the supervised one that
            PPOW began with; `""` leaves the tab out.
        dtype, device (`str`, *optional*): as in `ppow generate`.
        results (`str`, *optional*): folder whose `benchmark.json` files the third tab shows.
        concurrency (`int`): runs at once; with 1 nobody's tokens/s is slowed down by somebody else's run.
        queue (`int`): visitors that may wait; more are told that the demo is busy.
        seconds (`float`): time limit of a run.
    """

    target: str = "tiny"
    drafter: str = "tiny-eagle"
    compare: str = "tiny-standalone"
    dtype: str | None = None
    device: str | None = None
    results: str | None = None
    concurrency: int = 1
    queue: int = 32
    seconds: float = 60.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "DemoSettings":
        """Read `PPOW_DEMO_TARGET`, `_DRAFTER`, `_COMPARE`, `_DTYPE`, `_DEVICE`, `_RESULTS`, `_CONCURRENCY`, `_QUEUE`,
        `_SECONDS`. Without target and drafter the pair is a real one whose target lies in the Hub's cache, or else the
        embedded one. With another target or drafter there is no comparison unless one is named.

        Raises `ValueError` for a number that is none, or not above 0.
        """

        def number(name: str, default: float) -> float:
            text = environment.get(name, "").strip() or str(default)
            try:
                value = float(text)
            except ValueError:
                value = float("nan")
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: {text!r} given; a number above 0 is needed.")
            return value

        given = {
            name: environment[f"PPOW_DEMO_{name.upper()}"].strip()
            for name in ("target", "drafter", "compare", "dtype", "device", "results")
            if environment.get(f"PPOW_DEMO_{name.upper()}", "").strip()
        }
        if not {"target", "drafter", "compare"} & set(given) and (pair := downloaded_pair()):
            given |= dict(zip(("target", "drafter"), pair, strict=True))
        if ("target" in given or "drafter" in given) and "compare" not in given:
            given["compare"] = ""
        if "target" in given and not is_embedded(given["target"]):
            given.setdefault("drafter", "")
        return cls(
            **given,  # type: ignore[arg-type]
            concurrency=int(number("PPOW_DEMO_CONCURRENCY", 1)),
            queue=int(number("PPOW_DEMO_QUEUE", 32)),
            seconds=number("PPOW_DEMO_SECONDS", 60),
        )


@dataclass
class ShownDrafter:
    """A drafter with what the page says about it: its label and its training log (empty where none is stored)."""

    model: Any
    label: str
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Models:
    """Everything that is loaded before the page opens."""

    target: Any
    tokenizer: Any
    drafter: ShownDrafter
    compare: ShownDrafter | None
    target_label: str
    examples: tuple[tuple[str, str], ...]
    benchmarks: list[tuple[str, dict[str, Any]]]


def load_models(settings: DemoSettings) -> Models:
    """Load what the settings name; raises as `ppow generate` does, naming the argument and its variable."""
    target = load_target(settings.target, "--target (PPOW_DEMO_TARGET)", settings.dtype, settings.device)
    tokenizer = load_tokenizer(settings.target, "--target (PPOW_DEMO_TARGET)")

    name = settings.drafter or shipped_drafter(tokenizer)
    if name is None:
        raise ValueError("--drafter (PPOW_DEMO_DRAFTER): a target was named without one. Name its drafter.")

    def drafter(name: str, argument: str) -> ShownDrafter:
        model = load_drafter(name, argument, settings.dtype, settings.device)
        check_tokenizer(model, tokenizer, argument)
        log = training_log(name)
        return ShownDrafter(model, drafter_label(name, model.config.architecture, log), log)

    return Models(
        target=target,
        tokenizer=tokenizer,
        drafter=drafter(name, "--drafter (PPOW_DEMO_DRAFTER)"),
        compare=drafter(settings.compare, "--compare (PPOW_DEMO_COMPARE)") if settings.compare else None,
        target_label=short_name(settings.target),
        examples=CODE_EXAMPLES if is_embedded(settings.target) else PROSE_EXAMPLES,
        benchmarks=stored_benchmarks(settings.results),
    )


def short_name(name: str) -> str:
    """A name on the Hub or an embedded name as it is, a folder by its last part: no path is shown to visitors."""
    return Path(name).name if Path(name).exists() or name.startswith((".", "/", "~")) else name


def drafter_label(name: str, architecture: str, log: list[dict[str, Any]]) -> str:
    """Its name, architecture, and the last stage that its training log has."""
    stages = [entry["objective"] for entry in log if entry.get("objective")]
    last = stages[-1] if stages else ""
    stage = {"ppow": "PPOW", "supervised": "supervised only"}.get(last, last)
    return f"{short_name(name)} ({', '.join(part for part in (architecture, stage) if part)})"


def training_log(name: str) -> list[dict[str, Any]]:
    """The `training_log.json` beside a drafter's weights, in a folder or on the Hub; empty where there is none."""
    from huggingface_hub import hf_hub_download

    folder = Path(resolve(name))
    try:
        path = folder / "training_log.json" if folder.is_dir() else hf_hub_download(name, "training_log.json")
        log = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return log if isinstance(log, list) else []


def stored_benchmarks(folder: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The `benchmark.json` files under `folder`, or under the repository's model_cards/results, each with its name."""
    root = Path(folder) if folder else Path(__file__).parents[2] / "model_cards" / "results"
    found = []
    for path in sorted(root.rglob("benchmark.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"rows", "machine", "versions"} <= set(result):
            found.append((path.parent.name, result))
    return found
