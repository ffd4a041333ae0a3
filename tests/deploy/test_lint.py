"""Every rule of the cerebrium.toml check: a file that breaks it is reported under its key, one that does not is not."""

from pathlib import Path

import pytest

from csm_core.deploy import rules
from csm_core.deploy.lint import lint
from csm_core.deploy.upload import compile_pattern, normalize, select, walk

REPOSITORY = Path(__file__).parents[2]

CLEAN = """
[cerebrium.deployment]
name = "speak"
python_version = "3.11"
disable_auth = false
include = ["main.py", "requirements.txt", "pack/**"]
exclude = [".*", ".*/**", "**/.*", "**/.*/**", "**/__pycache__/**"]
deployment_initialization_timeout = 830

[cerebrium.hardware]
cpu = 4
memory = 16.0
compute = ["ADA_L4", "AMPERE_A10"]
gpu_count = 1

[cerebrium.scaling]
min_replicas = 0
max_replicas = 3
response_grace_period = 600

[cerebrium.dependencies.paths]
pip = "requirements.txt"
"""

MAIN = "import pack.part as _part\n\n\ndef run(text):\n    return _part.say(text)\n"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "requirements.txt").write_text("torch==2.9.1\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "part.py").write_text("")
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    (tmp_path / "cerebrium.toml").write_text(CLEAN)
    return tmp_path


def check(project, *edits):
    """Findings for the clean file with edits: "old -> new", "- start of the lines to drop", "+ lines to append"."""
    text = CLEAN
    for edit in edits:
        if edit.startswith("+ "):
            changed = text + edit[2:] + "\n"
        elif edit.startswith("- "):
            changed = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(edit[2:]))
        else:
            changed = text.replace(*edit.split(" -> "))
        assert changed != text, edit
        text = changed
    (project / "cerebrium.toml").write_text(text)
    return lint(project / "cerebrium.toml")


def test_this_repositorys_own_file_is_clean():
    assert lint(REPOSITORY / "cerebrium.toml") == []


def test_the_clean_file_is_clean(project):
    assert lint(project / "cerebrium.toml") == []
    assert lint(str(project / "cerebrium.toml")) == []


CUSTOM = '\n[cerebrium.runtime.custom]\nport = 8000\nentrypoint = ["uvicorn", "main:app", "--port", "8000"]\n'
GPU = '["ADA_L4", "AMPERE_A10"]'
ON_CPU = [f'{GPU} -> "CPU"', "- gpu_count"]
PLACE = "gpu_count = 1 -> "  # put another key of [cerebrium.hardware] there
SCALE = "min_replicas = 0 -> "  # put another key of [cerebrium.scaling] there

