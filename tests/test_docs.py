"""Proves that the documents say what the code does: commands parse, named files and functions exist, links lead
somewhere, and the two READMEs are twins.

    python -m pytest tests/test_docs.py
"""
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from test_layout import ROOT, tracked

PAGES = {name: text for name, text in tracked() if name.endswith(".md")}
GUIDES = {name: text for name, text in PAGES.items() if re.fullmatch(r"README\w*\.md|docs/\w+\.md", name)}
TWINS = ("README.md", "README_zh.md")

FENCE = re.compile(r"^ *(`{3,})([^\n`]*)\n(.*?)^ *\1 *$", re.M | re.S)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^()\s]+)\)")
PLACEHOLDER = re.compile(r"@@\w+@@")
# behind settings such as SEED=1, and behind other commands ("cd x &&", "echo x |")
COMMAND = re.compile(r"""(\$ )?(.*[&|;] *)?([A-Z_]+=("[^"]*"|'[^']*'|\S*) +)*(\S*/)?(bash|torchrun|python3?) """)

each_page = pytest.mark.parametrize("page", sorted(PAGES))
each_guide = pytest.mark.parametrize("page", sorted(GUIDES))


def prose(text):
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def headings(text):
    return [(len(level), title) for level, title in re.findall(r"^(#{1,6}) +(.+)$", prose(text), re.M)]


# -- Commands ----------------------------------------------------------------------------------------------------------
def command_lines(text):
    """The shell commands of a page: lines of its bash blocks, and whole `code words` of its prose."""
    blocks = [body for _, info, body in FENCE.findall(text) if info.strip() in ("bash", "sh", "console")]
    lines = [line.strip() for body in blocks for line in body.replace("\\\n", " ").split("\n")]
    return [line for line in lines + CODE.findall(prose(text)) if COMMAND.match(line)]


def simple_commands(line):
    """(settings, words) of each command between &&, ||, | and ;, without comment and redirections."""
    line = re.sub(r" \d?>{1,2} ?(&\d|[\w./-]+)", "", line.removeprefix("$ "))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";|&"):
            words.append(word)
            continue
        split = next((i for i, w in enumerate(words) if not re.match("[A-Z_]+=", w)), len(words))
        if words[split:]:
            yield dict(setting.split("=", 1) for setting in words[:split]), words[split:]
        words = []


def parse(script, words):
    """Give the words to the script's own parse_args, where it has one. "..." in a document stands for more flags."""
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if path.parent == ROOT:
        module = importlib.import_module(path.stem)
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if hasattr(module, "parse_args"):
        try:
            module.parse_args([word for word in words if word != "..."])
        except SystemExit as stop:
            assert not stop.code, f"{script} refuses: {shlex.join(words)}"


def check_run_sh(settings, words):
    """The words of `bash run.sh` are those of its case statement, and its settings are read by it."""
    text = (ROOT / "run.sh").read_text(encoding="utf-8")
    known = re.search(r'case "\$1" in\n(.*?)esac', text, re.S)[1]
    known = {word for labels in re.findall(r"^ +([-\w|]+)\)", known, re.M) for word in labels.split("|")}
    stages = re.search(r"^STAGES=\((.*)\)$", text, re.M)[1].split()
    before = ""
    for word in words:
        assert word in (stages if before == "--from" else known), f"run.sh does not know {word!r}"
        before = word
    for name, value in settings.items():
        assert f"${{{name}:-" in text, f"run.sh does not read {name}"
        if name.endswith("_ARGS"):
            stage = name.removesuffix("_ARGS").lower()
            script = {"data": "make_data.py", "eval": "eval.py"}.get(stage, f"train_{stage}.py")
            parse(script, shlex.split(value))


def check_command(line):
    """Raise AssertionError for a command line that one of our scripts would refuse; other programs are not checked."""
    for settings, (program, *words) in simple_commands(line):
        program = Path(program).name  # .venv/bin/python is python
        if program == "bash" and words[:1] == ["run.sh"]:
            check_run_sh(settings, words[1:])
        elif program == "torchrun":
            at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            assert at is not None, f"no script in: {line}"
            parse(words[at], words[at + 1:])
        elif program in ("python", "python3") and words and words[0].endswith(".py"):
            parse(words[0], words[1:])


