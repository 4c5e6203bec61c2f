"""The package as it is installed: what a wheel holds, that it trains away from the checkout, and what a script says without it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import roi_quantization
from tests.configuration import ROOT
from tests.trainings import SHORT

SCRIPTS = ("train", "eval", "predict", "recall", "explain", "compare", "predict_cost", "probe")
FOLDERS = ("ops", "roi_heads", "detection", "configs")  # each a subpackage of roi_quantization
GENERATED = {"data", "runs", "multirun", "outputs", "build"}  # by .gitignore


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves a build folder, whose old files would enter the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (*FOLDERS, "roi_quantization"):
        shutil.copytree(ROOT / name, source / name)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source]
    subprocess.run([*build, "--quiet", "--disable-pip-version-check"], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` of a new environment with the wheel and this environment's dependencies, but not its roi_quantization.

    A folder that a .pth file names is searched, and its own .pth files, such as that of an editable installation, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    bin, site_packages = folder / "bin", next(folder.glob("lib/python*/site-packages"))
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))
    install = [bin / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel]
    subprocess.run([*install, "--quiet", "--disable-pip-version-check"], check=True, cwd=folder)
    return bin


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = {"roi_quantization/__init__.py", "roi_quantization/py.typed"}
    expected |= {f"roi_quantization/scripts/{name}.py" for name in SCRIPTS}
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in (".py", ".yaml", ".jinja")]
        assert files
        expected |= {f"roi_quantization/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert found == expected


def test_the_wheel_carries_the_version_and_the_license(wheel):
    with zipfile.ZipFile(wheel) as file:
        folder = f"roi_quantization-{roi_quantization.__version__}.dist-info"
        metadata, license = file.read(f"{folder}/METADATA").decode(), file.read(f"{folder}/licenses/LICENSE").decode()
    assert f"\nVersion: {roi_quantization.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "Apache License" in license and "END OF TERMS AND CONDITIONS" in license


def test_an_installed_copy_trains_from_an_empty_folder(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ROI_CACHE")}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = "import roi_quantization as r, roi_quantization.ops as o; print(r.__file__, o.__file__, r.compose('train').run_dir, sep='\\n')"
    *where, run_dir = run(installed / "python", "-c", first).splitlines()  # compose needs nothing that another module has registered
    assert all(Path(line).is_relative_to(installed.parent) for line in where) and run_dir.startswith(f"{tmp_path}/runs/")
    trained = run(installed / "roi-train", *SHORT, "roi=warp", "trainer.max_steps=2", "hydra.run.dir=run")
    assert "on test: 4 images" in trained
    assert (tmp_path / "run" / "best.ckpt").is_file() and (tmp_path / "data" / "embedded").is_dir()


@pytest.mark.slow  # tests/test_my_project.py trains and evaluates the same project with this environment
def test_an_operator_of_ones_own_is_trained_evaluated_and_explained_with_an_installed_copy(installed, tmp_path):
    project = shutil.copytree(ROOT / "examples" / "my_project", tmp_path / "project")
    environment = {name: value for name, value in os.environ.items() if name != "ROI_CACHE"} | {"PYTHONPATH": str(project)}

    def run(program, *arguments):
        command = [installed / program, "--config-dir", "configs", *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    trained = run("roi-train", "experiment=my_project", "trainer=cpu", "trainer.max_epochs=2", "hydra.run.dir=run")
    assert "on val:" in trained
    evaluated = run("roi-eval", "ckpt=run/best.ckpt", "split=val", "trainer=cpu", "hydra.run.dir=again")
    assert "on val:" in evaluated
    assert (project / "again/results.json").read_bytes() == (project / "run/results.json").read_bytes()
    (project / "configs/roi/align_4_samples.yaml").write_text("defaults: [align]\nsampling_ratio: 4\n")  # explained by its samples
    explained = run("roi-explain", "operators=[align,align_4_samples]", "picture=explained.png")
    assert "align_4_samples" in explained and (project / "explained.png").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_the_package_names_the_command_that_installs_it(script, tmp_path):
    """`-S` leaves site-packages out."""
    done = subprocess.run([sys.executable, "-S", ROOT / f"{script}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"roi_quantization is not installed. Run: pip install -e {ROOT}\n"


def test_a_script_of_another_checkout_than_the_installed_one_says_so(tmp_path):
    for name in ("roi_quantization", "ops"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path} is not the checkout that is installed, which is {ROOT}. Run: pip install -e {tmp_path}\n"


def files(pattern: str) -> list[Path]:
    """Of the checkout, without what it generates and without folders whose name begins with a dot."""
    paths = (path for path in ROOT.rglob(pattern) if not path.relative_to(ROOT).parts[0].startswith("."))
    return sorted(path for path in paths if path.relative_to(ROOT).parts[0] not in GENERATED)


def bare_names(python: str) -> list[str]:
    """What this code names without `roi_quantization.`: imports, and dotted names in strings, such as those that tests replace."""
    names, in_strings = [], []
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value):
            in_strings.append(node.value)
    found = [name for name in names if name.split(".")[0] in (*FOLDERS, *SCRIPTS)]
    return found + [name for name in in_strings if is_module(*name.split(".")[:2])]


def is_module(folder: str, name: str) -> bool:
    """`ops.geometry` is one, `roi_heads.box_predictor` is a weight's name."""
    return folder in FOLDERS and ((ROOT / folder / name).is_dir() or (ROOT / folder / f"{name}.py").is_file())


def test_bare_names_are_found():
    imports = "import ops, os\nimport roi_quantization.ops\nfrom detection.files import x\nfrom train import main"
    code = f"{imports}\nreplace('ops.cpu.pool', 'train.py', 'roi_heads.box_predictor.weight')"
    assert bare_names(code) == ["ops", "detection.files", "train", "ops.cpu.pool"]


def test_no_python_file_imports_a_folder_by_its_own_name():
    """`import ops` would load a second copy of the operators, and register them twice."""
    found = {str(path.relative_to(ROOT)): bare_names(path.read_text()) for path in files("*.py") if path != Path(__file__)}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_python_block_of_a_document_imports_a_folder_by_its_own_name():
    blocks = {path: re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL) for path in files("*.md")}
    assert sum(map(len, blocks.values())) > 1
    found = {str(path.relative_to(ROOT)): [name for block in blocks for name in bare_names(block)] for path, blocks in blocks.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_command_of_a_document_runs_a_folder_by_its_own_name():
    found = {
        str(path.relative_to(ROOT)): re.findall(rf"-m (?:{'|'.join((*FOLDERS, *SCRIPTS))})\b.*", path.read_text())
        for pattern in ("*.md", "*.py", "*.yaml")
        for path in files(pattern)
        if path != Path(__file__)
    }
    assert {path: commands for path, commands in found.items() if commands} == {}


def test_no_configuration_names_a_folder_by_its_own_name():
    def targets(node):
        if isinstance(node, dict):
            yield from (node[key] for key in ("_target_", "path") if isinstance(node.get(key), str))
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from targets(value)

    found = [(path, target) for path in files("*.yaml") for target in targets(yaml.safe_load(path.read_text()))]
    assert len(found) > 30
    assert [(path, target) for path, target in found if target.split(".")[0] in FOLDERS] == []
