"""``leap_pl evaluate``: perplexity and zero-shot tasks of a model, in a reproducible and comparable result file."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_pl.base_model.prefix import Bos, in_words, prefix_of, record_of
from leap_pl.cli.command import check_used, command
from leap_pl.errors import UserError
from leap_pl.escape import say, terminal

if TYPE_CHECKING:
    from leap_pl.evaluation.subject import Subject

DEFAULT_TASKS_FOLDER = "assets/tasks"
HUB = "hub"


@command
def evaluate_command(
    model: str | None = None,
    mask: str | None = None,
    ckpt_path: str | None = None,
    perplexity: str | None = None,
    seq_length: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    share: Literal["all", "held_out"] = "all",
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "test",
    bos: Bos = "every",
    tasks: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    tasks_folder: str | None = None,
    batch_size: int = 4,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    output: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model: perplexity on texts, accuracy on zero-shot tasks.

    The model is an unchanged one (a base model, an exported checkpoint), a base model with a mask applied, or
    the hard mask of a training checkpoint. Perplexity is computed as in the literature, but for BOS (--bos) and the
    documents of C4, which others join by a space: documents joined by a blank line, tokenized once, windows of
    seq_length tokens, the mean over all predicted tokens. Perplexities are comparable only for the same text,
    tokenizer, seq_length, stride and bos, so the result records all of them.

    Args:
        model: Hub id, local folder or GGUF file. Optional with a mask, which records its base model.
        mask: MaskSet file (mask.safetensors), folder that has one, or hub id of one, to apply to the base model.
        ckpt_path: Checkpoint of leap_pl fit, such as RUN/checkpoints/last.ckpt, whose hard mask is applied to the base
            model.
        perplexity: Texts, separated by commas: wikitext2, c4 (both from the hub), local files (.jsonl,
            .jsonl.gz, .parquet, .txt), hub ids of other datasets.
        seq_length: Tokens in a window, including BOS.
        stride: Tokens from one window to the next; default: those of text in a window. A smaller stride gives every
            token more context and takes longer; each token counts once.
        max_tokens: Maximum number of tokens to read of each text. Part of the protocol.
        share: Part of local files to use: all of the text, or the held_out twentieth that training on the same file
            or pattern kept for validation.
        text_column: Column, or JSON key, of the text in local files and other datasets than wikitext2 and c4.
        config_name: Configuration of datasets that are given by their hub ids.
        split: Split of datasets that are given by their hub ids.
        bos: Windows that begin with what the tokenizer puts before a text, which is BOS for Llama and Gemma and nothing
            for Qwen and SmolLM2: every; the first of a text, as in the literature; none. Questions of tasks begin with
            it unless none is given. It is never predicted.
        tasks: Tasks of lm-eval, separated by commas. The paper's:
            mmlu,piqa,arc_easy,arc_challenge,winogrande,openbookqa.
        limit: Maximum number of questions of each task, for a quick look; the result is marked.
        num_fewshot: Number of solved examples before each question; default: the task's own, mostly 0.
        tasks_folder: Folder with the data of tasks; default: assets/tasks if it exists, which make assets-eval writes
            in a clone of the repository. Tasks that are not in it are read from the hub; hub: all of them.
        batch_size: Windows in a forward pass; of the answers of tasks, as many as have 512 tokens for each of them.
        dtype: Type of the weights in memory and of the computation; auto: the type they are stored in, but float32
            for bfloat16, and on a CPU for float16, on hardware where float32 is faster.
        device: Device to run on; auto: the first GPU, or the CPU without one.
        revision: Branch, tag or commit of the base model on the hub; a local model has none.
        trust_remote_code: Run code that comes with the model; only for a model given with --model.
        seed: Seed of few-shot sampling, the only random choice.
        output: Result file to write, JSON. Where something fails after the first figure, it has those that are there.

    Returns:
        The result, as written to output.

    Raises:
        UserError: There is nothing to measure, something cannot be found or reached, or options do not fit
            together.
    """
    texts, names = _names(perplexity, "--perplexity"), _names(tasks, "--tasks")
    if not texts and not names:
        raise UserError("Nothing to measure. Add --perplexity wikitext2 (or a file), or --tasks piqa,arc_easy.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a number of questions, at least 1.")
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"--max_tokens {max_tokens}: a perplexity needs at least 2 tokens.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num_fewshot {num_fewshot}: give a number of examples, 0 or more.")
    of_texts: dict[str, Any] = {"seq_length": seq_length, "stride": stride, "max_tokens": max_tokens}
    of_texts |= {"share": share, "text_column": text_column}
    check_used(of_texts, evaluate_command, not texts, "no text is given with --perplexity")
    of_tasks = {"limit": limit, "num_fewshot": num_fewshot, "tasks_folder": tasks_folder, "seed": seed}
    check_used(of_tasks, evaluate_command, not names, "no task is given with --tasks")
    # Check everything that needs no model before one is loaded.
    from leap_pl.base_model.sequence_length import check_sequence_length
    from leap_pl.cli.device import check_device, move_to_device
    from leap_pl.evaluation.perplexity import check_windows
    from leap_pl.evaluation.record import (
        FORMAT,
        FORMAT_VERSION,
        UNFINISHED,
        check_place,
        environment,
        may_replace,
        write_result,
    )
    from leap_pl.evaluation.subject import load_subject, realised_sparsity
    from leap_pl.evaluation.texts import TEXTS, check_text, check_trained
    from leap_pl.oneshot.methods import MASK_ALONE

    check_device(device)
    check_windows(seq_length, seq_length if stride is None else stride, batch_size)
    from_hub = {text for text in texts if check_text(text, text_column=text_column, share=share)}
    of_hub = {"config_name": config_name, "split": split}
    check_used(of_hub, evaluate_command, not from_hub, "no text is given by a hub id, and wikitext2 and c4 have theirs")
    column = {"text_column": text_column}
    check_used(column, evaluate_command, not {*texts}.difference(TEXTS), "wikitext2 and c4 have theirs")
    local_tasks = None
    if names:
        from leap_pl.cli.quiet import quiet_lm_eval
        from leap_pl.evaluation.tasks import check_tasks

        local_tasks = _tasks_folder(tasks_folder)
        with quiet_lm_eval():
            check_tasks(names, local_tasks, num_fewshot)
    if output is not None:
        check_place(output)
    started, begin = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
    seconds: dict[str, float] = {}
    subject = load_subject(
        model=model, mask=mask, ckpt_path=ckpt_path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
    )
    for text in texts:
        check_trained(text, subject.config, share=share, config_name=config_name, split=split)
    if MASK_ALONE in subject.method:
        say(
            f"leap_pl evaluate: {mask or ckpt_path or model} has the mask of a method that changes weights too, and "
            "not its weights. They are in the folder model that leap_pl prune wrote: --model FOLDER/model.",
            sys.stderr,
        )
    if texts:
        prefix = len(prefix_of(subject.tokenizer)) if bos == "every" else 0
        check_sequence_length(subject.model.config, seq_length, subject.base_model, "--seq_length")
        check_windows(seq_length, seq_length - prefix if stride is None else stride, batch_size, prefix)
    where = move_to_device(subject.model, device)
    if dtype == "auto":
        _use_fast_dtype(subject)
    result: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": _description(subject),
        "method": subject.method,
        "config": subject.config,
        "sparsity": realised_sparsity(subject.model) | {"asked": subject.asked},
        "seed": seed,
        "batch_size": batch_size,
        "perplexity": {},
        "tasks": {},
        "mean": None,
        **environment(where),
    }
    say(_of_whom(result))  # each figure when it is there, so that one that fails later takes none away

    def finish(which: str = "") -> None:
        seconds["total"] = round(time.monotonic() - begin, 2)
        result["times"] = {"started": started, "seconds": seconds}
        if output is not None:
            write_result(output, result)
            say(f"written: {output}{which}", sys.stderr)

    try:
        for text in texts:
            mark = time.monotonic()
            result["perplexity"][text] = _perplexity(
                subject,
                text,
                seq_length=seq_length,
                stride=stride,
                max_tokens=max_tokens,
                share=share,
                text_column=text_column,
                of_hub=of_hub if text in from_hub else {},
                bos=bos,
                batch_size=batch_size,
            )
            seconds[text] = round(time.monotonic() - mark, 2)
            say(_of_text(text, result["perplexity"][text]))
        if names:
            from leap_pl.evaluation.tasks import evaluate_tasks, mean_accuracy

            mark = time.monotonic()
            with quiet_lm_eval():
                result["tasks"] = evaluate_tasks(
                    subject.model,
                    subject.tokenizer,
                    names,
                    tasks_folder=local_tasks,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    batch_size=batch_size,
                    seed=seed,
                    bos=bos,
                )
            result["mean"] = mean_accuracy(result["tasks"])
            seconds["tasks"] = round(time.monotonic() - mark, 2)
            say("\n".join(_of_tasks(result)), lines=True)
    except BaseException:
        lacks = len(result["perplexity"]) < len(texts) or (names and not result["tasks"])
        if output is not None and (result["perplexity"] or not lacks):  # it may have taken hours
            if not lacks:
                finish()
            elif may_replace(output):
                result[UNFINISHED] = True
                finish(", with the figures above alone")
            else:
                say(f"not written: {output} exists, and is not of an evaluation that failed", sys.stderr)
        raise
    finish()
    return result


