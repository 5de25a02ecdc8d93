"""The wheel, the libraries in it, and what a user is told when something is missing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import env

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
ASK = "pip install --no-build-isolation ."


def run(
    *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Output of a command: both streams in one, as a user sees them."""
    merged = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=merged,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )


def succeed(*command: str | Path, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: str | Path, **options) -> str:
    return succeed(sys.executable, "-m", "pip", *arguments, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A release wheel, built from this tree and its build folder even though testing is switched on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT, env={"FUSEDRNN_TESTING": "1"})
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def libraries(installed) -> list[Path]:
    found = sorted((installed / "fusedrnn" / "lib").iterdir())
    assert found
    return found


def copy_sources(folder: Path) -> None:
    """What setup.py reads, where a test may change it."""
    (folder / "fusedrnn").mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fusedrnn/__init__.py"):
        shutil.copy(ROOT / name, folder / name)


def library_names() -> set[str]:
    names = {"libfusedrnn_cpu.so"}
    skipped = os.environ.get("FUSEDRNN_SKIP_CUDA", "0") not in ("", "0")
    if not skipped and shutil.which(os.environ.get("CUDACXX", "nvcc")):
        names.add("libfusedrnn_cuda.so")
    return names


def test_one_wheel_serves_every_python(wheel):
    assert wheel.name == f"fusedrnn-{fusedrnn.__version__}-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        (tags,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        text = archive.read(tags).decode()
    assert "Tag: py3-none-linux_x86_64\n" in text
    assert "Root-Is-Purelib: false\n" in text


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fusedrnn").rglob("*.py")}
    libraries = {f"fusedrnn/lib/{name}" for name in library_names()}
    assert names == sources | libraries | {"fusedrnn/py.typed"}


