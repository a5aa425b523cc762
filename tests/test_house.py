"""The house rules that a program can check: rows of imports, silence on import, packages."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "core" / "tenuto"
SHIPPED = ("core", "comfy_nodes", "webui_ext", "gradio_app", "scripts")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MIB = 2**20
Files = Callable[..., list[Path]]

# A room imports only from the lines above its own; the ground is everything else.
ROOMS = (
    ("numerics", "model"),
    ("sampling",),
    ("caching",),
    ("artifact",),
    ("runtime",),
    ("calibration", "measure"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ROOMS, 1) for name in names}

ROOMS_311 = ("calibration", "measure", "cli")  # no host imports them

HEAVY = (
    *("triton", "diffusers", "transformers", "gradio", "torchvision", "matplotlib", "pandas"),
    *("typer", "rich", "pydantic"),
)
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEEDS_311 = {
    "typing": {"Self", "Never", "LiteralString", "Required", "NotRequired", "Unpack", "override",
               "assert_never", "assert_type", "dataclass_transform", "TypeVarTuple"},
    "enum": {"StrEnum", "ReprEnum", "EnumCheck", "verify", "member", "nonmember"},
    "datetime": {"UTC"},
    "contextlib": {"chdir"},
    "hashlib": {"file_digest"},
    "asyncio": {"TaskGroup", "timeout", "Runner"},
    "itertools": {"batched"},
    "tomllib": set(),
    "builtins": {"ExceptionGroup", "BaseExceptionGroup"},
}  # fmt: skip


def sources(*folders: str) -> list[Path]:
    """The Python files under these folders of the project."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not {"build", "__pycache__"} & set(path.parts)
    )


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def at(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 1)}"


def imported(tree: ast.Module) -> Iterator[tuple[ast.AST, str, str]]:
    """Every import as (node, module, name), absolute ones alone; name is "" for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node, node.module or "", alias.name) for alias in node.names)


def inner_imports(path: Path, tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The modules of tenuto that a file of core/tenuto imports, as (node, dotted path below it)."""
    package = ["tenuto", *path.relative_to(CORE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module or "").split(".")]
            found = [[part for part in (*base, alias.name) if part] for alias in node.names]
        else:
            continue
        yield from ((node, ".".join(parts[1:])) for parts in found if parts[0] == "tenuto")


