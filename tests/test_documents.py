"""The documents hold: links lead somewhere, files they name exist, Python runs, and commands fit the configuration."""

import ast
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from roi_quantization.detection.runs.checkpoint import register_parts
from roi_quantization.ops import RoIWarp
from tests import detectron2_stub
from tests.configuration import ROOT, composed

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # that one names what was
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(path.read_text()) if name == language]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_that_are_named_exist(path):
    named = re.findall(r"\b(?:tests|benchmarks|ops|roi_heads|detection|configs)/[\w/.]*\.(?:py|yaml)\b", path.read_text())
    written = set(re.findall(r"as `(configs/[\w/]+\.yaml)`", path.read_text()))  # by the reader
    assert [file for file in named if file not in written and not (ROOT / file).exists()] == []


def python_blocks() -> list:
    return [
        pytest.param(text, id=f"{name_of(path)}-{number}")
        for path in (ROOT / "README.md", ROOT / "docs" / "recipes.md", ROOT / "docs" / "roi_operators.md")
        for number, text in enumerate(blocks(path, "python"))
    ]


@pytest.mark.parametrize("text", python_blocks())
def test_python_blocks_run(text):
    imported = [node.module.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    if missing := [name for name in imported if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(sorted(set(missing)))}")
    exec(compile(text, "<block>", "exec"), {})


@pytest.mark.skipif(find_spec("detectron2") is not None, reason="detectron2 is installed, and its block is run with it")
def test_the_block_on_detectron2_runs_with_what_detectron2_documents(monkeypatch):
    detectron2_stub.install(monkeypatch)
    (text,) = (text for text in blocks(ROOT / "docs" / "recipes.md", "python") if "detectron2" in text)
    names = {}
    exec(compile(text, "<block>", "exec"), names)
    rois = torch.tensor([[0, 10.0, 20.0, 90.0, 120.0]])  # by its size of the finest map, that of stride 8
    assert torch.equal(names["pooled"], RoIWarp(7, 1 / 8)(names["maps"][0], rois))


def commands(path: Path) -> list[str]:
    """`train.py roi=align ...` of every line that runs a script of ours."""
    text = path.read_text().replace("\\\n", " ")
    lines = re.findall(r"^python (\w+\.py .*|\w+\.py)$", text, re.MULTILINE)
    lines += re.findall(r"`python (\w+\.py [^`]*)`", text)
    ours = [line for line in lines if line.split(".py")[0] in ("train", "eval", "predict", "recall", "explain", "predict_cost", "probe")]
    return [line for line in ours if "<name>" not in line]  # of a file that the reader writes


def test_commands_are_found():
    assert "train.py roi=align" in [command.partition("#")[0].strip() for command in commands(ROOT / "README.md")]
    assert sum(len(commands(path)) for path in SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_commands_fit_the_configuration(path, tmp_path):
    """Each composes, a sweep with the first of its values; `configs/` are those that the document tells to write, and ours."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name, text in re.findall(r"as `(configs/[\w/]+\.yaml)`.*?^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    register_parts(OmegaConf.to_container(composed("train")), "the test")
    variables = {name: value.split() for name, value in re.findall(r'^(\w+)="(.*)"$', path.read_text(), re.MULTILINE)}
    for command in commands(path):
        script, *words = shlex.split(command.replace("--cfg job", ""), comments=True)
        words = [w for word in words for w in (variables[word[1:]] if word[:1] == "$" else [word])]
        overrides = [first_value(word) for word in words if not word.startswith("-") and "..." not in word]
        with initialize_config_dir(str(tmp_path / "configs"), version_base="1.3"):
            try:
                compose(script.removesuffix(".py"), overrides=overrides)
            except Exception as error:
                raise AssertionError(f"python {command}: {error}") from error


def first_value(word: str) -> str:
    override = OverridesParser.create().parse_override(re.sub(r"<[\w.]+>", "x", word))
    if override.is_sweep_override():
        word = f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return re.sub(r"<[\w.]+>", "x", word)
