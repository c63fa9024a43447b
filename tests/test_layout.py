"""Which modules import which: no circles, a runtime that stands alone, and layers whose arrows point downwards."""

import ast
import importlib
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import ppow_hf

PACKAGE = Path(ppow_hf.__file__).parent
RUNTIME_NEEDS = {"torch", "transformers", "numpy"}
# From the bottom up. A module imports from its own folder and from folders before it in this list.
LAYERS = [
    "runtime",
    "version",
    "hook",
    "data",
    "tiny",
    "measure",
    "training",
    "metrics",
    "export",
    "publish",
    "serving",
    "demo",
    "studies",
    "commands",
    "cli",
]
# What the folder's own place in the list does not allow, and why.
EXCEPTIONS: dict[str, set[str]] = {}
PUBLIC = {
    "GenerationTrace",
    "KLAdaptiveCandidateGenerator",
    "PPOWDrafter",
    "PPOWDrafterConfig",
    "PPOWTrainer",
    "PPOWTrainingArguments",
    "__version__",
    "export_drafter",
    "import_eagle3",
}


class Import(NamedTuple):
    """An import statement: the absolute name of what is imported, and its dots (0: absolute)."""

    name: str
    level: int


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def absolute(name: str, level: int, package: str) -> str:
    if not level:
        return name
    base = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*base, name] if name else base)


def imports_in(source: str, package: str) -> list[Import]:
    """Every import of a module in `package`, those inside functions and under TYPE_CHECKING too.

    `import_module` with a text counts where its argument is one; `.{name}` of a table of modules is found in the
    tables' own texts, which `table_imports` reads.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level, package)
            found += [Import(f"{base}.{alias.name}", node.level) for alias in node.names]
        elif (
            isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            found += table_imports(node, package)
    return found


def table_imports(call: ast.Call, package: str) -> list[Import]:
    """The modules that `import_module` may load: the one it names, or all that its pattern fits."""
    argument = call.args[0]
    if isinstance(argument, ast.Constant):
        pattern = [argument.value]
    elif isinstance(argument, ast.JoinedStr):  # f".commands.{name}": every module that begins and ends like this
        pattern = "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in argument.values).split("\0")
    else:
        raise AssertionError(
            f"line {call.lineno}: import_module of {ast.unparse(argument)}, which this test cannot read"
        )
    level = len(pattern[0]) - len(pattern[0].lstrip("."))
    start = absolute(pattern[0].lstrip("."), level, package)
    if len(pattern) == 1:
        return [Import(start, level)]
    start = start if pattern[0].strip(".") else start + "."
    return [
        Import(name, level)
        for name in MODULES
        if name.startswith(start) and name.endswith(pattern[-1]) and "." not in name[len(start) :]
    ]


def module_of(name: str) -> str | None:
    """The package's module that an imported name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports_of(module: str) -> list[Import]:
    return imports_in(MODULES[module].read_text(encoding="utf-8"), package_of(module))


def graph() -> dict[str, set[str]]:
    """For each module the package's modules that it imports."""
    return {
        module: {found for imported in imports_of(module) if (found := module_of(imported.name))} - {module}
        for module in MODULES
    }


def layer(module: str) -> str:
    return module.split(".")[1]


def test_imports_of_every_kind_are_seen():
    source = """
import ppow_hf.measure.costs
from typing import TYPE_CHECKING
from . import losses
from .. import version
if TYPE_CHECKING:
    from ..data.sources import load
def later():
    from ..demo.app import blocks
    importlib.import_module(".hub", __package__)
    import_module(f"..publish.{name}", __package__)
"""
    found = {module_of(imported.name) for imported in imports_in(source, "ppow_hf.training")}
    expected = {"measure.costs", "training.losses", "version", "data.sources", "demo.app", "publish.hub"}
    assert {f"ppow_hf.{name}" for name in expected} <= found


def test_no_module_imports_itself_by_way_of_others():
    # The package's own __init__ names what a user types; nothing inside it reads that list, but for its version.
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_folders_import_only_from_below():
    upwards = []
    for module, imported in graph().items():
        if module == "ppow_hf":
            continue
        for other in imported:
            if other == "ppow_hf":
                upwards.append(f"{module} -> {other}")
                continue
            allowed = set(LAYERS[: LAYERS.index(layer(module)) + 1]) | EXCEPTIONS.get(layer(module), set())
            if layer(other) not in allowed:
                upwards.append(f"{module} -> {other}")
    assert not upwards, "\n".join(sorted(upwards))


def test_runtime_imports_torch_transformers_numpy_and_itself():
    for module in MODULES:
        if module.split(".")[:2] != ["ppow_hf", "runtime"]:
            continue
        for name, level in imports_of(module):
            top = name.split(".")[0]
            if level == 0:
                assert top in RUNTIME_NEEDS or top in sys.stdlib_module_names, f"{module} imports {name}"
            else:
                assert level == 1 and name.startswith("ppow_hf.runtime."), f"{module} imports {name}"


def test_the_public_interface_is_what_a_user_types():
    assert set(ppow_hf.__all__) == PUBLIC and len(ppow_hf.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(ppow_hf, name) is not None
    assert set(importlib.import_module("ppow_hf").__dict__) >= {"PPOWDrafter", "PPOWDrafterConfig"}
