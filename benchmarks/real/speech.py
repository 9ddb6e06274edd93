"""Speech that a package of the registry brings, with what is said: a speech recognizer's data.

``python benchmarks/real/speech.py FOLDER`` writes ``calibrate`` (five readings of playing cards)
and ``test`` (five sentences of a novel by another voice), each a folder of sounds of 16 kHz with
``metadata.jsonl``: ``file_name`` and ``text``. They are the tests of pocketsphinx 5.1.1.
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from pathlib import Path

INDEX = "https://pypi.org/simple/pocketsphinx/"
ARCHIVE = "pocketsphinx-5.1.1.tar.gz"
PARTS = {"calibrate": "cards/cards.transcription", "test": "librivox/transcription"}
SPOKEN = re.compile(r"<s>(.*)</s>\s*\((.*)\)")


def archive() -> bytes:
    """Return the source archive, which pip would try to build; its digest is the index's."""
    wanted = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urllib.request.urlopen(urllib.request.Request(INDEX, headers=wanted)) as answer:
        files = json.load(answer)["files"]
    (file,) = [each for each in files if each["filename"] == ARCHIVE]
    with urllib.request.urlopen(file["url"]) as answer:
        stored: bytes = answer.read()
    assert hashlib.sha256(stored).hexdigest() == file["hashes"]["sha256"]
    return stored


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with tarfile.open(fileobj=io.BytesIO(archive())) as source:
        data = f"{ARCHIVE.removesuffix('.tar.gz')}/test/data"
        for part, transcription in PARTS.items():
            (folder / part).mkdir(parents=True)
            spoken = source.extractfile(f"{data}/{transcription}")
            assert spoken is not None
            lines = []
            for text, name in SPOKEN.findall(spoken.read().decode()):
                sound = source.extractfile(f"{data}/{Path(transcription).parent}/{name}.wav")
                assert sound is not None
                (folder / part / f"{name}.wav").write_bytes(sound.read())
                lines.append(json.dumps({"file_name": f"{name}.wav", "text": text.strip()}))
            (folder / part / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
