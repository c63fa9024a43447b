"""`ppow push`, `ppow card`, `ppow measure`: a drafter on the Hub, its card, and the acceptance that the card shows."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..data.models import (
    STDLIB_PROMPT_TOKENS,
    add_models,
    check_positive,
    ensure_file_writable,
    ensure_writable,
    load_drafter,
    load_pair,
    load_prompts,
    load_target,
    parse_workload,
    resolve,
)
from ..data.sources import DATA_HELP
from ..tiny import is_embedded


def register(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="push a drafter to the Hub, or write what would be pushed to a folder",
        description="Push a drafter to the Hub as one commit: weights, configuration, the code to run it without this "
        "package, custom_generate/generate.py, the records of training and measurements, plots and the card.",
    )
    push.add_argument("folder", metavar="DIR", help="the drafter's folder, or an embedded drafter")
    push.add_argument("repo_id", metavar="USER/NAME", nargs="?", help="the repository; made if there is none")
    push.add_argument("--write", metavar="FOLDER", help="write the repository's files to a folder and push nothing")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--tag", metavar="NAME", help="git tag that the commit gets, such as v1")
    push.add_argument("--message", default="Upload drafter", help="the commit's message (default: %(default)s)")
    push.add_argument("--metric", action="store_true", help="DIR is a metric's name: push it as a Space for evaluate")
    _add_facts(push)
    push.set_defaults(run=run_push)

    card = commands.add_parser(
        "card",
        help="write a drafter's card from its measurements",
        description="Write the card of a drafter from the measurements in its folder, and from nothing else.",
    )
    card.add_argument("folder", metavar="DIR", help="the drafter's folder, or an embedded drafter")
    card.add_argument("--repository", metavar="USER/NAME", help="the name that the card's examples load")
    card.add_argument("--output", metavar="FILE", help="the card (default: print it)")
    _add_facts(card)
    card.set_defaults(run=run_card)

    measure = commands.add_parser(
        "measure",
        help="measure acceptance per position and per workload for the card",
        description="Decode prompts and write the acceptance per position, workload, window rule and temperature as "
        "acceptance.json, which the card shows when it lies in the drafter's folder.",
    )
    add_models(measure)
    measure.add_argument(
        "--prompts",
        action="append",
        metavar="[NAME=]DATA",
        help=f"a workload, may be given several times: {DATA_HELP}; a .txt file; or stdlib for functions of the "
        f"standard library, cut to their last {STDLIB_PROMPT_TOKENS} tokens (default: stdlib)",
    )
    measure.add_argument("--num-prompts", type=int, default=20, help="prompts of each (default: %(default)s)")
    measure.add_argument("--max-new-tokens", type=int, default=64, help="tokens behind each (default: %(default)s)")
    measure.add_argument("--temperature", default="0", help="temperatures, with commas between (default: %(default)s)")
    measure.add_argument(
        "--window", default="fixed,kl", help="window rules, with commas between (default: %(default)s)"
    )
    measure.add_argument("--max-window", type=int, metavar="N", help="longest window (default: the drafter's own)")
    measure.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    measure.add_argument(
        "--half-precision",
        choices=["bfloat16", "float16"],
        help="also count greedy outputs that differ from plain generate's in this number format, and tell near-ties "
        "from errors (default: --dtype, where it is one of these)",
    )
    measure.add_argument("--json", required=True, metavar="FILE", help="the result, such as DIR/acceptance.json")
    measure.set_defaults(run=run_measure)


def _add_facts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--license", metavar="ID", help="the weights' licence, such as apache-2.0")
    parser.add_argument("--language", metavar="CODE", help="language of the training text, such as en or code")
    parser.add_argument("--dataset", action="append", metavar="NAME", help="a training data set on the Hub")
    parser.add_argument("--card-tag", action="append", default=[], metavar="TAG", help="a further tag of the card")


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "license": arguments.license,
        "language": arguments.language,
        "datasets": arguments.dataset,
        "tags": arguments.card_tag,
    }


def run_push(arguments: argparse.Namespace) -> int:
    from ..publish import hub

    if (arguments.repo_id is None) == (arguments.write is None):
        raise ValueError("USER/NAME: give either a repository to push to, or --write FOLDER.")
    options = {
        "private": arguments.private,
        "revision": arguments.revision,
        "create_pr": arguments.create_pr,
        "git_tag": arguments.tag,
    }
    if arguments.metric:
        if arguments.repo_id is None:
            raise ValueError("--metric: give the Space to push to, USER/NAME; --write is for drafters.")
        commit = hub.push_metric(arguments.repo_id, arguments.folder, **options)
    elif arguments.write is not None:
        made = not Path(arguments.write).exists()
        ensure_writable(arguments.write, "--write")
        if made:  # the folder comes with what is in it
            Path(arguments.write).rmdir()
        folder = hub.write_repository(resolve(arguments.folder), arguments.write, **_facts(arguments))
        print(f'{folder}: use it with generate(custom_generate="{folder}", trust_remote_code=True)')
        return 0
    else:
        commit = hub.push_folder(
            resolve(arguments.folder),
            arguments.repo_id,
            commit_message=arguments.message,
            **options,
            **_facts(arguments),
        )
    print(commit.pr_url or commit.commit_url)
    return 0


def run_card(arguments: argparse.Namespace) -> int:
    from ..publish.model_card import drafter_card

    repository = arguments.repository or (arguments.folder if is_embedded(arguments.folder) else None)
    if arguments.output:
        ensure_file_writable(arguments.output, "--output")
    text = str(drafter_card(resolve(arguments.folder), repository, **_facts(arguments)))
    if arguments.output is None:
        print(text)
        return 0
    with open(arguments.output, "w", encoding="utf-8") as file:
        file.write(text)
    return 0


def run_measure(arguments: argparse.Namespace) -> int:
    for name in ("num_prompts", "max_new_tokens"):
        check_positive(f"--{name.replace('_', '-')}", getattr(arguments, name))
    if arguments.max_window is not None:
        check_positive("--max-window", arguments.max_window)
    ensure_file_writable(arguments.json, "--json")
    temperatures = _temperatures(arguments.temperature)
    sources = dict(parse_workload(text) for text in arguments.prompts or ["stdlib"])
    target, tokenizer, drafter = load_pair(arguments)
    workloads = {}
    for name, source in sources.items():
        prompts = load_prompts(source, arguments.num_prompts, tokenizer, target, arguments.max_new_tokens)
        workloads[name] = [ids[0].tolist() for ids in prompts]
    from ..measure.benchmark_report import (
        write_benchmark,
    )
    from ..metrics import measure_acceptance

    result = measure_acceptance(
        target,
        drafter,
        workloads,
        temperatures=temperatures,
        windows=arguments.window.split(","),
        max_window=arguments.max_window,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        target_name=arguments.target,
        command=arguments.command,
    )
    every_prompt = [prompt for prompts in workloads.values() for prompt in prompts]
    half_precision = _half_precision(arguments, target, drafter, every_prompt)
    if half_precision is not None:
        result["half_precision"] = half_precision
    write_benchmark(result, arguments.json)
    for row in result["rows"]:
        print(json.dumps({name: row[name] for name in ("workload", "temperature", "window", "acceptance_length")}))
    if half_precision is not None:
        print(json.dumps({name: value for name, value in half_precision.items() if name != "first_differences"}))
    return 0


def _half_precision(
    arguments: argparse.Namespace, target: Any, drafter: Any, prompts: list[list[int]]
) -> dict[str, Any] | None:
    """What [`measure_divergence`] found, with the pair loaded again where it has another number format."""
    from ..measure.divergence import HALF_PRECISION, measure_divergence

    if arguments.half_precision is None and target.dtype not in HALF_PRECISION:
        return None
    if arguments.half_precision not in (None, str(target.dtype).removeprefix("torch.")):
        target = load_target(arguments.target, "--target", arguments.half_precision, arguments.device)
        drafter = load_drafter(arguments.drafter, "--drafter", arguments.half_precision, arguments.device)
    settings = {"max_window": arguments.max_window} if arguments.max_window else {}
    return measure_divergence(target, drafter, prompts, arguments.max_new_tokens, **settings)


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--temperature: {text!r} given; pass numbers with commas between, such as 0,1.") from error
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"--temperature: {text!r} given; 0 (greedy) or positive numbers are needed.")
    return values
