"""``leap_pl prune``: one-shot pruning from the command line."""

import sys
from argparse import SUPPRESS
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import OpenUnitInterval, PositiveInt

from leap_pl.base_model.prefix import Bos, prefix_of, record_of
from leap_pl.cli.command import check_used, command, given, with_arguments
from leap_pl.errors import UserError, listing
from leap_pl.escape import say
from leap_pl.oneshot.methods import DEFAULT, METHODS, method_named, settings_of, takers_of

if TYPE_CHECKING:
    from pathlib import Path

    from jsonargparse import ArgumentParser
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet
    from leap_pl.oneshot.prune import Pruned


# Defaults of earlier versions, whose --print_config wrote them for every method. Only some methods take these options
# now, and none takes mask_target.
FORMER = {"mask_target": "layer", "block_size": 128, "iterations": 20}


def add_arguments(parser: "ArgumentParser") -> None:
    """Add the options that come from the table of methods: the choice of a method, and the options of each."""
    group = parser.add_argument_group("methods")
    described = ", ".join(f"{name} ({'; '.join(_facts(name))})" for name in METHODS)
    group.add_argument("--method", choices=list(METHODS), default=DEFAULT, help=f"One of {described}.")
    kept = [name for name, method in METHODS.items() if method.solve_kept is not None]
    words = f"MaskSet file, folder or hub id of one, whose mask to keep; weights are updated. For {listing(kept)}."
    group.add_argument("--mask", type=str | None, default=None, help=words)
    for option in dict.fromkeys(option for method in METHODS.values() for option in method.options):
        takers = {name: METHODS[name].options[option] for name in takers_of(option)}
        first = next(iter(takers.values()))
        defaults = ", ".join(f"{taken.default:g} for {name}" for name, taken in takers.items())
        words = f"{first.help} By default {defaults}."
        group.add_argument(f"--{option}", type=type(first.default) | None, default=None, help=words)
    parser.add_argument("--mask_target", type=str | None, default=SUPPRESS, help=SUPPRESS)


def _facts(name: str) -> list[str]:
    method = METHODS[name]
    facts = [method.help, "reads no text" if method.needs is None else "", "updates weights" if method.updates else ""]
    return [fact for fact in facts if fact]


