"""How the package's modules may import each other: no circle, nothing upwards, nothing foreign in what travels.

Imports are read from the source, those inside functions and under TYPE_CHECKING too.
"""

import ast
import sys
from pathlib import Path

import pytest

import ppow_hf

ROOT = Path(ppow_hf.__file__).parents[1]
# Lowest first; a module imports from its own layer and from lower ones.
LAYERS = (
    {"version"},
    {"runtime"},
    {"candidate_generator", "hook"},
    {"tiny"},
    {"data"},
    {"measure", "metrics"},
    {"publish"},
    {"training"},
    {"studies", "export", "demo", "serving"},
    {"commands"},
    {"cli"},
    {"ppow_hf"},  # the public interface
)
TRAINED = {"ppow_hf.tiny.recipe", "ppow_hf.tiny.drafters"}  # they train what lies in ppow_hf/tiny


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / "ppow_hf").rglob("*.py"))}


def imports(module: str) -> list[tuple[str, int]]:
    """What a module imports, as full names, and at which relative level."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else base, node.level) for name in inside]
    return found


GRAPH = {module: {name for name, _ in imports(module) if name in MODULES} - {module} for module in MODULES}


def circle_through(graph: dict[str, set[str]]) -> list[str] | None:
    """A chain of modules that leads back to its first one, or `None`."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(graph.get(module, ())):
            if circle := visit(other, [*path, module]):
                return circle
        done.add(module)
        return None

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), None)


def layer_of(module: str) -> int:
    if module in TRAINED:
        return next(i for i, layer in enumerate(LAYERS) if "studies" in layer)
    room = module.split(".")[1] if "." in module else module
    return next(i for i, layer in enumerate(LAYERS) if room in layer)


def test_the_walker_finds_a_circle():
    assert circle_through({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_through({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert "ppow_hf.runtime.windowing" in GRAPH["ppow_hf.runtime.generation"]


def test_no_import_circle():
    assert circle_through(GRAPH) is None


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("ppow_hf.runtime.")])
def test_what_travels_to_the_hub_imports_itself_torch_transformers_and_numpy(module):
    for name, level in imports(module):
        first = name.partition(".")[0]
        allowed = {"torch", "transformers", "numpy", *sys.stdlib_module_names}
        assert name.startswith("ppow_hf.runtime.") if level else first in allowed, name
        assert level <= 1, name  # transformers gathers a repository's modules from one folder


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    upwards = {name for name in GRAPH[module] if layer_of(name) > layer_of(module)}
    assert not upwards


def test_the_public_interface_is_what_a_user_types():
    assert set(ppow_hf.__all__) == {
        "GenerationTrace", "KLAdaptiveCandidateGenerator", "PPOWDrafter", "PPOWDrafterConfig", "PPOWTrainer",
        "PPOWTrainingArguments", "drafter_path", "export_drafter", "import_drafter",
    }  # fmt: skip
    assert all(callable(getattr(ppow_hf, name)) for name in ppow_hf.__all__)
