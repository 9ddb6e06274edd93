"""Four people with a trained model, their data and a size: the pages of docs/tutorials.

    python examples/tutorials.py NAME...    # pictures, texts, writer, translator; all by default

Makes what such a person has (:data:`TUTORIALS`), runs what they would run and the mistakes that
come first, and writes the commands and what they really printed into ``docs/tutorials/NAME.md``.
``tests/test_tutorials.py`` runs the same commands and compares with the pages.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from reference import village
from reference.tasks import numeral_pairs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from ffmerge.models import digits

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "tutorials"
WIDTH = 96  # of the terminal, in characters
STEPS = 60  # of training the classifier of texts: it knows all of its test sentences by then
WORDS = 30  # of a page of the village
LANGUAGES = ("English", "German")
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}


@dataclass(frozen=True)
class Tutorial:
    """What a person has, what they run, what goes wrong first, and how the package is used.

    ``make`` writes what they have into a new folder; ``mistakes`` are commands that end in one
    sentence, by what is wrong with them.
    """

    title: str
    has: str
    make: Callable[[Path], None]
    command: str
    mistakes: Mapping[str, str]
    use: str


def pictures(folder: Path) -> None:
    """A classifier of pictures with its processor, and a folder of pictures for each class."""
    model = folder / "classifier"
    shutil.copytree(ROOT / "models" / "digits_vit", model)
    ViTImageProcessor(
        size={"height": 8, "width": 16}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(model)
    drawn = digits.load("validation", count=200)
    for pixels, label in zip(drawn["pixel_values"], drawn["labels"], strict=True):
        below = folder / "photos" / str(label)
        below.mkdir(parents=True, exist_ok=True)
        grey = np.rint(255 * (pixels[0] + 1) / 2).astype(np.uint8)
        Image.fromarray(grey).save(below / f"{len([*below.iterdir()])}.png")


def texts(folder: Path) -> None:
    """A classifier of texts, trained here in seconds: which language a number is written in."""
    train, test = (numeral_pairs(split, 0, 400) for split in ("train", "validation"))
    words = sorted({word for pair in train + test for text in pair for word in text.split()})
    known = SPECIAL | {word: len(SPECIAL) + number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(known), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=64,
            id2label=dict(enumerate(LANGUAGES)), label2id={n: i for i, n in enumerate(LANGUAGES)},
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        which = random.integers(2, size=32)
        rows = random.integers(len(train), size=32)
        batch = [train[row][language] for row, language in zip(rows, which, strict=True)]
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        model(**inputs, labels=torch.from_numpy(which)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    with (folder / "sentences.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "language"])
        for number, pair in enumerate(test[:200]):
            writer.writerow([pair[number % 2], LANGUAGES[number % 2]])


def writer(folder: Path) -> None:
    """A language model and a text file."""
    shutil.copytree(ROOT / "examples" / "reference" / "village_lm", folder / "model")
    random = np.random.RandomState([9, 0])
    pages = [" ".join(village.page(random, WORDS)) for _ in range(100)]
    (folder / "pages.txt").write_text("\n".join(pages) + "\n")


def translator(folder: Path) -> None:
    """A translator, and pairs of sentences."""
    shutil.copytree(ROOT / "examples" / "reference" / "numerals_marian", folder / "model")
    lines = []
    for english, german in numeral_pairs("validation", 0, 100):
        lines.append(json.dumps({"translation": {"en": english, "de": german}}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


TUTORIALS = {
    "pictures": Tutorial(
        "A classifier of pictures, under 600 kB",
        "`classifier` is a fine-tuned ViT with its image processor; `photos` has a folder of "
        "pictures for each class, 200 pictures in all.",
        pictures,
        "ffmerge compress classifier small --size 600kB --data photos",
        {
            "a folder that is not there": "ffmerge compress classifier tiny --size 600kB "
            "--data photo",
            "a size without its unit": "ffmerge compress classifier tiny --size 600 --data photos",
            "a size that is out of reach": "ffmerge compress classifier tiny --size 90kB "
            "--data photos",
            "an output that is there": "ffmerge compress classifier small --size 600kB "
            "--data photos",
            "no data to choose by": "ffmerge compress classifier tiny --size 600kB",
        },
        """\
import ffmerge
from PIL import Image
from transformers import AutoImageProcessor

