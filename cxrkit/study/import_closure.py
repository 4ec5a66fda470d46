"""The sources that decide what a run of a notebook stores: the modules that its code cells import, directly or not.

Imports are read from the code, not executed: `import cxrkit` counts for the attributes that are used, through packages
that load lazily; imports within functions count, those for type checkers don't. A module that imports others by name
(`import_module`) counts with every module that it names. Besides the package, the project's own modules are followed,
such as `papers.KEY.measure`, with the settings beside them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

import cxrkit
from cxrkit.files import checksum
from cxrkit.project import project_folder

__all__ = ["Code", "Source", "fingerprint", "sources", "writes_run"]

# They draw, start and name runs; what a run stores doesn't depend on them.
_APART = {"cxrkit.view", "cxrkit.grid", "cxrkit.study.run_key", "cxrkit.study.import_closure", "cxrkit.study.index"}
_WRITERS = {f"cxrkit.study.{name}" for name in ("keep", "training.keep", "writing", "runs.writing")}
_DATA = re.compile(r"[\w.-]+\.(yaml|json|csv)")
_MODULE = re.compile(r"cxrkit(\.\w+)+\.?")

# A dotted name, and whether its value is used as it is: all of a package may be.
Use = tuple[str, bool]


def fingerprint(notebook: str) -> str:
    """Hash of the code that decides what runs of a notebook store; of all the package's where there is no such file.

    `notebook`: path in the project. A run made by other code is stale: it is made again rather than shown.
    """
    return hashlib.sha256(json.dumps(sources(notebook), sort_keys=True).encode()).hexdigest()[:12]


def sources(notebook: str) -> dict[str, str]:
    """Short hash of each module, and of each settings file, that can change what runs of a notebook store."""
    return _code(project_folder()).sources(notebook)


def writes_run(notebook: str) -> bool:
    """Whether a notebook calls `study.writing` or `study.keep`, and so stores its run itself."""
    path = project_folder() / notebook
    return path.is_file() and any(name in _WRITERS for name, _ in _code(project_folder()).source(path).uses)


@functools.cache
def _code(project: Path) -> Code:
    return Code(Path(cxrkit.__file__).parent, project)


@dataclass
class Source:
    """One file, read: hash of its code without docstrings, comments and layout; the names that it uses, those that it
    calls or decorates with when imported, those that its imports bind, by lazy loading too, and data files."""

    meaning: str = ""
    uses: set[Use] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    names: dict[str, set[str]] = field(default_factory=dict)
    lazy: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


class Code:
    """The package and the project's modules. The package's files are read once, as a running program loads them once;
    the project's when they change."""

    def __init__(self, package: Path, project: Path):
        self.package, self.project = package, project
        self.path, self.modules = functools.cache(self._path), functools.cache(self._modules)
        self._read: dict[Path, tuple[object, Source]] = {}
        self._closures: dict[str, tuple[dict[Path, object], dict[str, str]]] = {}

    def sources(self, notebook: str) -> dict[str, str]:
        """Short hash by module or settings file; see :func:`sources`."""
        states, found = self._closures.get(notebook, ({}, {}))
        if not states or any(_state(path) != state for path, state in states.items()):
            closure = _Closure(self, self.project / notebook)
            own = [path for path in closure.paths if not path.is_relative_to(self.package)]
            states, found = {path: _state(path) for path in own}, closure.found
            self._closures[notebook] = states, found
        return found

    def source(self, path: Path, module: str = "") -> Source:
        """A module or notebook, read."""
        state = None if path.is_relative_to(self.package) else _state(path)
        known = self._read.get(path)
        if known is None or known[0] != state:
            known = self._read[path] = (state, _source(path, module))
        return known[1]

    def _path(self, module: str) -> Path | None:
        """The file or folder of a module; None for one that is neither the package's nor the project's."""
        packaged = module.partition(".")[0] == "cxrkit"
        roots = [self.package.parent] if packaged else [self.project, self.project / "notebooks"]
        places = [root.joinpath(*module.split(".")) for root in roots]
        files = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
        found = [file for file in files if file.is_file()] + [place for place in places if place.is_dir()]
        return found[0] if found else None

    def _modules(self, package: str) -> list[str]:
        """Names of the modules and packages in a package."""
        path = self.path(package)
        folder = path if path.is_dir() else path.parent if path.name == "__init__.py" else None
        inside = sorted(folder.iterdir()) if folder else []
        own = [one for one in inside if one.suffix == ".py" or (one / "__init__.py").is_file()]
        return [f"{package}.{one.stem}" for one in own if one.name != "__init__.py"]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class _Closure:
    """Follows the names that a notebook uses to modules, and these to what they use: hashes by name, and the files."""

    def __init__(self, code: Code, notebook: Path):
        self.code = code
        self.found: dict[str, str] = {}
        self.paths = [notebook]
        seen: set[Use] = set()
        todo: set[Use] = {("cxrkit.*", True)}
        if notebook.is_file():
            todo = self._count(notebook, code.source(notebook))
        while todo:
            seen |= todo
            todo = {more for one in todo for more in self._step(*one)} - seen
            todo = todo or set(self._registered()) - seen

    def _step(self, name: str, bare: bool) -> Iterable[Use]:
        """Count the modules along a dotted name; what they use, and what the rest of the name stands for."""
        module, *rest = name.split(".")
        if (todo := self._add(module)) is None:
            return ()
        while rest:
            source, part = self._source(module), rest.pop(0)
            if part == "*":
                return [*todo, *source.uses, *((one, True) for one in self.code.modules(module))]
            if part in source.lazy:
                return [*todo, (".".join([source.lazy[part], *rest]), bare)]
            added = self._add(f"{module}.{part}")
            if added is None:
                bound = [(".".join([one, *rest]), bare) for one in source.names.get(part, ())]
                return [*todo, *(bound or source.uses)]
            module = f"{module}.{part}"
            todo = todo | added
        return [*todo, (f"{module}.*", True)] if bare and self._is_package(module) else todo

    def _source(self, module: str) -> Source:
        return self.code.source(self.code.path(module), module)

    def _is_package(self, module: str) -> bool:
        return self.code.path(module).name == "__init__.py"

    def _add(self, module: str) -> set[Use] | None:
        """Count a module, and return what it uses; None for one that isn't followed.

        Of what a package only takes from its modules, nothing counts before it is used.
        """
        path = self.code.path(module)
        if path is None or module in _APART:
            return None
        if module in self.found or path.is_dir():
            return set()
        source = self._source(module)
        self.found[module] = source.meaning
        self.paths.append(path)
        uses = self._count(path, source)
        return {(name, True) for name in source.called} if self._is_package(module) else uses

    def _count(self, path: Path, source: Source) -> set[Use]:
        """Count the data files beside a source that bear its name or are mentioned in it; returns what it uses."""
        packaged = path.is_relative_to(self.code.package)
        beside = source.files | {f"{path.stem}.yaml"} | (set() if packaged else {"settings.yaml"})
        for file in sorted(path.with_name(name) for name in beside):
            if file.is_file():
                self.paths.append(file)
                name = file.relative_to(self.code.package.parent if packaged else self.code.project).as_posix()
                self.found[name] = checksum(file)[:8]
        return source.uses

    def _registered(self) -> Iterator[Use]:
        """The modules that put something into a followed module of their package when they are imported."""
        for package in {name.rpartition(".")[0] for name in self.found if "/" not in name} - {""}:
            for module in self.code.modules(package):
                if module not in self.found and module not in _APART:
                    homes = {name.rpartition(".")[0] for name in self._source(module).called}
                    if any(home in self.found and home.startswith(package) for home in homes):
                        yield module, False


