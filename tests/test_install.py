"""What users install: an editable clone, a wheel, a source distribution; and two traps of paths."""

import os
import shutil
import site
import stat
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
WHOLE = "import eqxmeta, eqxmeta.callbacks; print(eqxmeta.__file__, eqxmeta.data, eqxmeta.MAML)"


def run(*command: object, cwd: Path) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


def environment(folder: Path) -> Path:
    """The Python of a new environment, which sees the packages of this one (but not what is
    editable here): nothing is downloaded."""
    venv.create(folder)
    (packages(folder) / "outer.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin" / "python"


def install(python: Path, *what: object) -> None:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=ROOT)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as it is, in a folder of the name that `git clone` gives it."""
    folder = tmp_path_factory.mktemp("home") / "eqxmeta"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore)


@pytest.fixture(scope="module")
def built(clone):
    """The source distribution, and the wheel that was made of it."""
    backend = "import setuptools.build_meta as b; print(b.build_{}('dist'))"
    source = run(sys.executable, "-c", backend.format("sdist"), cwd=clone).splitlines()[-1]
    with tarfile.open(clone / "dist" / source) as archive:
        archive.extractall(clone / "dist", filter="data")
    unpacked = clone / "dist" / source.removesuffix(".tar.gz")
    wheel = run(sys.executable, "-c", backend.format("wheel"), cwd=unpacked).splitlines()[-1]
    return clone / "dist" / source, unpacked / "dist" / wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A Python in whose environment the wheel is installed."""
    python = environment(tmp_path_factory.mktemp("plain"))
    install(python, built[1])
    return python


def modules() -> set[str]:
    """Every file of the library, those of `eqxmeta/callbacks` by that name."""
    found = {"eqxmeta/py.typed"}
    for folder, _, names in os.walk(ROOT / "eqxmeta", followlinks=True):
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found |= {path.relative_to(ROOT).as_posix() for path in paths}
    assert "eqxmeta/callbacks/__init__.py" in found
    return found


def test_a_script_beside_the_clone_after_an_editable_install(clone, tmp_path):
    # Python finds the folder of the clone first, which is no package, and has to go on looking.
    python = environment(tmp_path)
    install(python, "-e", clone)
    script = clone.parent / "script.py"
    script.write_text(WHOLE)
    assert run(python, script, cwd=tmp_path).startswith(str(clone / "eqxmeta" / "__init__.py"))


def test_in_the_root_of_the_clone_after_a_plain_install(clone, installed):
    told = run(installed, "-c", WHOLE, cwd=clone)
    assert told.startswith(str(clone / "eqxmeta" / "__init__.py"))


def test_an_installed_wheel_is_imported(installed, tmp_path):
    told = run(installed, "-c", WHOLE, cwd=tmp_path)
    assert told.startswith(str(packages(installed.parents[1]) / "eqxmeta" / "__init__.py"))


def test_the_wheel_holds_the_library_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        infos = wheel.infolist()
    assert not any(stat.S_ISLNK(info.external_attr >> 16) for info in infos)
    names = {info.filename for info in infos if ".dist-info/" not in info.filename}
    assert names == modules()


def test_the_source_distribution_holds_real_files(built):
    with tarfile.open(built[0]) as source:
        members = source.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert names >= modules() | {"README.md", "LICENSE", "pyproject.toml"}