@pytest.mark.parametrize("page, line", [(page, line) for page, text in GUIDES.items() for line in command_lines(text)])
def test_command_parses(page, line):
    check_command(line)


@pytest.mark.parametrize("page", TWINS)
def test_every_script_has_a_command_in_the_readme(page):
    """Also proves that the commands above are found."""
    named = {Path(word).name for line in command_lines(PAGES[page]) for _, words in simple_commands(line)
             for word in words}
    scripts = {path.name for path in ROOT.glob("*.py") if "\ndef parse_args(" in path.read_text(encoding="utf-8")}
    assert scripts | {"run.sh"} <= named


@pytest.mark.parametrize("line", [
    "python eval.py --no_such_flag 1", "python gone.py", "python train_sft.py --optim adamw", "bash run.sh everything",
    "torchrun --nproc_per_node 2 train_sft.py --nope # why", "cd x && python tokenizer.py train",
    "bash run.sh --from chat", "NO_ARGS='--epochs 1' bash run.sh", 'SFT_ARGS="--epoch 1" bash run.sh sft'])
def test_wrong_command_is_noticed(line):
    assert COMMAND.match(line)
    with pytest.raises(AssertionError):
        check_command(line)


@pytest.mark.parametrize("line", [
    "python -m pytest -m slow", "python train_sft.py --max-steps 5 ... # a comment",
    "bash run.sh --smoke-test > log.txt", "PYTHON=python3.12 bash run.sh --from sft",
    'echo "x" | python tokenizer.py encode --text "a | b"'])
def test_right_command_passes(line):
    check_command(line)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_targets_of_the_makefile_are_commands_that_parse():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    stages = re.search(r"addprefix train-,(.*)\)", text)[1].split()
    targets = re.search(r"^\.PHONY: (.*) \$", text, re.M)[1].split() + [f"train-{stage}" for stage in stages]
    assert {"train-pretrain", "train-sft", "train-dpo", "test", "lint", "smoke"} <= set(targets)
    for target in targets:
        line, = subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True,
                               text=True).stdout.strip().split("\n")
        line = line.replace("${VENV_DIR:-.venv}/bin/", "").replace("${OUT:-out}", "out").replace('"', "")
        assert COMMAND.match(line), line
        check_command(line)
        if target.startswith("train-"):
            assert line == f"bash run.sh {target.removeprefix('train-')}"


# -- Names -------------------------------------------------------------------------------------------------------------
@each_guide
def test_functions_named_in_a_page_exist(page):
    """`module.name()` and `module.Class.method()` of our own modules."""
    for dotted in re.findall(r"`((?:\w+\.)+\w+)\(\)`", prose(GUIDES[page])):
        module, *names = dotted.split(".")
        if (ROOT / f"{module}.py").is_file():
            thing = importlib.import_module(module)
            for name in names:
                assert hasattr(thing, name), f"{dotted}: no {name}"
                thing = getattr(thing, name)


@each_guide
def test_files_named_in_a_page_exist(page):
    named = re.findall(r"`((?:tests|bench|docs|rustbpe|rustdecode)/[\w./]+\.\w+)`", prose(GUIDES[page]))
    assert not [name for name in named if not (ROOT / name).is_file()]


@each_guide
def test_tests_named_in_a_page_exist(page):
    there = {name for file in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}
    assert not set(re.findall(r"`(test_\w+)`", prose(GUIDES[page]))) - there


