"""``leap_pl compare``: comparison of results and masks as a table, pictures and an HTML page."""

from collections.abc import Sequence
from typing import Any

from leap_pl.cli.command import command
from leap_pl.errors import UserError, listing
from leap_pl.escape import say


@command
def compare_command(
    results: Sequence[str] = (), output_dir: str = "comparison", baselines: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Compare results and masks.

    The following files are written to output_dir: table.md, table.csv, every picture as .svg (perplexity and mean
    accuracy against sparsity, differences from the best baseline, density by layer and projection, overlap of masks),
    and index.html, a page with all of them that can be opened from disk. The table is printed as well.

    Perplexities measured with different texts, tokenizers, seq_length or stride cannot be in one column, nor can
    accuracies measured on different splits, limits or numbers of examples.

    Args:
        results: Result files of leap_pl evaluate, MaskSet files or hub ids of them, checkpoints of leap_pl fit, and
            folders that leap_pl has written a mask to, in any order, without a flag: leap_pl compare dense.json
            sparse.json mask.safetensors exported-folder/. The mask that a result was measured with
            (evaluate --mask, or the model's own) is found automatically if it is still in its original place.
        output_dir: Folder to write.
        baselines: Methods, separated by commas; the other results are compared with the best of them at the same
            sparsity. By default the methods of leap_pl prune.
        force: Replace output_dir if it is not empty.

    Returns:
        ``table`` (one dictionary for each row, with the CSV's columns as keys) and ``files``.

    Raises:
        UserError: A file cannot be read, results are not comparable, or the folder cannot be written.
    """
    if not results:
        raise UserError(
            "Nothing to compare. Name result files of leap_pl evaluate, masks or exported folders: "
            "leap_pl compare dense.json sparse.json mask.safetensors exported-folder/"
        )
    from pathlib import Path
    from shutil import get_terminal_size

    from leap_pl.comparison.entries import read_entries
    from leap_pl.comparison.page import make_page
    from leap_pl.comparison.pictures import draw_all
    from leap_pl.comparison.table import make_table
    from leap_pl.comparison.verdict import verdict
    from leap_pl.escape import markdown
    from leap_pl.files import atomic_folder
    from leap_pl.inputs.register import listed
    from leap_pl.oneshot.methods import METHODS

    measured_against = {*(METHODS if baselines is None else listed(baselines))}
    if "" in measured_against:
        raise UserError(f"--baselines {baselines!r} has an empty entry. Separate entries by single commas.")
    entries = read_entries(results)
    methods = {*METHODS, *(entry.method for entry in entries)}
    if unknown := sorted(measured_against - methods):
        raise UserError(
            f"--baselines {baselines}: there is no method {listing(unknown)}. There are {listing(sorted(methods))}."
        )
    table, sentence = make_table(entries, measured_against), verdict(entries, measured_against)
    with atomic_folder(output_dir, force=force) as folder:
        top = f"{markdown(sentence)}\n\n" if sentence else ""
        (folder / "table.md").write_text(top + table.markdown(), encoding="utf-8")
        (folder / "table.csv").write_text(table.csv(), encoding="utf-8")
        pictures = draw_all(entries, measured_against, folder)
        (folder / "index.html").write_text(make_page(entries, sentence, table, pictures, folder), encoding="utf-8")
    say(table.text(get_terminal_size(fallback=(0, 0)).columns or None), lines=True)  # None: not a terminal
    say("")
    if sentence:
        say(sentence)
    say(f"written: {Path(output_dir, 'index.html')}, table.md, table.csv and {len(pictures)} pictures")
    return {
        "table": [dict(zip(table.keys, row, strict=True)) for row in table.values],
        "files": sorted(str(path) for path in Path(output_dir).iterdir()),
    }
