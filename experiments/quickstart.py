"""``make quickstart``: fit, export, evaluate and pack the embedded default, and say where to look.

Each part runs as its own command, the one the README tells, and is skipped where its output already stands.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leap_pl.cli.main import main
from leap_pl.errors import UserError
from leap_pl.escape import say
from leap_pl.files import atomic_file
from leap_pl.masks import MaskSet

CONFIG = Path("configs/quickstart.yaml")
RUN = Path("runs/quickstart")
BASE_MODEL = Path("assets/SmolLM2-135M-Instruct")
TEXT = Path("assets/wikipedia/test.jsonl")
WINDOW = 512  # tokens: the sequence length the mask is learned at
TOKENS = 48 * WINDOW  # evaluated of the held-out text
PROMPT = "The city lies on the river"
NEW_TOKENS = 32


def run() -> dict[str, object]:
    """Fit, export, evaluate, pack, generate; write and return ``runs/quickstart/summary.json``.

    Raises:
        UserError: The assets or the config are not there.
    """
    if not (BASE_MODEL.is_dir() and TEXT.is_file() and CONFIG.is_file()):
        raise UserError(
            f"{BASE_MODEL}, {TEXT} or {CONFIG} is not there. Run `make quickstart` in the project's folder."
        )
    checkpoints, sparse = RUN / "checkpoints", RUN / "model"
    mask, prior = checkpoints / "mask.safetensors", checkpoints / "prior.safetensors"
    stamp = RUN / "config.yaml"  # of the run that is there
    if not (mask.is_file() and is_stamped(stamp, CONFIG.read_bytes())):
        show(["fit", "--config", str(CONFIG), "--force"])  # of a run with other settings, or one that was stopped
        write_stamp(stamp, CONFIG.read_bytes())
    results = {}
    for name, flags in {
        "dense": ["--model", str(BASE_MODEL)],
        "prior": ["--mask", str(prior)],
        "learned": ["--mask", str(mask)],
    }.items():
        results[name] = evaluated(flags, RUN / f"{name}.json", stamp)
    if not is_newer(sparse, RUN / "learned.json"):
        learned = str(RUN / "learned.json")
        show(["export", "--mask", str(mask), "--output_dir", str(sparse), "--perplexity", learned, "--force"])
    facts = json.loads((sparse / "leap_pl.json").read_text(encoding="utf-8"))
    packed = RUN / "packed"
    if not is_newer(packed, sparse):
        show(["export", "--model", str(sparse), "--output_dir", str(packed), "--format", "packed", "--force"])
    summary: dict[str, object] = {"base_model": str(BASE_MODEL)}
    for name, result in results.items():
        (figure,) = result["perplexity"].values()
        summary[f"{name}_perplexity"] = figure["value"]
    summary |= {
        "sparsity": facts["sparsity"],
        "checkpoint": str(sparse),
        "packed": str(packed),
        "mask": str(mask),
        "tensorboard": str(RUN / "tensorboard"),
        "perplexity_protocol": {"text": str(TEXT), "seq_length": WINDOW, "stride": WINDOW, "tokens": TOKENS},
    }
    for name, folder in {"dense": sparse, "packed": packed}.items():
        made = show(["generate", "--model", str(folder), "--prompt", PROMPT, "--max_new_tokens", str(NEW_TOKENS)])
        summary[f"{name}_megabytes"] = megabytes(folder)
        summary[f"{name}_tokens_per_second"] = made["tokens_per_second"]
    with atomic_file(RUN / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def is_newer(folder: Path, source: Path) -> bool:
    """Whether ``folder`` holds a whole export, made after ``source``."""
    return (folder / "leap_pl.json").is_file() and folder.stat().st_mtime >= source.stat().st_mtime


def is_stamped(stamp: Path, contents: bytes) -> bool:
    """Whether a finished run has left ``contents`` in its stamp."""
    return stamp.is_file() and stamp.read_bytes() == contents


def write_stamp(stamp: Path, contents: bytes) -> None:
    """Say that a run of these settings is finished."""
    with atomic_file(stamp) as temporary:
        temporary.write_bytes(contents)


def evaluated(flags: list[str], output: Path, stamp: Path) -> dict[str, Any]:
    """The perplexity on the held-out text of what ``flags`` name, measured unless ``output`` has it already."""
    of = MaskSet.load(flags[1]).digest_of_bits() if flags[0] == "--mask" else None
    newest = max(path.stat().st_mtime for path in (stamp, TEXT))
    if not output.is_file() or output.stat().st_mtime < newest or not _is_of(output, of):
        protocol = ["--perplexity", str(TEXT), "--seq_length", str(WINDOW), "--max_tokens", str(TOKENS)]
        show(["evaluate", *flags, *protocol, "--output", str(output)])
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result


def _is_of(output: Path, mask_digest: str | None) -> bool:
    """Whether a result is of the mask of this digest, None for the dense model, by the protocol of today."""
    try:
        result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        (figure,) = result["perplexity"].values()
        protocol = figure["seq_length"], figure["max_tokens"], list(result["perplexity"])
        return (result["model"]["mask_digest"], *protocol) == (mask_digest, WINDOW, TOKENS, [str(TEXT)])
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def show(words: list[str]) -> Any:
    """Show and run a command; return what it returns, if it runs in this process."""
    say("")
    say(f"$ {bin_folder()}leap_pl {shlex.join(words)}", sys.stdout)
    if words[0] in ("fit", "recover"):
        # A process of its own, so that its memory is gone afterwards.
        process = subprocess.Popen([sys.executable, "-m", "leap_pl", *words])
        try:
            failed = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was told as well, and writes a checkpoint
            raise
        if failed:
            raise UserError(f"leap_pl {words[0]} failed; its message is above.")
        return None
    return main(words)  # in this one: imports take as long as the work


def report(summary: dict[str, object]) -> str:
    """The closing lines."""
    dense, prior, learned = (summary[f"{name}_perplexity"] for name in ("dense", "prior", "learned"))
    return f"""
