"""What main.py publishes, read from its syntax without running it.

Every module-level function of main.py becomes a public URL unless its name begins with an underscore, also a function
that was only imported; and main.py is imported on a worker thread, where signal handlers cannot be set. Knows no
settings except whether the platform runs main.py at all.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csm_core.deploy.rules import Finding, error, warning


def is_used(values: Mapping[str, Any]) -> bool:
    """Whether the platform imports main.py: not with a Dockerfile, an entrypoint of one's own, or a partner's image."""
    entrypoint = values.get("runtime.custom.entrypoint") or ["uvicorn"]
    partner = "runtime.deepgram" in values or "runtime.rime" in values
    return not partner and "runtime.custom.dockerfile_path" not in values and entrypoint[0] == "uvicorn"


def check(values: Mapping[str, Any], root: Path) -> Iterator[Finding]:
    """Findings about ``root/main.py``; none when it is not used."""
    if not is_used(values):
        return
    if not (root / "main.py").is_file():
        yield error("main.py", "main.py does not exist beside the cerebrium.toml")
        return
    try:
        module = ast.parse((root / "main.py").read_bytes())
    except (SyntaxError, ValueError) as problem:
        yield error("main.py", f"main.py is not valid Python ({problem}); the client does not check it")
        return
    if "runtime.custom" in values:
        return  # an ASGI app: functions are not endpoints there
    if not published_functions(module):
        yield error("main.py", "main.py defines no public function, so the app has no endpoint")
    for statement in _import_time(module):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                name = alias.asname or alias.name
                if name == "*" or (name[0] != "_" and name == name.lower()):
                    yield warning(
                        "main.py", f"`{name}` from {statement.module}: an imported function is published too; "
                        "import the module, or rename with a leading underscore"
                    )  # fmt: skip
        elif isinstance(statement, ast.Call) and ast.unparse(statement.func).endswith("signal.signal"):
            yield error("main.py", f"line {statement.lineno}: signal handlers cannot be set on the importing thread")


def published_functions(module: ast.Module) -> list[str]:
    """Names of the public functions that main.py defines itself, in order."""
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [function.name for function in functions if not function.name.startswith("_")]


def local_imports(root: Path) -> list[str]:
    """Modules beside main.py that it imports, as the file or folder to upload ("helper.py", "csm_core")."""
    try:
        module = ast.parse((root / "main.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    files = [f"{name}.py" for name in names if (root / f"{name}.py").is_file()]
    return sorted(files + [name for name in names if (root / name).is_dir()])


def _import_time(module: ast.Module) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: all but the bodies of functions."""
    pending: list[ast.AST] = list(module.body)
    while pending:
        node = pending.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending = [*ast.iter_child_nodes(node), *pending]
