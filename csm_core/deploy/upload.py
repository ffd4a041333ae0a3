"""Which files ``cerebrium deploy`` would put into its archive, and which of them should not be there.

Matching is the platform's own. Semantics (doublestar globs, as the client uses them): ``*`` and ``?``
stay inside one path segment, a segment ``**`` is any number of segments, ``{a,b}`` and ``[a-z]`` work, names that begin
with a dot are nothing special, ``./*`` and ``*`` mean everything at any depth, a trailing ``/`` means all below.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from csm_core.deploy import entry
from csm_core.deploy.rules import DEFAULT_EXCLUDE, DEFAULT_INCLUDE, Finding, error, warning

# Paths that a folder may grow at any time; patterns that would take them are reported before they exist.
PROBES = (".git/config", ".venv/bin/python", ".env", ".netrc", ".ssh/id_ed25519", "csm_core/.env")
# What the client writes into the archive itself, from the dependency tables.
GENERATED_FILES = {"pip": "requirements.txt", "apt": "pkglist.txt", "conda": "conda_pkglist.txt"}
CLUTTER = "compiled Python files"
HIDDEN = "hidden files"
WARN_BYTES = 1_000_000_000  # the client warns from 1 GB and refuses above 2 GB, compressed; weights do not compress
LARGE_WEIGHTS_BYTES = 64_000_000  # the bundled voice (20 MB) may travel with the code
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz", ".tar", ".tar.gz", ".zip")
_SECRET = re.compile(
    r"\.env(\..+)?|.*\.env|\.netrc|\.git-credentials|\.pypirc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx)"
    r"|(credentials|service[-_]account|client_secret).*\.json|secrets?\.(toml|ya?ml|json)"
)

_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
_PIECE = re.compile(r"\[(?P<negation>[!^]?)(?P<members>\]?[^\]]+)\]|\\(?P<literal>.)|(?P<char>.)", re.DOTALL)
_SET_OPERATORS = re.compile(r"([\[&|~])")  # plain characters in a glob's set, reserved in Python's


def normalize(patterns: Iterable[str]) -> list[str]:
    """Bring patterns to the form that is matched: blanks dropped, ``./`` stripped, the shorthands expanded."""
    result = []
    for raw in patterns:
        pattern = raw.strip()
        if not pattern:
            continue
        if pattern in ("*", "./*"):
            pattern = "**/*"
        pattern = pattern.removeprefix("./")
        result.append(pattern + "**" if pattern.endswith("/") else pattern)
    return result


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A normalised pattern as a regular expression over relative ``/`` paths.

    Raises ValueError for a pattern that the client cannot read (an open bracket or brace), which matches nothing there.
    """
    try:
        return re.compile("|".join(_translate(choice.split("/")) for choice in _expand_braces(pattern)), re.DOTALL)
    except re.error as error:
        raise ValueError(f"unreadable pattern {pattern!r}") from error


def _expand_braces(pattern: str) -> list[str]:
    if match := _INNERMOST_BRACES.search(pattern):
        head, tail = pattern[: match.start()], pattern[match.end() :]
        return [full for choice in match[1].split(",") for full in _expand_braces(head + choice + tail)]
    if "{" in pattern or "}" in pattern:
        raise ValueError(f"unreadable pattern {pattern!r}: unpaired brace")
    return [pattern]


def _translate(segments: list[str]) -> str:
    regex = ""
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        if segment != "**":
            regex += "".join(_translate_piece(piece) for piece in _PIECE.finditer(segment)) + ("" if last else "/")
        elif not last:
            regex += "(?:[^/]+/)*"
        elif regex.endswith("/"):
            regex = regex[:-1] + "(?:/.*)?"  # "a/**" is a itself and all below it
        else:
            regex += ".*"
    return regex


def _translate_piece(piece: re.Match[str]) -> str:
    if piece["members"]:
        members = _SET_OPERATORS.sub(r"\\\1", piece["members"])
        return f"(?!/)[{'^' if piece['negation'] else ''}{members}]"
    if piece["literal"]:
        return re.escape(piece["literal"])
    if piece["char"] in "[\\":
        raise ValueError("unreadable pattern: open bracket or trailing backslash")
    return {"*": "[^/]*", "?": "[^/]"}.get(piece["char"], re.escape(piece["char"]))


def select(paths: Iterable[str], include: Iterable[str], exclude: Iterable[str]) -> list[str]:
    """The paths that an include pattern matches and no exclude pattern does. Unreadable patterns match nothing."""
    wanted, unwanted = _readable(include), _readable(exclude)
    return [
        path
        for path in paths
        if any(p.fullmatch(path) for p in wanted) and not any(p.fullmatch(path) for p in unwanted)
    ]