# edits of the clean file -> "severity key: words of the message"
BROKEN = [
    # unknown and misplaced
    ("cpu = 4 -> cpus = 4", "error hardware.cpus: did you mean `cpu`"),
    ("name = -> Name =", "error deployment.Name: did you mean `name`"),
    ("compute = -> gpu = ", "error hardware.gpu: use `compute`"),
    (SCALE + "max_concurrency = 2", "error scaling.max_concurrency: replica_concurrency"),
    ("python_version -> cuda_version", "error deployment.cuda_version: docker_base_image_url"),
    ("+ \n[cerebrium.secrets]\nHF_TOKEN = 'x'", "error secrets: cerebrium secrets add"),
    ("+ \n[cerebrium.apt.dependancies]\na = '1'", "error apt: unknown"),
    ("+ \n[deployment]\nname = 'x'", "error deployment: [cerebrium.deployment]"),
    ("+ \n[cerebrium.experimental]\nsnapshots = true", "error experimental.snapshots: unknown"),
    # types
    ('"3.11" -> 3.11', "error deployment.python_version: quoted"),
    ("16.0 -> '24Gi'", "error hardware.memory: without unit"),
    ("16.0 -> nan", "error hardware.memory: number"),
    ("cpu = 4 -> cpu = true", "error hardware.cpu: number"),
    ("disable_auth = false -> disable_auth = 'false'", "error deployment.disable_auth: boolean"),
    (PLACE + "gpu_count = 1.5", "error hardware.gpu_count: whole number"),
    ("exclude = [ -> exclude = [1, ", "error deployment.exclude: list of strings"),
    (f"{GPU} -> 4", "error hardware.compute: string"),
    ("[cerebrium.hardware] -> [cerebrium.runtime]\ncustom = 3\n[cerebrium.hardware]", "error runtime.custom: a table"),
    # deployment
    ("- name", "error deployment.name: required"),
    ('"speak" -> " "', "error deployment.name: required"),
    ('"speak" -> "Speak_Now"', "error deployment.name: lower-case"),
    (f'"speak" -> "{"a" * 31}"', "warning deployment.name: 30"),
    ("- python_version", "warning deployment.python_version: set it"),
    ('"3.11" -> "3.9"', "error deployment.python_version: 3.10, 3.11"),
    ("- disable_auth", "error deployment.disable_auth: PUBLIC"),
    ("disable_auth = false -> disable_auth = true", "warning deployment.disable_auth: anyone"),
    ("830 -> 831", "error deployment.deployment_initialization_timeout: 60 to 830"),
    ("830 -> 59", "error deployment.deployment_initialization_timeout: 60 to 830"),
    ("830 -> 299", "warning deployment.deployment_initialization_timeout: weights"),
    # hardware
    ("- compute", "warning hardware: compute"),
    ("- cpu", "warning hardware: 2 cores"),
    ("ADA_L4 -> AMPERE_A100", "error hardware.compute: AMPERE_A100_40GB"),
    (f'{GPU} -> ""', "error hardware.compute: empty"),
    (f"{GPU} -> []", "error hardware.compute: empty"),
    ('"ADA_L4", -> "ADA_L4", "ADA_L4", "ADA_L4", "ADA_L4", "ADA_L4",', "error hardware.compute: at most 5"),
    ('"ADA_L4" -> "CPU"', "error hardware.compute: one family"),
    ('"ADA_L4" -> "INF2"', "error hardware.compute: one family"),
    (PLACE + "gpu_count = 0", "error hardware.gpu_count: at least 1"),
    (PLACE + "gpu_count = 5", "error hardware.gpu_count: at most 4"),
    ("cpu = 4 -> cpu = 3.5", "error hardware.cpu: whole cores"),
    ("cpu = 4 -> cpu = 12", "error hardware.cpu: ceiling of 11"),
    ("16.0 -> 45.0", "error hardware.memory: ceiling of 44"),
    ("16.0 -> 16.125", "error hardware.memory: two decimals"),
    ("16.0 -> 0.0", "error hardware.memory: above 0"),
    (f'{GPU} -> "CPU"', "error hardware.gpu_count: 0 or absent"),
    ([*ON_CPU, "cpu = 4 -> cpu = 5"], "error hardware.cpu: size"),
    ([*ON_CPU, "16.0 -> 161.0"], "error hardware.memory: 160"),
    (PLACE + "provider = 'coreweave'", "error hardware.provider: refused"),
    (PLACE + "provider = 'gcp'", "error hardware.provider: aws"),
    (PLACE + "region = 'mars-1'", "error hardware.region: us-east-1"),
    (PLACE + "region = 'eu-north1'", "error hardware.region: nebius"),
    (PLACE + "region = 'us-west-2'", "warning hardware.region: asked"),
    # plans
    (PLACE + "gpu_count = 2", "warning hardware.gpu_count: Standard"),
    (f'{GPU} -> "HOPPER_H100"', "warning hardware.compute: Standard"),
    (f'{GPU} -> "TRN1"', "warning hardware.compute: Enterprise"),
    ([f'{GPU} -> "HOPPER_H100"', "cpu = 4 -> cpu = 20"], "warning hardware.cpu: Standard"),
    ([f'{GPU} -> "ADA_L40"', "16.0 -> 64.0"], "warning hardware.memory: Standard"),
    ("max_replicas = 3 -> max_replicas = 6", "warning scaling.max_replicas: Standard"),
    ("max_replicas = 3 -> max_replicas = 31", "warning scaling.max_replicas: Enterprise"),
    # scaling
    ("- max_replicas", "warning scaling.max_replicas: default is 1"),
    ("max_replicas = 3 -> max_replicas = 0", "error scaling.max_replicas: 1 to 2000"),
    (SCALE + "min_replicas = -1", "error scaling.min_replicas: 0 to 2000"),
    (SCALE + "min_replicas = 4", "error scaling.min_replicas: more than max_replicas"),
    (["- max_replicas", SCALE + "min_replicas = 2"], "error scaling.min_replicas: more than max_replicas (1)"),
    (SCALE + "replica_concurrency = 0", "error scaling.replica_concurrency: at least 1"),
    (SCALE + "cooldown = 3601", "error scaling.cooldown: 3600"),
    (SCALE + "scaling_buffer = -1", "error scaling.scaling_buffer: at least 0"),
    ("600 -> 15", "error scaling.response_grace_period: 16"),
    ("600 -> 43201", "error scaling.response_grace_period: 43200"),
    ("600 -> 119", "warning scaling.response_grace_period: killed"),
    (SCALE + "evaluation_interval_seconds = 5", "error scaling.evaluation_interval_seconds: 6 to 300"),
    (SCALE + "roll_out_duration_seconds = 601", "error scaling.roll_out_duration_seconds: 600"),
    (SCALE + "scaling_metric = 'gpu'", "error scaling.scaling_metric: requests_per_second"),
    (SCALE + "load_balancing_algorithm = 'best'", "error scaling.load_balancing_algorithm: min-connections"),
    (SCALE + "compute_tier = 'spot'", "error scaling.compute_tier: protected"),
    (SCALE + "scaling_target = 101", "error scaling.scaling_target: percentage"),
    (SCALE + "scaling_target = 0", "error scaling.scaling_target: percentage"),
    (SCALE + "scaling_metric = 'requests_per_second'\nscaling_target = 0", "error scaling.scaling_target: rate"),
    (SCALE + "min_replicas = 0\nscaling_metric = 'cpu_utilization'", "error scaling.scaling_metric: min_replicas = 0"),
    (SCALE + "scaling_metric = 'memory_utilization'", "error scaling.scaling_metric: nothing to measure"),
    (
        SCALE + "min_replicas = 1\nscaling_buffer = 1\nscaling_metric = 'cpu_utilization'",
        "error scaling.scaling_buffer: refused",
    ),
    # dependencies
    ("+ \n[cerebrium.dependencies.pip]\ntorch = '==2.9.1'", "error dependencies.paths.pip: one of the two"),
    ('pip = "requirements.txt" -> pip = "other.txt"', "error dependencies.paths.pip: does not exist"),
    ("+ apt = 'pkglist.txt'", "error dependencies.paths.apt: does not exist"),
    ("+ poetry = 'x'", "error dependencies.paths.poetry: unknown"),
    # runtime
    ("+ \n[cerebrium.runtime]\ncontainer_runtime = 'v3'", "error runtime.container_runtime: v1"),
    ("+ \n[cerebrium.runtime.custom]", "error runtime.custom.entrypoint: required"),
    ("+ \n[cerebrium.runtime.custom]\nentrypoint = 'uvicorn main:app'", "error runtime.custom.entrypoint: commas"),
    ("+ " + CUSTOM.replace("port = 8000", "port = 8001"), "error runtime.custom.port: 8000"),
    ("+ " + CUSTOM.replace("port = 8000", "port = 70000"), "error runtime.custom.port: 65535"),
    ("+ " + CUSTOM + "healthcheck_endpoint = 'health'", "error runtime.custom.healthcheck_endpoint: begin with /"),
    ("+ " + CUSTOM + "readycheck_endpoint = 'ready'", "error runtime.custom.readycheck_endpoint: begin with /"),
    ("+ " + CUSTOM + "dockerfile_path = 'None'", "error runtime.custom.dockerfile_path: does not exist"),
    ("+ " + CUSTOM + "dockerfile_path = 'Dockerfile'", "warning dependencies: ignored"),
    # what is uploaded
    ("- include", "warning deployment.include: list what the app needs"),
    (["- include", "- exclude"], "error deployment.include: git history: .git/config"),
    ('["main.py" -> ["./*"', "warning deployment.include: list what the app needs"),
    (['["main.py" -> ["*"', "- exclude"], "error deployment.include: development environment: .venv"),
    (['["main.py" -> ["**/*"', "- exclude"], "error deployment.include: secret: .ssh"),
    ('"pack/**" -> "pack/*.txt"', "warning deployment.include: matches no file"),
    ('"pack/**" -> "pack/["', "error deployment.include: unreadable"),
    ('".*", -> "{a", ', "error deployment.exclude: unreadable"),
    ('"pack/**" -> "pack/*.txt"', "error deployment.include: imports pack"),
    ('"pack/**" -> "pack/__*"', "warning deployment.include: pack/part.py"),
    ('"main.py",  -> ', "error deployment.include: main.py would not be uploaded"),
    ('["main.py", "requirements.txt", "pack/**"] -> ["nothing"]', "error deployment.include: no file"),
]


