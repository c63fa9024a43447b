"""The `ppow` command: the table of its subcommands, and what a mistake ends with.

Knows the commands' names only. A mistake of the user ends with one line on stderr and exit code 2 (`PPOW_DEBUG=1`
shows the traceback instead).
"""

import os
import sys
from collections.abc import Sequence

from .commands import (
    bench,
    calibrate,
    card,
    compare,
    demo,
    export,
    generate,
    import_,
    measure,
    overhead,
    plan,
    push,
    quickstart,
    record,
    tiny_drafter,
    tiny_results,
    tiny_target,
    train,
    windows,
    write,
)
from .commands.errors import check_words, explain
from .commands.parsing import parse, spellings
from .commands.typed import Typed, TypedWarnings

COMMANDS = (  # in the order of `ppow --help`
    quickstart,
    write,
    plan,
    record,
    tiny_target,
    tiny_drafter,
    generate,
    bench,
    calibrate,
    export,
    import_,
    demo,
    push,
    card,
    measure,
    windows,
    compare,
    overhead,
    tiny_results,
    train,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `ppow` command with `argv` (by default the process's own arguments) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"] and "--windows" in argv:
        argv = ["windows", *(word for word in argv[1:] if word != "--windows")]
    if argv[:1] in (["train"], ["compare"]):
        # On a CPU oneDNN keeps a kernel for each of the last 1,024 shapes, and a training has new ones in every step:
        # what is kept between the tensors of past steps is memory that is never given back.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    typed = Typed(argv, lambda: spellings(argv[0] if argv else "", COMMANDS))
    try:
        with TypedWarnings(typed):
            if argv[:1] == ["train"]:
                return train.run(train.parse(argv[1:]))
            arguments = parse(argv, COMMANDS)
            check_words(arguments, argv)
            return arguments.run(arguments)
    except SystemExit as exit_request:  # argparse: --help, or a mistake that it has explained already
        return exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except KeyboardInterrupt:
        print("ppow: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = explain(error, argv, typed)
        if sentence is None or os.environ.get("PPOW_DEBUG"):
            raise
        print(f"ppow: error: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
