"""The shape of the repository: one direction of imports, honest packaging, quick help."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.compiler import tvm_pair

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it below 3.11

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlc_compile"
LINKS = {PACKAGE / "quantization": ROOT / "quantization", PACKAGE / "targets": ROOT / "targets"}

# A module belongs to the row with its longest matching name; it may import that row and above.
LAYERS = (
    ("errors", "versions"),
    ("rope",),
    ("config",),
    ("models",),
    ("quantization",),
    ("targets",),
    ("nn",),
    (
        "quantization.linear",
        "quantization.compiled",
        "quantization.cuda_encoder",
        "quantization.encode_kernels",
        "quantization.hash_kernels",
        "quantization.hashing",
        "quantization.native",
        "quantization.search_kernels",
        "runtime.cuda_device",
    ),
    ("weights", "manifest", "chat_config"),
    ("compiler",),
    ("runtime",),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
# These build no graphs: what only reads, quantises or prints starts without TVM.
WITHOUT_TVM = {"errors", "rope", "config", "models", "quantization", "weights", "manifest"}
WITHOUT_TVM |= {"chat_config", "cli", "versions"}
HEAVY = "tvm tvm_ffi numpy ml_dtypes torch transformers safetensors gguf tokenizers jinja2 rich"


def modules() -> dict[str, Path]:
    """Our modules by dotted name below mlc_compile, `mlc_compile/__init__.py` left out."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            parts = (*Path(folder).relative_to(PACKAGE).parts, file.removesuffix(".py"))
            name = ".".join(part for part in parts if part != "__init__")
            if file.endswith(".py") and name:
                found[name] = Path(folder) / file
    return found


def layer(module: str) -> str:
    """The entry of LAYERS that `module` belongs to."""
    names = [n for n in RANK if module == n or module.startswith(n + ".")]
    assert names, f"mlc_compile.{module} has no place in LAYERS"
    return max(names, key=len)


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, at its top, in a function or on demand, as an absolute
    name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "on_demand":
            (where,) = node.args
            yield ast.literal_eval(where).replace(":", ".")


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    own = layer(module)
    for name in imports(MODULES[module]):
        first, _, rest = name.partition(".")
        assert first not in ("quantization", "targets"), f"write mlc_compile.{name}"
        if first == "mlc_compile":
            other = layer(rest)
            assert RANK[other] <= RANK[own], f"mlc_compile.{module} imports {name}"
        if own in WITHOUT_TVM:
            assert first not in ("tvm", "tvm_ffi"), f"mlc_compile.{module} imports {name}"


def pyproject() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def test_packages_are_the_folders() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    folders = {"mlc_compile"}
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            folders.add(f"mlc_compile.{name}")
        else:
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py"
    assert setuptools["packages"] == sorted(folders)
    mapped = {f"mlc_compile.{target.name}": target.name for target in LINKS.values()}
    assert setuptools["package-dir"] == {"mlc_compile": "mlc_compile", **mapped}


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_links_are_relative_and_resolve(link: Path) -> None:
    assert link.is_symlink()
    assert os.readlink(link) == f"../{link.name}"
    assert link.resolve() == LINKS[link]


def test_tvm_is_pinned_as_the_pair_that_is_checked() -> None:
    pinned = dict(
        line.split("==") for line in pyproject()["project"]["dependencies"] if "==" in line
    )
    assert pinned == dict(tvm_pair.PINS)


def test_help_imports_click_alone() -> None:
    code = (
        "import sys\n"
        "from mlc_compile.cli import COMMANDS, main\n"
        "for words in [[], ['--help'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    try: main(words)\n"
        "    except SystemExit as done: assert not done.code, (words, done.code)\n"
        f"heavy = set('{HEAVY}'.split()) & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def deferred() -> dict[str, set[str]]:
    """What is imported on demand: names by their module, both below mlc_compile."""
    found: dict[str, set[str]] = {}
    for path in MODULES.values():
        for where in re.findall(r'on_demand\(\s*"mlc_compile\.(.+?)"', path.read_text("utf-8")):
            module, _, name = where.partition(":")
            found.setdefault(module, set()).add(name)
    return found


def test_what_is_imported_on_demand_is_there() -> None:
    assert len(deferred()) > 5
    for module, names in deferred().items():
        assert names <= vars(importlib.import_module(f"mlc_compile.{module}")).keys()


def test_a_plain_conversion_imports_no_other_readers(tmp_path: Path) -> None:
    """Nor anything beside numpy and click that is slow to import."""
    command = ["convert_weight", str(ROOT / "examples/tiny_model"), "--quantization", "q4f16_1"]
    code = (
        "import sys\n"
        "from mlc_compile.cli import main\n"
        f"try: main({[*command, '-o', str(tmp_path / 'out')]})\n"
        "except SystemExit as done: assert not done.code\n"
        "print(*sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.splitlines()[-1].split())
    assert "mlc_compile.weights.st" in imported
    needless = {f"mlc_compile.{module}" for module in deferred()}
    needless |= set(HEAVY.split()) - {"numpy", "ml_dtypes"}
    assert not needless & imported


def our_files() -> list[Path]:
    """What is written by hand: text files outside hidden, built and installed folders."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for top in (".ci", ".github", "benchmarks", "docs", "examples", "mlc_compile", "quantization"):
        found += (ROOT / top).rglob("*")
    found += [*(ROOT / "targets").rglob("*"), *(ROOT / "tests").rglob("*")]
    installed = {"__pycache__", "node_modules"}
    return [path for path in found if path.is_file() and not installed & set(path.parts)]


@pytest.mark.parametrize(
    "path",
    [path for path in our_files() if path.suffix == ".py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{path} has no module docstring"


def test_no_paths_of_a_machine_and_no_registry_addresses() -> None:
    parents = [re.escape(f"{p}/") for p in {ROOT.parent, Path.home()} if p != Path("/")]
    pattern = re.compile(
        "|".join([*parents, r"(?<![\w.])/(?:home|Users)/\w+/", r"--(?:extra-)?index-url"])
    )
    found = []
    for path in our_files():
        data = path.read_bytes()
        if b"\0" not in data:
            text = data.decode("utf-8", "replace")
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found
