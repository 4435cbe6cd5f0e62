"""The house: who may import whom, what loads when, and what the package is made of."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxsp
from tests.test_files import prompt

ROOT = Path(__file__).parents[1]

# Rooms by floor; a room imports from floors below its own, or from itself.
FLOORS = [
    ["errors", "terminal"],
    ["files"],
    ["typing", "arguments", "device"],
    ["settings", "compile_cache", "hub"],
    ["models", "losses"],
    ["prompts", "processes", "progress"],
    ["data"],
    ["distributions"],
    ["teacher"],
    ["artifact"],
    ["training", "evaluation", "exports"],
    ["callbacks", "plan", "study"],
    ["runs", "demo"],
    ["api"],
    ["console", "options", "watching"],
    [
        "ask_command",
        "cache",
        "compare_command",
        "export_command",
        "import_command",
        "push_command",
        "serve",
        "watch_command",
    ],
    ["cli"],
    ["__main__", "__init__"],
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# Scripts of exports, which run in other processes than jaxsp's.
CONSUMERS = {f"exports/consumers/{name}.py" for name in ("biases", "check", "peft", "transformers")}
# Heavy packages, and the only places that may import them.
ONLY_IN = {
    "matplotlib": {"evaluation/plots.py"},
    "orbax": {"training/checkpoint.py"},
    "transformers": {"models/lazy_tokenizer.py", "models/load.py", "models/gguf/convert.py", *CONSUMERS},
    "jinja2": {"evaluation/page.py", "evaluation/report.py", "models/chat_renderer.py"},
    "rich": {"progress.py", "console.py", "cli.py", "watching.py"},
    "tyro": {
        "arguments.py",
        "ask_command.py",
        "cache.py",
        "cli.py",
        "compare_command.py",
        "export_command.py",
        "import_command.py",
        "options.py",
        "push_command.py",
        "serve/command.py",
        "watch_command.py",
    },
    "flax": {"models/decoder.py", "models/layers.py", "models/weights.py"},
    "torch": CONSUMERS,
    "huggingface_hub": {"hub.py", "models/load.py"},
    "starlette": {"serve/app.py"},
    "uvicorn": {"serve/connection.py", "serve/server.py"},
}


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere, but for type checking."""
    tree = ast.parse(file.read_text("utf-8"))
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