@pytest.mark.parametrize(("edits", "expected"), BROKEN)
def test_a_broken_rule_is_reported(project, edits, expected):
    findings = check(project, *([edits] if isinstance(edits, str) else edits))
    severity, key, words = expected.replace(":", "", 1).split(" ", 2)
    assert any((f.severity, f.key) == (severity, key) and words in f.message for f in findings), findings


@pytest.mark.parametrize(
    "edits",
    [
        f'"speak" -> "{"a" * 30}"',
        '"speak" -> "a-1"',
        *[f'"3.11" -> "{version}"' for version in rules.PYTHON_VERSIONS if version != "3.11"],
        "830 -> 300",
        f'{GPU} -> "ADA_L4"',
        "ADA_L4 -> ADA_L40",
        ["cpu = 4 -> cpu = 11", "16.0 -> 44"],
        "16.0 -> 16.25",
        [f'{GPU} -> "INF2"', "cpu = 4 -> cpu = 8"],
        [f'{GPU} -> "CPU"', PLACE + "gpu_count = 0", "cpu = 4 -> cpu = 0.25"],
        [*ON_CPU, "830 -> 60"],
        PLACE + "region = 'us-east-1'",
        PLACE + "region = 'eu-north1'\nprovider = 'nebius'",
        "max_replicas = 3 -> max_replicas = 5",
        SCALE + "min_replicas = 3",
        SCALE + "replica_concurrency = 16\nload_balancing_algorithm = 'min-connections'",
        SCALE + "min_replicas = 1\nscaling_metric = 'cpu_utilization'\nscaling_target = 80",
        SCALE + "scaling_metric = 'requests_per_second'\nscaling_target = 500\nscaling_buffer = 2",
        "600 -> 120",
        SCALE + "cooldown = 0\nevaluation_interval_seconds = 6\nroll_out_duration_seconds = 600",
        SCALE + "compute_tier = 'protected'",
        "+ \n[cerebrium.runtime]\ncontainer_runtime = 'v2'",
        "+ \n[cerebrium.experimental]\ncheckpointing = true",
        "+ \n[cerebrium.dependencies.apt]\nffmpeg = 'latest'",
        "+ " + CUSTOM + "healthcheck_endpoint = '/health'\nreadycheck_endpoint = '/ready'",
        ["- [cerebrium.dependencies", "- pip", "+ " + CUSTOM + "dockerfile_path = 'Dockerfile'"],
        '"pack/**" -> "pack/"',
        '"pack/**" -> "./pack/*.py"',
    ],
)
def test_what_is_allowed_is_not_reported(project, edits):
    assert check(project, *([edits] if isinstance(edits, str) else edits)) == []


