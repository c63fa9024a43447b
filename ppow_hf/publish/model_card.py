"""The card of a drafter, made from the measurements that lie in its folder and from nothing else.

Knows files and text; measures nothing and loads no weights. What was not measured is said to be missing.

Files it reads, all optional but the first two: `config.json`, `*.safetensors` (headers only), `training_log.json`,
`training_arguments.json`, `provenance.json`, `acceptance*.json` (of `ppow measure`), `benchmark*.json` (of `ppow
bench`), `training.png`, `windows.png`.
"""

import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import read_json, write_whole
from ..data.weights import safetensors_header
from ..measure.provenance import is_hub_name, public_name
from ..measure.redaction import redact_record
from ..tiny import is_embedded

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

ARXIV = "2605.14978"
PAPER = f"[arXiv {ARXIV}](https://arxiv.org/abs/{ARXIV})"
TEMPLATE = Path(__file__).parent / "templates" / "drafter_card.md"
EMBEDDED_FACTS = {"license": "apache-2.0", "language": "code"}
ARCHITECTURES = {
    "eagle": "an EAGLE-3 drafter that reads three of the target's hidden states",
    "block": "a block drafter (DFlash, DSpark) that drafts a window in one forward over the target's hidden states",
    "medusa": "Medusa heads on the target's last hidden state",
    "standalone": "a small causal language model of its own",
}


def drafter_card(
    folder: str | Path,
    repository: str | None = None,
    *,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    tags: Sequence[str] = (),
    licence_note: str | None = None,
    limits: Sequence[str] = (),
) -> "ModelCard":
    """The card of the drafter in `folder`.

    Args:
        folder (`str` or `Path`): the drafter with the files of its measurements (see the module).
        repository (`str`, *optional*):
            Name on the Hub, or of an embedded drafter; by default the folder is what the examples load.
        license, language, datasets (*optional*):
            What no measurement holds; by default as in the front matter of a `README.md` in the folder.
        tags (`list[str]`, *optional*): added to the card's own.
        licence_note (`str`, *optional*), limits (`list[str]`, *optional*): texts of those sections.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {str(folder)!r}.")
    config = _read(folder / "config.json")
    target = public_name(config.get("target_name_or_path"))
    name = _plain(repository or folder.resolve().name)
    embedded = repository is not None and is_embedded(repository)
    declared = {**(EMBEDDED_FACTS if embedded else {}), **_declared(folder)}
    benchmarks = [(path, one) for path in sorted(folder.glob("benchmark*.json")) for one in _as_list(_read(path))]
    acceptance = [(path, _read(path)) for path in sorted(folder.glob("acceptance*.json"))]
    acceptance_parts = [_part(path, _acceptance_part, one) for path, one in acceptance]
    results = [result for path, one in acceptance for result in _part(path, eval_results, [one], target)]
    own_tags = ["speculative-decoding", "draft-model", "ppow", config["architecture"], f"arxiv:{ARXIV}"]
    if repository is not None and not embedded:
        own_tags.append("custom_generate")
    data = ModelCardData(
        base_model=target if is_hub_name(target) else None,
        datasets=datasets or declared.get("datasets"),
        eval_results=results or None,
        language=language or declared.get("language"),
        library_name="transformers",
        license=license or declared.get("license"),
        model_name=name if results else None,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*own_tags, *tags])),
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=_cell(name.split("/")[-1]),
        what=ARCHITECTURES[config["architecture"]],
        target_link=_link(target),
        parameters=_parameters(folder),
        paper=PAPER,
        usage=_usage(name, folder, repository, target, config),
        fingerprint=_fingerprint(config),
        curves=(folder / "training.png").is_file(),
        windows_plot=(folder / "windows.png").is_file(),
        acceptance=acceptance_parts,
        benchmarks=[_part(path, _benchmark_part, one, target) for path, one in benchmarks],
        licence=licence_note or _licence(license or declared.get("license"), embedded),
        limits=list(limits),
        **_training(folder, config),
    )


def write_drafter_card(folder: str | Path, repository: str | None = None, **facts: Any) -> Path:
    """Write [`drafter_card`] to the folder's `README.md`, whole or not at all."""
    return write_whole(Path(folder) / "README.md", str(drafter_card(folder, repository, **facts)))


