"""Subcommands of `ppow`, one module each: `register(subparsers)` adds its parser, `run(arguments)` does the work.

A module imports heavy libraries inside its functions, so that the table of commands costs nothing.
"""
