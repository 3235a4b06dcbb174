"""The help of every option of every verb: sentences, and true of this package."""

import argparse
import re

import jsonargparse
import pytest

from leap_pl.cli.fit import LeapCLI, make_cli
from leap_pl.cli.main import VERBS, _find, settings_of
from leap_pl.cli.recover import RecoverCLI
from leap_pl.cli.sentences import sentences

LIGHTNING = ("trainer", "ckpt_path", "weights_only", "seed_everything")


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def parsers():
    """Every parser by its verb, before it has parsed anything."""
    found = {}

    def keep(cli, parser, args):
        own = {verb: parser for verb, parser in cli.parsers.items() if verb is not None}
        found.update({"recover": own["fit"]} if isinstance(cli, RecoverCLI) else own)
        raise StoppedError

    def keep_one(parser, *args, **kwargs):
        found[parser.prog.split()[-1]] = parser
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeapCLI, "parse_arguments", keep)
        for word, kind in (("fit", LeapCLI), ("validate", LeapCLI), ("fit", RecoverCLI)):
            with pytest.raises(StoppedError):
                make_cli([word], kind=kind)
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", keep_one)
        for name, verb in VERBS.items():
            if not verb.run:
                with pytest.raises(StoppedError):
                    settings_of(name, _find(verb.function), [])
    assert found.keys() == VERBS.keys()
    return found


def helps(parser):
    """Option → its help, in one line."""
    told = {action.dest: action.help for action in parser._actions if action.help != argparse.SUPPRESS}
    return {name: " ".join(text.split()) for name, text in told.items()}


def test_every_help_is_sentences(parsers):
    """What is of this package also before it is formatted."""
    inherited = {"help", "checkpoint.verbose", "checkpoint.save_weights_only", "checkpoint.auto_insert_metric_name"}
    for verb, parser in parsers.items():
        written = {n: t for n, t in helps(parser).items() if n not in inherited and not n.startswith(LIGHTNING)}
        page = parser.format_help()
        shown = helps(parser)
        assert len(shown) > 2
        for name, text in [*written.items(), *shown.items()]:
            assert re.match(r"[A-Z`]", text), (verb, name, text)
            assert text.endswith((".", ":")), (verb, name, text)
        assert not re.search(r"``|:\w+:`", "".join(shown.values()))
        assert " ".join(shown["help"].split()) in " ".join(page.split())
    paths = {verb: helps(parser)["ckpt_path"] for verb, parser in parsers.items() if "ckpt_path" in helps(parser)}
    resuming = {verb for verb, path in paths.items() if path.startswith("Checkpoint to resume")}
    assert resuming == {"fit", "validate", "recover"}
    assert {"export", "evaluate"} <= paths.keys()
    assert "Default:" not in helps(parsers["fit"])["trainer.logger"]  # Lightning's, which is not the one here


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("verbosity mode. Default: ``False``.", "Verbosity mode."),
        ("See :class:`~a.b.Name` and :mod:`a.b`; ``x`` is 1.5", "See Name and a.b; x is 1.5."),
        ("One of these:", "One of these:"),
        ("Steps. Default: 1.", "Steps."),
    ],
)
def test_sentences(text, shown):
    assert sentences(text) == sentences(shown) == shown
