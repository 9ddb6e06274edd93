"""Pictures that packages of the registries bring: parts of photographs, drawn at random.

``python benchmarks/real/pictures.py FOLDER`` writes those of each part into a folder of its own;
``run.py`` takes them as they are. Split by photograph: nothing of one that is calibrated on is
measured on, whoever runs this. They are those of two packages for Python, textures and skies among
them, and of templates for web pages: 69. Needs ``npm``.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

PARTS = ("calibrate", "calibrate", "validate", "test")  # what becomes of every fourth photograph
COUNTS = {"calibrate": 128, "validate": 32, "test": 96}
SMALLEST = 0.35  # of the shorter side of a photograph, that the side of a part of it has
TEMPLATES = (  # of Start Bootstrap, MIT
    "agency@7.0.12", "business-casual@7.0.9", "clean-blog@6.0.9", "coming-soon@6.0.7",
    "creative@7.0.7", "grayscale@7.0.6", "landing-page@6.0.6", "one-page-wonder@6.0.6",
    "stylish-portfolio@6.0.6",
)  # fmt: skip
LEAST = 300  # pixels of the shorter side of a photograph of those


def photographs() -> list[Image.Image]:
    """Return all photographs, each once."""
    return from_python() + from_templates()


def from_python() -> list[Image.Image]:
    """Return the photographs of scikit-image 0.26.0, which are no drawings, and scikit-learn's."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    found = [Image.fromarray(array) for array in load_sample_images().images]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, folder, "scikit-image==0.26.0"], check=True)
        data = Path(folder) / "skimage" / "data"
        for file in sorted([*data.glob("*.png"), *data.glob("*.jpg")]):
            picture = Image.open(file).convert("RGB")
            # each scene once, and no drawings: they are small files, or of few colours
            if file.stem != "motorcycle_right" and file.stat().st_size > 50_000:
                found.append(picture)
    return found


def from_templates() -> list[Image.Image]:
    """Return the photographs of the templates, those of enough pixels."""
    found: dict[bytes, Image.Image] = {}
    for template in TEMPLATES:
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", "--silent", f"startbootstrap-{template}"]
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            (file,) = Path(folder).glob("*.tgz")
            with tarfile.open(file) as archive:
                for member in archive.getmembers():
                    if member.name.endswith(".jpg"):
                        stored = archive.extractfile(member).read()  # type: ignore[union-attr]
                        found[stored] = Image.open(io.BytesIO(stored)).convert("RGB")
    return [picture for picture in found.values() if min(picture.size) >= LEAST]


def part(name: str) -> list[Any]:
    """Return square parts of the photographs of a part, some of them mirrored."""
    chosen = [each for at, each in enumerate(photographs()) if PARTS[at % len(PARTS)] == name]
    generator = np.random.default_rng(0)
    found = []
    for number in range(COUNTS[name]):
        picture = chosen[number % len(chosen)]
        side = int(generator.uniform(SMALLEST, 1) * min(picture.size))
        left = int(generator.integers(0, picture.width - side + 1))
        top = int(generator.integers(0, picture.height - side + 1))
        square = picture.crop((left, top, left + side, top + side))
        if generator.random() < 0.5:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(square)
    return found


def main() -> None:
    """Write the pictures of each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in COUNTS:
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(part(name)):
            picture.save(folder / name / f"{number:03}.png")


if __name__ == "__main__":
    main()
