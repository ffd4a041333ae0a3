"""The shape of the package: imports go downward, budgets hold, bans are kept, importing has no effect.

Each rule is a function from one file (its path inside the package, its source) to complaints. Every rule is run over
the package and over a snippet that breaks it, so that a rule that cannot fail is itself a failure.
"""

import ast
import functools
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "csm_core"

# Top to bottom; a file may import from rows below its own, and from its own folder.
LAYERS = [
    {"cli", "__main__", "deploy", "main"},
    {"server", "train", "bench"},
    {"generator", "asr", "call"},
    {"takes", "loading"},
    {"voices", "engine"},
    {"prompt"},
    {"audio", "text", "spelling", "codec", "silence", "model", "device", "dialogue", "playback", "arguments"},
    {"streaming_decoder", "empty_weights"},
    {"config", "errors"},
]
SIDEWAYS = {("__main__", "cli"), ("cli", "deploy"), ("config", "errors")}  # the command line is deploy's door
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
MAX_BROAD_EXCEPTS = 4
# One speech in, one speech out: the original's keyword parameters, in every place where a caller meets them.
PUBLIC_CONTRACT = {"generate", "stream", "astream", "speak", "generate_codes", "generate_audio", "stream_audio"}
ROLE_NAMES = {"utils", "util", "helpers", "helper", "manager", "service", "base", "common", "misc", "handler"}
NO_TORCH = ("engine/scheduler.py", "silence.py", "server/")
WEB = {"fastapi", "pydantic", "pydantic_settings", "starlette", "uvicorn"}

Rule = Callable[[str, str], list[str]]