def eval_results(acceptance: Sequence[dict[str, Any]], target: str | None) -> "list[EvalResult]":
    """The measured acceptance lengths as the front matter's `model-index`.

    The newer `.eval_results/*.yaml` belong to the leaderboards of registered benchmarks, which score what a model
    answers. No benchmark is registered for acceptance, which a drafter never shares with its target's scores.
    """
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name="Speculative decoding",
            dataset_type=re.sub(r"[^\w./-]+", "-", row["workload"]),
            dataset_name=row["workload"],
            metric_type="acceptance_length",
            metric_name=f"Acceptance length (T = {row['temperature']:g}, {_window(row)})",
            metric_value=round(row["acceptance_length"], 3),
            metric_args={
                "target": measurement.get("target") or target or "unknown",
                "max_window": row["max_window"],
                "prompts": row["prompts"],
                "max_new_tokens": measurement["max_new_tokens"],
            },
        )
        for measurement in acceptance
        for row in measurement["rows"]
    ]


# -- parts of the text


def _training(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What `training_log.json`, `training_arguments.json` and `provenance.json` say."""
    log = _read(folder / "training_log.json", default=[])
    arguments = _read(folder / "training_arguments.json", default={})
    provenance = _read(folder / "provenance.json", default={})
    runs = _part(folder / "training_log.json", _runs, log)
    stages = _part(folder / "training_log.json", _stages, log, runs)
    return {
        "objectives": _objectives([name for name, _ in runs]),
        "stages": stages,
        "evaluation": _part(folder / "training_arguments.json", _evaluation, arguments, config),
        "verdict": " ".join(filter(None, [_plateau(runs), _verdict(stages, log, arguments)])),
        "provenance_rows": _part(folder / "provenance.json", _provenance_rows, provenance, runs),
    }


def _objectives(names: list[str]) -> str:
    """What stands after "Trained": the stages one by one, or, where they come back, each once."""
    words = {"supervised": "supervised on text that the target wrote", "ppow": "with PPOW"}
    said = {name: words.get(name, f"with the objective {name}") for name in names}
    if len(said) == len(names):
        return ", then ".join(said.values())
    return f"in {len(names)} stages, {' and '.join(said.values())} in turns, the last of them `{names[-1]}`"


Runs = list[tuple[str, list[dict[str, Any]]]]


def _runs(log: list[dict[str, Any]]) -> Runs:
    """The stages of training in their order, an objective and its rows each; one may come back later."""
    named = [row for row in log if "objective" in row]
    return [(_cell(name), list(rows)) for name, rows in itertools.groupby(named, key=lambda row: row["objective"])]


def _stages(log: list[dict[str, Any]], runs: Runs) -> list[dict[str, Any]]:
    evaluations = [row for row in log if "eval_acceptance_length" in row]
    if not evaluations:
        return []
    evaluated = [(name, [row for row in rows if "eval_acceptance_length" in row]) for name, rows in runs]
    chosen = [(f"after {name}", rows[-1]) for name, rows in evaluated if rows]
    first = evaluations[0]
    if not chosen or chosen[0][1] is not first:
        chosen.insert(0, ("untrained" if first["step"] == 0 else f"{runs[0][0]}, step {first['step']}", first))
    return [
        {
            "name": name,
            "value": row["eval_acceptance_length"],
            "acceptance_length": f"{row['eval_acceptance_length']:.2f}",
            "wasted": _share(row.get("eval_wasted")),
            "repeated": _share(row.get("eval_repeated_8grams")),
        }
        for name, row in chosen
    ]


def _plateau(runs: Runs) -> str:
    """How much the first objective still gained, when it was last trained with, in about the last quarter of steps."""
    if not runs:
        return ""
    name = runs[0][0]
    rows = [rows for other, rows in runs if other == name][-1]
    evaluations = [row for row in rows if "eval_acceptance_length" in row]
    if len(evaluations) < 4:
        return ""
    first, last = evaluations[0]["step"], evaluations[-1]
    share = {(row["step"] - first) / max(last["step"] - first, 1): row for row in evaluations[1:-1]}
    nearest = min(share, key=lambda place: abs(place - 0.75))
    if not 0.6 <= nearest <= 0.9:
        return ""
    before, after = share[nearest]["eval_acceptance_length"], last["eval_acceptance_length"]
    return (
        f"In the last {1 - nearest:.0%} of the steps of the {name} stage it went from {before:.2f} to {after:.2f} "
        f"({after / before - 1:+.1%})."
    )


def _verdict(stages: list[dict[str, Any]], log: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    if len(stages) < 2:
        return ""
    change = stages[-1]["value"] - stages[-2]["value"]
    prompts = arguments.get("eval_prompts")
    few = f"With {prompts} prompts and one seed, " if prompts else "From one run with one seed, "
    text = (
        f"The last stage changed it by {change:+.2f}. {few}small differences are noise; continued training without it "
        "for the same time is not part of this record."
    )
    with_choice = [row["adaw"] for row in log if "adaw" in row]
    if with_choice and not any(with_choice):
        text += " All windows were chosen uniformly: the divergence-aware choice (ADAW) was not reached in this run."
    return text


def _evaluation(arguments: dict[str, Any], config: dict[str, Any]) -> str:
    temperature = arguments.get("target_temperature", 0.0)
    parts = ["greedy" if temperature == 0 else f"T = {temperature:g}"]
    parts.append(f"fixed windows of {arguments.get('max_window', config['max_window'])} tokens")
    if arguments.get("eval_prompts"):
        parts.append(f"{arguments['eval_prompts']} prompts, {arguments['eval_new_tokens']} tokens each")
    return ", ".join(parts)


def _provenance_rows(provenance: dict[str, Any], runs: Runs) -> list[tuple[str, str]]:
    rows = []
    if runs:
        before, parts = 0, []
        for name, stage in runs:
            last = max(row["step"] for row in stage)
            parts.append(f"{last - before} {name}")
            before = last
        rows.append(("steps", ", ".join(parts)))
    if provenance.get("command"):
        rows.append(("command", _code(provenance["command"])))
    for label, key in (
        ("temperatures of the target's texts, in turn", "text_temperatures"),
        ("what was minimised, in turn", "objectives"),
        ("data fingerprint", "data_fingerprint"),
        ("target's revision", "target_revision"),
        ("source revision", "git_revision"),
    ):
        if provenance.get(key):
            rows.append((label, _code(provenance[key])))
    if provenance.get("seeds"):
        rows.append(
            ("seeds", ", ".join(f"{_cell(name)} {_cell(value)}" for name, value in provenance["seeds"].items()))
        )
    if provenance.get("machine"):
        rows.append(("machine", _machine(provenance["machine"])))
    if provenance.get("versions"):
        rows.append(("versions", _named(provenance["versions"])))
    return rows


def _acceptance_part(measurement: dict[str, Any]) -> dict[str, Any]:
    longest = max((len(row["acceptance_by_position"]) for row in measurement["rows"]), default=0)
    return {
        "conditions": (
            f"Target {_code(measurement['target'])} in {_cell(measurement['dtype'])}, "
            f"{measurement['max_new_tokens']:d} new tokens after each prompt, seed {measurement['seed']:d}, on "
            f"{_machine(measurement['machine'])}; {_named(measurement['versions'])}. Made with "
            f"{_code(measurement['command'])}."
        ),
        "positions": list(range(1, longest + 1)),
        "rows": [
            {
                "workload": _cell(row["workload"]),
                "temperature": f"{row['temperature']:g}",
                "window": _window(row),
                "prompts": _cell(row["prompts"]),
                "acceptance_length": f"{row['acceptance_length']:.2f}{_interval(row)}",
                "tokens_per_target_forward": f"{row['tokens_per_target_forward']:.2f}",
                "wasted": _share(row["wasted"]),
                "repeated": _share(row["repeated_8grams"]),
                "by_position": [
                    *(f"{share:.2f}" for share in row["acceptance_by_position"]),
                    *[""] * (longest - len(row["acceptance_by_position"])),
                ],
            }
            for row in measurement["rows"]
        ],
        "half_precision": _half_precision(measurement.get("half_precision")),
    }


def _interval(row: dict[str, Any]) -> str:
    """The 95% interval of an acceptance length as it stands after it; nothing where the measurement has none."""
    ends = row.get("acceptance_length_interval")
    return f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""


def _half_precision(divergence: dict[str, Any] | None) -> str:
    """One sentence of greedy outputs in half precision against plain generation's; "" where it was not measured."""
    if divergence is None:
        return ""
    dtype, prompts, differing = _cell(divergence["dtype"]), int(divergence["prompts"]), int(divergence["differing"])
    if not differing:
        return f"In {dtype} none of {prompts} greedy outputs differs from plain `generate`'s."
    opening = (
        f"In {dtype} {differing} of {prompts} greedy outputs {'differ' if differing > 1 else 'differs'} from plain "
        "`generate`'s"
    )
    numbers = f"(largest top-2 gap {divergence['largest_gap']:.2g}, noise {divergence['noise']:.2g})"
    near_ties = divergence["near_ties"]
    if near_ties == differing:
        return f"{opening}, {'each first' if differing > 1 else 'first'} at a near-tie {numbers}."
    return f"{opening}, of which {near_ties} first at a near-tie: the rest is more than rounding {numbers}."


def _benchmark_part(result: dict[str, Any], target: str | None) -> dict[str, Any]:
    from ..measure.benchmark_report import verdict

    workload = f"{_cell(result['workload'])}, t" if result.get("workload") else "T"
    temperature = result.get("temperature") or 0
    sampling = "greedy" if temperature == 0 else f"T = {temperature:g}"
    if result.get("batch_size", 1) > 1:
        sampling += f", batches of {result['batch_size']}"
    return {
        "conditions": (
            f"{workload}arget {_code(result.get('target') or target or 'unknown')} in {_cell(result['dtype'])}, "
            f"{result['prompts']:d} prompts, {result['max_new_tokens']:d} tokens each, {sampling}, on "
            f"{_machine(result['machine'])}; {_named(result['versions'])}. Cost ratio {result['cost_ratio']:.3f} "
            f"(draft step {1e3 * result['draft_step_seconds']:.2f} ms, target forward "
            f"{1e3 * result['target_forward_seconds']:.2f} ms). Made with {_code(result['command'])}."
        ),
        "verdict": _text(verdict(result)),
        "rows": [
            {
                "name": _cell(row["name"]),
                "tokens_per_second": f"{row['tokens_per_second']:.1f}",
                "ratio": f"{row['ratio_to_plain']:.2f}",
                "interval": " to ".join(f"{end:.2f}" for end in row.get("ratio_interval") or []),
                "acceptance_length": f"{row['acceptance_length']:.2f}",
                "tokens_per_target_forward": f"{row['tokens_per_target_forward']:.2f}",
                "wasted": _share(row["wasted"]) if row["drafted"] else "",
                "identical": {True: "yes", False: "no", None: "sampled"}[row["identical_to_plain"]],
            }
            for row in result["rows"]
        ],
    }


def _usage(name: str, folder: Path, repository: str | None, target: str | None, config: dict[str, Any]) -> str:
    """How to use the drafter: in transformers, and in the engines that serve its export."""
    embedded = repository is not None and is_embedded(repository)
    target = None if target is None else _plain(target)
    shown = name if repository is not None else _plain(folder.name)
    return _use_in_transformers(shown, target, embedded) + _use_in_engines(shown, target, config)


def _use_in_transformers(shown: str, target: str | None, embedded: bool) -> str:
    target_text = f"tiny.target_path({target!r})" if target and is_embedded(target) else repr(target or "TARGET")
    generate = (
        "output = target.generate(**inputs, assistant_model=drafter)\n"
        "print(drafter.last_trace.acceptance_length)\n```\n"
    )
    load = (
        ("from ppow_hf import tiny\n" if target and is_embedded(target) and not embedded else "")
        + "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({target_text})\n"
        f"target = AutoModelForCausalLM.from_pretrained({target_text})\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)\n'
    ).replace("'", '"')
    if embedded:
        drafter = f'drafter = PPOWDrafter.from_pretrained(tiny.drafter_path("{shown}"))'
        return f"### transformers\n\n```python\nfrom ppow_hf import PPOWDrafter, tiny\n{load}{drafter}\n{generate}"
    return (
        "### transformers\n\nWith transformers alone, the repository brings its own code:\n\n"
        f"```python\n{load}"
        f'output = target.generate(**inputs, custom_generate="{shown}", trust_remote_code=True)\n```\n\n'
        'The code that was pushed with this repository\'s `generate.py` is run, or none. `revision="COMMIT"` beside '
        "`custom_generate` pins all of it, the weights too.\n\n"
        "With ppow_hf installed:\n\n"
        f'```python\nfrom ppow_hf import PPOWDrafter\n\ndrafter = PPOWDrafter.from_pretrained("{shown}")\n{generate}'
    )


def _use_in_engines(shown: str, target: str | None, config: dict[str, Any]) -> str:
    architecture, tokens = config["architecture"], 5
    if architecture == "block":
        architecture, tokens = "dspark" if config.get("markov_rank") else "dflash", config["block_size"]
    method = {"eagle": "eagle3", "standalone": "draft_model"}.get(architecture, architecture)
    algorithm = {"eagle": "EAGLE3", "standalone": "STANDALONE"}.get(architecture)
    served = shlex.quote(_plain(target or "TARGET"))
    if is_embedded(served):
        served = f'"$(python -c \'from ppow_hf import tiny; print(tiny.target_path("{served}"))\')"'
    exported = shlex.quote(shown)
    speculative = json.dumps({"method": method, "model": "exported", "num_speculative_tokens": tokens})
    text = (
        "\n### vLLM\n\n"
        f"```bash\nppow export {exported} --format vllm --output-dir exported\n"
        f"vllm serve {served} --speculative-config '{speculative}'\n```\n"
    )
    if algorithm is not None:
        text += (
            "\n### SGLang\n\nFrom the same directory.\n\n"
            f"```bash\npython -m sglang.launch_server --model-path {served} --speculative-algorithm {algorithm} \\\n"
            "  --speculative-draft-model-path exported --speculative-num-steps 5 --speculative-eagle-topk 1 \\\n"
            "  --speculative-num-draft-tokens 6\n```\n"
        )
    return text


def _fingerprint(config: dict[str, Any]) -> str:
    fingerprint = config.get("target_vocabulary_fingerprint")
    return f" (vocabulary fingerprint {_code(fingerprint)})" if fingerprint else ""


def _licence(license: str | None, embedded: bool) -> str:
    if embedded:
        from ..tiny.cards import LICENCE_NOTE

        return LICENCE_NOTE
    return f"The weights are released under {_code(license)}; the target has its own licence." if license else ""


# -- cells


def _link(target: str | None) -> str:
    if target is None:
        return "a target that has no name"
    return f"[{target}](https://huggingface.co/{target})" if is_hub_name(target) else _code(target)


def _machine(machine: dict[str, Any]) -> str:
    if machine["device"] != "cpu" and machine.get("gpu"):
        return _cell(machine["gpu"])
    cores = f"{_cell(machine['threads'])} of {_cell(machine['cores'])} cores"
    return f"{_cell(machine['processor'])}, {cores}, {machine['memory_gib']:g} GiB"


def _named(versions: dict[str, str]) -> str:
    return ", ".join(f"{_cell(name)} {_cell(version)}" for name, version in versions.items())


def _window(row: dict[str, Any]) -> str:
    return (
        f"fixed {row['max_window']:d}"
        if row["window"] == "fixed"
        else f"{_cell(row['window'])}, at most {row['max_window']:d}"
    )


def _share(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.0%}"


def _plain(text: Any) -> str:
    """One line without backticks and quotes, which would end a code span, a string, or a code block."""
    return " ".join(re.sub("[`'\"]", "", str(text)).split())


def _text(text: Any) -> str:
    """A value inside a sentence: one line, nothing of it read as HTML."""
    return " ".join(str(text).replace("`", "'").split()).replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: Any) -> str:
    """A value inside a table or a sentence: nothing of it read as HTML, as a link, or as the end of a cell."""
    escaped = _text(text)
    for mark in "|[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def _code(text: Any) -> str:
    """A value as code: one line, which no backtick ends and no bar divides."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split()).replace('|', chr(92) + '|')}`"


def _part(path: Path, make: Callable[..., Any], *values: Any) -> Any:
    """`make(*values)`; where the record of `path` has another shape, an error that names the file."""
    try:
        return make(*values)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"folder: {path.name} in {str(path.parent)!r} is no record that ppow wrote: {what}. Measure again, or "
            "remove it."
        ) from error


def _parameters(folder: Path) -> str:
    """Number of the drafter's weights, from the headers of its safetensors."""
    count = sum(
        math.prod(entry["shape"])
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in safetensors_header(path)["tensors"].items()
        if name not in ("d2t", "t2d")
    )
    return f"{count:,}"


def _declared(folder: Path) -> dict[str, Any]:
    """Licence, language and data sets of a `README.md` that lies in the folder already."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    data = ModelCard.load(path).data.to_dict()
    return {name: data[name] for name in ("license", "language", "datasets") if name in data}


def _as_list(result: Any) -> list[dict[str, Any]]:
    """The results of a benchmark file: one, or those of several batch sizes and temperatures."""
    return result if isinstance(result, list) else [result]


def _read(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    record = redact_record(read_json(path))
    if default is not None and not isinstance(record, type(default)):
        raise ValueError(
            f"folder: {path.name} in {str(path.parent)!r} holds a {type(record).__name__}, not a "
            f"{type(default).__name__} as ppow writes it. Write it again, or remove it."
        )
    return record
