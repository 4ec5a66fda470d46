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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cxrkit
from cxrkit.files import checksum, replace_file
from cxrkit.project import project_folder, results_folder

__all__ = ["Code", "fingerprint", "sources", "writes_run"]

# They draw, start and name runs; what a run stores doesn't depend on them.
_APART = {"cxrkit.view", "cxrkit.grid", "cxrkit.study.run_key", "cxrkit.study.import_closure", "cxrkit.study.index"}
_WRITERS = {f"cxrkit.study.{name}" for name in ("keep", "training.keep", "writing", "runs.writing")}
_DATA = re.compile(r"[\w.-]+\.(yaml|json|csv)")
_MODULE = re.compile(r"cxrkit(\.\w+)+\.?")
_COMMAND = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)  # to IPython, as in the next
_ANSWER = re.compile(r"=\s*[%!].*$", re.MULTILINE)

# Of one file: `meaning` (hash of its code without comments, docstrings and layout), `imports`, `uses` (chains of
# attributes of imported names), `called` (those that decorate or are called as it is imported), `names` (what a name is
# bound to by imports), `lazy` (what a lazy package takes from where), `files` (names of data files that it mentions).
Facts = dict[str, Any]
_NOTHING: Facts = {"meaning": "", "imports": [], "uses": [], "called": [], "names": {}, "lazy": {}, "files": []}


def fingerprint(notebook: str) -> str:
    """Hash of the code that decides what runs of a notebook store; of all the package's where there is no such file.

    `notebook`: path in the project. A run made by other code is stale: it is made again rather than shown.
    """
    return hashlib.sha256(json.dumps(sources(notebook), sort_keys=True).encode()).hexdigest()[:12]


def sources(notebook: str) -> dict[str, str]:
    """Short hash of each module, and of each settings file, that can change what runs of a notebook store."""
    return _here().sources(notebook)


def writes_run(notebook: str) -> bool:
    """Whether a notebook calls `study.writing` or `study.keep`, and so stores its run itself."""
    path = project_folder() / notebook
    return path.is_file() and not _WRITERS.isdisjoint(_here().facts(path)["uses"])


def _here() -> Code:
    remembered = results_folder() / ".grid" / "code.json"
    return _code(Path(cxrkit.__file__).parent, project_folder(), remembered)


@functools.cache
def _code(package: Path, project: Path, remembered: Path) -> Code:
    return Code(package, project, remembered)