def _perplexity(
    subject: "Subject",
    text: str,
    *,
    seq_length: int,
    stride: int | None,
    max_tokens: int | None,
    share: Literal["all", "held_out"],
    text_column: str,
    of_hub: dict[str, Any],
    bos: Bos,
    batch_size: int,
) -> dict[str, Any]:
    from leap_pl.evaluation.perplexity import perplexity
    from leap_pl.evaluation.texts import TEXTS, read_text, tokenizer_identity, tokens_digest

    tokenizer = subject.tokenizer
    tokens = read_text(
        text,
        tokenizer,
        seq_length=seq_length,
        max_tokens=max_tokens,
        share=share,
        text_column=text_column,
        bos=bos,
        **of_hub,
    )
    found = perplexity(
        subject.model,
        tokens,
        seq_length=seq_length,
        stride=stride,
        prefix=prefix_of(tokenizer) if bos == "every" else (),
        leading=len(prefix_of(tokenizer)) if bos == "first" else 0,
        batch_size=batch_size,
        progress=terminal(f"perplexity of {Path(text).name}"),
    )
    return {
        "value": found.value,
        "stderr": found.stderr,
        "nll": found.nll,
        "nll_stderr": found.nll_stderr,
        "seq_length": found.seq_length,
        "stride": found.stride,
        "tokens": found.tokens,
        "predicted": found.predicted,
        "max_tokens": max_tokens,
        "share": share,
        **({"text_column": text_column} if text_column != "text" and text not in TEXTS else {}),
        **of_hub,
        "text_digest": tokens_digest(tokens),
        "tokenizer": tokenizer_identity(tokenizer),
        **record_of(bos, tokenizer),
        # Two results on the same windows can be compared window by window.
        "window_nll": [round(value, 6) for value in found.window_nll],
    }