def _readable(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in normalize(patterns):
        try:
            compiled.append(compile_pattern(pattern))
        except ValueError:
            continue  # the linter reports it; the client goes on without it
    return compiled


def walk(root: Path) -> Iterator[str]:
    """Every file under ``root`` as a relative ``/`` path. A link to a folder counts as one file, as in the client."""
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        base = here.relative_to(root).as_posix()
        for name in files + links:
            yield name if base == "." else f"{base}/{name}"


def check(values: Mapping[str, Any], root: Path) -> Iterator[Finding]:
    """Findings about the archive that a deploy of ``root`` would send."""
    include = values.get("deployment.include") or DEFAULT_INCLUDE
    exclude = values.get("deployment.exclude") or DEFAULT_EXCLUDE
    files = set(walk(root))
    yield from _check_patterns(include, exclude, files)
    sent = select(sorted(files | set(PROBES)), include, exclude)
    uploaded = [path for path in sent if path in files]
    if not uploaded:
        yield error("deployment.include", "no file matches the include patterns; the client refuses to deploy")
    if entry.is_used(values):
        yield from _check_needed(set(uploaded), files, root)
    environments = tuple(path.removesuffix("pyvenv.cfg") for path in files if path.endswith("/pyvenv.cfg"))
    kinds: dict[str, list[str]] = {}
    for path in sent:
        if kind := _unwanted(path, environments, root):
            kinds.setdefault(kind, []).append(path)
    for kind, paths in kinds.items():
        report = warning if kind in (CLUTTER, HIDDEN) else error
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield report("deployment.include", f"would upload {kind}: {paths[0]}{more}; name it in exclude")
    size = sum((root / path).stat().st_size for path in uploaded if (root / path).is_file())
    if size > WARN_BYTES:
        yield warning(
            "deployment.include",
            f"{size / 1e9:.1f} GB to upload; an archive above 2 GB is refused, put large files on persistent storage",
        )
    for kind, name in GENERATED_FILES.items():
        file = values.get(f"dependencies.paths.{kind}")
        if name in uploaded and (values.get(f"dependencies.{kind}") or file not in (None, name)):
            yield error(
                "deployment.include", f"{name} would be in the archive twice: the client writes one of that name"
            )


def _check_patterns(include: list[str], exclude: list[str], files: set[str]) -> Iterator[Finding]:
    for key, patterns in (("deployment.include", include), ("deployment.exclude", exclude)):
        for pattern in normalize(patterns):
            try:
                matcher = compile_pattern(pattern)
            except ValueError as problem:
                yield error(key, f"{problem}; the client skips it without a word")
                continue
            if key == "deployment.exclude":
                continue
            if pattern.startswith("**"):
                yield warning(key, f"{pattern!r} takes whatever lies in the folder; list what the app needs instead")
            elif not any(matcher.fullmatch(path) for path in files):
                yield warning(key, f"{pattern!r} matches no file")


def _check_needed(uploaded: set[str], files: set[str], root: Path) -> Iterator[Finding]:
    if "main.py" in files and "main.py" not in uploaded:
        yield error("deployment.include", "main.py would not be uploaded")
    for needed in entry.local_imports(root):
        sources = {needed} & files or {path for path in files if path.startswith(f"{needed}/") and path.endswith(".py")}
        missing = sorted(sources - uploaded)
        if missing and len(missing) == len(sources):
            yield error("deployment.include", f"main.py imports {needed}, which would not be uploaded")
        elif missing:
            yield warning(
                "deployment.include",
                f"{len(missing)} files of {needed} would not be uploaded, the first is {missing[0]}",
            )


def _unwanted(path: str, environments: tuple[str, ...], root: Path) -> str | None:
    """Why a path should not be uploaded, or None."""
    folders, name = path.split("/")[:-1], path.split("/")[-1]
    if ".git" in folders:
        return "the git history"
    if {".venv", "venv", "virtualenv", "node_modules"} & set(folders) or path.startswith(environments):
        return "a development environment"
    if _SECRET.fullmatch(name):
        return "what looks like a secret"
    if name.endswith(_WEIGHTS) and (root / path).is_file() and (root / path).stat().st_size > LARGE_WEIGHTS_BYTES:
        return "model weights, which belong on persistent storage"
    if "__pycache__" in folders:
        return CLUTTER
    if any(part.startswith(".") for part in (*folders, name)):
        return HIDDEN
    return None