INLINE = ["[cerebrium.dependencies.paths] -> [cerebrium.dependencies.pip]", ', "requirements.txt", "pack -> , "pack']


@pytest.mark.parametrize(
    ("line", "severity"),
    [
        ("torch = '==2.9.1'", None),
        ("torch = '2.9.1'", None),
        ("torch = '>=2.9,<2.10'", None),
        ("'git+https://example.org/x.git' = 'latest'", None),
        ("torch = '~=2.4'", "error"),
        ("torch = '^2.4'", "error"),
        ("torch = '=2.4'", "error"),
        ("torch = 'git+https://example.org/x.git'", "error"),
        ("torch = {version = '2.4'}", "error"),
        ("torch = 2.4", "error"),
        ("torch = 'latest'", "warning"),
        ("torch = '*'", "warning"),
        ("torch = ''", "warning"),
    ],
)
def test_inline_pip_versions(project, line, severity):
    findings = check(project, *INLINE, f'pip = "requirements.txt" -> {line}')
    assert [finding.severity for finding in findings] == ([severity] if severity else []), findings


def test_inline_pip_and_an_uploaded_requirements_file_collide(project):
    findings = check(project, INLINE[0], "pip = \"requirements.txt\" -> torch = '==2.9.1'")
    assert [(f.severity, f.key) for f in findings] == [("error", "deployment.include")]
    assert "twice" in findings[0].message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name = [", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "no [cerebrium.*]"),
        (b"cerebrium = 1", "no [cer"),
    ],
)
def test_an_unusable_file_is_one_finding(tmp_path, content, words):
    (tmp_path / "cerebrium.toml").write_bytes(content)
    first = lint(tmp_path / "cerebrium.toml")[0]
    assert first.severity == "error"
    assert words in first.message


