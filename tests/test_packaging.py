"""What is installed is ``ffmerge`` and nothing else, and every room is in it."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from setuptools import build_meta
from setuptools_scm import get_version

import ffmerge

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["setup.py", "--quiet"])
        # not in build/ of the tree, where files of an earlier build would come along
        apart = {"--global-option": ["build", f"--build-base={folder / 'build'}"]}
        name = build_meta.build_wheel(str(folder), apart)
    return zipfile.ZipFile(folder / name)


def test_the_licence_of_every_bundled_model_and_picture_is_told(wheel: zipfile.ZipFile) -> None:
    inside = {name.rpartition("/")[2] for name in wheel.namelist() if "/licenses/" in name}
    assert inside == {"LICENSE", "NOTICE"}
    told = (ROOT / "NOTICE").read_text()
    words = ["git", "ls-files", "*.safetensors", "*.png", "*.npz", "*.onnx", "*.wav"]
    tracked = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    folders = {Path(name).parent.as_posix() for name in tracked.stdout.splitlines()}
    assert all(folder in told for folder in folders)


# the one file outside ffmerge: optimum-cli looks for commands in this namespace
PLUGIN = "optimum/commands/register/register_ffmerge.py"


def test_only_ffmerge_and_the_command_for_optimum_are_installed(wheel: zipfile.ZipFile) -> None:
    outside = [n for n in wheel.namelist() if n.split("/")[0] != "ffmerge"]
    assert [n for n in outside if ".dist-info/" not in n] == [PLUGIN]
    assert not any(name.startswith("ffmerge/tests") for name in wheel.namelist())


def test_every_source_file_of_the_rooms_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    rooms = ("models", "passes", "exporter", "runtime_tests")
    sources = [p for room in rooms for p in (ROOT / room).rglob("*.py")] + list(ROOT.glob("*.py"))
    expected = {f"ffmerge/{p.relative_to(ROOT).as_posix()}" for p in sources}
    moved = "ffmerge/exporter/optimum_plugin/register_ffmerge.py"
    assert {n for n in wheel.namelist() if n.endswith(".py")} == expected - {moved} | {PLUGIN}


def test_the_demo_model_and_the_template_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in ("models/digits_vit/model.safetensors", "runtime_tests/report.html.j2", "py.typed"):
        assert f"ffmerge/{name}" in names


def test_optimum_cli_finds_the_command_of_an_installed_wheel(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    """The unpacked wheel stands first on the path, as it would be in site-packages."""
    wheel.extractall(tmp_path / "site")
    names = {p.name for p in (tmp_path / "site").iterdir() if p.suffix != ".dist-info"}
    assert names == {"ffmerge", "optimum"}
    # -S: without the editable installation that these tests run on
    packages = [p for p in sys.path if p.endswith("site-packages")]
    path = os.pathsep.join([str(tmp_path / "site"), *packages])
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import ffmerge; print(ffmerge.__file__)\n"
         "from optimum.commands.optimum_cli import main; main()", "ffmerge",
         "inspect", ROOT / "models" / "digits_vit"],
        capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "ffmerge"))
    assert "layers" in done.stdout


def test_the_packages_list_names_every_room() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(("ffmerge", *p.parent.relative_to(ROOT).parts))
        for room in ("models", "passes", "exporter", "runtime_tests")
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert set(listed) == found | {"ffmerge", "optimum.commands.register"}


def test_the_version_is_that_of_the_last_tag(tmp_path: Path) -> None:
    """In a copy without git, a clone without tags, one that is tagged, and one a commit later."""

    def found() -> Version:
        return Version(get_version(str(tmp_path), fallback_version=fallback))

    def git(*words: str) -> None:
        name = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    fallback = settings.pop("fallback_version")
    assert not settings
    assert found() == Version(fallback)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert found().is_devrelease
    git("tag", "v1.2.3")
    assert found() == Version("1.2.3")
    git("commit", "--allow-empty", "-m", "second")
    assert Version("1.2.3") < found() < Version("1.2.4") and found().is_devrelease


def test_what_is_installed_tells_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ffmerge", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ffmerge {ffmerge.__version__}\n"
    Version(ffmerge.__version__)
