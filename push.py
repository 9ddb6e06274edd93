"""A package on the Hugging Face hub: what its manifest names, after it was seen to be whole.

``ffmerge push`` calls :func:`push`. The hub's client talks to the hub; its token is the one that
``hf auth login`` left, or is given.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffmerge.errors import InputError, first_line
from ffmerge.models.manifest import NAME, Manifest
from ffmerge.runtime_tests.report import REPORT
from ffmerge.runtime_tests.validate import NAME as VALIDATION


@dataclass(frozen=True)
class Pushed:
    """Where a package is now, and the files that went there."""

    url: str
    files: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"url": self.url, "files": list(self.files)}


def push(folder: Path, repository: str, private: bool = False, token: str | None = None) -> Pushed:
    """Upload the package in ``folder`` as the model ``repository`` (ORG/NAME), in one commit.

    The repository is made if it is not there. What lies beside the package's own files stays, but
    for what ``validate`` wrote.

    Raises:
        InputError: the package is not whole, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    names = [file.path for file in manifest.files]
    made_for = f"{', '.join(manifest.dtypes)} for {', '.join(manifest.profiles)}"
    names += [name for name in (NAME, VALIDATION, REPORT) if (folder / name).is_file()]
    try:
        api = HfApi(token=token)
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=f"{manifest.model_type} in {made_for}, by ffmerge",
        )
    except Exception as error:  # the hub client's errors have no common head across its releases
        raise InputError(
            f"{repository} cannot be written on the hub: {first_line(error)}"
        ) from error
    return Pushed(str(made), names)