FILES = sorted((ROOT / "jaxsp").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_downwards(file):
    place = file.relative_to(ROOT / "jaxsp")
    room = place.parts[0].removesuffix(".py")
    for name in imports(file):
        top, *rest = name.split(".")
        if top == "jaxsp" and rest:
            other = rest[0]
            lower = FLOOR[other] < FLOOR[room]
            assert lower or other == room, f"{place} imports {name}"
        for package, allowed in ONLY_IN.items():
            assert top != package or str(place) in allowed, f"{place} imports {package}"


def test_no_room_is_in_a_circle():
    """Between files as between rooms, package inits included."""
    modules = {}
    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imports(file)}
        for module, file in modules.items()
    }
    graph = {module: (others & modules.keys()) - {module, "jaxsp"} for module, others in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join([*path, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_nothing_is_too_long_to_read():
    for file in FILES:
        text = file.read_text("utf-8")
        assert len(text.splitlines()) <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 90, f"{file}: {node.name}"


def test_nobody_else_asks_for_the_backend():
    """A kernel or a size chosen by this machine's backend would be wrong for a described device."""
    own = ROOT / "jaxsp" / "device.py"
    assert not [file for file in FILES if file != own and "default_backend" in file.read_text("utf-8")]


def test_models_never_hear_of_prompts_and_prompts_never_see_weights():
    for file in FILES:
        room = file.relative_to(ROOT / "jaxsp").parts[0]
        used = {name for name in imports(file) if name.startswith("jaxsp.")}
        if room == "models":
            assert not any("prompt" in name for name in used)
        if room == "prompts":
            assert not any(name.startswith("jaxsp.models") for name in used)


def test_what_annotations_name_is_there():
    """Ruff and pyright don't see it: to them the names of axes are undefined names."""
    axes = r"\b(Float|Int|Bool)\["
    found = 0
    for module in pkgutil.walk_packages(jaxsp.__path__, "jaxsp."):
        names = vars(importlib.import_module(module.name))
        own = [thing for thing in names.values() if getattr(thing, "__module__", None) == module.name]
        methods = [member for thing in own if inspect.isclass(thing) for member in vars(thing).values()]
        for thing in [*own, *methods]:
            for text in getattr(thing, "__annotations__", {}).values():
                if isinstance(text, str) and re.search(axes, text):
                    eval(text, dict(names))
                    found += 1
    assert found > 100


def test_importing_jaxsp_is_fast_and_loads_nothing_heavy(python):
    code = (
        "import time, sys; start = time.perf_counter(); import jaxsp;"
        "print(time.perf_counter() - start, [m for m in ('jax', 'flax', 'numpy', 'transformers')"
        " if m in sys.modules])"
    )
    seconds, loaded = python("-c", code).stdout.split(maxsplit=1)
    assert float(seconds) < 0.2
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("words", [["compress", "--help"], ["compress", "a.md", "--querys", "q.txt"]])
def test_help_and_mistakes_need_nothing_heavy(python, words):
    code = (
        f"import sys; sys.argv = ['jaxsp', *{words}]\nfrom jaxsp.cli import main\ntry:\n    main()\n"
        "except SystemExit:\n    print('ends with', [m for m in ('jax', 'flax', 'numpy', 'transformers')"
        " if m in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "ends with []"


def cpu_seconds(python, *arguments) -> float:
    """The least time that a processor works for such a process, of a few: others may be at work, too."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.mark.slow
def test_help_takes_half_a_second(python):
    assert cpu_seconds(python, "-m", "jaxsp", "--help") < 0.5
    assert cpu_seconds(python, "-m", "jaxsp", "compress", "--help") < 0.5


@pytest.mark.slow
def test_importing_losses_takes_little_longer_than_jax(python):
    jax, losses = (cpu_seconds(python, "-c", f"import {name}") for name in ("jax", "jaxsp.losses"))
    assert losses < 1.2 * jax


LATE = ["gguf", "huggingface_hub", "matplotlib", "orbax", "pyarrow", "starlette", "transformers", "uvicorn"]
"""Packages that a command loads when it comes to what they do."""


def test_what_few_need_loads_when_it_is_used(python, tmp_path):
    prompt().save(tmp_path)
    code = "import sys; sys.modules['torch'] = None; import jaxsp.api, jaxsp.console;"
    code += f"jaxsp.SoftPrompt.load({str(tmp_path)!r});"
    code += f"print([name for name in {LATE} if sys.modules.get(name)])"
    done = python("-c", code)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there_and_documented():
    assert {"compress", "load_model", "losses", "UserError"} < set(dir(jaxsp))
    for name in dir(jaxsp):
        assert getattr(jaxsp, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        jaxsp.nonsense  # noqa: B018


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--wheel", "-q", "-o", str(folder), str(ROOT)], check=True
    )
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_is_light_and_holds_no_weights(wheel):
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith((".gguf", ".safetensors", ".bin", ".npz", ".pyc"))]
    assert all(name.startswith(("jaxsp/", f"jaxsp-{jaxsp.__version__}.dist-info/")) for name in names)


@pytest.mark.slow
def test_the_wheel_runs_from_an_empty_folder(wheel, tmp_path):
    """Installed apart from this checkout, the console script finds everything it ships."""
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--target", str(target),
         str(wheel)],
        check=True,
    )  # fmt: skip
    assert (target / "jaxsp" / "py.typed").is_file()
    assert (target / "jaxsp" / "demo" / "manual.md").is_file()
    assert (target / "jaxsp" / "evaluation" / "report.md.jinja").is_file()
    assert (target / "jaxsp" / "evaluation" / "html" / "report.html.jinja").is_file()
    assert all((target / "jaxsp" / name).is_file() for name in CONSUMERS)
    script = target / "bin" / "jaxsp"
    result = subprocess.run(
        [sys.executable, str(script), "compress", "nowhere.txt", "--queries", "q.txt"],
        cwd=empty, env={"PYTHONPATH": str(target), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "jaxsp: There is no file nowhere.txt.\n"
    shown = subprocess.run(
        [sys.executable, "-c", "import jaxsp.api; print(jaxsp.api.__file__)"],
        cwd=empty, env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(target) in shown.stdout
    assert not any(empty.iterdir())