@command
@with_arguments(add_arguments, ("method", "mask"))
def prune_command(
    model: str,
    output_dir: str,
    text: str | list[str] = "allenai/c4",
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    seq_length: PositiveInt = 2048,
    sequences: PositiveInt = 128,
    separator: Literal["end_token", "blank_line"] = "end_token",
    bos: Bos = "every",
    seed: int = 0,
    method: str = DEFAULT,
    sparsity: OpenUnitInterval = 0.5,
    pattern: str | None = None,
    layer_sparsity: str | list[float] | None = None,
    owl: bool = False,
    owl_threshold: float = 5.0,
    owl_spread: float = 0.08,
    fisher: float | None = None,
    fisher_rows: float = 0.25,
    mask: str | None = None,
    targets: list[str] | None = None,
    ignore: list[str] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    batch_size: PositiveInt | None = None,
    offload: bool = True,
    force: bool = False,
    **options: Any,
) -> "Pruned":
    """Prune a model in one shot, layer by layer, on a small calibration text.

    Writes the mask to OUTPUT_DIR/mask.safetensors, the layer errors to OUTPUT_DIR/errors.json and, with methods that
    update the kept weights, a Hugging Face folder OUTPUT_DIR/model with the new weights.

    Args:
        model: Base model: hub id, local folder or GGUF file.
        output_dir: Folder to write.
        text: Calibration text: local files, or a hub dataset.
        config_name: Configuration of a hub dataset.
        split: Split of a hub dataset.
        text_column: Column, or JSON key, of the text.
        seq_length: Number of tokens in a calibration sequence, including BOS.
        sequences: Number of calibration sequences.
        separator: Separator after each document: the end token, or a blank line.
        bos: Calibration sequences that begin with what the tokenizer puts before a text, which is BOS for Llama and
            Gemma and nothing for Qwen and SmolLM2: every; with first and none no sequence, as in earlier versions.
        seed: Seed of the order in which the text's files are read.
        method: Name of the method, one of the table of methods.
        sparsity: Fraction of the weights to remove, above 0 and below 1. A pattern determines it.
        pattern: Pattern n:m, as in 2:4, which keeps n of every m consecutive inputs; unstructured by default.
        layer_sparsity: Sparsity of each decoder block, instead of one for all: a list, or a file with a JSON list or
            one number a line.
        owl: Allocate the sparsity over the decoder blocks by their shares of outliers (OWL).
        owl_threshold: Multiple of their block's mean above which Wanda scores are outliers, with owl.
        owl_spread: Half of the largest difference between the blocks' sparsities, with owl.
        fisher: Strength of Fisher allocation in (0, 1]: matrices that matter less to the loss are pruned more; .5 is a
            good start. It runs the whole model forward and backward on the device.
        fisher_rows: Strength, from 0 to 1, of Fisher allocation over the rows of each matrix, with fisher; for methods
            whose weights compete within a row, such as wanda.
        mask: MaskSet file, folder or hub id of one, whose mask to keep: only the kept weights are updated.
        targets: Weights to prune: class names, module or parameter names, or re: and a regular expression. By default
            all linears and experts of the decoder blocks.
        ignore: Weights to leave dense, in the same form.
        dtype: Dtype of the weights and of the forward passes; auto is the stored one. Hessians are float32.
        revision: Revision of the model on the hub; a local model has none.
        trust_remote_code: Run code that comes with the model.
        device: Device on which one block at a time is computed: cpu, cuda …; auto uses a GPU if there is one.
        batch_size: Number of sequences in one forward pass of a block: by default 4; with fisher, which keeps the
            activations of all blocks, as many as have 4096 tokens, at most 4.
        offload: Keep the activations between blocks in CPU memory.
        force: Replace OUTPUT_DIR if it is not empty.
        options: Options of the method, by their names in the table of methods.

    Returns:
        The masks and the layer errors.

    Raises:
        UserError: The options are invalid or contradict each other, an input cannot be read, or the folder cannot be
            written; nothing was written.
    """
    from leap_pl.base_model.config import load_config
    from leap_pl.base_model.loading import load_model
    from leap_pl.base_model.sequence_length import check_sequence_length
    from leap_pl.base_model.tokenizer import load_tokenizer
    from leap_pl.base_model.tokenizer_files import check_links
    from leap_pl.base_model.weights import check_finite_weights, find_weights
    from leap_pl.cli.device import check_device, device_name
    from leap_pl.data.messages import for_options
    from leap_pl.data.source import TextSource
    from leap_pl.files import atomic_folder
    from leap_pl.masks import MaskSet
    from leap_pl.masks.mask_set import TRAINED
    from leap_pl.masks.patterns import NM, parse_pattern
    from leap_pl.oneshot.allocation import OwlOptions, read_layer_sparsities
    from leap_pl.oneshot.checks import check_settings, warn_of_zeros
    from leap_pl.oneshot.fisher import whole_model_batch
    from leap_pl.oneshot.prune import prune
    from leap_pl.oneshot.walk import WalkOptions

    asked = method_named(method)
    check_device(device)
    taken = {name: value for name, value in options.items() if name in asked.options or value != FORMER.get(name)}
    settings = settings_of(method, taken)
    shape = parse_pattern(pattern, sparsity)
    if isinstance(shape, NM) and sparsity != shape.sparsity and given({"sparsity": sparsity}, prune_command):
        raise UserError(
            f"--pattern {shape} has sparsity {shape.sparsity:g}, and --sparsity {sparsity:g} was given. Leave one out."
        )
    of_mask, of_rows = {"sparsity": sparsity, "pattern": pattern}, {"fisher_rows": fisher_rows}
    of_owl = {"owl_threshold": owl_threshold, "owl_spread": owl_spread}
    check_used(of_mask, prune_command, mask is not None, "--mask sets which weights are kept")
    of_mask.pop("pattern")
    check_used(of_mask, prune_command, layer_sparsity is not None, "--layer_sparsity sets the sparsity")
    check_used(of_rows, prune_command, fisher is None, "only --fisher allocates over rows")
    rivals = listing([name for name, taker in METHODS.items() if taker.by_row])
    check_used(of_rows, prune_command, not asked.by_row, f"of {method} no weights compete within a row, as of {rivals}")
    check_used(of_owl, prune_command, not owl, "only --owl true counts outliers")
    uses_text = asked.needs is not None or owl or fisher is not None
    of_text = {"text": text, "sequences": sequences, "seq_length": seq_length, "separator": separator, "bos": bos}
    of_text |= {"text_column": text_column, "config_name": config_name, "split": split}
    of_text |= {"seed": seed, "batch_size": batch_size, "offload": offload}
    if not uses_text and (idle := given(of_text, prune_command)):
        # A note, so that one command line serves several methods.
        named = listing([f"--{name}" for name in idle])
        say(f"leap_pl prune: not used by {method}, which reads no text: {named}", sys.stderr)
    if uses_text:
        config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
        check_sequence_length(config, seq_length, model, "--seq_length")
        try:
            source = TextSource.open(text, text_column=text_column)
        except UserError as error:  # which names the options of fit
            raise UserError(for_options(str(error), PARAMETERS)) from error
        of_files = source.record_of_files(text)
        if source.is_local:
            of_hub = {"config_name": config_name, "split": split}
            check_used(of_hub, prune_command, True, "they choose a part of a hub dataset, and the text is local")
    allocated = None if fisher is None else _fisher(fisher, fisher_rows if asked.by_row else 0.0)
    per_layer = None if layer_sparsity is None else read_layer_sparsities(layer_sparsity)
    kept_mask = None if mask is None else MaskSet.load(mask)
    if kept_mask is not None and TRAINED in kept_mask.provenance.config:
        say(
            f"leap_pl prune: weights were trained under {mask}, and are left out: the update starts from those of "
            f"{model}. To train them further, use leap_pl recover.",
            sys.stderr,
        )
    of_outliers = OwlOptions(owl_threshold, owl_spread) if owl else None
    allocations = {"--layer_sparsity": per_layer, "--owl": of_outliers, "--fisher": allocated}
    chosen = [flag for flag, value in allocations.items() if value is not None]
    check_settings(method, shape, chosen, settings, masked=mask is not None)

    with atomic_folder(output_dir, force=force) as folder:
        if asked.updates:  # a model is written
            check_links(model)
        base = load_model(model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        check_finite_weights(base, f"base model {model}")
        weights = find_weights(base, targets, ignore or ())
        if kept_mask is not None:
            kept_mask.check(base, weights)
            kept_mask.check_form(weights)
        if not asked.updates:  # nor does pruning write anything into the model, which may stay on disk
            warn_of_zeros(weights)
        tokens, begun, first_target = None, {}, 1
        if uses_text and dtype == "auto":
            _note_slow_dtype(base, device_name(device))
        if uses_text:
            from leap_pl.base_model.vocabulary import check_tokenizer, vocabulary_of
            from leap_pl.data import calibration_blocks

            tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
            check_tokenizer(tokenizer, vocabulary_of(base), model)
            try:
                tokens = calibration_blocks(
                    text,
                    tokenizer,
                    seq_length=seq_length,
                    sequences=sequences,
                    seed=seed,
                    config_name=config_name,
                    split=split,
                    text_column=text_column,
                    separator=separator,
                    bos=bos,
                )
            except UserError as error:  # which names the options of fit
                raise UserError(for_options(str(error), PARAMETERS)) from error
            begun = record_of(bos, tokenizer)
            first_target = max(len(prefix_of(tokenizer)) if bos == "every" else 0, 1)
        usual = WalkOptions().batch_size if fisher is None else whole_model_batch(seq_length)
        pruned = prune(
            base,
            tokens,
            method=method,
            pattern=shape,
            layer_sparsity=per_layer,
            owl=of_outliers,
            fisher=allocated,
            mask=kept_mask,
            weights=weights,
            options=settings,
            walk=WalkOptions(batch_size or usual, device_name(device), offload, first_target=first_target),
            update=asked.updates,
            base_model=model,
            revision=revision,
        )
        data: dict[str, Any] = {"text": text, "config_name": config_name, "split": split, "separator": separator}
        data |= {"seed": seed, **begun} | ({} if text_column == "text" else {"text_column": text_column})
        data = {**data, **of_files} if uses_text else {}
        masks = pruned.masks
        made: dict[str, Any] = dict(masks.provenance.config)
        if kept_mask is None:
            made |= data
        else:  # of the weights; the mask has its own
            made["weight_update"] = {**made["weight_update"], **data}
        pruned.masks = masks.with_provenance(config=made)
        _write(folder, pruned, base if asked.updates else None, method, model, revision, trust_remote_code)
    _report(output_dir, pruned, asked.updates)
    return pruned


def _note_slow_dtype(base: "PreTrainedModel", device: str) -> None:
    """Print a note where the type that the model is stored in is slower than float32 on the ``device``."""
    import torch

    from leap_pl.base_model.fast_dtype import is_slow

    kind = torch.device(device)
    if is_slow(base.dtype, kind):
        stored = str(base.dtype).removeprefix("torch.")
        say(
            f"leap_pl prune: the model is stored in {stored}, and this {kind.type.upper()} computes float32 faster: "
            "--dtype float32, which takes twice the memory",
            sys.stderr,
        )


def _fisher(strength: float, row_strength: float) -> Any:
    from leap_pl.oneshot.fisher import FisherOptions

    if not 0 < strength <= 1:
        raise UserError(f"--fisher {strength:g}: give a number above 0 and at most 1.")
    if not 0 <= row_strength <= 1:
        raise UserError(f"--fisher_rows {row_strength:g}: give a number from 0 to 1.")
    return FisherOptions(strength, row_strength)


def _write(
    folder: "Path",
    pruned: "Pruned",
    updated: "PreTrainedModel | None",
    method: str,
    model: str,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    import json

    from leap_pl.base_model.tokenizer import save_tokenizer
    from leap_pl.export.card import facts_of
    from leap_pl.export.hugging_face import write_index, zeros_kept
    from leap_pl.inputs.plain_values import plain
    from leap_pl.inputs.records import MASK, RECORD

    pruned.masks.save(folder / MASK)
    errors = plain({"layer_error": pruned.errors, "damping": pruned.dampings, "unseen": pruned.unseen})
    (folder / "errors.json").write_text(json.dumps(errors, indent=1), encoding="utf-8")
    if updated is not None:
        updated.save_pretrained(folder / "model")
        write_index(folder / "model")
        save_tokenizer(model, folder / "model", revision=revision, trust_remote_code=trust_remote_code)
        # Without this record, evaluate and compare would read the folder as a dense base model.
        facts = facts_of(pruned.masks, zeros_kept(pruned.masks, updated)) | {"updated_by": method}
        pruned.masks.save(folder / "model" / MASK)  # a kept weight may be 0
        record = json.dumps(plain(facts), indent=2)
        (folder / "model" / RECORD).write_text(record + "\n", encoding="utf-8")


def _report(output_dir: str, pruned: "Pruned", updated: bool) -> None:
    masks: MaskSet = pruned.masks
    if empty := [name for name, mask in masks.masks.items() if not bool(mask.any())]:
        say(
            f"leap_pl prune: nothing is left of {len(empty)} of {len(masks.masks)} matrices: {listing(empty, 3)}. "
            "Remove less, or leave them dense with --ignore.",
            sys.stderr,
        )
    line = f"{output_dir}: {masks.provenance.method} mask of {masks.total:,} weights, sparsity {masks.sparsity:.4f}"
    if pruned.errors:
        line += f", mean layer error {sum(pruned.errors.values()) / len(pruned.errors):.4f}"
    say(f"{line}{', and the model with its updated weights' if updated else ''}, in {pruned.seconds:.0f} s")


PARAMETERS = signature(prune_command).parameters  # name of each option → with its default
