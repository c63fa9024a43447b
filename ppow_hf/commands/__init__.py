"""Subcommands of `ppow`, one module each: `register(commands)` adds its parser, whose `run` default does the work.

A module imports heavy libraries inside its functions, so that `ppow --help` is quick.
"""

COMMANDS: tuple[str, ...] = (
    "write",
    "bench",
    "calibrate",
    "export",
    "import_",
    "demo",
    "push",
    "windows",
    "compare",
    "overhead",
    "tiny_results",
)
