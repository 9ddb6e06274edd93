"""Train the reference model that ``ffmerge demo`` merges: a 12-layer ViT on 8 x 8 digits.

    python examples/train_digits_vit.py models/digits_vit

Plain supervised training on the train split only, with small random affine distortions; the
checkpoint of the last epoch is kept, so no other split is ever looked at. About 4 minutes on
2 cores.
"""

import argparse
import math

import torch
from torch.nn import functional
from tqdm import trange
from transformers import ViTConfig, ViTForImageClassification

from ffmerge.models import digits

EPOCHS, BATCH, PEAK_LR = 200, 64, 1e-3


def distort(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to 8 degrees, scale by up to 8 % and shift by up to half a pixel."""
    n = len(pixels)
    uniform = lambda limit: (torch.rand(n, generator=generator) * 2 - 1) * limit  # noqa: E731
    angle, zoom = uniform(math.radians(8)), 1 + uniform(0.08)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -zoom * angle.sin(), zoom * angle.sin()
    theta[:, 0, 2], theta[:, 1, 2] = uniform(0.125), uniform(0.125)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    ink = functional.grid_sample(pixels + 1, grid, align_corners=False)  # outside is no ink
    return ink - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    out = parser.parse_args().out
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).train()
    data = digits.load("train")
    pixels, labels = torch.from_numpy(data["pixel_values"]), torch.from_numpy(data["labels"])
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=PEAK_LR
    )
    steps = EPOCHS * math.ceil(len(pixels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, steps, pct_start=0.1)
    with trange(EPOCHS, desc="epochs") as progress:
        for _ in progress:
            for rows in torch.randperm(len(pixels), generator=generator).split(BATCH):
                logits = model(pixel_values=distort(pixels[rows], generator)).logits
                loss = functional.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(out)


if __name__ == "__main__":
    main()
