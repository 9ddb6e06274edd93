"""What a speech recognizer writes of sounds: a checkpoint in PyTorch, or its package.

``python benchmarks/real/transcribe.py CHECKPOINT SOUNDS [PACKAGE...]`` with folders of
``benchmarks/trained.py whisper`` and ``benchmarks/real/speech.py``. Prints a line for each sound,
and under it what a package writes of it otherwise.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.io import wavfile
from transformers import AutoFeatureExtractor, AutoTokenizer

import ffmerge

ENGLISH = [[50258, 50259, 50359, 50363]]  # to be transcribed, without times


def main() -> None:
    """Print what is written of each sound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("sounds", type=Path)
    parser.add_argument("packages", nargs="*", type=Path)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    extractor = AutoFeatureExtractor.from_pretrained(given.checkpoint)
    model = ffmerge.load(given.checkpoint)
    packages = {folder: ffmerge.load_package(folder) for folder in given.packages}

    def written(by: Any, features: torch.Tensor) -> str:
        ids = by.generate(
            input_features=features, decoder_input_ids=torch.tensor(ENGLISH), max_new_tokens=60
        )
        return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()

    for file in sorted(given.sounds.glob("*.wav")):
        rate, samples = wavfile.read(file)
        sound = extractor(samples / 2**15, sampling_rate=rate, return_tensors="pt").input_features
        text = written(model, sound)
        print(f"{file.name}: {text}")
        for folder, package in packages.items():
            other = written(package, sound)
            if other != text:
                print(f"  {folder.name}: {other}")


if __name__ == "__main__":
    main()