@functools.cache
def walk(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def nodes(source: str, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in walk(source) if isinstance(node, kinds))


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return nodes(source, ast.FunctionDef, ast.AsyncFunctionDef)  # type: ignore[return-value]


def imported_modules(path: str, node: ast.AST) -> list[str]:
    """Absolute dotted names that an import statement of csm_core/``path`` names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    origin = node.module or ""
    if node.level:
        folder = ["csm_core", *Path(path).parent.parts]
        kept = folder[: len(folder) - node.level + 1]
        origin = ".".join([*kept, *([origin] if origin else [])])
    # `from csm_core import errors` names a module, `from csm_core.errors import CsmError` does not: keep both readings.
    return [origin, *(f"{origin}.{alias.name}" for alias in node.names if origin == "csm_core")]


def room(path: str) -> str:
    """The row's word for a file: the first folder or the file's stem."""
    return Path(path).parts[0].removesuffix(".py")


def row(word: str) -> int | None:
    return next((index for index, words in enumerate(LAYERS) if word in words), None)


def imports_go_downward(path: str, source: str) -> list[str]:
    if path == "__init__.py":  # re-exports the public names from wherever they live
        return []
    here = row(room(path))
    if here is None:
        return [f"{path}: has no row in LAYERS"]
    complaints = []
    for node in nodes(source, ast.Import, ast.ImportFrom):
        for name in imported_modules(path, node):
            if not name.startswith("csm_core."):
                if name == "csm_core" and isinstance(node, ast.Import) and here > 1:
                    complaints.append(f"{path}:{node.lineno}: imports the whole package")
                continue
            word = name.split(".")[1]
            there = row(word)
            if there is None:
                if here > 1:  # a public name: only the two top rows use the package as its callers do
                    complaints.append(f"{path}:{node.lineno}: imports {name} through the package")
            elif word != room(path) and there <= here and (room(path), word) not in SIDEWAYS:
                complaints.append(f"{path}:{node.lineno}: {room(path)} imports {word}, which is not below it")
    return complaints


def files_are_short(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines"] if lines > MAX_FILE_LINES else []


def functions_are_short(path: str, source: str) -> list[str]:
    if path.startswith("train/") or path == "bench.py":  # scripts that are scrolled
        return []
    return [
        f"{path}:{f.lineno}: {f.name} has {length} lines"
        for f in functions(source)
        if (length := f.end_lineno - f.lineno + 1) > MAX_FUNCTION_LINES  # type: ignore[operator]
    ]


def parameters_are_few(path: str, source: str) -> list[str]:
    complaints = []
    for f in functions(source):
        a = f.args
        count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
        if count > MAX_PARAMETERS and f.name not in PUBLIC_CONTRACT:
            complaints.append(f"{path}:{f.lineno}: {f.name} has {count} parameters")
    return complaints


def no_global_statement(path: str, source: str) -> list[str]:
    return [f"{path}:{node.lineno}: global" for node in nodes(source, ast.Global)]


def no_role_names(path: str, source: str) -> list[str]:
    return [f"{path}: named after a role" for part in Path(path).parts if part.removesuffix(".py") in ROLE_NAMES]


def no_torch_in_policy(path: str, source: str) -> list[str]:
    if not path.startswith(NO_TORCH):
        return []
    found = [name for node in nodes(source, ast.Import, ast.ImportFrom) for name in imported_modules(path, node)]
    return [f"{path}: imports {name}" for name in found if name.split(".")[0] in {"torch", "torchaudio", "moshi"}]


def no_web_below_server(path: str, source: str) -> list[str]:
    if room(path) in {"server", "cli", "deploy"}:
        return []
    found = [name for node in nodes(source, ast.Import, ast.ImportFrom) for name in imported_modules(path, node)]
    return [f"{path}: imports {name}" for name in found if name.split(".")[0] in WEB]


def environment_only_in_config(path: str, source: str) -> list[str]:
    if path in {"config.py", "main.py"}:
        return []
    words = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    attributes = [node for node in nodes(source, ast.Attribute) if node.attr in words]  # type: ignore[attr-defined]
    names = [n for n in nodes(source, ast.ImportFrom) if n.module == "os" and {a.name for a in n.names} & words]  # type: ignore[attr-defined]
    return [f"{path}:{node.lineno}: reads or writes the environment" for node in [*attributes, *names]]  # type: ignore[attr-defined]


def no_late_imports(path: str, source: str) -> list[str]:
    if path == "cli.py":  # a command imports what it needs, so that `csm --help` is fast
        return []
    late = {
        (node.lineno, ast.unparse(node))
        for f in functions(source)
        for node in ast.walk(f)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return [f"{path}:{line}: {text} inside a function" for line, text in sorted(late)]


def broad_excepts(path: str, source: str) -> list[ast.ExceptHandler]:
    def is_broad(kind: ast.expr | None) -> bool:
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        return any(k is None or (isinstance(k, ast.Name) and k.id in {"Exception", "BaseException"}) for k in kinds)

    return [node for node in nodes(source, ast.ExceptHandler) if is_broad(node.type)]  # type: ignore[attr-defined,misc]


def broad_excepts_say_why(path: str, source: str) -> list[str]:
    lines = ["", *source.splitlines(), ""]
    explained = set()
    for node in broad_excepts(path, source):
        if any("#" in line.replace("# noqa", "") for line in lines[node.lineno - 1 : node.lineno + 2]):
            explained.add(node.lineno)
        for f in functions(source):  # or the function exists for it and says so
            if f.lineno < node.lineno <= f.end_lineno and "boundary" in (ast.get_docstring(f) or ""):  # type: ignore[operator]
                explained.add(node.lineno)
    return [
        f"{path}:{node.lineno}: broad except without a comment that names its boundary"
        for node in broad_excepts(path, source)
        if node.lineno not in explained
    ]


def modules_say_what_they_are(path: str, source: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(source)) or not source.strip() else [f"{path}: no module docstring"]


# rule -> (path, snippet) that it must refuse, several where the rule has several ways to be broken
BROKEN: dict[Rule, list[tuple[str, str]]] = {
    imports_go_downward: [
        ("codec.py", "from csm_core.generator import load"),
        ("codec.py", "from .generator import load"),
        ("model/csm.py", "from ..engine.runner import Runner"),
        ("model/csm.py", "from csm_core import engine"),
        ("prompt.py", "from csm_core import Segment"),
        ("prompt.py", "import csm_core"),
        ("audio.py", "import csm_core.text"),
        ("errors.py", "from csm_core.config import Settings"),
        ("cli.py", "from csm_core.main import x"),
        ("novel.py", "x = 1"),
    ],
    files_are_short: [("text.py", "x = 1\n" * 401)],
    functions_are_short: [
        ("text.py", "def f():\n" + "    x = 1\n" * 60),
        ("text.py", "async def f():\n" + "    1\n" * 60),
    ],
    parameters_are_few: [
        ("text.py", "def f(a, b, c, d, e, f, g): ..."),
        ("text.py", "class A:\n    def f(self, a, b, c, *, d, e, f): ..."),
        ("text.py", "def f(a, b, c, /, d, *e, g, **h): ..."),
    ],
    no_global_statement: [("text.py", "x = 1\ndef f():\n    global x\n    x = 2")],
    no_role_names: [("utils.py", ""), ("engine/manager.py", ""), ("common/text.py", "")],
    no_torch_in_policy: [
        ("silence.py", "import torch"),
        ("engine/scheduler.py", "from torch import nn"),
        ("server/app.py", "import torch.nn.functional as F"),
    ],
    no_web_below_server: [("prompt.py", "from pydantic import BaseModel"), ("engine/engine.py", "import fastapi")],
    environment_only_in_config: [
        ("text.py", "import os\nx = os.environ['HOME']"),
        ("text.py", "import os\nx = os.getenv('HOME')"),
        ("text.py", "from os import environ"),
    ],
    no_late_imports: [
        ("text.py", "def f():\n    from csm_core import errors"),
        ("text.py", "class A:\n    def f(self):\n        import json"),
    ],
    broad_excepts_say_why: [
        ("text.py", "try:\n    f()\nexcept Exception:\n    pass"),
        ("text.py", "try:\n    f()\nexcept (ValueError, Exception):  # noqa: BLE001\n    pass"),
        ("text.py", "try:\n    f()\nexcept:\n    pass"),
    ],
    modules_say_what_they_are: [("text.py", "x = 1")],
}


def package_files() -> dict[str, str]:
    return {str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    files = package_files()
    assert len(files) > 10
    assert [complaint for path, source in files.items() for complaint in rule(path, source)] == []


@pytest.mark.parametrize(
    ("rule", "path", "snippet"),
    [(rule, path, snippet) for rule, snippets in BROKEN.items() for path, snippet in snippets],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_rule_can_fail(rule: Rule, path: str, snippet: str) -> None:
    assert len(rule(path, snippet)) == 1


def test_broad_excepts_are_counted() -> None:
    found = [f"{path}:{e.lineno}" for path, source in package_files().items() for e in broad_excepts(path, source)]
    assert len(found) <= MAX_BROAD_EXCEPTS, found
    assert len(broad_excepts("x.py", "try:\n    f()\nexcept ValueError:\n    pass\nexcept Exception:\n    pass")) == 1


def test_scripts_at_the_root_keep_the_budgets() -> None:
    scripts = {p.name: p.read_text(encoding="utf-8") for p in ROOT.glob("*.py")}
    rules = [files_are_short, functions_are_short, parameters_are_few, no_global_statement, modules_say_what_they_are]
    assert [c for rule in rules for path, source in scripts.items() for c in rule(path, source)] == []


def test_tests_use_real_things() -> None:
    files = {str(p): p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py")}
    imported = {
        (path, m)
        for path, s in files.items()
        for n in nodes(s, ast.Import, ast.ImportFrom)
        for m in imported_modules(path, n)
    }
    assert [(path, m) for path, m in imported if m.split(".")[:2] == ["unittest", "mock"] or m == "pytest_mock"] == []


def test_public_names_are_listed() -> None:
    package = importlib.import_module("csm_core")
    public = {n for n in dir(package) if not n.startswith("_") and not inspect.ismodule(getattr(package, n))}
    assert set(package.__all__) == public
    assert list(package.__all__) == sorted(package.__all__, key=str.casefold) or list(package.__all__) == sorted(
        package.__all__
    )
    assert {"load", "load_csm_1b", "Generator", "Segment", "Speech", "CsmError"} <= public


def test_generate_takes_the_original_parameters() -> None:
    generate = inspect.signature(importlib.import_module("csm_core").Generator.generate)
    names = list(generate.parameters)
    assert names[:7] == ["self", "text", "speaker", "context", "max_audio_length_ms", "temperature", "topk"]


# Runs in a process of its own: import NAME from FOLDER, touch each public name, print what it did to the world.
IMPORT_PROBE = """
import logging, os, sys
name, folder = sys.argv[1:]
sys.path.insert(0, folder)
seen = []
def own_frame():
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.startswith(("<frozen", os.__file__)):
        frame = frame.f_back
    return frame is not None and f"{os.sep}{name}{os.sep}" in frame.f_code.co_filename
class Watched(type(os.environ)):
    def __getitem__(self, key):
        if own_frame(): seen.append(f"read the environment: {key}")
        return super().__getitem__(key)
    def __setitem__(self, key, value):
        if own_frame(): seen.append(f"wrote the environment: {key}")
        return super().__setitem__(key, value)
os.environ.__class__ = Watched
def hook(event, args):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system"}:
        seen.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and "pyc" not in str(args[0]):
        if str(args[0]) != os.devnull: seen.append(f"wrote {args[0]}")
sys.addaudithook(hook)
handlers, level = list(logging.root.handlers), logging.root.level
package = __import__(name)
for public in getattr(package, "__all__", ()):
    getattr(package, public)
if logging.root.handlers != handlers or logging.root.level != level:
    seen.append("configured logging")
seen += [f"configured the logger {n}" for n, lg in logging.root.manager.loggerDict.items()
         if n.split(".")[0] == name and isinstance(lg, logging.Logger) and (lg.handlers or lg.level)]
if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
    seen.append("initialised the GPU")
print("\\n".join(seen))
"""


def import_effects(name: str, folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_PROBE, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_import_has_no_effect() -> None:
    assert import_effects("csm_core", ROOT) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import os\nos.environ.get('HOME')", "read the environment"),
        ("import os\nos.environ['X_Y'] = '1'", "wrote the environment"),
        ("import logging\nlogging.basicConfig()", "configured logging"),
        ("import logging\nlogging.getLogger('bad_one').setLevel(10)", "configured the logger"),
        ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))", "socket.connect"),
        ("import tempfile\ntempfile.NamedTemporaryFile('w', dir='.').close()\nopen('left', 'w').close()", "wrote left"),
    ],
)
def test_import_effects_are_seen(tmp_path: Path, source: str, complaint: str) -> None:
    folder = tmp_path / "bad_one"
    folder.mkdir()
    (folder / "__init__.py").write_text(textwrap.dedent(source), encoding="utf-8")
    assert any(line.startswith(complaint) for line in import_effects("bad_one", tmp_path))
