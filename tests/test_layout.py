"""Proves that the house is built as drawn: which file imports which, and the rules of style that a script can check.

    python -m pytest tests/test_layout.py
"""
import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The drawing: three floors. A ground file imports no local file, a leaf ground files only, a script leaves and ground
# files. So a reader of any file knows how deep it can go. A file is added here when it is written.
GROUND = {"cli", "configuration", "weights", "logprobs", "kernels", "decoding", "forms", "records", "rows", "arrays",
          "bpe"}
LEAVES = {"model", "generation", "inference", "lora", "tokenizer", "dataset", "optim", "common", "checkpoint", "logs",
          "health", "report", "metrics", "results", "sharding", "tasks", "chat", "selection", "download", "tensors"}
SCRIPTS = {"make_data", "prepare_data", "train_pretrain", "train_sft", "train_reward", "train_dpo", "train_ppo",
           "train_grpo", "train_distill", "eval", "export_gguf"}
FILES = sorted(ROOT.glob("*.py"))
TRAINERS = [path for path in FILES if path.stem.startswith("train_")]
BANNERS = ["1. Processes, device, seed", "2. Data", "3. Model", "4. Optimizer", "5. Resume",
           "6. Compile and DDP", "7. Training loop", "8. Final save and summary"]


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Names of all modules a file imports anywhere, local or not."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: relative import"
            found.add(node.module.split(".")[0])
    return found


def functions(path):
    """(function node, class node or None, nesting of definitions) of a file; nested functions included."""

    def visit(node, owner, depth):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child, owner, depth
                yield from visit(child, owner, depth + 1)
            else:
                yield from visit(child, child if isinstance(child, ast.ClassDef) else owner, depth)

    yield from visit(tree(path), None, 0)


def tracked():
    """Text files that git tracks or would track; all files where there is no git."""
    try:
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True,
                               capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not p.relative_to(ROOT).parts[0].startswith(".")]
    for name in names:
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes())[:8000]:
            yield name, content.decode("utf-8")


def each(files):
    return pytest.mark.parametrize("path", files, ids=lambda path: path.name)


def test_every_file_is_in_the_drawing():
    assert {path.stem for path in FILES} <= GROUND | LEAVES | SCRIPTS


def test_no_local_file_hides_a_module_of_python():
    assert not {path.stem for path in FILES} & set(sys.stdlib_module_names)


@each(FILES)
def test_a_file_imports_only_files_of_the_floors_below(path):
    local = imports(path) & (GROUND | LEAVES | SCRIPTS)
    below = set() if path.stem in GROUND else GROUND if path.stem in LEAVES else GROUND | LEAVES
    assert local <= below


@each(FILES)
def test_imports_are_declared_requirements(path):
    declared = {re.split(r"[<>=~! ]", line)[0].replace("-", "_")
                for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split() if line[0].isalpha()}
    optional = {"minillm_bpe", "minillm_decode"}  # built by run.sh where Rust is there; the code asks before it imports
    assert imports(path) <= declared | optional | GROUND | LEAVES | set(sys.stdlib_module_names)


@each(FILES)
def test_public_functions_have_docstrings(path):
    assert ast.get_docstring(tree(path)), "the module itself"
    documented = {f.name for f, owner, _ in functions(path) if owner and ast.get_docstring(f)}
    bare = [f"{f.name}:{f.lineno}" for f, owner, depth in functions(path)
            if depth == 0 and not f.name.startswith("_") and not ast.get_docstring(f)
            # a method that fills in a documented one of its base class says what it does there
            and not (owner and owner.bases and f.name in documented)]
    assert not bare


@each(FILES)
def test_functions_are_short_but_main(path):
    long = [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f, _, depth in functions(path)
            if depth == 0 and f.name not in ("main", "parse_args") and f.end_lineno - f.lineno >= 60]
    assert not long


def deepest(node, depth=0):
    """Levels of if, for, while, with and try below a function or block."""
    levels = [depth]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            # `elif` is an If inside the other's else, but no step to the right
            chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
            block = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and not chained
            levels.append(deepest(child, depth + block))
    return max(levels)


@each(FILES)
def test_nesting_stays_readable(path):
    limit = 5 if path.stem == "train_ppo" else 4
    assert not [f"{f.name}: {deepest(f)}" for f, _, depth in functions(path) if depth == 0 and deepest(f) > limit]


@each(FILES)
def test_no_global_bare_except_type_bool_or_path_edits(path):
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Global), f"{where}: global statement"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: bare except"
        if isinstance(node, ast.keyword) and node.arg == "type":
            assert not (isinstance(node.value, ast.Name) and node.value.id == "bool"), f"{where}: type=bool"
        if isinstance(node, ast.Attribute) and node.attr in ("append", "insert", "filterwarnings", "simplefilter"):
            assert not ast.unparse(node).startswith(("sys.path.", "warnings.")), f"{where}: acts on the whole process"


@each(TRAINERS)
def test_training_scripts_have_the_same_numbered_banners(path):
    found = re.findall(r"^    # -- (\d\. .*?)(?: \(.*\))?(?: without .*| -- .*)? -+$", path.read_text("utf-8"), re.M)
    assert [banner.split(".")[0] for banner in found] == [banner.split(".")[0] for banner in BANNERS]


@each([path for path in FILES if path.stem in SCRIPTS])
def test_scripts_have_parse_args_main_and_a_guard_of_one_line(path):
    names = {f.name for f, _, depth in functions(path) if depth == 0}
    assert {"parse_args", "main"} <= names
    guard = tree(path).body[-1]
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == '__main__'" and len(guard.body) == 1


def test_lines_are_at_most_120_wide():
    code = [(name, text) for name, text in tracked() if name.endswith((".py", ".rs", ".sh", ".pyi"))]
    assert not [f"{name}:{i}" for name, text in code for i, line in enumerate(text.split("\n"), 1) if len(line) > 120]


def test_no_machine_paths_in_tracked_files():
    # written in two halves, or this file would find itself
    words = ["/wo" + "rk/", "/ro" + "ot/", "/tmp" + "/w/", "/usr/loc" + "al/lib/python"]
    assert not [(name, word) for name, text in tracked() for word in words if word in text]


def test_code_has_no_emoji_and_no_invisible_characters():
    odd = re.compile("[\u00a0\u200b-\u200f\u2028-\u202f\ufeff\U0001f300-\U0001faff]")
    assert not [(path.name, hit.group()) for path in FILES for hit in odd.finditer(path.read_text(encoding="utf-8"))]
