"""What `make release-check` does: sdist and wheel are built, and used outside of the repository.

For each Python from 3.11 on that is on this machine: the wheel in a fresh environment without
torch, in which a package is audited, shared and validated; then the sdist, which must have the same
version. With ``--torch`` also all of it with the extra ``torch``. Prints what each environment
takes on disk. A Python that is not there is named, and is no failure.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "digits_vit"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCH = "torch==2.13.0"  # a plain torch would bring gigabytes of CUDA packages


def run(*words: object, code: int = 0) -> str:
    """Return what a command prints, outside of the repository; it must end with ``code``."""
    environment = dict(os.environ)
    if words[0] != sys.executable:  # an environment of its own has no other ffmerge on the path
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
        env=environment,
    )
    if done.returncode != code:
        sys.exit(f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find_python(release: str) -> str | None:
    """Return the interpreter of a release, on the path or of pyenv, if it runs."""
    candidates = [shutil.which(f"python{release}")]
    candidates += sorted(Path.home().glob(f".pyenv/versions/{release}.*/bin/python"))
    for candidate in candidates:
        if candidate is None:
            continue
        words = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        said = subprocess.run(words, capture_output=True, text=True)
        if said.stdout.strip() == release:
            return str(candidate)
    return None


def fresh(python: str, folder: Path, *wanted: object) -> Path:
    """Return the folder of the programs of a new environment with what is wanted in it."""
    run(python, "-m", "venv", "--clear", folder)
    run(folder / "bin" / "pip", "install", "-q", *wanted)
    return folder / "bin"


def disk(folder: Path) -> str:
    """Return what a folder takes, in MB, without pip, which every environment has."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    own = [path for path in files if not any(part.startswith("pip") for part in path.parts)]
    return f"{sum(path.stat().st_size for path in own) / 1e6:,.0f} MB"


def check_device(bin: Path, package: Path, out: Path) -> None:
    """Do what a device does, and see that the rest says what is missing."""
    ffmerge = bin / "ffmerge"
    run(ffmerge, "audit", package)
    run(ffmerge, "validate", package)
    run(ffmerge, "share", package / "model.onnx", out)
    run(ffmerge, "audit", out)
    said = run(ffmerge, "merge", MODEL, out.with_name("merged"), "--k", "2", code=2)
    assert "pip install 'ffmerge[torch]'" in said, said


def main() -> None:
    """Build once, and check every Python that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("pythons", nargs="*", default=PYTHONS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as there:
        scratch = Path(there)
        run(sys.executable, "-m", "build", "--outdir", scratch, ROOT)
        (sdist,), (wheel,) = scratch.glob("*.tar.gz"), scratch.glob("*.whl")
        print(f"{sdist.name} {sdist.stat().st_size / 1e3:,.0f} kB, {wheel.name} "
              f"{wheel.stat().st_size / 1e3:,.0f} kB")  # fmt: skip
        run(sys.executable, "-m", "ffmerge", "export", MODEL, scratch / "package")
        for release in asked.pythons:
            python = find_python(release)
            if python is None:
                print(f"Python {release}: not on this machine, not checked")
                continue
            bin = fresh(python, scratch / "venv", wheel)
            version = run(bin / "ffmerge", "--version").strip()
            package = shutil.copytree(scratch / "package", scratch / f"package{release}")
            check_device(bin, package, scratch / f"shared{release}.onnx")
            said = f"Python {release}: {version}, {disk(scratch / 'venv')} without torch"
            if asked.torch:
                run(bin / "pip", "install", "-q", TORCH)
                run(bin / "pip", "install", "-q", f"{wheel}[torch]")
                merged = scratch / f"merged{release}"
                run(
                    bin / "ffmerge",
                    "merge",
                    MODEL,
                    merged,
                    "--window",
                    "1-2",
                    "--method",
                    "weights",
                )
                run(bin / "ffmerge", "export", merged, scratch / f"exported{release}")
                run(bin / "ffmerge", "validate", scratch / f"exported{release}")
                said += f", {disk(scratch / 'venv')} with it"
            bin = fresh(python, scratch / "venv", sdist)
            of_sdist = run(bin / "ffmerge", "--version").strip()
            assert of_sdist == version, of_sdist
            print(f"{said}; the sdist is the same version")


if __name__ == "__main__":
    main()