def defined(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and methods, as (qualified name, node)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    public = isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
                    if public and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


# --- the rooms ----------------------------------------------------------------------------------


def test_rooms_import_downwards_only() -> None:
    """Each room from those before it, the ground (files beside them) from no room."""
    wrong = []
    for path in sources("core"):
        room = path.relative_to(CORE).with_suffix("").parts[0]
        if room == "__init__":
            continue  # the public names
        for node, module in inner_imports(path, tree_of(path)):
            other = module.split(".")[0]
            if other != room and RANK.get(other, 0) >= max(RANK.get(room, 0), 1):
                wrong.append(f"{at(path, node)}: {room} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_modules_import_in_no_circle() -> None:
    """Within a room too: at import time, every module is there before those that need it."""
    files = {".".join(path_parts(p)): p for p in sources("core")}
    needs: dict[str, set[str]] = {}
    for name, path in files.items():
        tree = tree_of(path)
        found = inner_imports(path, tree)
        top = {module for node, module in found if node in tree.body}
        needs[name] = {m if m in files else m.rpartition(".")[0] for m in top} - {name}
    order = graphlib.TopologicalSorter({n: m & set(files) for n, m in needs.items()})
    order.prepare()  # CycleError names the circle


def path_parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(CORE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def test_the_house_has_nine_rooms() -> None:
    folders = [p.name for p in CORE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert sorted(folders) == sorted(RANK)
    assert len([p for p in CORE.iterdir() if p.is_file()]) <= 9


def test_the_import_check_sees_what_it_should() -> None:
    """A check of imports that finds none would pass for ever."""

    def found(path: Path, *lines: str) -> list[str]:
        return [name for _, name in inner_imports(path, ast.parse("\n".join(lines)))]

    inside = ("from . import x", "from ..artifact import A", "import tenuto.numerics.scheme")
    assert found(CORE / "caching" / "x.py", *inside) == [
        "caching.x", "artifact.A", "numerics.scheme",
    ]  # fmt: skip
    top = ("from .errors import E", "from . import clock, name", "from torch import nn")
    assert found(CORE / "x.py", *top) == ["errors.E", "clock", "name"]
    assert found(CORE / "x.py", "from tenuto import quantize") == ["quantize"]


def test_the_library_imports_no_host_and_no_adapter() -> None:
    banned = {"core", "comfy_nodes", "webui_ext", "gradio_app", "comfy", "modules", "ldm", "sgm"}
    wrong = [
        f"{at(path, node)}: {module}"
        for path in sources("core")
        for node, module, _ in imported(tree_of(path))
        if module.split(".")[0] in banned
    ]
    assert not wrong, wrong


def test_what_is_imported_from_us_is_there() -> None:
    """The tests of the hosts too, which run elsewhere, and imports inside of functions."""
    wrong = []
    for path in sources("core", "gradio_app", "comfy_nodes", "webui_ext", "benchmarks", "tests"):
        for node, module, name in imported(tree_of(path)):
            if module.split(".")[0] not in ("tenuto", "gradio_app") or name in ("", "*"):
                continue
            if module.endswith("_triton") or name.endswith("_triton"):
                continue  # not everywhere
            if not is_there(module, name):
                wrong.append(f"{at(path, node)}: {module}.{name}")
    assert not wrong, "\n".join(wrong)
    assert is_there("tenuto.model", "patches") and is_there("tenuto.model", "layers")
    assert not is_there("tenuto.model", "layer") and not is_there("tenuto.errors", "layers")


def is_there(module: str, name: str) -> bool:
    """Whether a module has `name`, or a package a module of that name."""
    found = importlib.import_module(module)
    if hasattr(found, name):
        return True
    return hasattr(found, "__path__") and bool(importlib.util.find_spec(f"{module}.{name}"))


# --- no surprises on import ---------------------------------------------------------------------

PROBE = """
import json, logging, os, sys, threading, warnings
import numpy, safetensors.torch, torch
def state():
    root = logging.getLogger()
    own = [type(h).__name__ for h in logging.getLogger("tenuto").handlers]
    own = [name for name in own if name != "NullHandler"]
    cuda = torch.backends.cuda
    return {
        "environment": dict(os.environ),
        "logging": [root.level, len(root.handlers), len(own), logging.getLogger("tenuto").level],
        "warnings": [str(f) for f in warnings.filters],
        "threads": [torch.get_num_threads(), threading.active_count()],
        "torch": [str(torch.get_default_dtype()), torch.is_grad_enabled()],
        "speed": [torch.backends.cudnn.benchmark, cuda.matmul.allow_tf32],
        "random": torch.random.get_rng_state().sum().item(),
        "path": list(sys.path),
    }
before, loaded = state(), set(sys.modules)
import tenuto
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "heavy": sorted({m.split(".")[0] for m in sys.modules} & set(HEAVY)),
    "cuda": torch.cuda.is_initialized(),
    "file": tenuto.__file__,
    "version": tenuto.__version__,
    "missing": [name for name in tenuto.__all__ if not hasattr(tenuto, name)],
}))
"""


def test_import_is_silent_and_lean(tmp_path: Path) -> None:
    """Nothing heavy, no CUDA, nothing printed, and the process is as it was."""
    code = PROBE.replace("HEAVY", repr(HEAVY))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "core")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    assert run.stdout.count("\n") == 1, run.stdout
    seen = json.loads(run.stdout)
    assert Path(seen["file"]).parent == CORE
    assert seen["heavy"] == []
    assert seen["changed"] == []
    assert seen["missing"] == []
    assert not seen["cuda"]
    assert seen["version"] == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", ["ComfyUI-Tenuto.main", "tenuto"])
def test_a_clone_in_custom_nodes_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI imports the clone as a package whose name is its path, dots and hyphens included."""
    before = list(sys.path)
    module = f"custom_nodes/{name.replace('.', '_x_')}"
    spec = importlib.util.spec_from_file_location(
        module, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, package)
    spec.loader.exec_module(package)
    assert sys.path == before
    assert hasattr(package, "comfy_entrypoint") or hasattr(package, "NODE_CLASS_MAPPINGS")


def test_a_script_beside_a_clone_gets_the_library(tmp_path: Path) -> None:
    """Python looks into the folder above the clone first, and finds the clone as `tenuto`."""
    (tmp_path / "tenuto").symlink_to(ROOT)
    code = "import tenuto, tenuto.errors as e; print(tenuto.__file__, tenuto.attach, e.__file__)"
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert str(ROOT / "core" / "tenuto" / "__init__.py") in found.stdout
    assert str(ROOT / "core" / "tenuto" / "errors.py") in found.stdout


# --- what the code may not do -------------------------------------------------------------------


def unsafe(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Ways to run what a file or a string says."""
    for node, module, name in imported(tree):
        if module.split(".")[0] in UNPICKLERS:
            yield node, f"imports {module}"
        if module == "torch" and name in {"load", "save", "hub"}:
            yield node, f"imports torch.{name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}:
            yield node, f"calls {called}"
        if called in {"torch.load", "torch.save"} or called.startswith("torch.hub."):
            yield node, f"calls {called}"
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            if on and keyword.arg in {"shell", "allow_pickle", "trust_remote_code"}:
                yield node, f"passes {keyword.arg}"


def test_nothing_is_unpickled_or_evaluated() -> None:
    files = sources(*SHIPPED)
    wrong = [f"{at(p, node)}: {what}" for p in files for node, what in unsafe(tree_of(p))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from torch import load", "torch.load(p)", "eval(s)", "exec(s)",
     "subprocess.run(c, shell=True)", "np.load(p, allow_pickle=flag)", "f(trust_remote_code=True)"],
)  # fmt: skip
def test_the_safety_check_sees_it(line: str) -> None:
    assert list(unsafe(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["model.eval()", "torch.compile(f)", "run(c, shell=False)", "re.compile(s)"]
)
def test_the_safety_check_lets_pass(line: str) -> None:
    assert not list(unsafe(ast.parse(line)))


def test_only_the_command_prints() -> None:
    """And a long function a bar, on a terminal: `progress.py` alone knows stderr."""
    wrong = [
        at(path, node)
        for path in sources("core")
        if CORE / "cli" not in path.parents and path != CORE / "progress.py"
        for node in ast.walk(tree_of(path))
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"print", "input", "breakpoint"}
        )
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in {"sys.stdout", "sys.stderr"})
    ]
    assert not wrong, f"the library logs to the logger 'tenuto': {wrong}"


