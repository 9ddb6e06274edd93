"""The weight files of a checkpoint: which ones transformers reads, all of them in its folder.

``checkpoint.load`` asks before it reads anything, ``hub.py`` to fetch no others, and the manifest
for what a package was made of. Names come from ``config.json`` or an index, which others wrote: a
path that leads out of the folder is refused, also by a link, and so is all that is no safetensors.
"""

from pathlib import Path

from ffmerge.errors import InputError
from ffmerge.files import read_json
from ffmerge.models.manifest import NAME

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GGUF = ".gguf"
OWN_FILE = "ffmerge.safetensors"  # of layers that share; as in modeling_ffmerge.py, which travels


def weight_files(folder: Path, variant: str = "") -> list[Path]:
    """Return the files that transformers reads the weights of ``folder`` from.

    Raises:
        InputError: there are none, or one is missing, outside the folder or not safetensors.
    """
    main, named = weight_names(folder, variant)
    if not named:
        _refuse_none(folder)
    paths = []
    for name in named:
        _check(folder, name, main)
        paths.append(folder / name)
    return paths


def weight_names(folder: Path, variant: str = "") -> tuple[str, list[str]]:
    """Return the file that names the weights of a folder, and those names as they stand there."""
    infix = f".{variant}" if variant else ""
    config = folder / "config.json"
    explicit = read_json(config).get("transformers_weights") if config.is_file() else None
    index = f"model.safetensors.index{infix}.json"
    if explicit:
        main, named = config.name, [str(explicit)]
        if named[0].endswith(".index.json"):
            main, named = named[0], _names_of(folder, named[0])
    elif (folder / f"model{infix}.safetensors").is_file():
        main = f"model{infix}.safetensors"
        named = [main]
    elif (folder / index).is_file():
        main, named = index, _names_of(folder, index)
    else:
        main, named = "", []
    return main, named


def _names_of(folder: Path, index: str) -> list[str]:
    """Return the shards that an index names, each once."""
    _check(folder, index, index)
    stored = read_json(folder / index)
    shards = stored.get("weight_map") if isinstance(stored, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{folder / index} is no index of shards: it has no weight_map of names.")
    return sorted(set(shards.values()))


def _check(folder: Path, name: str, main: str) -> None:
    """Raise InputError unless a weight file is safetensors of the folder's own."""
    path = folder / name
    by = f"{folder / main} names {name!r}" if name != main else str(path)
    if not name.endswith((".safetensors", ".json")):
        raise InputError(f"{by}: that is no safetensors file, convert it.")
    try:
        inside = not Path(name).is_absolute() and is_inside(folder, path)
        is_there = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(f"{by}: {error}.") from error
    if not inside:
        raise InputError(f"{by}: that is outside the checkpoint, copy the file into the folder.")
    if not is_there:
        raise InputError(f"{by}: there is no such file.")


def is_inside(folder: Path, path: Path) -> bool:
    """Tell if a path leads below ``folder``, or to the blobs of its hub cache."""
    real = path.resolve()
    if real.is_relative_to(folder.resolve()):
        return True
    blobs = hub_blobs(folder)
    return blobs is not None and real.parent == blobs


def hub_blobs(folder: Path) -> Path | None:
    """Return where a hub cache keeps what the links in ``folder`` lead to; None: it is no cache."""
    for parent in folder.resolve().parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent / "blobs"
    return None


def _refuse_none(folder: Path) -> None:
    """Raise InputError for a folder without weights that can be read."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    if NAME in names:
        raise InputError(
            f"{folder} is a package, whose graphs have the weights: give the checkpoint that it "
            "was exported from."
        )
    if any(name.endswith(PICKLES) for name in names):
        raise InputError(
            f"{folder} holds its weights as pickles, which can run code: convert to safetensors."
        )
    if any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"{folder} has safetensors files, but neither a model.safetensors nor an index that "
            "names them."
        )
    raise InputError(f"{folder} holds no weights, no .safetensors file: they are needed for this.")
