"""Names from outside are shown as text: on the terminal, in the page, in Markdown and in the model card."""

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from made_results import result

import leap_pl
from leap_pl.cli import main as cli
from leap_pl.cli.compare import compare_command
from leap_pl.escape import html, markdown, markdown_code, say, terminal, write_out
from leap_pl.masks import MaskSet

EVIL = "\x1b]0;evil\x07<script>alert(1)</script>![](http://x)`|$_*\u202e\n# title\r\u2028"


def unseen(text: str) -> list[str]:
    """Characters that a terminal acts on, or that turn text around; line ends are the caller's."""
    return [
        c
        for c in text
        if c != "\n"
        and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202e\u2066\u2069\u200f\ufeff")
    ]


def test_what_is_plain_stays_as_it_is() -> None:
    for text in ("SmolLM2-135M, α=0.5 ± 0.1", "日本語 العربية", "👩\u200d👩\u200d👧", "a/b_c-d.jsonl", r"C:\new"):
        assert terminal(text) == text
    assert html("a_b 50%") == "a_b 50%"
    assert markdown("self_attn.q_proj, 50% (wanda) ± 1") == "self_attn.q_proj, 50% (wanda) ± 1"
    assert markdown_code("org/model_a") == "`org/model_a`"


def test_what_is_not_is_written_out() -> None:
    assert terminal("\x1b]0;evil\x07\n\u202e\ud800\U000e0001") == r"\x1b]0;evil\x07\n\u202e\ud800\U000e0001"
    assert terminal("a\nb\x9b", lines=True) == "a\nb\\x9b"
    assert html("<a href='x'>&\x1b") == "&lt;a href=&#x27;x&#x27;&gt;&amp;\\x1b"
    assert markdown("![](http://x) <b> www.x.y a@b") == r"\!\[\](http\://x) &lt;b&gt; www\.x.y a\@b"
    for begun in ("# a", "### a", "- a", "+ a", "1. a", "23) a", "---", "===", "-"):
        assert re.fullmatch(r"\d*\\[^\w\s].*", markdown(begun)), begun
    for plain in ("-0.5", "+0.25 ± 0.1", "1.5", "#1", "2:4", "a - b"):
        assert markdown(plain) == plain
    assert markdown("_a_ b__c") == r"\_a\_ b__c"
    assert markdown_code("a`b``c|") == "```a`b``c|```"
    assert markdown_code("`|", cell=True) == r"`` `\| ``"


@given(st.text())
def test_any_text_is_one_line_that_nothing_acts_on(text: str) -> None:
    for shown in (terminal(text), html(text), markdown(text), markdown_code(text)):
        assert not unseen(shown)
        assert "\n" not in shown
        shown.encode()  # lone surrogates cannot be printed


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text())
def test_any_text_is_no_markup(text: str) -> None:
    page = _Page()
    page.feed(f"<p title='{html(text)}'>{html(text)}</p>")
    page.close()
    assert page.tags == {"p"}
    assert page.text == terminal(text)
    bare = re.sub(r"\\[^\w\s]", "", markdown(text))
    assert not set("`*[]|~$!<>") & set(bare)
    code = markdown_code(text)
    fence = re.match("`+", code)
    assert fence is not None
    assert fence[0] not in code[len(fence[0]) : -len(fence[0])].replace("`" * (len(fence[0]) + 1), "")


@pytest.fixture
def evil_results(tmp_path: Path) -> list[str]:
    """Two results with EVIL in every string that is shown of one, and as a file name."""
    paths = []
    for place, method in enumerate(("dense", EVIL)):
        content = result(method, 0.5 * place, 20.0)
        content["model"] = {"name": EVIL, "base_model": EVIL, "fingerprint": EVIL, "mask": EVIL.replace("/", "")}
        content["config"] = {"pattern": EVIL}
        content["sparsity"]["weights"] = {f"model.layers.{n}.{EVIL}.weight": 0.4 + n / 10 for n in range(2)}
        text, task = content["perplexity"].pop("held-out.jsonl"), content["tasks"].pop("piqa")
        content["perplexity"][EVIL], content["tasks"][EVIL] = text, task | {"split": EVIL, "limit": 3}
        path = tmp_path / f"{place}{EVIL.replace('/', '')}.json"
        path.write_text(json.dumps(content))
        paths.append(str(path))
    return paths