perplexity on held-out Wikipedia ({TOKENS:,} tokens in windows of {WINDOW}), every mask at the same sparsity:
  dense model    {dense:8.2f}
  Wanda prior    {prior:8.2f}
  learned mask   {learned:8.2f}
sparsity         {summary["sparsity"]:.6f}  (exactly, read back from the checkpoint)
checkpoint       {summary["checkpoint"]}   AutoModelForCausalLM.from_pretrained("{summary["checkpoint"]}")
mask             {summary["mask"]}
packed           {summary["packed"]}   {_beside(summary)}
curves           {bin_folder()}tensorboard --logdir {summary["tensorboard"]}
these figures    {RUN / "summary.json"}"""


def _beside(summary: dict[str, object]) -> str:
    """Size and speed of the packed model, beside the dense one."""
    size, dense_size = (summary[f"{name}_megabytes"] for name in ("packed", "dense"))
    speed, dense_speed = (summary[f"{name}_tokens_per_second"] for name in ("packed", "dense"))
    sizes = f"{size:,.0f} MB, dense {dense_size:,.0f} MB"
    return (
        sizes
        if speed is None or dense_speed is None
        else f"{sizes}; {speed:.1f} tokens a second, dense {dense_speed:.1f}"
    )


def megabytes(folder: Path) -> float:
    """Size of the weights in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e6


def bin_folder() -> str:
    """Folder of this environment's commands, with a slash, if it is within the current one; else nothing."""
    folder = Path(sys.executable).parent
    return f"{folder.relative_to(Path.cwd())}/" if folder.is_relative_to(Path.cwd()) else ""


def command(name: str, closing: Callable[[], str]) -> None:
    """Run a command of the Makefile and print its closing lines, or why there are none in one line."""
    try:
        say(closing(), lines=True)
    except UserError as failure:
        say(f"{name}: {failure}", sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say(f"\n{name}: stopped.", sys.stderr, lines=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    command("quickstart", lambda: report(run()))