model = ffmerge.load_package("small/package")
processor = AutoImageProcessor.from_pretrained("small/package")
picture = processor(Image.open("photos/3/0.png"), return_tensors="pt")
print(model(**picture).logits.argmax().item())""",
    ),
    "texts": Tutorial(
        "A classifier of texts, under 350 kB",
        "`classifier` is a fine-tuned BERT with its tokenizer; `sentences.csv` has 200 rows with "
        "the columns `sentence` and `language`, whose values are names of the model's classes.",
        texts,
        "ffmerge compress classifier small --size 350kB --data sentences.csv",
        {
            "a column that is not there": "ffmerge compress classifier tiny --size 350kB "
            "--data sentences.csv --label-column lang",
            "a column that holds no classes": "ffmerge compress classifier tiny --size 350kB "
            "--data sentences.csv --label-column sentence",
        },
        """\
import ffmerge
from transformers import AutoTokenizer

model = ffmerge.load_package("small/package")
tokenizer = AutoTokenizer.from_pretrained("small/package")
text = tokenizer("vier Schafe", return_tensors="pt")
print(model.config.id2label[model(**text).logits.argmax().item()])""",
    ),
    "writer": Tutorial(
        "A language model, under 500 kB",
        "`model` is a small Llama with its tokenizer; `pages.txt` has 100 lines of text.",
        writer,
        "ffmerge compress model small --size 500kB --data pages.txt",
        {
            "a command that is misspelt": "ffmerge compres model tiny --size 500kB "
            "--data pages.txt",
            "more layers than there are": "ffmerge merge model tiny --k 9 --data pages.txt",
        },
        """\
import ffmerge
from transformers import AutoTokenizer

model = ffmerge.load_package("small/package")
tokenizer = AutoTokenizer.from_pretrained("small/package")
text = tokenizer("on Monday Bado buys 5 figs and 4", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=8)[0]))""",
    ),
    "translator": Tutorial(
        "A translator, under 1 MB",
        "`model` is a small Marian with its tokenizer; `pairs.jsonl` has 100 pairs, each "
        '`{"translation": {"en": ..., "de": ...}}`.',
        translator,
        "ffmerge compress model small --size 1MB --data pairs.jsonl",
        {
            "a language that is not there": "ffmerge compress model tiny --size 1MB "
            "--data pairs.jsonl --target-column fr",
        },
        """\
import ffmerge
from transformers import AutoTokenizer

model = ffmerge.load_package("small/package")
tokenizer = AutoTokenizer.from_pretrained("small/package")
text = tokenizer("forty sheep", return_tensors="pt")
print(tokenizer.decode(model.generate(**text)[0], skip_special_tokens=True))""",
    ),
}


def page(tutorial: Tutorial, folder: Path) -> str:
    """Return the tutorial as Markdown, with what its commands print in a folder."""
    tutorial.make(folder)
    source = (tutorial.make.__doc__ or "").strip()
    done = printed(["ffmerge", *tutorial.command.split()[1:]], folder)
    lines = [
        f"# {tutorial.title}",
        "",
        tutorial.has,
        "",
        "```",
        f"$ {tutorial.command}",
        done,
        "```",
    ]
    lines += ["", "Used from Python:", "", "```python", tutorial.use, "```", "", "which prints"]
    lines += ["", "```", printed(["-c", tutorial.use], folder), "```", "", "What goes wrong first:"]
    for what, command in tutorial.mistakes.items():
        said = printed(["ffmerge", *command.split()[1:]], folder)
        lines += ["", f"- {what}", "", "  ```", f"  $ {command}"]
        lines += [f"  {line}" for line in said.splitlines()]
        lines += ["  ```"]
    made = f"Made by `python examples/tutorials.py`; here the files are: {source}"
    return "\n".join([*lines, "", made, ""])


def printed(words: list[str], folder: Path) -> str:
    """Return what a module, or a line of code, prints in a folder, or the error that it ends in."""
    if words[0] != "-c":
        words = ["-m", *words]
    environment = {**os.environ, "COLUMNS": str(WIDTH)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    said = done.stdout
    if done.returncode:
        said = done.stderr
    lines = [line.rstrip() for line in said.splitlines()]
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or TUTORIALS:
        with tempfile.TemporaryDirectory() as there:
            (PAGES / f"{name}.md").write_text(page(TUTORIALS[name], Path(there)), encoding="utf-8")
