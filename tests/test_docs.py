"""The documents match the code: paths, functions, commands, options, links."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_plugin.cli import COMMANDS
from mlm_plugin.config.loading import load_config, options_markdown
from mlm_plugin.config.methods import METHOD_CLASSES
from mlm_plugin.config.pretraining import parse_pretrain

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
METHOD = ROOT / "docs" / "method.md"
FILES = ROOT / "docs" / "methods-and-files.md"
TRAINING = ROOT / "docs" / "training.md"
GUI = ROOT / "docs" / "kohya-gui.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
OPTIONS_PAGE = ROOT / "docs" / "options.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "research" / "README.md",
    ROOT / "research" / "benchmarks" / "README.md",
]
PACKAGES = ("mlm_plugin", "research")
TRAIN = "python train_network_mlm.py"
FIRST_SCREEN = 150
"""README has fewer lines; everything else is in docs/."""


def page_name(page):
    return page.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text(encoding="utf-8")


def fences(path):
    """Contents of the code blocks of a page, indented ones too."""
    return re.findall(r"^ *```\w*\n(.*?)^ *```$", text_of(path), flags=re.MULTILINE | re.DOTALL)


def commands(path):
    """Single commands of the code blocks; ``a && b`` are two."""
    lines = (line.strip() for block in fences(path) for line in block.splitlines())
    return [part.strip() for line in lines for part in line.split(" && ")]


def train_commands():
    found = {
        command for page in PAGES for command in commands(page) if command.startswith(f"{TRAIN} ")
    }
    return sorted(found)


def file_tree():
    """Paths of the maps of all files and the phrase of each."""
    maps = [block for block in fences(ARCHITECTURE) if block.split("/")[0] in PACKAGES]
    entries, folders = {}, []
    for line in "".join(maps).splitlines():
        name, _, phrase = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        entries["".join(folders)] = phrase.strip()
    return entries


# --- the map of all files --------------------------------------------------------------------


@pytest.mark.parametrize("path", file_tree())
def test_a_path_of_the_file_tree_exists(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_every_entry_of_the_file_tree_has_its_phrase():
    assert [path for path, phrase in file_tree().items() if not phrase] == []


def test_every_module_is_in_the_file_tree():
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" and not path.is_relative_to(ROOT / "research" / "tests")
    }
    assert modules - set(file_tree()) == set()


def test_every_preset_is_in_the_list_of_presets_and_its_command_is_in_the_preset():
    presets = {f"presets/{path.name}" for path in (ROOT / "presets").glob("*.toml")}
    assert [preset for preset in presets if preset not in text_of(TRAINING)] == []
    for preset in presets:
        assert preset in text_of(ROOT / preset)


# --- commands -------------------------------------------------------------------------------


def test_readme_gives_both_first_commands_in_one_line_each():
    lines = [line for block in fences(README) for line in block.splitlines()]
    assert f"pip install -e . && {TRAIN} --config_file presets/quickstart.toml" in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def test_readme_and_the_gui_page_add_the_same_line():
    line = "--network_module mlm_plugin.kohya\n"
    assert line in fences(README)
    assert line in fences(GUI)


@pytest.mark.parametrize("command", train_commands())
def test_a_training_command_parses(command):
    arguments = shlex.split(command)[2:]
    if "--help" in arguments:
        return
    if "--config_file" in arguments:
        place = arguments.index("--config_file") + 1
        if not arguments[place].startswith("presets/"):  # the reader's own file
            arguments[place] = "presets/quickstart.toml"
    arguments = [str(ROOT / part) if part.startswith("presets/") else part for part in arguments]
    assert load_config(arguments).model.pretrained_model_name_or_path


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_subcommand_named_in_a_page_exists(page):
    named = re.findall(r"(?:`|^ *)mlm-plugin ([a-z-]+)", text_of(page), flags=re.MULTILINE)
    assert set(named) <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_module_of_research_that_a_page_runs_can_be_run(page):
    named = set(re.findall(r"python -m (research[\w.]*)", text_of(page)))
    paths = {name: ROOT / name.replace(".", "/") for name in named}
    assert [
        name
        for name, path in paths.items()
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()
    ] == []


def test_readme_names_every_subcommand_but_train_which_has_its_own_script():
    named = re.findall(r"mlm-plugin ([a-z-]+)", text_of(README))
    assert set(COMMANDS) - {"train"} <= set(named)


def test_the_pretraining_command_parses():
    found = [c for c in commands(TRAINING) if c.startswith("mlm-plugin pretrain ")]
    assert found
    for command in found:
        assert parse_pretrain(shlex.split(command)[2:]).captions


# --- options --------------------------------------------------------------------------------


def test_the_options_page_is_what_the_declarations_give():
    head, line, tables = text_of(OPTIONS_PAGE).partition("<!-- generated -->\n")
    assert line, "the mark before the generated part is gone"
    assert tables == "\n" + options_markdown(), "run the command at the top of docs/options.md"


def test_the_command_on_the_options_page_makes_the_page(tmp_path):
    (command,) = commands(OPTIONS_PAGE)
    page = tmp_path / "docs" / "options.md"
    page.parent.mkdir()
    shutil.copy(OPTIONS_PAGE, page)
    page.write_text(text_of(page).split("**model**")[0], encoding="utf-8")
    _, *arguments = shlex.split(command)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, check=True)
    assert text_of(page) == text_of(OPTIONS_PAGE)


# --- methods --------------------------------------------------------------------------------


def methods_in_tables(path):
    """First cells of table rows, which name a method."""
    return set(re.findall(r"^\| `(\w+)` \|", text_of(path), flags=re.MULTILINE))


@pytest.mark.parametrize("page", [FILES, METHOD], ids=page_name)
def test_every_method_has_its_row(page):
    assert set(METHOD_CLASSES) <= methods_in_tables(page)


def test_the_page_of_methods_gives_a_command_for_every_one():
    with_preset = [c for c in commands(FILES) if "presets/sd15" in c]
    configs = [
        load_config([str(ROOT / p) if p.startswith("presets/") else p for p in shlex.split(c)[2:]])
        for c in with_preset
    ]
    assert {config.schedule.method for config in configs} == set(METHOD_CLASSES)


# --- references -----------------------------------------------------------------------------


def equation_rows():
    rows = re.findall(r"^\|.*\| `([\w.]+)` \| `([\w/]+)\.py` \|$", text_of(METHOD), re.MULTILINE)
    return [(name, path.replace("/", ".")) for name, path in rows]


@pytest.mark.parametrize(("name", "module"), equation_rows())
def test_a_function_beside_an_equation_exists(name, module):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_the_equation_table_is_found():
    assert len(equation_rows()) >= 12


def links(page):
    """Relative links and pictures of a page: target (empty for the page itself), heading."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"""(?:\]\(|(?:src|href)=")(?!https?://)([^)"#]*)#?([^)"]*)""", text)
    return [target for target in found if any(target)]


def headings(page):
    """The headings of a page as a link names them."""
    found = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page):
    targets = [target for target, _ in links(page) if target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_to_a_heading_name_one(page):
    named = [(page.parent / target if target else page, name) for target, name in links(page)]
    assert [
        (other.name, name)
        for other, name in named
        if name and other.suffix == ".md" and name not in headings(other)
    ] == []


def test_readme_fits_the_first_screens_and_leads_to_every_page():
    assert len(text_of(README).splitlines()) < FIRST_SCREEN
    linked = {(ROOT / target).resolve() for target, _ in links(README) if target}
    assert set(PAGES) - {README, *ROOT.glob("research/benchmarks/*.md")} - linked == set()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_in_running_text_exist(page):
    named = re.findall(r"`((?:docs|presets|tests|research|mlm_plugin)/[\w./]*)`", text_of(page))
    assert [path for path in named if not (ROOT / path).exists()] == []
