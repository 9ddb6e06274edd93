"""What each loader does with a merged checkpoint; runs in both environments."""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny import gpt2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, pipeline

import ffmerge
from ffmerge.models import ties

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.arange(24).reshape(2, 12)


def write(root: Path) -> None:
    """Save a GPT-2 whose layers 1 to 4 share one sublayer: once, expanded, and in shards.

    And one whose layers have parts of their own besides.
    """
    model = gpt2()
    ffmerge.merge_(model, None, ffmerge.MergeConfig(window=(1, 4), method="average"))
    ffmerge.save(model, root / "once")
    ffmerge.save(model, root / "shards", max_shard_size="100KB")
    ffmerge.save(model, root / "expanded", expanded=True)
    own = gpt2()
    settings = ffmerge.MergeConfig(window=(1, 4), method="residual", rank=4)
    ffmerge.merge_(own, {"input_ids": IDS.numpy()}, settings)
    ffmerge.save(own, root / "own")
    logits = {"": model(IDS).logits.detach(), "own": own(IDS).logits.detach()}
    torch.save(logits, root / "logits.pt")


def outcomes(root: Path) -> dict[str, str]:
    """Return what each way of loading ends with: ``exact``, ``tied and exact`` or an error."""
    wanted = torch.load(root / "logits.pt", weights_only=True)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words)

    def outcome(load: Callable[[], Any], folder: str = "") -> str:
        try:
            model = load()
        except Exception as error:
            return type(error).__name__
        with torch.no_grad():
            error = model.eval()(IDS).logits - wanted.get(folder, wanted[""])
        exact = error.abs().max() < 1e-6  # measured 0
        tied = len(ties.ties(model)) == (3 if folder == "own" else 5)  # its biases are not shared
        return " and ".join(["tied"] * tied + ["exact"] * bool(exact))

    def in_plain_torch() -> Any:
        model = gpt2()
        model.load_state_dict(load_file(root / "once" / "model.ffmerge.safetensors"), strict=False)
        return model

    def trained_on(folder: str) -> Any:
        """Load by the generated code, save as a trainer does, load again."""
        model = AutoModelForCausalLM.from_pretrained(root / folder, trust_remote_code=True)
        again = root / f"{folder}-again-{transformers.__version__}"
        model.save_pretrained(again, state_dict=model.state_dict())
        exact = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        assert outcome(lambda: ffmerge.load(again), folder) == "tied and exact"
        ffmerge.save(exact, f"{again}-expanded", expanded=True)
        plain = outcome(lambda: GPT2LMHeadModel.from_pretrained(f"{again}-expanded"), folder)
        assert plain == "exact", plain
        return exact

    found = {
        f"{folder}: {name}": outcome(lambda load=load, folder=folder: load(root / folder), folder)
        for folder in ("once", "shards", "expanded", "own")
        for name, load in {
            "ffmerge": ffmerge.load,
            "class": GPT2LMHeadModel.from_pretrained,
            "class, no remote code": lambda f: GPT2LMHeadModel.from_pretrained(
                f, trust_remote_code=False
            ),
            "auto": AutoModelForCausalLM.from_pretrained,
            "auto, trusted": lambda f: AutoModelForCausalLM.from_pretrained(
                f, trust_remote_code=True
            ),
            "pipeline": lambda f: pipeline("text-generation", str(f), tokenizer=words).model,
            "pipeline, trusted": lambda f: (
                pipeline("text-generation", str(f), tokenizer=words, trust_remote_code=True).model
            ),
            "base class, trusted": lambda f: AutoModel.from_pretrained(f, trust_remote_code=True),
            "class, variant": lambda f: GPT2LMHeadModel.from_pretrained(f, variant="ffmerge"),
            "auto, variant": lambda f: AutoModelForCausalLM.from_pretrained(f, variant="ffmerge"),
        }.items()
        if folder != "expanded" or "base" not in name
    }
    return {
        **found,
        "torch": outcome(in_plain_torch),
        "trained on": outcome(lambda: trained_on("once")),
        "own: trained on": outcome(lambda: trained_on("own"), "own"),
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = outcomes(Path(sys.argv[1]))
    print(json.dumps(found))
