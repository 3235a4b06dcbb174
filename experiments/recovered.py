"""``make recovered``: train the weights that a one-shot mask keeps, evaluate, export, pack, and say where to look.

The mask is the quickstart's prior, Wanda's: a learned mask gains nothing from some minutes more of the same text.
"""

import json
from pathlib import Path

from experiments.quickstart import (
    BASE_MODEL,
    CONFIG,
    RUN,
    TOKENS,
    WINDOW,
    bin_folder,
    command,
    evaluated,
    is_newer,
    is_stamped,
    megabytes,
    show,
    write_stamp,
)
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet

FOLDER = Path("runs/recovered")
MASK = RUN / "checkpoints" / "prior.safetensors"
LEARNED = MASK.with_name("mask.safetensors")
WORDS = [
    "recover",
    f"--model.base_model={BASE_MODEL}",
    f"--model.mask={MASK}",
    "--data.text=assets/wikipedia/train.jsonl",
    "--data.validation_text=assets/wikipedia/validation.jsonl",
    f"--data.seq_length={WINDOW}",
    "--data.batch_size=2",
    "--data.validation_sequences=8",
    "--trainer.max_steps=48",
    "--trainer.val_check_interval=24",
    "--trainer.accelerator=cpu",
    f"--trainer.logger.save_dir={FOLDER}",
    f"--checkpoint.dirpath={FOLDER / 'checkpoints'}",
]
# Some minutes: the default length of a run is 8 million tokens.
FINE_TUNING = "--data.text TEXT --data.seq_length 512 --data.batch_size 2 --tokens 50K --checkpoint.dirpath runs/mine"


def run() -> str:
    """Train, evaluate, export, pack; return the closing lines.

    Raises:
        UserError: The quickstart has not made its mask.
    """
    if not (MASK.is_file() and LEARNED.is_file() and is_stamped(RUN / "config.yaml", CONFIG.read_bytes())):
        raise UserError(f"{RUN} has no finished run of {CONFIG}. Run `make quickstart` first.")
    mask, stamp = FOLDER / "checkpoints" / "mask.safetensors", FOLDER / "stamp.txt"
    sparse, packed = FOLDER / "model", FOLDER / "packed"
    digest = MaskSet.load(MASK).digest_of_bits()
    contents = "\n".join([*WORDS, digest, ""]).encode()
    if not (mask.is_file() and is_stamped(stamp, contents)):
        show([*WORDS, "--force"])
        write_stamp(stamp, contents)
    dense = evaluated(["--model", str(BASE_MODEL)], RUN / "dense.json", RUN / "config.yaml")
    learned = evaluated(["--mask", str(LEARNED)], RUN / "learned.json", RUN / "config.yaml")
    before = evaluated(["--mask", str(MASK)], RUN / "prior.json", RUN / "config.yaml")
    after = evaluated(["--mask", str(mask)], FOLDER / "recovered.json", stamp)
    if not is_newer(sparse, FOLDER / "recovered.json"):
        figures = f"{FOLDER / 'recovered.json'},{RUN / 'dense.json'}"
        show(["export", "--mask", str(mask), "--output_dir", str(sparse), "--perplexity", figures, "--force"])
    if not is_newer(packed, sparse):
        show(["export", "--model", str(sparse), "--output_dir", str(packed), "--format", "packed", "--force"])
    facts = json.loads((packed / "leap_pl.json").read_text(encoding="utf-8"))
    zeros = "exactly those of the mask, read back" if facts["mask_digest"] == digest else "NOT THOSE OF THE MASK"
    figures_of = [next(iter(result["perplexity"].values()))["value"] for result in (dense, before, after, learned)]
    return f"""
perplexity on held-out Wikipedia ({TOKENS:,} tokens in windows of {WINDOW}):
  dense model            {figures_of[0]:8.2f}
  Wanda's mask           {figures_of[1]:8.2f}
  with trained weights   {figures_of[2]:8.2f}
  learned mask, alone    {figures_of[3]:8.2f}
zeros            {facts["sparsity"]:.6f} of the gated weights, {zeros}
checkpoint       {sparse}
fine-tune it     {bin_folder()}leap_pl recover --model.base_model {sparse} --model.mask {sparse} {FINE_TUNING}
packed           {packed}   {megabytes(packed):,.0f} MB; {bin_folder()}leap_pl generate --model {packed} --prompt TEXT
mask, weights    {mask}, {mask.with_name("weights.safetensors").name} beside it"""


if __name__ == "__main__":
    command("recovered", run)
