"""A model of the Hugging Face hub as a local folder: what it needs, and nothing else.

``source.resolve`` calls :func:`fetch` for what is no folder. The hub tells which files there are;
fetched are the small ones and then the weights that ``config.json`` or the index names: a
repository may hold the same weights in five formats.
"""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ffmerge.config import LoadConfig
from ffmerge.errors import InputError
from ffmerge.models.adapter import ADAPTER
from ffmerge.models.companions import is_companion, modules_of
from ffmerge.models.modeling_ffmerge import OWN_FILE
from ffmerge.models.stored import GGUF, weight_names


def fetch(name: str, options: LoadConfig, weights: bool) -> Path:
    """Return the folder of the hub cache with the files of a model; without weights if not wanted.

    Where the hub cannot be reached, what the cache has of the model is taken.

    Raises:
        InputError: there is no such model, revision or sub-folder, or no access to it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    given: dict[str, Any] = {"token": options.token, "revision": options.revision}
    try:
        try:
            about = HfApi().model_info(name, files_metadata=True, **given)
        except HfHubHTTPError:
            raise
        except Exception:  # no network: each client library raises errors of its own
            config = _exactly([f"{options.subfolder}/config.json".lstrip("/")])
            snapshot = snapshot_download(
                name, local_files_only=True, allow_patterns=config, **given
            )
            return Path(snapshot, options.subfolder)
        files = {file.rfilename: file.size or 0 for file in about.siblings or ()}
        small = [file for file, size in files.items() if _is_small(file, size, options)]
        if options.subfolder and not any(
            file.startswith(f"{options.subfolder}/") for file in files
        ):
            raise InputError(f"{name} has no sub-folder {options.subfolder!r} on the hub.")
        snapshot = snapshot_download(name, allow_patterns=_exactly(small), **given)
        folder = Path(snapshot, options.subfolder)
        if weights:
            wanted = _weights(folder, files, options.subfolder)
            snapshot_download(name, allow_patterns=_exactly(wanted), **given)
    except InputError:
        raise
    except Exception as error:  # the hub client's errors have no common head across its releases
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{name} is not a local folder, and fetching it from the hub failed: {lines[0]}"
        ) from error
    return folder


def _is_small(file: str, size: int, options: LoadConfig) -> bool:
    """Tell whether a file is fetched before it is known which weights are."""
    folder = f"{options.subfolder}/" if options.subfolder else ""
    if not file.startswith(folder):
        return False
    name = file.removeprefix(folder)
    if name.endswith(".py"):
        return options.trust_remote_code
    if name in ("config.json", "adapter_config.json", OWN_FILE):
        return True
    if name.endswith(".json") and ".index." in name:
        return True
    return is_companion(name, size)


def _weights(folder: Path, files: Iterable[str], subfolder: str) -> list[str]:
    """Return the weight files that are read: those of the model, of an adapter, of modules."""
    prefix = f"{subfolder}/" if subfolder else ""
    there = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    wanted = set()
    for variant in ("", "ffmerge"):
        infix = f".{variant}" if variant else ""
        single = f"model{infix}.safetensors"
        wanted |= {single} if single in there else set(weight_names(folder, variant)[1])
    wanted.add(ADAPTER)
    for module in modules_of(folder):
        wanted.add(f"{module.relative_to(folder).as_posix()}/model.safetensors")
    found = wanted & {*there}
    if not found:
        found = {file for file in there if file.endswith(GGUF)}
        if len(found) > 1:
            raise InputError(
                f"the model of the hub has several {GGUF} files, {min(found)} among them: fetch "
                "one and give its path."
            )
    return sorted(prefix + file for file in found)


def _exactly(names: Iterable[str]) -> list[str]:
    return [glob.escape(name) for name in names]