def test_a_missing_file_and_a_folder_are_findings(tmp_path):
    assert "does not exist" in lint(tmp_path / "cerebrium.toml")[0].message
    assert "cannot be read" in lint(tmp_path)[0].message


def test_errors_come_before_warnings(project):
    findings = check(project, "- max_replicas", "cpu = 4 -> cpu = 99")
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities)
    assert set(severities) == {"error", "warning"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("pack/.git/HEAD", "git history"),
        ("pack/.venv/bin/python", "development environment"),
        ("pack/venv/bin/python", "development environment"),
        ("pack/node_modules/x.js", "development environment"),
        ("pack/mine/pyvenv.cfg", "development environment"),
        ("pack/.env", "secret"),
        ("pack/prod.env", "secret"),
        ("pack/server.key", "secret"),
        ("pack/id_rsa", "secret"),
        ("pack/service-account.json", "secret"),
        ("pack/.hidden", "hidden"),
        ("pack/__pycache__/part.pyc", "compiled"),
    ],
)
def test_what_must_not_be_uploaded(project, path, words):
    (project / path).parent.mkdir(parents=True, exist_ok=True)
    (project / path).write_text("x")
    assert any(words in finding.message and path in finding.message for finding in check(project, "- exclude"))


def test_the_clean_excludes_keep_the_same_files_out(project):
    for path in ("pack/.git/HEAD", "pack/.venv/bin/python", ".venv/x", "pack/.env", "pack/__pycache__/part.pyc"):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text("x")
    assert check(project) == []


def test_large_weights_are_reported_and_small_ones_are_not(project):
    weights = project / "pack" / "model.safetensors"
    weights.write_bytes(b"x" * 1000)
    assert check(project) == []
    with weights.open("r+b") as file:
        file.truncate(100_000_000)  # sparse: takes no room
    assert "persistent storage" in check(project)[0].message
    with weights.open("r+b") as file:
        file.truncate(1_500_000_000)
    assert any("GB to upload" in finding.message for finding in check(project))


