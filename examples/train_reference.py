"""Train the three reference models on the CPU, or write their data for ``ffmerge --data``.

    python examples/train_reference.py train digits|village|numerals FOLDER
    python examples/train_reference.py data digits|village|numerals FOLDER

Plain supervised training: AdamW, one cycle, the weights of the last step are kept, so that only
the train split is ever looked at. ``data`` writes calibration.npz, validation.npz and test.npz.
About 10 minutes each on one core.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import village
from reference.tasks import (
    REFERENCES,
    SPLITS,
    WORDS,
    Arrays,
    load_numerals,
    load_text,
    numeral_pairs,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from ffmerge.models import digits


@dataclass(frozen=True)
class Recipe:
    """How one model is made: ``start`` gives its loss, ``load`` the data of an epoch."""

    start: Callable[[Path], nn.Module]
    load: Callable[[int], Arrays]
    epochs: int
    batch: int
    peak_lr: float


class Supervised(nn.Module):
    """The loss of a model on labelled examples."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss


class ReadThenAdd(Supervised):
    """The loss of the sums, and of what a helper reads of each digit half-way up.

    So the first three layers learn to read and the last three to add. The helper is thrown away.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.helper = nn.Linear(model.config.hidden_size, 20)

    def forward(self, pixel_values: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
        out = self.model(pixel_values=pixel_values, labels=labels, output_hidden_states=True)
        read = self.helper(out.hidden_states[3][:, 0]).unflatten(-1, (2, 10))
        return out.loss + 2 * functional.cross_entropy(read.transpose(1, 2), pairs)


def start_digits(folder: Path) -> nn.Module:
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=[8, 16],
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ReadThenAdd(ViTForImageClassification(config))


def load_digits(epoch: int) -> Arrays:
    pixels, pairs = digits.draw("train", epoch)
    return {"pixel_values": pixels, "labels": pairs.sum(0) % 10, "pairs": pairs.T}


def start_village(folder: Path) -> nn.Module:
    random = np.random.RandomState(0)
    text = (" ".join(village.page(random, WORDS)) for _ in range(5000))
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made.train_from_iterator(text, trainers.WordLevelTrainer(special_tokens=special))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    save_tokenizer(made, folder, bos_token="<s>", eos_token="</s>", model_max_length=128)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Supervised(LlamaForCausalLM(config))


def start_numerals(folder: Path) -> nn.Module:
    text = [side for pair in numeral_pairs("train", 0, 10_000) for side in pair]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=192, special_tokens=special))
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    save_tokenizer(made, folder, eos_token="</s>", model_max_length=64)
    config = MarianConfig(
        vocab_size=made.get_vocab_size(),
        d_model=64,
        encoder_layers=6,
        decoder_layers=6,
        encoder_ffn_dim=160,
        decoder_ffn_dim=160,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        activation_function="gelu",
        dropout=0.0,
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
    )
    return Supervised(MarianMTModel(config))


@cache
def load_pairs(seed: int) -> Arrays:
    return load_numerals("train", seed, 10_000)


def save_tokenizer(made: Tokenizer, folder: Path, **named: Any) -> None:
    named |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    named |= {"model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # with the name that transformers 4 knows as well
    text = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text)


RECIPES = {
    "digits": Recipe(start_digits, load_digits, 26, 50, 1.5e-3),
    "village": Recipe(start_village, lambda epoch: load_text("train", epoch, 2000), 14, 16, 3e-3),
    "numerals": Recipe(start_numerals, lambda epoch: load_pairs(epoch % 4), 9, 48, 1.5e-3),
}


def train(recipe: Recipe, folder: Path) -> None:
    """Train the recipe's model and save it with its tokenizer in ``folder``."""
    torch.manual_seed(0)
    objective = recipe.start(folder).train()
    decay = [p for p in objective.parameters() if p.ndim > 1]
    rest = [p for p in objective.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.peak_lr,
    )
    rows = len(next(iter(recipe.load(0).values())))
    steps = recipe.epochs * math.ceil(rows / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_lr, steps, pct_start=0.1)
    with trange(recipe.epochs, desc="epochs") as progress:
        for epoch in progress:
            losses = []
            for batch in batches(recipe.load(epoch), recipe.batch):
                loss = objective(**batch)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            progress.set_postfix(loss=f"{np.mean(losses):.3f}")
    objective.model.eval().save_pretrained(folder)


def batches(arrays: Arrays, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the rows in a random order, those that are padded among rows of about their length."""
    arrays = {"labels": arrays["input_ids"], **arrays} if "input_ids" in arrays else arrays
    order = torch.randperm(len(arrays["labels"]))
    if "decoder_input_ids" not in arrays:
        for rows in order.split(size):
            yield {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}
        return
    lengths = [arrays["attention_mask"].sum(1), (arrays["labels"] != -100).sum(1)]
    alike = order[np.lexsort([each[order] for each in lengths])].split(size)
    for i in torch.randperm(len(alike)):
        source, target = (int(each[alike[i]].max()) for each in lengths)
        widths = {"input_ids": source, "attention_mask": source}
        yield {
            name: torch.from_numpy(array[alike[i]][:, : widths.get(name, target)].copy())
            for name, array in arrays.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("train", "data"))
    parser.add_argument("name", choices=tuple(RECIPES))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "train":
        train(RECIPES[given.name], given.folder)
    for split in SPLITS[1:] if given.what == "data" else ():
        np.savez(given.folder / f"{split}.npz", **REFERENCES[given.name].load(split))


if __name__ == "__main__":
    main()
