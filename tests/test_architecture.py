"""The rules of the architecture, checked against the source: imports, places of code, sizes of files and functions.

The table of folders is drawn in docs/architecture.md; the reasons are in docs/decisions.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "engine", "kernels", "pipeline")

MAY_IMPORT_OURS = {
    "pipeline": {"actors", "engine"},
    "actors": {"engine"},
    "engine": {"kernels"},
    "kernels": set(),
}
MAY_IMPORT_OTHERS = {
    "pipeline": {
        "aiohttp", "deltalake", "jinja2", "lance", "numpy", "pyarrow", "pydantic", "pydantic_core", "ray", "rich",
        "tenacity", "tqdm", "typer", "yaml",
    },
    "actors": {"ray", "tenacity"},
    "engine": {
        "aiohttp", "fsspec", "gguf", "huggingface_hub", "jinja2", "llguidance", "modelscope", "numpy", "safetensors",
        "tenacity", "tokenizers", "torch", "tqdm", "transformers",
    },
    "kernels": {"llvmlite", "numba", "numpy", "torch", "triton"},
}  # fmt: skip
FROM_ROOT = ("millrace._version.__version__", "millrace._lazy.lazy_face")
"""Names that any folder may import from the root."""

MAX_FILE_LINES = 600
"""Most lines of a file; a longer file gives the reason in its docstring (`Length: ...`)."""

MAX_ROOM_MODULES = 17
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 8


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    path: Path

    @property
    def folder(self) -> str:
        """The subpackage of the file; empty for the root."""
        parts = self.path.relative_to(ROOT).parts
        return parts[0] if len(parts) > 1 else ""

    @property
    def name(self) -> str:
        """The path of the file from the root, as tests print it."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def package(self) -> list[str]:
        """The dotted name of the package that relative imports in this file start from, split."""
        return ["millrace", *self.path.parent.relative_to(ROOT).parts]

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def _tree(self) -> ast.Module:
        return ast.parse(self.source, filename=str(self.path))

    def tree(self) -> ast.Module:
        return self._tree

    @cached_property
    def _imports(self) -> list[tuple[int, str]]:
        return list(self._find_imports())

    def imports(self) -> list[tuple[int, str]]:
        """Returns every import, also inside functions, as (line, absolute dotted name)."""
        return self._imports

    def _find_imports(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree()):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self.package[: len(self.package) - node.level + 1] if node.level else []
                start = [*base, *(node.module.split(".") if node.module else [])]
                yield from ((node.lineno, ".".join([*start, alias.name])) for alias in node.names)


MODULES = [
    Module(path)
    for path in (
        ROOT / "__init__.py",
        ROOT / "_lazy.py",
        ROOT / "_version.py",
        *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))),
    )
]


def findings(lines: Iterator[str]) -> str:
    """Joins the findings of a test, so that one run shows all of them."""
    return "\n".join(lines)


def dotted(node: ast.AST) -> str:
    """Returns `a.b.c` for a chain of attributes of a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{start}.{node.attr}" if (start := dotted(node.value)) else ""
    return ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def uses(module: Module, *names: str) -> Iterator[str]:
    """Yields the places at which a module uses one of the dotted names, as an attribute or by importing it."""
    at = [(node.lineno, dotted(node)) for node in ast.walk(module.tree()) if isinstance(node, ast.Attribute)]
    for line, used in [*at, *module.imports()]:
        if any(used == name or used.startswith(f"{name}.") for name in names):
            yield f"{module.name}:{line} uses {used}"


def test_all_four_folders_are_read() -> None:
    assert {module.folder for module in MODULES} == {"", *FOLDERS}


def test_imports_go_down_only() -> None:
    wrong = (
        f"{module.name}:{line} imports {name}"
        for module in MODULES
        if module.folder
        for line, name in module.imports()
        if name not in FROM_ROOT
        and (parts := name.split("."))[0] == "millrace"
        and (len(parts) < 2 or parts[1] not in {module.folder, *MAY_IMPORT_OURS[module.folder]})
    )
    assert not (text := findings(wrong)), text


def test_each_folder_keeps_to_its_libraries() -> None:
    wrong = (
        f"{module.name}:{line} imports {name}"
        for module in MODULES
        for line, name in module.imports()
        if (top := name.partition(".")[0]) not in sys.stdlib_module_names
        and top not in {"millrace", *MAY_IMPORT_OTHERS.get(module.folder, set())}
    )
    assert not (text := findings(wrong)), text


def test_imports_inside_the_package_are_relative() -> None:
    wrong = (
        f"{module.name}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(module.tree())
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "millrace")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "millrace" for alias in node.names))
    )
    assert not (text := findings(wrong)), text


def test_no_folder_takes_private_names_of_another() -> None:
    wrong = (
        f"{module.name}:{line} imports {name}"
        for module in MODULES
        if module.folder
        for line, name in module.imports()
        if name not in FROM_ROOT
        and (parts := name.split("."))[0] == "millrace"
        and parts[1:2] != [module.folder]
        and any(part.startswith("_") for part in parts)
    )
    assert not (text := findings(wrong)), text


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (("torch.cuda",), ("engine/device.py", "engine/step/cuda_graph.py")),
        (("os.environ", "os.getenv", "os.putenv"), ("engine/env.py",)),
        (("ray.remote",), ("actors/",)),
        (("ray.data",), ("pipeline/",)),
    ],
    ids=["torch.cuda", "os.environ", "ray.remote", "ray.data"],
)
def test_some_things_stand_in_one_place(names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    wrong = (line for module in MODULES if not module.name.startswith(allowed) for line in uses(module, *names))
    assert not (text := findings(wrong)), text


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = sorted({".".join(module.package) for module in MODULES})
    assert listed == found


def test_every_folder_of_code_is_a_package() -> None:
    folders = {module.path.parent for module in MODULES}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_long_files_say_why() -> None:
    wrong = (
        f"{module.name}: {length} lines, and its docstring has no line that begins with 'Length:'"
        for module in MODULES
        if (length := len(module.source.splitlines())) > MAX_FILE_LINES
        and not re.search(r"^Length: ", ast.get_docstring(module.tree()) or "", flags=re.MULTILINE)
    )
    assert not (text := findings(wrong)), text


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the length of a function without its docstring."""
    first = function.body[0]
    is_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def test_functions_are_short() -> None:
    wrong = (
        f"{module.name}:{function.lineno} {function.name}: {length} lines"
        for module in MODULES
        for function in functions(module.tree())
        if (length := code_lines(function)) >= MAX_FUNCTION_LINES
    )
    assert not (text := findings(wrong)), text