def test_modules_are_watched_in_one_way() -> None:
    """`watched` takes its hooks out again; two followers stay for as long as what they follow.

    What fills the blocks of a private copy stays with that copy.
    """
    allowed = {
        "core/tenuto/model/watch.py", "core/tenuto/sampling/follow.py", "webui_ext/run.py",
        "core/tenuto/calibration/by_block.py",
    }  # fmt: skip
    found = {
        path.relative_to(ROOT).as_posix()
        for path in sources(*SHIPPED, "benchmarks")
        if "register_forward" in path.read_text(encoding="utf-8")
    }
    assert found == allowed


# --- form ---------------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    wrong = []
    for path in sources("core", "gradio_app"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 300:
            wrong.append(f"{at(path, ast.Module([], []))}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    wrong.append(f"{at(path, node)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_the_hosts_python_can_read_it() -> None:
    """A1111 and Forge run Python 3.10: its grammar, and no later addition to its library."""
    wrong = []
    for path in sources("core", "webui_ext", "scripts"):
        if CORE in path.parents and path.relative_to(CORE).parts[0] in ROOMS_311:
            continue
        text = path.read_text(encoding="utf-8")
        try:
            tree = ast.parse(text, str(path), feature_version=(3, 10))
        except SyntaxError as error:
            wrong.append(f"{path}: {error}")
            continue
        for node, module, name in imported(tree):
            if module in NEEDS_311 and (name in NEEDS_311[module] or not NEEDS_311[module]):
                wrong.append(f"{at(path, node)}: {module}.{name} came with Python 3.11")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                module, _, name = ast.unparse(node).rpartition(".")
                if name in NEEDS_311.get(module or "builtins", ()):
                    wrong.append(f"{at(path, node)}: {name} came with Python 3.11")
    assert not wrong, "\n".join(wrong)


def test_public_names_are_documented_and_annotated() -> None:
    inherited = {"forward", "extra_repr"}  # their contract is torch's
    wrong = []
    for path in sources("core", "gradio_app"):
        tree = tree_of(path)
        if not ast.get_docstring(tree):
            wrong.append(f"{at(path, tree)}: the module has no docstring")
        for name, node in defined(tree):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if not ast.get_docstring(node) and node.name not in inherited:
                wrong.append(f"{at(path, node)}: {name} has no docstring")
            if isinstance(node, ast.ClassDef):
                continue
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in every if a.annotation is None and a.arg not in {"self", "cls"}]
            if bare or node.returns is None:
                wrong.append(f"{at(path, node)}: {name} lacks annotations: {bare or 'its result'}")
    assert not wrong, "\n".join(wrong)


# --- files and packages -------------------------------------------------------------------------


def test_assets_fit_a_wheel(files_under: Files) -> None:
    """An index refuses a wheel over 100 MB; git keeps every version of a file. Links are free."""
    sizes = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in files_under(ROOT / "assets")}
    assert sizes, "assets/ is empty"
    assert sum(sizes.values()) <= 90 * MIB, f"{sum(sizes.values()) / MIB:.1f} MiB"
    assert not {name: size for name, size in sizes.items() if size > 15 * MIB}


def test_links_stay_among_the_assets(files_under: Files) -> None:
    """A link out of assets/ would be a hole in an installation."""
    for link in (p for p in files_under(ROOT, links=True) if p.is_symlink()):
        assert link.exists() and link.resolve().is_relative_to(ROOT / "assets"), link
        assert not link.readlink().is_absolute(), link


def test_every_weight_is_safetensors(files_under: Files) -> None:
    pickled = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz", ".h5", ".msgpack"}
    assert not [p for p in files_under(ROOT / "assets") if p.suffix in pickled]


def test_package_list_is_the_tree() -> None:
    """setuptools drops an unlisted package in silence."""
    packages = {
        ".".join(p.parent.relative_to(CORE.parent).parts) for p in CORE.rglob("__init__.py")
    }
    for name in ("gradio_app", "assets"):
        packages |= {
            ".".join(("tenuto", *p.parent.relative_to(ROOT).parts))
            for p in (ROOT / name).rglob("__init__.py")
        }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages)
    stray = [p for p in sources("core") if not (p.parent / "__init__.py").is_file()]
    assert not stray, "not in a package"
    assert not (ROOT / "core" / "__init__.py").exists(), "core/ is a source root"
    assert not (ROOT / "tests" / "__init__.py").exists(), "a host's own `tests` would be shadowed"


