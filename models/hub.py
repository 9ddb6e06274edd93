"""A model of the Hugging Face hub as a local folder: what it needs, and nothing else.

``source.resolve`` calls :func:`fetch` for what is no folder. The hub tells which files there are;
fetched are the small ones and then the weights that ``config.json`` or the index names: a
repository may hold the same weights in five formats.
"""

import glob
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ffmerge.config import LoadConfig
from ffmerge.errors import InputError, first_line
from ffmerge.models.adapter import ADAPTER
from ffmerge.models.companions import is_companion, modules_of
from ffmerge.models.stored import GGUF, OWN_FILE, weight_names


def is_id(source: str) -> bool:
    """Tell whether a text has the form of the name of a model."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) is not None


def fetch(name: str, options: LoadConfig, weights: bool) -> Path:
    """Return the folder of the hub cache with the files of a model; without weights if not wanted.

    Where the hub cannot be reached, what the cache has of the model is taken.

    Raises:
        InputError: there is no such model, revision or sub-folder, or no access to it.
    """
    try:
        return _fetched(name, options, weights)
    except InputError:
        raise
    except Exception as error:  # the hub client's errors have no common head across its releases
        raise InputError(
            f"{name} is not a local folder, and fetching it from the hub failed: "
            f"{first_line(error)}"
        ) from error


def _fetched(name: str, options: LoadConfig, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"{options.subfolder}/" if options.subfolder else ""
    given: dict[str, Any] = {"token": options.token, "revision": options.revision}

    def download(files: Iterable[str], **how: Any) -> Path:
        """Have these files of the sub-folder in the cache; return their folder there."""
        patterns = [glob.escape(prefix + file) for file in files]
        return Path(snapshot_download(name, allow_patterns=patterns, **given, **how), prefix)

    try:
        about = HfApi().model_info(name, files_metadata=True, **given)
    except HfHubHTTPError:
        raise
    except Exception:  # no network: each client library raises errors of its own
        return download(["config.json"], local_files_only=True)
    sizes = _sizes(about.siblings or (), prefix)
    if prefix and not sizes:
        raise InputError(f"{name} has no sub-folder {options.subfolder!r} on the hub.")
    small = [file for file in sizes if _is_small(file, sizes[file], options.trust_remote_code)]
    folder = download(small)
    if weights:
        download(_weights(folder, sizes))
    return folder


def _sizes(listed: Iterable[Any], prefix: str) -> dict[str, int]:
    """Return the sizes of the files whose path begins with ``prefix``, by what follows it."""
    sizes = {}
    for file in listed:
        if file.rfilename.startswith(prefix):
            sizes[file.rfilename.removeprefix(prefix)] = file.size or 0
    return sizes


def _is_small(name: str, size: int, trust_remote_code: bool) -> bool:
    """Tell whether a file is fetched before it is known which weights are."""
    if name.endswith(".py"):
        return trust_remote_code
    if name in ("config.json", "adapter_config.json", OWN_FILE):
        return True
    if name.endswith(".json") and ".index." in name:
        return True
    return is_companion(name, size)


def _weights(folder: Path, there: Collection[str]) -> list[str]:
    """Return the weight files that are read: those of the model, of an adapter, of modules."""
    wanted = {ADAPTER}
    for variant in ("", "ffmerge"):
        infix = f".{variant}" if variant else ""
        single = f"model{infix}.safetensors"
        wanted |= {single} if single in there else set(weight_names(folder, variant)[1])
    for module in modules_of(folder):
        wanted.add(f"{module.relative_to(folder).as_posix()}/model.safetensors")
    found = wanted & {*there}
    if found:
        return sorted(found)
    packed = sorted(file for file in there if file.endswith(GGUF))
    if len(packed) > 1:
        raise InputError(
            f"the model of the hub has several {GGUF} files, {packed[0]} among them: fetch one and "
            "give its path."
        )
    return packed