def is_device_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Returns whether a compiler other than Python's reads the function, which then has no keyword-only parameters."""
    decorators = {dotted(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list}
    return any(name.split(".")[0] in {"triton", "numba"} or name.endswith(("jit", "njit")) for name in decorators)


def num_positional(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of parameters that can be given by position, without `self`."""
    parameters = [*function.args.posonlyargs, *function.args.args]
    return len([parameter for parameter in parameters if parameter.arg not in {"self", "cls"}])


def test_every_source_of_the_compiled_kernels_is_listed() -> None:
    extensions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    shared = ("kernels/_cpu/*.cpp", "kernels/*/native.cpp")
    files = ((*shared, "kernels/*/native_avx512.cpp"), shared)
    for extension, patterns in zip(extensions, files, strict=True):
        found = [path for pattern in patterns for path in ROOT.glob(pattern)]
        assert sorted(extension["sources"]) == sorted(path.relative_to(ROOT).as_posix() for path in found)
        assert extension["optional"]


def test_signatures_are_short() -> None:
    wrong = (
        f"{module.name}:{function.lineno} {function.name}: {count} positional parameters"
        for module in MODULES
        for function in functions(module.tree())
        if not is_device_code(function) and (count := num_positional(function)) > MAX_POSITIONAL
    )
    assert not (text := findings(wrong)), text


def undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """Yields the public classes and functions in a body that have no docstring."""
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        decorators = {dotted(d) for d in child.decorator_list}
        overloaded = any(name.endswith(("overload", ".setter")) for name in decorators)
        if ast.get_docstring(child) is None and not overloaded:
            yield f"{prefix}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{prefix}.{child.name}")


def test_everything_public_has_a_docstring() -> None:
    modules = (module.name for module in MODULES if ast.get_docstring(module.tree()) is None)
    assert not (text := findings(modules)), text
    wrong = (name for module in MODULES for name in undocumented(module.tree(), module.name))
    assert not (text := findings(wrong)), text


def test_no_path_of_a_machine_is_left_behind() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w")
    kinds = {".py", ".md", ".toml", ".yaml", ".txt"}
    skipped = {".git", ".venv", "build", "dist"}
    paths = [p for p in ROOT.rglob("*") if p.suffix in kinds and not skipped & set(p.relative_to(ROOT).parts)]
    wrong = (
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    )
    assert not (text := findings(wrong)), text


def test_the_index_of_modules_is_up_to_date() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "module_index.py"))
    assert module["TARGET"].read_text(encoding="utf-8") == module["index"](), "run `make docs`"


def test_the_tour_names_modules_that_exist() -> None:
    tour = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:actors|engine|kernels|pipeline|tests)/[\w/.]*)`", tour)
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_no_modules_import_each_other() -> None:
    """Type-only imports and imports inside functions count too."""
    homes = {".".join([*module.package, module.path.stem]): module for module in MODULES}
    edges: dict[str, set[str]] = {name: set() for name in homes}
    for name, module in homes.items():
        for _, imported in module.imports():
            found = next((other for other in (imported, imported.rpartition(".")[0]) if other in homes), None)
            if found is not None and found != name:
                edges[name].add(found)
    TopologicalSorter(edges).prepare()  # raises a CycleError that names the modules


def test_rooms_are_of_a_size_to_walk_through() -> None:
    """A room holds about a dozen modules; only a room whose modules are all of one kind may hold more."""
    equals = {"pipeline/stages/declared", "pipeline/commands", "engine/models/families"}
    counts = Counter(module.path.parent.relative_to(ROOT).as_posix() for module in MODULES if module.folder)
    wrong = (
        f"{room}: {count - 1} modules"
        for room, count in counts.items()
        if count - 1 > MAX_ROOM_MODULES and room not in equals
    )
    assert not (text := findings(wrong)), text