def test_metadata_names_what_the_user_needs(wheel):
    (entry,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    lines = zipfile.ZipFile(wheel).read(entry).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines


def test_libraries_have_no_python_symbol(libraries):
    for library in libraries:
        symbols = succeed("nm", "-D", library)
        assert "GLIBC" in symbols  # the table was read
        assert not re.findall(r"\b_?Py[A-Z_]\w*", symbols), library.name
        needed = re.findall(r"NEEDED.*\[(.+)\]", succeed("readelf", "-d", library))
        assert "libtorch.so" in needed
        assert not [name for name in needed if "python" in name], library.name


def test_libraries_carry_no_path_of_the_builder(libraries):
    for library in libraries:
        assert not re.findall(r"\((?:RPATH|RUNPATH)\).*", succeed("readelf", "-d", library)), library.name
        content = library.read_bytes()
        for path in (ROOT, TORCH):
            assert str(path).encode() not in content, f"{library.name} names {path}"


def test_wide_instructions_stay_in_their_namespace(installed):
    """An inline function that the wide objects share with the rest must not be taken from them."""
    code = succeed("objdump", "-d", "--no-show-raw-insn", installed / "fusedrnn/lib/libfusedrnn_cpu.so")
    namespaces = "|".join(f"{len(isa)}{isa}" for isa in env.CPU_ISAS if isa != "portable")
    function, wide, misplaced = "", 0, set()
    for line in code.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = header[1]
        elif "\tv" in line and "mm" in line:  # v...: the encoding that only wide processors know
            wide += 1
            if not re.search(namespaces, function) or (
                "\tvdpbf16ps" in line and "10avx512bf16" not in function
            ):
                misplaced.add(function)
    assert wide > 0
    assert not misplaced


def test_installed_package_works_outside_the_source_tree(installed, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import torch, fusedrnn
assert fusedrnn.__file__.startswith({str(installed)!r}), fusedrnn.__file__
assert fusedrnn.backends()["cpu"].available, fusedrnn.backends()["cpu"].reason
with fusedrnn.use_backend("cpu"):
    y, _ = fusedrnn.LSTM(3, 5)(torch.zeros(2, 1, 3))
print(tuple(y.shape))
"""
    assert succeed(sys.executable, "-I", "-c", script, cwd=tmp_path).splitlines()[-1] == "(2, 1, 5)"


def test_cuda_library_loads_and_says_what_it_was_built_for(libraries):
    assert {library.name for library in libraries} == library_names()
    for library in libraries:
        if library.name == "libfusedrnn_cuda.so":
            # Lazily: a torch without CUDA has no function that tells the current stream.
            built_for = ctypes.CDLL(str(library), mode=os.RTLD_LAZY).fusedrnn_cuda_built_for
            built_for.restype = ctypes.c_char_p
            assert {b"80", b"90a"} <= set(built_for().split())


def test_version_is_written_once(tmp_path):
    """The version in the sources is the version of the distribution, whatever it is."""
    assert importlib.metadata.version("fusedrnn") == fusedrnn.__version__
    copy_sources(tmp_path)
    source = tmp_path / "fusedrnn" / "__init__.py"
    source.write_text(source.read_text().replace(f'"{fusedrnn.__version__}"', '"98.7.6"'))
    assert succeed(sys.executable, "setup.py", "--version", cwd=tmp_path).splitlines()[-1] == "98.7.6"


def test_sdist_holds_what_a_build_needs(tmp_path):
    # Without torch in sight: sources need none. With an egg-info of its own: an older one's list is kept.
    succeed(
        *(sys.executable, "-S", "setup.py"),
        *("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path),
        cwd=ROOT,
        env={"PYTHONPATH": setuptools_alone(tmp_path)},
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "fusedrnn").rglob("*.py")}
    assert len(sources) > 10
    needed = sources | {"CMakeLists.txt", "LICENSE", "README.md", "fusedrnn/py.typed", "setup.py"}
    assert not needed - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def setuptools_alone(folder: Path) -> str:
    """A folder from which setuptools, and nothing else, can be imported."""
    alone = folder / "alone"
    alone.mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for path in [site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*.dist-info")]:
        (alone / path.name).symlink_to(path)
    return str(alone)


def setuptools_wheel(folder: Path) -> Path:
    """The installed setuptools as a wheel: an isolated build can be run without a network."""
    distribution = importlib.metadata.distribution("setuptools")
    path = folder / f"setuptools-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files or []:
            if file.suffix != ".pyc" and ".." not in file.parts:
                archive.write(distribution.locate_file(file), str(file))
    return path


def test_isolated_build_stops_before_torch_is_fetched(tmp_path):
    setuptools_wheel(tmp_path)
    done = run(
        *(sys.executable, "-m", "pip", "install", "--no-index", "--find-links", tmp_path),
        *("--target", tmp_path / "target", "--ignore-installed", ROOT),
        env={"PIP_CONFIG_FILE": os.devnull},
    )
    assert done.returncode != 0
    assert ASK in done.stdout
    assert "Installing build dependencies: finished with status 'done'" in done.stdout
    assert "torch>=" not in done.stdout  # how pip names the requirement when it looks for it
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [name for name in requires if name.startswith("torch")]


@pytest.mark.parametrize(
    ("torch_version", "message"),
    [(None, "torch is not visible to this build"), ("2.9.1", "torch 2.9.1 is too old")],
)
def test_missing_or_old_torch_is_named(tmp_path, torch_version, message):
    alone = setuptools_alone(tmp_path)
    if torch_version:
        (tmp_path / "alone" / "torch").mkdir()
        (tmp_path / "alone" / "torch" / "__init__.py").touch()
        info = tmp_path / "alone" / f"torch-{torch_version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
    hook = f"from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    done = run(sys.executable, "-S", "-c", hook, cwd=ROOT, env={"PYTHONPATH": alone})
    assert done.returncode != 0
    assert message in done.stdout
    assert "Traceback" not in done.stdout


def configure(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Configures a build of its own, as setup.py does."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ["PATH"]])
    defaults = {"PATH": path, "FUSEDRNN_SKIP_CUDA": "", "FUSEDRNN_FORCE_CUDA": "", "FUSEDRNN_TESTING": ""}
    cmake = shutil.which("cmake", path=path)
    assert cmake
    return run(
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DTORCH_ROOT={TORCH}", env={**defaults, **env}
    )


@pytest.fixture(params=["cannot run", "cannot compile"])
def broken_nvcc(request, tmp_path) -> Path:
    """An nvcc that leaves a trace when it is run, and fails at once or where it should compile."""
    script = tmp_path / "broken" / "nvcc"
    script.parent.mkdir()
    lists = (
        '[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0' if request.param == "cannot compile" else ""
    )
    script.write_text(
        f"#!/bin/sh\ntouch {tmp_path}/nvcc-ran\n{lists}\necho 'the toolkit is damaged' >&2\nexit 7\n"
    )
    script.chmod(0o755)
    return script


def test_build_without_nvcc_is_cpu_only_and_says_so(tmp_path):
    done = configure(tmp_path / "build", CUDACXX="/nonexistent/nvcc")
    assert done.returncode == 0, done.stdout
    assert "CUDA library: not built: nvcc not found" in done.stdout
    assert "fusedrnn_cuda" not in (tmp_path / "build" / "build.ninja").read_text()


def test_forced_cuda_without_nvcc_fails_and_says_why(tmp_path):
    done = configure(tmp_path / "build", CUDACXX="/nonexistent/nvcc", FUSEDRNN_FORCE_CUDA="1")
    assert done.returncode != 0
    message = " ".join(done.stdout.split())  # CMake wraps lines
    assert "FUSEDRNN_FORCE_CUDA is set, but the CUDA library cannot be built: nvcc not found" in message


def test_broken_nvcc_leaves_the_cpu_build_alone(tmp_path, broken_nvcc):
    done = configure(tmp_path / "build", CUDACXX=str(broken_nvcc))
    assert done.returncode == 0, done.stdout
    assert "does not work here" in done.stdout
    assert "the toolkit is damaged" in done.stdout
    build = (tmp_path / "build" / "build.ninja").read_text()
    assert "libfusedrnn_cpu.so" in build
    assert "libfusedrnn_cuda.so" not in build

    forced = configure(tmp_path / "build", CUDACXX=str(broken_nvcc), FUSEDRNN_FORCE_CUDA="1")
    assert forced.returncode != 0
    assert "the toolkit is damaged" in forced.stdout


def test_skipped_cuda_does_not_touch_nvcc(tmp_path, broken_nvcc):
    done = configure(tmp_path / "build", CUDACXX=str(broken_nvcc), FUSEDRNN_SKIP_CUDA="1")
    assert done.returncode == 0, done.stdout
    assert "CUDA library: not built: FUSEDRNN_SKIP_CUDA is set" in done.stdout
    assert not (tmp_path / "nvcc-ran").exists()


def test_failed_native_build_fails_the_installation(tmp_path):
    """Through setup.py, as a user meets it: the environment reaches CMake and its failure reaches pip."""
    copy_sources(tmp_path)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    done = run(
        *(sys.executable, "setup.py", "build_ext", "--inplace"),
        cwd=tmp_path,
        env={"CUDACXX": "/nonexistent/nvcc", "FUSEDRNN_FORCE_CUDA": "1", "FUSEDRNN_SKIP_CUDA": ""},
    )
    assert done.returncode != 0
    assert "nvcc not found" in " ".join(done.stdout.split())  # CMake wraps lines
    assert "fusedrnn: the native build failed" in done.stdout
    assert "Traceback" not in done.stdout