class Code:
    """The package and the project's modules. The package's files are read once, as a running program loads them once;
    the project's when they change. What they say is kept in the file `remembered`, as reading them takes a second."""

    def __init__(self, package: Path, project: Path, remembered: Path | None = None):
        self.package, self.project, self.remembered = package, project, remembered
        self._paths: dict[str, Path | None] = {}
        self._modules: dict[str, list[str]] = {}
        self._facts: dict[Path, tuple[Any, Facts]] = {}
        self._closures: dict[str, tuple[list[tuple[Path, Any]], dict[str, str]]] = {}
        self._known: dict[str, Facts] = {}
        self._new = False

    def sources(self, notebook: str) -> dict[str, str]:
        if notebook in self._closures:
            states, found = self._closures[notebook]
            if all(_state(path) == state for path, state in states):
                return found
        closure = _Closure(self)
        path = self.project / notebook
        if path.is_file():
            closure.add_notebook(path)
        else:
            closure.follow([("cxrkit.*", True)])
        own = [path, *(one for one in closure.paths if not one.is_relative_to(self.package))]
        self._closures[notebook] = [(one, _state(one)) for one in own], closure.found
        self._remember()
        return closure.found

    def path(self, module: str) -> Path | None:
        """The file or folder of a module; None for one that is neither the package's nor the project's."""
        if module not in self._paths:
            inside = module.partition(".")[0] == "cxrkit"
            roots = [self.package.parent] if inside else [self.project, self.project / "notebooks"]
            places = [root.joinpath(*module.split(".")) for root in roots]
            files = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
            found = [file for file in files if file.is_file()] + [place for place in places if place.is_dir()]
            self._paths[module] = found[0] if found else None
        return self._paths[module]

    def modules(self, package: str) -> list[str]:
        """Names of the modules and packages in a package."""
        if package not in self._modules:
            path = self.path(package)
            folder = path if path.is_dir() else path.parent if path.name == "__init__.py" else None
            files = sorted(folder.iterdir()) if folder else []
            own = [one for one in files if one.suffix == ".py" or (one / "__init__.py").is_file()]
            self._modules[package] = [one.stem for one in own if one.name != "__init__.py"]
        return self._modules[package]

    def facts(self, path: Path, module: str = "") -> Facts:
        state = None if path.is_relative_to(self.package) else _state(path)
        known = self._facts.get(path)
        if known is None or known[0] != state:
            known = self._facts[path] = (state, self._read(path, module))
        return known[1]

    def _read(self, path: Path, module: str) -> Facts:
        if path.is_dir():
            return _NOTHING
        if self.remembered and not self._known:
            try:
                self._known = dict(json.loads(self.remembered.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known = {"": _NOTHING}
        name = hashlib.sha256(repr([_VERSION, str(path), _state(path)]).encode()).hexdigest()[:20]
        facts = self._known.get(name)
        if not isinstance(facts, dict) or facts.keys() != _NOTHING.keys():
            self._new = True
            facts = self._known[name] = _notebook(path) if path.suffix == ".ipynb" else _python(path, module)
        return facts

    def _remember(self) -> None:
        if self._new and self.remembered and self.remembered.parent.is_dir():
            self._new = False
            with contextlib.suppress(OSError):
                replace_file(self.remembered, json.dumps(dict(list(self._known.items())[-1000:])))


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


_VERSION = _state(Path(__file__))


class _Closure:
    """Follows names to modules, and these to what they import."""

    def __init__(self, code: Code):
        self.code = code
        self.found: dict[str, str] = {}
        self.paths: list[Path] = []
        self._facts: dict[str, Facts] = {}
        self._seen: set[tuple[str, bool]] = set()

    def follow(self, names: list[tuple[str, bool]]) -> None:
        """Add what dotted names stand for. With each, whether its value is used as it is: all of a package may be."""
        todo = list(names)
        while todo:
            if (one := todo.pop()) not in self._seen:
                self._seen.add(one)
                todo += self._step(*one)
            todo = todo or [one for one in self._registered() if one not in self._seen]

    def _step(self, name: str, bare: bool) -> list[tuple[str, bool]]:
        """Count the modules along a dotted name; what they need, and what the rest of the name stands for."""
        module, *rest = name.split(".")
        todo = self._add(module)
        if todo is None:
            return []
        while rest:
            facts, part = self._facts_of(module), rest.pop(0)
            if part == "*":
                return todo + _needed(facts) + [(f"{module}.{one}", True) for one in self.code.modules(module)]
            if part in facts["lazy"]:
                return [*todo, (".".join([facts["lazy"][part], *rest]), bare)]
            added = self._add(f"{module}.{part}")
            if added is None:
                bound = [(".".join([one, *rest]), bare) for one in facts["names"].get(part, [])]
                return todo + (bound or _needed(facts))
            module = f"{module}.{part}"
            todo += added
        return [*todo, (f"{module}.*", True)] if bare and self._is_package(module) else todo

    def _facts_of(self, module: str) -> Facts:
        if module not in self._facts:
            self._facts[module] = self.code.facts(self.code.path(module), module)
        return self._facts[module]

    def _is_package(self, module: str) -> bool:
        return self.code.path(module).name == "__init__.py"

    def _add(self, module: str) -> list[tuple[str, bool]] | None:
        """Count a module, and return what it imports and uses; None for one that isn't followed.

        Of what a package only takes from its modules, nothing counts before it is used.
        """
        path = self.code.path(module)
        if path is None or module in _APART:
            return None
        if module in self.found or path.is_dir():
            return []
        facts = self._facts_of(module)
        self.found[module] = facts["meaning"][:8]
        self._add_data(path, facts)
        return [(name, True) for name in facts["called"]] if self._is_package(module) else _needed(facts)

    def _registered(self) -> list[tuple[str, bool]]:
        """The modules that put something into a followed module of their package when they are imported."""
        found = []
        for package in {name.rpartition(".")[0] for name in self.found if "/" not in name} - {""}:
            for module in (f"{package}.{one}" for one in self.code.modules(package)):
                if module not in self.found and module not in _APART:
                    homes = (name.rpartition(".")[0] for name in self._facts_of(module)["called"])
                    if any(home in self.found and home.startswith(package) for home in homes):
                        found.append((module, False))
        return found

    def add_notebook(self, path: Path) -> None:
        facts = self.code.facts(path)
        self._add_data(path, facts)
        self.follow(_needed(facts))

    def _add_data(self, path: Path, facts: Facts) -> None:
        """Count the data files that stand beside a source and bear its name or are mentioned in it."""
        self.paths.append(path)
        packaged = path.is_relative_to(self.code.package)
        beside = {*facts["files"], f"{path.stem}.yaml", *([] if packaged else ["settings.yaml"])}
        for file in sorted(path.with_name(name) for name in beside):
            if file.is_file():
                self.paths.append(file)
                name = file.relative_to(self.code.package.parent if packaged else self.code.project).as_posix()
                self.found[name] = checksum(file)[:8]


def _needed(facts: Facts) -> list[tuple[str, bool]]:
    return [(name, False) for name in facts["imports"]] + [(name, True) for name in facts["uses"]]


def _notebook(path: Path) -> Facts:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    body: list[ast.stmt] = []
    for text in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        for python in (text, _COMMAND.sub(r"\1pass", _ANSWER.sub("= None", text))):
            with contextlib.suppress(SyntaxError):
                body += ast.parse(python).body
                break
    return _read_tree(ast.Module(body, []), "")


def _python(path: Path, module: str) -> Facts:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _read_tree(ast.parse(path.read_text(encoding="utf-8")), package)


def _read_tree(tree: ast.Module, package: str) -> Facts:
    nodes = list(_nodes(tree))
    names: dict[str, set[str]] = defaultdict(set)
    imports: set[str] = set()
    for node in nodes:
        for name, target in _bindings(node, package):
            imports.add(target)
            names[name].add(target if name != target.partition(".")[0] else name)
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {
        "imports": sorted(imports | _imports_by_name(nodes, texts, package)),
        "uses": sorted(set(_uses(nodes, names))),
        "called": sorted(set(_uses(_on_import(tree), names))),
        "names": {name: sorted(targets) for name, targets in names.items()},
        "lazy": _lazy(nodes, package),
        "files": sorted(filter(_DATA.fullmatch, texts)),
        "meaning": _meaning(tree),
    }


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, each before those within it, without those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in (getattr(child.test, name, "") for name in ("id", "attr")):
            yield from _nodes(ast.Module(child.orelse, []))
        else:
            yield child
            yield from _nodes(child)


def _bindings(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """What an import statement binds: names here, and what they stand for."""
    if isinstance(node, ast.Import):
        yield from ((one.asname or one.name.partition(".")[0], one.name) for one in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((one.asname or one.name, f"{base}.{one.name}") for one in node.names)


def _on_import(tree: ast.Module) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in tree.body:
        for one in getattr(node, "decorator_list", [node] if isinstance(node, ast.Expr) else []):
            found += [one, *_nodes(one)]
    return found


def _uses(nodes: list[ast.AST], names: dict[str, set[str]]) -> Iterator[str]:
    """The longest chains of attributes that begin with an imported name."""
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


def _imports_by_name(nodes: list[ast.AST], texts: set[str], package: str) -> set[str]:
    """What a module may import that calls `import_module`: all that it names, and where it names a package or looks
    for what lies beside it, all of that."""
    called = {getattr(node.func, "attr", getattr(node.func, "id", "")) for node in nodes if isinstance(node, ast.Call)}
    if "import_module" not in called:
        return set()
    found = {f"{text}*" if text.endswith(".") else text for text in texts if _MODULE.fullmatch(text)}
    parts = (part for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node))
    written = {part.id for part in parts if isinstance(part, ast.Name)}
    if "iter_modules" in called or written & {"__name__", "__package__"}:
        found.add(f"{package}.*")
    return found


def _lazy(nodes: list[ast.AST], package: str) -> dict[str, str]:
    """What a package takes from where on first use, by `cxrkit.lazy.lazily`; `*` stands for its modules."""
    found = {}
    for call in nodes:
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "lazily":
            found["*"] = package
            for home in call.keywords:
                listed = ast.literal_eval(home.value).split()
                found |= {name: f"{package}.{home.arg}.{name}" for name in listed}
    return found


def _meaning(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