def _source(path: Path, module: str) -> Source:
    if path.is_dir():
        return Source()
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return _of_tree(ast.parse(text), module if path.name == "__init__.py" else module.rpartition(".")[0])
    body: list[ast.stmt] = []
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.suppress(SyntaxError):
                body += ast.parse(TransformerManager().transform_cell("".join(cell["source"]))).body
    return _of_tree(ast.Module(body, []), "")


def _of_tree(tree: ast.Module, package: str) -> Source:
    nodes = list(_nodes(tree))
    names: dict[str, set[str]] = defaultdict(set)
    uses: set[Use] = set()
    for node in nodes:
        for name, target in _bindings(node, package):
            uses.add((target, False))
            names[name].add(target if name != target.partition(".")[0] else name)
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    if any(_last_name(call.func) == "import_module" for call in calls):
        uses |= {(f"{text}*" if text.endswith(".") else text, False) for text in texts if _MODULE.fullmatch(text)}
    uses |= {(name, True) for name in _chains(nodes, names)}
    called = set(_chains(_on_import(tree), names))
    files = set(filter(_DATA.fullmatch, texts))
    return Source(_meaning(tree), uses, called, dict(names), _lazy(calls, package), files)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, each before those within it, without those that only type checkers see."""
    todo = [tree]
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            if isinstance(child, ast.If) and _last_name(child.test) == "TYPE_CHECKING":
                child = ast.Module(child.orelse, [])
            yield child
            todo.append(child)


def _last_name(node: ast.expr) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _bindings(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """What an import statement binds: names here, and what they stand for."""
    if isinstance(node, ast.Import):
        yield from ((one.asname or one.name.partition(".")[0], one.name) for one in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((one.asname or one.name, f"{base}.{one.name}") for one in node.names)


def _on_import(tree: ast.Module) -> list[ast.AST]:
    """The nodes of a module's decorators and of the expressions that stand alone."""
    found: list[ast.AST] = []
    for node in tree.body:
        for one in getattr(node, "decorator_list", [node] if isinstance(node, ast.Expr) else []):
            found += [one, *_nodes(one)]
    return found


def _chains(nodes: list[ast.AST], names: dict[str, set[str]]) -> Iterator[str]:
    """The longest chains of attributes that begin with an imported name of the package."""
    within: set[int] = set()
    for node in nodes:
        if id(node) not in within and isinstance(node, ast.Attribute | ast.Name):
            chain: list[str] = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
                within.add(id(node))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield from (".".join([target, *chain]) for target in names.get(node.id, ()) if "cxrkit" in target)


def _lazy(calls: list[ast.Call], package: str) -> dict[str, str]:
    """What a package takes from where on first use, by `cxrkit.lazy.lazily`."""
    homes = [home for call in calls if _last_name(call.func) == "lazily" for home in call.keywords]
    return {name: f"{package}.{home.arg}.{name}" for home in homes for name in ast.literal_eval(home.value).split()}


def _meaning(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del body[0]
    return hashlib.sha256(ast.dump(tree, annotate_fields=False).encode()).hexdigest()[:8]
