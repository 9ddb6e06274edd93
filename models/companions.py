"""What travels with a model: every small file that is neither weights nor code, in sub-folders too.

Saving and exporting call :func:`copy_companions`. Nobody can list what tokenizers, processors and
sentence encoders read (``bpe.codes``, ``1_Pooling/config.json``, a licence), so what does *not*
travel is told instead: weights, code, what a new checkpoint or package has of its own, hidden
files, links, whose target may be anything, and files over :data:`LARGEST` bytes.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.files import open_inside, read_json, size_text
from ffmerge.models.stored import GGUF, PICKLES, hub_blobs

LARGEST = 50_000_000  # bytes; the largest tokenizers have 35 MB
_WEIGHTS = (
    *PICKLES, GGUF, ".safetensors", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".onnx.data",
    ".ort", ".tflite", ".pb", ".npz", ".npy", ".mlmodel", ".ggml", ".tar", ".zip", ".gz",
)  # fmt: skip
_CODE = (
    ".py", ".pyc", ".ipynb", ".sh", ".bat", ".ps1", ".exe", ".so", ".dll", ".dylib", ".js", ".mjs",
    ".wasm", ".jar", ".class", ".c", ".cpp", ".cu", ".whl",
)  # fmt: skip
# What is written anew, or describes weights that do not travel as they are.
_OWN = (
    "config.json",
    "adapter_config.json",
    "ffmerge.json",
    "validation.json",
    "validation.failed.json",
    "similarity.json",
)
_VERSION_CONTROL = ("CVS", "_darcs", "__pycache__")


def is_companion(name: str, size: int) -> bool:
    """Tell whether a file of a model folder, by its path inside and its bytes, travels with it."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part in _VERSION_CONTROL for part in path.parts):
        return False
    lower = path.name.lower()
    if lower.endswith((*_WEIGHTS, *_CODE)) or ".index." in lower or str(path) in _OWN:
        return False
    return size <= LARGEST


def copy_companions(source: Path, target: Path) -> None:
    """Copy what travels with a model and ``target`` does not have yet.

    The weights of a sentence encoder's further modules travel as well. What is left behind because
    it is a link, or too large, is warned of by name.
    """
    modules = modules_of(source)
    for path in _walk(source):
        name = path.relative_to(source).as_posix()
        size = 0 if path.is_symlink() else path.lstat().st_size
        of_module = path.suffix == ".safetensors" and path.parent in modules
        if (of_module or is_companion(name, size)) and not (target / name).exists():
            _copy(source, name, target / name)
        elif size > LARGEST and is_companion(name, 0):
            _warn(f"{name} ({size_text(size)}) is over {size_text(LARGEST)}")


def companion_bytes(folder: Path) -> int:
    """Return the bytes of the small files that travel: tokenizer, processor, configuration."""
    with TemporaryDirectory() as copied:
        copy_companions(folder, Path(copied))
        files = [path for path in Path(copied).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)


def _walk(source: Path) -> Iterator[Path]:
    """Yield the files below a folder in order, but no links to folders and no other package's."""
    for folder, names, files in os.walk(source):
        here = Path(folder)
        kept = []
        for name in sorted(names):
            is_package = (here / name / "ffmerge.json").exists()
            if not (name.startswith(".") or name in _VERSION_CONTROL or is_package):
                kept.append(name)
        names[:] = kept
        yield from (here / name for name in sorted(files))


def modules_of(source: Path) -> set[Path]:
    """Return the sub-folders in which a sentence encoder keeps modules beside its Transformer."""
    file = source / "modules.json"
    if not file.is_file():
        return set()
    modules = read_json(file)
    paths = set()
    for module in modules if isinstance(modules, list) else ():
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path and ".." not in path:
            paths.add(source / path)
    return paths


def _copy(source: Path, name: str, target: Path) -> None:
    """Copy one file of the folder's own; a link is left behind, but for those of a hub cache."""
    blobs, real = hub_blobs(source), (source / name).resolve()
    try:
        if blobs is not None and real.parent == blobs:
            descriptor = open_inside(blobs, real.name)
        else:
            descriptor = open_inside(source, name)
    except InputError as error:
        return _warn(f"{name} {str(error).rstrip('.')}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(descriptor, "rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written)


def _warn(what: str) -> None:
    warnings.warn(f"left behind: {what}.", FfmergeWarning, stacklevel=3)
