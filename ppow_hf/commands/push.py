"""`ppow push`: a drafter on the Hub in one commit, or the files of that commit in a folder.

Knows arguments and messages; what a repository holds is in publish/hub.py.
"""

import argparse
from pathlib import Path
from typing import Any

from ..data.files import ensure_writable
from ..data.models import resolve
from .card import add_facts, facts


def register(subparsers: Any) -> None:
    """Add the parser of `ppow push`."""
    parser = subparsers.add_parser(
        "push",
        help="push a drafter to the Hub, or write what would be pushed to a folder",
        description="Push a drafter to the Hub as one commit: weights, configuration, the code to run it without this "
        "package, custom_generate/generate.py, the records of training and measurements, plots and the card.",
    )
    parser.add_argument("folder", metavar="DIR", help="the drafter's folder, or an embedded drafter")
    parser.add_argument("repo_id", metavar="USER/NAME", nargs="?", help="the repository; made if there is none")
    parser.add_argument("--write", metavar="FOLDER", help="write the repository's files to a folder and push nothing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--tag", metavar="NAME", help="git tag that the commit gets, such as v1")
    parser.add_argument("--message", default="Upload drafter", help="the commit's message (default: %(default)s)")
    parser.add_argument(
        "--metric", action="store_true", help="DIR is a metric's name: push it as a Space for evaluate"
    )
    add_facts(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Push the drafter or the metric, or write the files."""
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
        folder = hub.write_repository(resolve(arguments.folder), arguments.write, **facts(arguments))
        print(f'{folder}: use it with generate(custom_generate="{folder}", trust_remote_code=True)')
        return 0
    else:
        commit = hub.push_folder(
            resolve(arguments.folder),
            arguments.repo_id,
            commit_message=arguments.message,
            **options,
            **facts(arguments),
        )
    print(commit.pr_url or commit.commit_url)
    return 0