@pytest.mark.parametrize(
    ("source", "severity", "words"),
    [
        ("def run(:\n", "error", "not valid Python"),
        ("\0", "error", "not valid Python"),
        ("x = 1\n\n\ndef _run():\n    return 1\n", "error", "no public function"),
        (MAIN + "from pack import helper\n", "warning", "`helper` from pack"),
        (MAIN + "from pack.part import *\n", "warning", "`*` from pack.part"),
        (MAIN + "try:\n    from pack import helper as say\nexcept ImportError:\n    pass\n", "warning", "`say`"),
        (MAIN + "import signal\nsignal.signal(signal.SIGTERM, print)\n", "error", "line 7: signal handlers"),
    ],
)
def test_main_py_is_read_for_traps(project, source, severity, words):
    (project / "main.py").write_text(source)
    matching = [f for f in check(project) if f.key == "main.py" and f.severity == severity and words in f.message]
    assert len(matching) == 1


@pytest.mark.parametrize(
    "source",
    [
        MAIN + "from pack import helper as _helper\n",
        MAIN + "from pack import Helper\n",
        MAIN + "def stop():\n    import signal\n    signal.signal(signal.SIGTERM, print)\n",
        "async def run(text):\n    return text\n",
    ],
)
def test_a_sound_main_py_is_not_reported(project, source):
    (project / "main.py").write_text(source)
    assert check(project) == []


def test_a_missing_main_py_is_reported_unless_the_runtime_needs_none(project):
    (project / "main.py").unlink()
    assert any(f.key == "main.py" and f.severity == "error" for f in check(project))
    assert any(f.key == "main.py" for f in check(project, "+ " + CUSTOM))
    for runtime in (CUSTOM.replace("uvicorn", "server"), "\n[cerebrium.runtime.rime]\nport = 8001\n"):
        assert not any(f.key == "main.py" or "main.py would" in f.message for f in check(project, "+ " + runtime))


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.py", "main.py", True),
        ("*.py", "pack/main.py", False),
        ("**/*.py", "main.py", True),
        ("**/*.py", "a/b/main.py", True),
        ("src/**/main.py", "src/main.py", True),
        ("src/**/main.py", "src/a/b/main.py", True),
        ("src/**/main.py", "other/main.py", False),
        ("src/**", "src/a/b", True),
        ("src/**", "srcs/a", False),
        ("src/", "src/a/b", True),
        ("./src/*.py", "src/a.py", True),
        ("./*", "a/.git/config", True),
        ("*", ".git/config", True),
        (".*", ".env", True),
        (".*", ".git/config", False),
        (".*", "pack/.env", False),
        (".*/**", ".git/config", True),
        ("**/.*/**", "a/.git/b/c", True),
        ("**/.*", "a/b/.env", True),
        ("a/**/**/b", "a/b", True),
        ("*.{py,txt}", "a.txt", True),
        ("{a,b/{c,d}}/*", "b/d/x", True),
        ("*.{py,txt}", "a.md", False),
        ("test?.py", "test1.py", True),
        ("test?.py", "test/.py", False),
        ("test[0-9].py", "test1.py", True),
        ("test[!0-9].py", "test1.py", False),
        ("test[^a].py", "test/.py", False),
        ("a\\*", "a*", True),
        ("a\\*", "ab", False),
        ("a.py", "axpy", False),
    ],
)
def test_patterns_match_as_the_platforms_client_does(pattern, path, matches):
    assert bool(compile_pattern(normalize([pattern])[0]).fullmatch(path)) is matches


@pytest.mark.parametrize("pattern", ["[a", "{a", "a}", "a\\", "[]", "[b-a]"])
def test_an_unreadable_pattern_is_an_error_and_selects_nothing(pattern):
    with pytest.raises(ValueError, match="unreadable"):
        compile_pattern(pattern)
    assert select(["a", "b"], [pattern, "b"], [pattern]) == ["b"]


def test_blank_patterns_are_dropped_and_excludes_win():
    assert normalize([" ", "", " a "]) == ["a"]
    assert select(["a.py", "b.py"], ["*.py"], ["b.*"]) == ["a.py"]


def test_walk_does_not_follow_links_to_folders(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert sorted(walk(tmp_path)) == ["link", "real/file"]
