"""The first pages of ``leap_pl fit --help`` and ``leap_pl recover --help``: short, at once, and true."""

import re
import subprocess
import sys

import pytest

from leap_pl.cli.first_pages import FIT, RECOVER
from leap_pl.cli.fit import LeapCLI, make_cli
from leap_pl.cli.main import main
from leap_pl.cli.recover import RecoverCLI

OPTION = re.compile(r"--([\w.]*\w)(?: ([\w./-]*\w))?(?=,|;|\.? |\.?\n|$)")
ADDED = {"config", "ckpt_path", "force", "help", "print_config", "tokens"}  # of the verb, not of its three classes


def test_it_is_a_page_of_sentences(capsys) -> None:
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", word])
        assert stop.value.code == 0
        assert capsys.readouterr().out == FIT
    lines = FIT.splitlines()
    assert 35 <= len(lines) <= 48
    assert max(map(len, lines)) <= 120
    told = [
        line for line in lines if line.startswith("  --") and not line.endswith(("_batches 1", "_checkpointing false"))
    ]
    assert all(re.search(r"(  |0\.0 |25\.0 )[A-Z][^.].*\.$", line) for line in told), told


def test_it_imports_nothing_heavy() -> None:
    code = "import sys; from leap_pl.cli.main import main\ntry: main(['fit', '--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'lightning', 'jsonargparse'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(("page", "kind"), [(FIT, LeapCLI), (RECOVER, RecoverCLI)])
def test_options_and_defaults_are_those_of_the_parser(page: str, kind: type[LeapCLI]) -> None:
    cli = make_cli(["--model.base_model=x", "--trainer.accelerator=cpu"], run=False, kind=kind)
    defaults = cli.parser.get_defaults()
    seen = 0
    for name, shown in OPTION.findall(page):
        if name.partition(".")[0] in ADDED or name in ("tensorboard", "logdir"):
            continue
        *groups, last = name.split(".")
        group = defaults
        for part in groups:
            group = group[part]
            group = group.get("init_args", group) if hasattr(group, "get") else group
        assert last in group, name
        seen += 1
        if shown and not shown.isupper():
            value = group[last]
            value = value["class_path"].rpartition(".")[2] if hasattr(value, "get") else value
            assert (str(value).lower() if isinstance(value, bool) else str(value)) == shown, name
    assert seen > 25