def tree_paths(text):
    """Paths that a drawn tree names. A line is a name, or some, then a remark; what stands deeper is inside."""
    rows = [re.match(r"([\s│├└─|`+-]*)(.*)", line).groups() for line in text.split("\n") if line.strip()]
    if len(rows) > 1 and all(len(indent) > len(rows[0][0]) for indent, _ in rows[1:]):
        rows = rows[1:]  # the first line is the project's own folder
    found, above = [], []  # above: (indent, folder) of the folders that hold the present line
    for indent, content in rows:
        above = [(depth, folder) for depth, folder in above if depth < len(indent)]
        for number, name in enumerate(re.split(r",? ", content)):
            # behind the first name only what must be one: a remark may begin with any word
            pattern = r"[\w.*/-]+(/|\.(py|sh|md|toml|txt|rs))" if number else r"[\w.*/-]+"
            if not re.fullmatch(pattern, name):
                break
            path = "/".join([*(folder for _, folder in above), name.rstrip("/")])
            found.append(path)
        if content.split(" ")[0].endswith("/"):
            above.append((len(indent), content.split(" ")[0].rstrip("/")))
    return found


def test_file_tree_of_the_readme_is_true():
    at = PAGES["README.md"].index("\n## Files\n")
    tree = FENCE.search(PAGES["README.md"], at)[3]
    if PLACEHOLDER.search(tree):
        pytest.skip("the tree is not filled in yet (test_no_placeholder_is_left fails for it)")
    named = {path: list(ROOT.glob(path)) for path in tree_paths(tree)}
    assert not [path for path, files in named.items() if not files], "named, but not there"
    there = {name for name, _ in tracked() if re.fullmatch(r"[^/]+\.(py|sh|md)", name)}
    assert not there - {file.name for files in named.values() for file in files}, "there, but not named"


def test_trees_are_read_in_every_usual_form():
    drawn = "minillm/\n├── model.py   the model\n├── rustbpe/  a.b of it\n│   └── src/lib.rs  core\n└── run.sh"
    assert tree_paths(drawn) == ["model.py", "rustbpe", "rustbpe/src/lib.rs", "run.sh"]
    assert tree_paths("run.sh   the story\nbench/ tests/  ratios\ntrain_*.py, eval.py  one job each\nLICENSE") == [
        "run.sh", "bench", "tests", "train_*.py", "eval.py", "LICENSE"]


# -- Links, leftovers --------------------------------------------------------------------------------------------------
@each_page
def test_relative_links_lead_to_files(page):
    """Pictures in assets/ are drawn by a run and may be missing."""
    targets = [link.split("#")[0] for link in LINK.findall(prose(PAGES[page])) if "://" not in link]
    here = (ROOT / page).parent
    assert not [target for target in targets if target and not (here / target).exists()
                and (ROOT / "assets") not in (here / target).resolve().parents]


@each_page
def test_no_placeholder_is_left(page):
    assert not PLACEHOLDER.findall(PAGES[page]), "to be filled in with measured numbers"


@each_page
def test_no_machine_paths(page):
    # written in two halves, or test_layout.py would find them here
    words = ["/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/ho" + "me/"]
    assert not [word for word in words if word in PAGES[page]]


# -- Twins -------------------------------------------------------------------------------------------------------------
def test_twins_name_each_other_at_the_top():
    for page, other in (TWINS, TWINS[::-1]):
        assert f"]({other})" in "\n".join(PAGES[page].split("\n")[:5])


def test_twins_have_the_same_headings():
    english, chinese = ([level for level, _ in headings(PAGES[page])] for page in TWINS)
    assert english == chinese and len(english) > 5


def test_twins_have_the_same_code_blocks():
    english, chinese = ([match[0] for match in FENCE.finditer(PAGES[page])] for page in TWINS)
    assert english == chinese and english


@pytest.mark.parametrize("what", ["rows of tables", "links", "placeholders", "code words"])
def test_twins_say_the_same(what):
    """What a translation leaves as it is: a change in one README that is missing in the other shows here."""
    pick = {"rows of tables": lambda text: [row.count("|") for row in re.findall(r"^\|.*$", text, re.M)],
            "links": lambda text: [link for link in LINK.findall(text) if link not in TWINS],
            "placeholders": PLACEHOLDER.findall,
            "code words": lambda text: Counter(CODE.findall(text))}[what]
    english, chinese = (pick(prose(PAGES[page])) for page in TWINS)
    assert english == chinese