READER_GONE = """
import sys
from leap_pl.escape import say
for number in range(3):
    say(f"line {number}")
    if number == 0:
        sys.stdin.readline()  # until the reader has closed its end
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"\u2212 1 \xb1 2"), ("latin-1", "\\u2212 1 \xb1 2")])
def test_what_the_encoding_of_a_stream_has_not_is_written_out(encoding: str, shown: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    say("\u2212 1 \xb1 2", stream)
    assert stream.buffer.getvalue().decode(encoding) == shown + "\n"  # type: ignore[attr-defined]


def test_a_terminal_that_is_not_utf_8_ends_nothing(evil_results: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    comparison = ["compare", f"--results={json.dumps(evil_results)}", f"--output_dir={tmp_path / 'out'}"]
    for words in (["fit", "--help"], ["prune", "--help"], comparison):
        command = [sys.executable, "-m", "leap_pl", *words]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr.decode()
        assert done.stdout.isascii()


def test_a_reader_that_wants_no_more_ends_nothing(tmp_path: Path) -> None:
    """As head does, once it has its lines; and the first is there before the process ends."""
    words = [sys.executable, "-c", READER_GONE, str(tmp_path / "result")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        process.stdin.write(b"closed\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert (tmp_path / "result").read_text() == "went on"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """Without an output a command ends as with one; where a bar cannot be written, it does not end as if done."""
    program = "import sys\nfrom leap_pl.cli import main as cli\n"
    program += "cli.main = lambda: sys.stderr.write('x' * 10**6)\ncli.console()"
    if closed == "stdout":
        command = f'{sys.executable} -c "$0" >&- 2>/dev/null'
        assert subprocess.run(["sh", "-c", command, program], check=False).returncode == 0
    else:
        words = [sys.executable, "-c", program]
        with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr is not None
            process.stderr.close()
        assert process.returncode == 128 + 13


def test_a_comparison(evil_results: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    compare_command(evil_results, output_dir=str(out), baselines="wanda")
    said = capsys.readouterr().out
    assert r"\x1b]0;evil\x07" in said
    assert not unseen(said)
    page, text = _Page(), (out / "index.html").read_text(encoding="utf-8")
    page.feed(text)
    ours = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "table", "thead", "tbody", "tr", "th"}
    assert page.tags <= ours | {"td", "p", "ul", "li", "code", "figure", "figcaption", "img", "wbr"}
    assert not unseen(text)
    assert r"\x1b]0;evil\x07<script>alert(1)</script>" in page.text
    table = (out / "table.md").read_text(encoding="utf-8")
    assert not unseen(table)
    assert "<script>" not in table
    assert "![" not in table
    assert "](" not in table.replace(r"\](", "")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}) == 1
    for picture in out.glob("*.svg"):
        drawn = picture.read_text(encoding="utf-8")
        assert not unseen(drawn)
        assert "<script>" not in drawn


def test_a_model_card(finished: Run, model_folder, tmp_path: Path, capsys) -> None:
    told = MaskSet.load(finished.mask).provenance
    settings = {**told.config, "data": {"text": [EVIL], "seq_length": 32}, EVIL: EVIL}
    mask = MaskSet.load(finished.mask).with_provenance(
        base_model=f"a/b{EVIL.replace('/', '')}",
        revision=EVIL,
        method=EVIL,
        versions={"leap_pl": EVIL},
        config=settings,
    )
    mask.save(tmp_path / "mask.safetensors")
    content = result(EVIL, 0.5, 3.0, mask=str(tmp_path / "mask.safetensors"))
    content["perplexity"] = {EVIL: content["perplexity"]["held-out.jsonl"]}
    (tmp_path / "r.json").write_text(json.dumps(content))
    out = tmp_path / f"out{EVIL.replace('/', '')}"
    words = [
        f"--mask={tmp_path / 'mask.safetensors'}",
        f"--model={model_folder}",
        f"--perplexity={tmp_path / 'r.json'}",
    ]
    cli.main(["export", *words, f"--output_dir={out}"])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1
    assert not unseen(said)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert not unseen(card)
    assert card.split("---\n")[1] == (  # no base model
        "library_name: transformers\npipeline_tag: text-generation\ntags: [leap_pl, pruned, sparse]\n"
    )
    lines_of_code = re.search(r"^```python\n(.*?)^```\n", card, re.DOTALL | re.MULTILINE)
    assert lines_of_code is not None
    assert "evil" not in lines_of_code[1]
    prose = card.replace(lines_of_code[0], "")
    without_code = re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert "evil" in without_code
    bare = re.sub(r"\\[^\w\s]", "", without_code)
    assert "<" not in bare
    assert "[" not in bare.partition("---\n\n")[2]
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [re.findall(r"^# .*", prose, re.M)[0]]


def test_errors_and_warnings_are_one_line(finished: Run, tmp_path: Path, capsys) -> None:
    name = EVIL.replace("/", "")
    for words in (
        ["export", f"--mask={name}", "--output_dir=o"],
        ["export", f"--mask={finished.mask}", f"--output_dir={tmp_path / name}", f"--model=./{name}"],
        ["evaluate", f"--model=./{name}", f"--perplexity={name}"],
        ["compare", name],
        ["prune", f"--model=./{name}", "--output_dir=o", "--method=magnitude"],
        ["fit", f"--{name}"],
        ["fit", f"--model.base_model=./{name}", f"--data.text={name}"],
        [name],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main(words)
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("leap_pl ")]
        assert len(lines) == 1, said
        assert "evil" in lines[0]
        assert not unseen(said)
    assert (
        cli._one_line(f"text {EVIL} ends", UserWarning, "", 0)
        == f"warning: {terminal(' '.join(f'text {EVIL} ends'.split()))}\n"
    )


def test_nothing_is_printed_past_it() -> None:
    """What this package says goes through one function; its experiments print their own figures."""
    allowed = {"escape.py", "runner.py", "running.py", "__main__.py", "usage.py"}
    package = Path(leap_pl.__file__).parent
    for file in package.rglob("*.py"):
        calls = re.findall(
            r"(?<![\w.])print\((?!USAGE|f\"leap_pl \{__version__\}|\"usage: )", file.read_text(encoding="utf-8")
        )
        assert file.name in allowed or not calls, file


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_without_streams_does_its_work(closed: str, evil_results: list[str], tmp_path: Path) -> None:
    """As some supervisors start jobs."""
    out = tmp_path / "out"
    words = [
        "sh",
        "-c",
        f'"$0" -m leap_pl compare "$1" --output_dir "$2" {closed}',
        sys.executable,
        evil_results[0],
        str(out),
    ]
    assert subprocess.run(words, capture_output=True, timeout=300, check=False).returncode == 0
    assert (out / "index.html").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(evil_results: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "leap_pl", "compare", evil_results[0], f"--output_dir={out}"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("warning: standard output cannot be written (No space left on device)")
    assert (out / "index.html").is_file()


def test_text_that_a_verb_makes_is_escaped_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "f() {\n\treturn\r\n}\x1b[2J\u200f"
    write_out(text)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    write_out(text)
    assert capsys.readouterr().out == "f() {\n\treturn\\x0d\n}\\x1b[2J\\u200f\n"


def test_a_result_may_have_a_name_that_is_no_unicode(evil_results: list[str], tmp_path: Path) -> None:
    named = tmp_path / "r-\udce9.json"
    try:
        named.write_bytes(Path(evil_results[0]).read_bytes())
    except OSError:
        pytest.skip("this file system has Unicode names alone")
    compare_command([str(named)], output_dir=str(tmp_path / "out"))
    assert r"r-\udce9.json" in (tmp_path / "out" / "table.csv").read_text(encoding="utf-8")