def test_constraints_pin_what_is_installed() -> None:
    """Every requirement is pinned, every line is a pin, and no path or local build got in."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)
    ]
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = PROJECT["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in wanted:
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        free = name in ("tenuto", "triton")  # a CUDA torch pins its own triton
        assert free or re.sub(r"[-_.]+", "-", name).lower() in names, requirement


def test_the_registry_of_nodes_is_told() -> None:
    """ComfyUI's manager shows the name; the version is the oldest with the API that is used."""
    facts = PROJECT["tool"]["comfy"]
    assert facts["DisplayName"] == "Tenuto" and facts["PublisherId"]
    assert facts["requires-comfyui"] == ">=0.3.64"


def test_requirements_name_no_package() -> None:
    """Hosts run `pip install -r requirements.txt` in their own environment."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_version_has_a_changelog_entry() -> None:
    version = PROJECT["project"]["version"]
    assert re.search(
        rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )


def test_readme_shows_the_code_early_and_it_is_python() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("```python") + 1
    end = lines.index("```", start)
    assert end <= 30, "the Python example ends after line 30"
    tree = ast.parse("\n".join(lines[start:end]))
    tenuto = importlib.import_module("tenuto")
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tn"
    }
    assert len(used) >= 6
    assert used <= set(tenuto.__all__)


def test_readme_and_docs_link_to_files_that_are_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken, broken
