"""How much of what a package leaves out is gone from memory as well."""

from dataclasses import dataclass

from ffmerge.models.manifest import Manifest


@dataclass(frozen=True)
class Sharing:
    """Of the bytes that a package has less than the one it came from, those gone from memory.

    ``fraction`` is ``resident_saved`` over ``bytes_removed``; both None where memory is not told.
    """

    against: str
    bytes_removed: int
    resident_saved: int | None
    fraction: float | None

    def text(self) -> str:
        """Return the fraction in percent."""
        shown = "not measured" if self.fraction is None else f"{100 * self.fraction:.0f} %"
        return shown.replace("-", "\N{MINUS SIGN}")


def sharing(
    against: str, before: int, after: int, rss_before: int | None, rss_after: int | None
) -> Sharing | None:
    """Return what sharing keeps of ``before - after`` bytes, None if no byte was removed."""
    removed = before - after
    if removed <= 0:
        return None
    saved = None if rss_before is None or rss_after is None else rss_before - rss_after
    return Sharing(against, removed, saved, None if saved is None else saved / removed)


def model_bytes(manifest: Manifest) -> int:
    """Return the bytes of the files a runtime loads: graphs and their external data."""
    return sum(f.bytes for f in manifest.files if f.path.endswith((".onnx", ".onnx_data")))
