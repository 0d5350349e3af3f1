"""The file as it is to be read: its size, its sections, and what it may import, name and know where."""
import ast
import hashlib
import inspect
import io
import re
import shutil
import subprocess
import sys
import tokenize

from conftest import ROOT

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE, feature_version=(3, 10))
NODES = list(ast.walk(TREE))
FUNCTIONS = [node for node in NODES if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def section_lines() -> dict[int, range]:
    """Section number -> its lines (from 1), found by the banners."""
    heads = {int(m[1]): i + 1 for i, line in enumerate(LINES) if (m := re.match(r"# ======== (\d+) \w", line))}
    ends = [*list(heads.values())[1:], len(LINES) + 1]
    return {number: range(begin, end) for (number, begin), end in zip(heads.items(), ends)}


SECTIONS = section_lines()


def test_the_file_is_small_enough_to_be_read():
    assert len(LINES) <= 3_900 and max(map(len, LINES)) <= 120
    assert len(NODES) <= 45_500 and len(FUNCTIONS) <= 293
    assert [f.name for f in FUNCTIONS if f.end_lineno - f.lineno >= 80] == []
    assert len(tg.shipped_source(ROOT / "train_gpt.py")) <= 46_000


def test_it_branches_little_and_comments_much():
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    ifs, inline = (sum(isinstance(node, kind) for node in NODES) for kind in (ast.If, ast.IfExp))
    assert len(comments) >= 0.09 * len(LINES) and ifs <= 0.042 * len(LINES) and inline <= 0.015 * len(LINES)


def test_sections_are_those_of_the_table_and_say_what_is_safe_to_change():
    assert list(SECTIONS) == list(range(1, 13))
    for number, where in SECTIONS.items():
        title = re.match(r"# ======== \d+ ([^:]+)", LINES[where.start - 1])[1]
        prose = "\n".join(LINES[where.start:where.start + 12])
        assert re.search(rf"\b{number} {title}\b", ast.get_docstring(TREE)) and "Safe to change:" in prose


def test_it_needs_seven_packages_and_the_triton_that_comes_with_torch():
    modules = {alias.name for node in NODES if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in NODES if isinstance(node, ast.ImportFrom)}
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    seven = {"torch", "numpy", "sentencepiece", "brotli", "constriction", "tqdm", "safetensors"}
    assert packages == seven | {"triton"}
    assert set(re.findall(r"^(\w+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)) == seven


def test_import_prints_nothing_and_needs_nothing_that_a_laptop_may_lack():
    code = ("import sys\n"
            "absent = 'triton', 'flash_attn', 'sentencepiece', 'brotli', 'constriction', 'safetensors'\n"
            "sys.modules.update(dict.fromkeys(absent))\n"
            "import train_gpt\n"
            "assert all(sys.modules[name] is None for name in absent)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_ships_is_a_function_of_the_text_alone():
    """Of this file on every Python that is at hand; and of what is easily taken for a comment or an empty line."""
    odd = "s = '''a # b\n\n  c'''  # why\n\ndef f(x=\"#\"):\n    # why\n    '''What.'''\n\nt = (1,  # one\n\n     2)\n"
    assert tg.without_prose(odd) == "s = '''a # b\n\n  c'''\ndef f(x=\"#\"):\n    pass\nt = (1,\n     2)\n"
    code = ("import ast, hashlib, io, sys, tokenize\n" + inspect.getsource(tg.without_prose) +
            "text = without_prose(open('train_gpt.py', encoding='utf-8').read())\n"
            "compile(text, 'shipped', 'exec')\nprint(hashlib.sha256(text.encode()).hexdigest())\n")
    pythons = [sys.executable, *map(shutil.which, (f"python3.{minor}" for minor in range(10, 15)))]
    runs = [subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True)
            for python in filter(None, pythons)]
    told = {run.stdout for run in runs if run.returncode == 0}  # some are stubs of a version that is not installed
    assert told == {hashlib.sha256(tg.without_prose(SOURCE).encode()).hexdigest() + "\n"}


def test_the_environment_is_read_at_the_two_ends_of_the_file_only():
    ends = [node for node in TREE.body if isinstance(node, ast.If)
            and "__name__" in ast.unparse(node.test)]
    allowed = {line for node in ends for line in range(node.lineno, node.end_lineno + 1)}
    reads = {node.lineno for node in NODES if isinstance(node, ast.Attribute)
             and node.attr in ("environ", "environb", "getenv", "putenv")}
    assert len(ends) == 2 and reads and reads <= allowed


def test_only_section_2_knows_of_processes_and_none_of_temporary_folders():
    """torch.distributed under any name, but for its import. Two runs on one machine share nothing but their inputs."""
    uses = [node.lineno for node in NODES if (isinstance(node, ast.Name) and node.id == "dist")
            or (isinstance(node, ast.Attribute) and node.attr == "distributed")]
    imports = [node for node in NODES if isinstance(node, (ast.Import, ast.ImportFrom))
               and "torch.distributed" in ast.unparse(node)]
    assert len(uses) > 5 and all(line in SECTIONS[2] for line in uses) and len(imports) == 1
    texts = [node.value for node in NODES if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if "/tmp" in text or "/dev/shm" in text] == []


# -- README.md -------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_240


def test_every_verb_that_the_readme_names_is_one_of_run_sh():
    verbs = set(re.findall(r"\./run\.sh ([a-z]+)", README))
    cases = set(re.findall(r"^  ([a-z][a-z |-]*)\)", (ROOT / "run.sh").read_text(encoding="utf-8"), re.MULTILINE))
    assert verbs and verbs <= {verb for case in cases for verb in case.split(" | ")}


def test_every_file_that_the_readme_names_exists():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    names = re.findall(r"`((?:data|records|bench|tests|tools|docs)/[\w./]*|[\w]+\.(?:py|sh|txt|md|toml))`", README)
    made = ("data/datasets", "data/tokenizers")  # by a command
    missing = {name for name in links + names if not (ROOT / name).exists() and not name.startswith(made)}
    assert links + names and missing == set()
