"""The report of a job: what it shows, that nothing leaves it, and how a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.tiny_models import WORDS, tiny, tiny_tokenizer
from spurge.cli import main
from spurge.engine.base.files import canonical_json
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.data.examples import Example, Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.evaluation.report import Report
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites
from spurge.methods.find.found import Found, Row
from spurge.methods.macu.located import Located
from spurge.report.folders import read_job
from spurge.report.html import write_report
from spurge.report.results import Results

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
HOSTILE = "<script>alert('x')</script>\"><img src=http://example.com/x.png> \u202egnol\u202c " + "w" * 300


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a job leaves it, its texts as bad as texts can be."""
    folder = tmp_path_factory.mktemp("job")
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=8)) for _ in range(30)]
    texts[::3] = [f"{text} {HOSTILE}" for text in texts[::3]]
    names = ("a group", HOSTILE)
    rows = [Example(text, i % 2, group=names[i // 2 % 2]) for i, text in enumerate(texts)]
    tests = {"home": Examples(rows, ("no", "<b>yes</b>")), "away": Examples(rows[:20], ("no", "<b>yes</b>"))}
    edit = WeightEdit.build(model, {"classifier.weight": -model.classifier.weight.detach()}, {"method": "turned"})
    edit.save(folder / "edit.safetensors")
    report = evaluate(model, tokenizer, tests, edit=edit, draws=2, bootstrap=50, changed=3, progress=False)
    assert len(report.changed) == 6
    results = Results("evaluate", {**report.settings, "command": f"spurge evaluate --model '{HOSTILE}'"})
    results.extend(report.rows())
    results.write(folder / "evaluate.json")
    lines = "".join(f"{canonical_json(one.to_dict())}\n" for one in report.changed)
    (folder / "changed.jsonl").write_text(lines, encoding="utf-8")
    sites = [site.name for site in find_sites(model)]
    scores = NeuronScores({site: torch.randn(6) for site in sites}, {"method": "MacU"})
    phrases = [{"text": HOSTILE, "label": "no", "count": 7, "strength": 4.25}]
    Located(
        scores,
        scores,
        NeuronSet({sites[0]: [1]}),
        NeuronSet({sites[0]: [1, 2], sites[1]: [3]}),
        {},
        {"phrases": phrases},
    ).save(folder / "located.safetensors")
    found = [
        Row(word=word, kind="word", label="no", role=role, count=7, share=90.0, q=0.01, lean=1.5, low=1.0, high=2.0)
        for word, role in (("on tuesday", "spurious"), ("good", "causal"), (HOSTILE, "undecided"))
    ]
    Found(tuple(found), ("no", "yes")).save(folder / "found.tsv")
    gates = NeuronEdit.build(model, NeuronSet({sites[0]: [1, 2]}), 0.0)
    gates.save(folder / "gates.safetensors")
    (folder / "golden.json").write_text("{}")
    (folder / "train.tsv").write_text("text\tlabel\na\t1\n")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    return folder


class Tags(HTMLParser):
    """Tags, what they point to, and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_everything_and_loads_nothing(job: Path, tmp_path: Path) -> None:
    card = write_report([job], tmp_path / "report.html", title=HOSTILE)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Tags(html)
    assert not {"script", "img", "iframe", "object", "embed", "form"} & found.tags
    assert found.links == ["data:,"]
    assert "url(" not in html
    assert "@import" not in html
    for text in ("on tuesday", "worst group", "threshold", "random (2 draws)", "broken.safetensors could not be read"):
        assert text in found.text
    for name in ("found.tsv", "located.safetensors", "edit.safetensors", "gates.safetensors", "changed.jsonl"):
        assert name in found.text
    assert HOSTILE in found.text
    assert f"spurge evaluate --model '{HOSTILE}'" in found.text
    assert html.count("<svg") >= 4
    assert html.count("<mark title=") > 10
    assert {edit["file"] for edit in card.facts["edits"]} == {"edit.safetensors", "gates.safetensors"}
    write_report([job], tmp_path / "again.html", title=HOSTILE)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_the_card_is_json_and_markdown(job: Path, tmp_path: Path) -> None:
    card = write_report([job], tmp_path / "r.html", title=HOSTILE)
    card.save(tmp_path / "card.json")
    card.save(tmp_path / "card.md")
    facts = json.loads((tmp_path / "card.json").read_text())
    assert facts["title"] == HOSTILE
    assert re.fullmatch("[0-9a-f]{64}", facts["edits"][0]["sha256"])
    (measured,) = facts["measured"]
    assert {"none", "edit", "threshold", "random"} <= {row["method"] for row in measured["rows"]}
    text = (tmp_path / "card.md").read_text()
    assert text.startswith("---\nlibrary_name: spurge\n")
    assert "<script>" not in re.sub("(?m)^    .*$", "", text)  # an indented line is code
    assert "| home | edit | accuracy |" in text
    assert "## What this does not say" in text


def test_a_report_is_back_from_its_rows(job: Path) -> None:
    results = Results.load(job / "evaluate.json")
    report = Report.of_rows(results.rows, results.head["settings"])
    assert report.rows() == [{**row, "seed": 0, "labels": row.get("labels")} for row in results.rows]
    assert str(report).startswith("accuracy, percent\n")


def test_the_command(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [str(tmp_path / name) for name in ("report.html", "card.md", "card.json", "numbers.json")]
    page, *cards, numbers = outputs
    given = ["report", str(job), str(job / "edit.safetensors"), "--out", page, "--title", "Toxicity", "--json", numbers]
    assert main([*given, "--card", cards[0], "--card", cards[1]]) == 0
    assert all(Path(path).stat().st_size for path in outputs)
    assert "<h1>Toxicity</h1>" in Path(page).read_text(encoding="utf-8")
    assert Results.load(numbers).head["settings"]["command"].startswith("spurge report ")
    capsys.readouterr()
    assert main([*given, "--card", "card.txt"]) == 2
    assert "--card: expected a file that ends in .md or .json, got 'card.txt'" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none"), "--out", page]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_what_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected files that spurge wrote"):
        read_job([tmp_path])
    with pytest.raises(ValueError, match="does not exist"):
        read_job([tmp_path / "none"])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "paper"), [(375, False), (1280, False), (700, True)])
def test_a_browser_draws_it_without_overflow(job: Path, tmp_path: Path, width: int, paper: bool) -> None:
    """The page itself never scrolls sideways, on paper nothing does; no error is reported, and nothing asked for."""
    write_report([job], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    if paper:
        html = html.replace("@media print", "@media screen")
        assert html.count("@media screen") == 1
    page = json.dumps(html).replace("<", "\\u003c")
    (tmp_path / "frame.html").write_text(
        _FRAME.format(width=width, page=page, paper=json.dumps(paper)), encoding="utf-8"
    )
    out = run(tmp_path, "--dump-dom", "frame.html")
    found: dict[str, Any] = json.loads(out.stdout.partition("RESULT ")[2].partition("</pre>")[0])
    assert found["wide"] == []
    assert found["scroll"] <= found["client"] <= width
    assert found["loaded"] == 0
    assert "CONSOLE" not in out.stderr


# The page in a frame as wide as a screen: the outer page may run the script that the inner one forbids.
_FRAME = """<!doctype html><body style="margin:0"><iframe id=f width={width} height=900 style="border:0"></iframe>
<pre id=out></pre><script>
const frame = document.getElementById('f'), paper = {paper};
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll('body *')]
    .filter(one => (paper || !one.closest('.wide')) && one.getBoundingClientRect().right > root.clientWidth + 1)
    .map(one => one.tagName + ' ' + one.textContent.slice(0, 40));
  const loaded = frame.contentWindow.performance.getEntriesByType('resource').length;
  document.getElementById('out').textContent =
    'RESULT ' + JSON.stringify({{scroll: root.scrollWidth, client: root.clientWidth, wide, loaded}});
}};
frame.srcdoc = {page};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_it_prints(job: Path, tmp_path: Path) -> None:
    write_report([job], tmp_path / "report.html")
    out = run(tmp_path, "--print-to-pdf=report.pdf", "report.html")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "CONSOLE" not in out.stderr


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ("background-networking", "component-update", "sync", "gpu")
    flags = [f"--disable-{name}" for name in quiet]
    command = [str(BROWSER), "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr", *flags]
    *options, page = arguments
    where = [f"--user-data-dir={folder / 'profile'}", *options, f"file://{folder / page}"]
    return subprocess.run(command + where, capture_output=True, text=True, timeout=120, cwd=folder, check=True)