def _names(given: str | list[str] | None, flag: str) -> list[str]:
    from leap_pl.inputs.register import listed

    names = (given if isinstance(given, list) else listed(given)) if given is not None else []
    if not all(names):
        raise UserError(f"{flag} {given!r} has an empty entry. Separate entries by single commas.")
    return list(dict.fromkeys(names))


def _tasks_folder(given: str | None) -> str | None:
    if given == HUB:
        return None
    if given is None:
        if not Path(DEFAULT_TASKS_FOLDER).is_dir():
            return None
        say(
            f"tasks that are in {DEFAULT_TASKS_FOLDER} are read from there, with the splits that it has "
            "(--tasks_folder names another folder, or hub)",
            sys.stderr,
        )
        return DEFAULT_TASKS_FOLDER
    if not Path(given).is_dir():
        raise UserError(f"--tasks_folder {given}: there is no such folder. Create it with make assets-eval.")
    return given


def _use_fast_dtype(subject: "Subject") -> None:
    """Convert weights of 16 bits to float32 on a device where float32 is faster, and print a note."""
    from leap_pl.base_model.fast_dtype import is_slow

    model = subject.model
    if is_slow(model.dtype, model.device):
        stored = str(model.dtype).removeprefix("torch.")
        say(
            f"evaluating in float32, which is faster than {stored} on this {model.device.type.upper()} "
            f"(--dtype {stored} overrides this)",
            sys.stderr,
        )
        model.float()


def _description(subject: "Subject") -> dict[str, Any]:
    return {
        "name": subject.origin["model"] or subject.base_model,
        "mask": subject.origin["mask"],
        "ckpt_path": subject.origin["ckpt_path"],
        "base_model": subject.base_model,
        "revision": subject.revision,
        "fingerprint": subject.fingerprint,
        "mask_digest": subject.mask_digest,
        "class": type(subject.model).__name__,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
    }


def _of_whom(result: dict[str, Any]) -> str:
    return f"{result['method']}, {result['model']['base_model']}, sparsity {result['sparsity']['global']:.2%}"


def _of_text(text: str, found: dict[str, Any]) -> str:
    error = f" ± {found['stderr']:.2f}" if found["stderr"] is not None else ""
    part = " of its held-out part" if found.get("share") == "held_out" else ""
    part += f" of its split {found['split']}" if "split" in found else ""
    protocol = [f"windows of {found['seq_length']}", f"stride {found['stride']}", *in_words(found)]
    protocol.append(f"{found['tokens']:,} tokens{part}")
    return f"  perplexity on {text}: {found['value']:.3f}{error}  ({', '.join(protocol)})"


def _of_tasks(result: dict[str, Any]) -> list[str]:
    """Return a line for each task, and one for their mean."""
    lines = []
    for task, found in result["tasks"].items():
        figures = []
        for metric in ("acc", "acc_norm"):
            if metric in found:
                error = found.get(f"{metric}_stderr")
                figures.append(f"{metric} {found[metric]:.2%}" + ("" if error is None else f" ± {error:.2%}"))
        if not figures:
            others = {name: value for name, value in found.items() if isinstance(value, float) and name != "version"}
            figures = [f"{name} {value:.4g}" for name, value in others.items() if "stderr" not in name]
        look = f", a quick look: the first {found['limit']}" if found["limit"] else ""
        questions = f"{found['samples']} questions of {found['split']}{look}"
        lines.append(f"  {task}: {', '.join(figures) or 'see the result'}  ({questions})")
    if result["mean"] is not None:
        mean = result["mean"]
        lines.append(f"  mean accuracy of {len(mean['tasks'])} tasks: {mean['value']:.2%}")
    return lines
