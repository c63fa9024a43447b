"""`ppow demo`: the page that the Space shows, on this machine.

Knows arguments and environment variables; the page is in demo/.
"""

import argparse
import os
import socket
from typing import Any

from .options import MODEL_HELP, NUMBER_FORMATS, add_device

LAST_PORT = 65535


def register(subparsers: Any) -> None:
    """Add the parser of `ppow demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="watch a drafter at work on a page in the browser",
        description="Serve the page of the Space: gauge, windows and text of a run, round by round. What is not given "
        "here is read from the environment variables PPOW_DEMO_TARGET, PPOW_DEMO_DRAFTER, PPOW_DEMO_COMPARE, ...",
    )
    parser.add_argument(
        "--target",
        metavar="MODEL",
        help=f"the target: {MODEL_HELP} (default: one in the Hub's cache with a drafter here, else tiny)",
    )
    parser.add_argument(
        "--drafter",
        metavar="MODEL",
        help=f"the drafter: {MODEL_HELP} (default: the one of the package for the target)",
    )
    parser.add_argument(
        "--compare", metavar="MODEL", help="a second drafter of the same target, such as the supervised one"
    )
    parser.add_argument("--dtype", choices=NUMBER_FORMATS, help="number format")
    add_device(parser, "the models")
    parser.add_argument("--host", help="address to serve on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="port to serve on (default: the first free one from 7860)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    if arguments.port is not None:
        _check_port(arguments.host or "127.0.0.1", arguments.port)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'ppow demo: gradio is not installed, which draws the page. Install it with pip install "ppow-hf[demo]".'
        ) from error
    from ..demo.app import launch
    from ..demo.settings import DemoSettings

    names = ("target", "drafter", "compare", "dtype", "device")
    given = {f"PPOW_DEMO_{name.upper()}": getattr(arguments, name) for name in names if getattr(arguments, name)}
    settings = DemoSettings.from_environment({**os.environ, **given})
    launch(settings, server_name=arguments.host, server_port=arguments.port)
    return 0


def _check_port(host: str, port: int) -> None:
    """Raise `ValueError` for a port that is out of range or taken, before models are loaded."""
    if not 0 < port <= LAST_PORT:
        raise ValueError(f"--port: {port} given; a number from 1 to {LAST_PORT} is needed.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ValueError(f"--port: {port} cannot be served on ({error.strerror}). Give another, or none.") from error
