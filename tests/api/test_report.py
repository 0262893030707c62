"""The report: what it says is computed from the run, losses included, and the page needs nothing but itself."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console
from sample_run import encoder_run, llm_run

from gossamer.core.errors import FileDamaged, FormatError, UnknownName
from gossamer.report import (
    FIGURES,
    EngineRow,
    figure,
    headline,
    load_run,
    speedup,
    table,
    verdicts,
    write_png,
    write_report,
    write_run,
)

RUNS = pytest.mark.parametrize("run", [encoder_run(), llm_run()], ids=["encoder", "llm"])


@pytest.fixture(scope="module", params=[encoder_run, llm_run], ids=["encoder", "llm"])
def page(request, tmp_path_factory) -> str:
    file = write_report(request.param(), tmp_path_factory.mktemp("page") / "report.html")
    return file.read_text(encoding="utf-8")


@RUNS
def test_a_run_comes_back_from_json_as_it_was(run, tmp_path):
    write_report(run, tmp_path / "sub" / "report.html")
    assert load_run(tmp_path / "sub" / "run.json") == run
    assert [p.name for p in sorted((tmp_path / "sub").iterdir())] == ["report.html", "run.json"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    file = write_run(encoder_run(), tmp_path / "run.json")
    whole = file.read_text()
    for text in (whole[:-100], "[]", '{"a": 1}', whole.replace('"schema": 1', '"schema": 99')):
        file.write_text(text)
        with pytest.raises(FileDamaged):
            load_run(file)
    held = json.loads(whole)
    file.write_text(json.dumps({**held, "hardwear": {}}))
    with pytest.raises(UnknownName, match="hardware"):
        load_run(file)
    del held["engines"][0]["latency_ms"]
    file.write_text(json.dumps(held))
    with pytest.raises(FormatError, match="latency_ms"):
        load_run(file)
    with pytest.raises(FileDamaged, match="cannot be read"):
        load_run(tmp_path / "nothing.json")


def test_a_run_that_disagrees_with_itself_is_refused():
    run = encoder_run()
    with pytest.raises(UnknownName, match="dense"):
        replace(run, engines=[replace(run.engines[0], setting="dens")])
    with pytest.raises(FormatError, match="no setting is dense"):
        replace(run, settings=run.settings[1:], engines=(), layers=())
    with pytest.raises(FormatError, match="share a name"):
        replace(run, settings=(*run.settings, run.settings[0]))
    with pytest.raises(FormatError, match="probe accuracy"):
        replace(run.settings[0], quality_label="probe acuracy")


def test_the_headline_is_computed_from_the_numbers():
    run = encoder_run()
    said = "4-row, 80 %: 2.1× faster than openvino (2 threads), 1.6× smaller on disk, −0.7 points of probe accuracy"
    assert headline(run) == said
    slower = tuple(replace(r, throughput=r.throughput / 4) if r.engine == "gossamer" else r for r in run.engines)
    assert "slower than openvino" in headline(replace(run, engines=slower))
    better = tuple(replace(s, quality={s.quality_label: 0.9}) if not s.is_dense else s for s in run.settings)
    assert "+9.0 points of probe accuracy" in headline(replace(run, settings=better))


def test_losses_are_said_as_plainly_as_gains():
    last = verdicts(encoder_run())[-1]
    assert (
        last.sentence
        == "2:4: 1.4× slower than openvino (2 threads), 1.2× smaller on disk, −0.1 points of probe accuracy"
    )
    assert [p.news for p in last.phrases] == ["loss", "win", "loss"]
    prompt = verdicts(llm_run())[-1].phrases[1]
    assert (prompt.text, prompt.news) == ("1.2× slower than torch (2 threads, prompt)", "loss")
    perplexity = [v.phrases[-1].text for v in verdicts(llm_run())]
    assert perplexity[0] == "53× the perplexity (912 against 17.2)"
    assert perplexity[2] == "+45.9 % perplexity (25.1 against 17.2)"


def test_within_the_noise_nothing_is_claimed():
    run = encoder_run()
    near = tuple(replace(r, throughput=56.0 * r.threads**0.8) if r.setting == "2:4" else r for r in run.engines)
    phrase = verdicts(replace(run, engines=near))[-1].phrases[0]
    assert (phrase.text, phrase.news) == ("1.0× the speed of openvino (2 threads)", "same")


def test_speed_is_compared_at_the_same_threads_and_unit_with_the_best_dense_engine():
    run = encoder_run()
    of = {(r.setting, r.engine, r.threads): speedup(run, r) for r in run.engines}
    assert of["dense", "openvino", 1] == of["dense", "openvino", 2] == 1.0
    assert of["dense", "torch", 1] == pytest.approx(40 / 55)
    assert of["4-row, 90 %", "gossamer", 2] == pytest.approx(3.2)
    alone = EngineRow("2:4", "gossamer", 8, 1.0, 0.0, 999.0, "sentences/s")
    assert speedup(replace(run, engines=(*run.engines, alone)), alone) is None


@RUNS
def test_the_table_fits_a_terminal_and_shows_the_losers(run):
    console = Console(width=120, record=True, file=io.StringIO(), force_terminal=True)
    console.print(table(run))
    text = console.export_text(clear=False)
    assert max(map(len, text.splitlines())) <= 120
    rows = [line for line in text.splitlines() if line.strip()]
    assert next(i for i, r in enumerate(rows) if "dense " in r and "MB" in r) == 3  # after title, head and rule
    for row in run.engines:
        assert f"{speedup(run, row):.2f}×" in text
    assert "\x1b[31m" in console.export_text(styles=True)  # red: something loses in both runs


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data") and v]


def test_the_page_needs_nothing_but_itself(page):
    seen = _Links()
    seen.feed(page)
    assert [link for link in seen.links if not link.startswith("#")] == []
    assert not {"link", "img", "iframe", "object", "embed"} & set(seen.tags)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in without_names
    assert "https://" not in without_names
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_page_has_both_themes_and_reads_without_scripts(page):
    assert "prefers-color-scheme: dark" in page
    assert 'data-theme="dark"' in page
    assert "@media print" in page
    assert page.count('class="on-light"') == page.count('class="on-dark"') == 4
    script = page[page.index("<script>") :]
    assert "innerHTML" not in script
    assert '<button id="theme" type="button" hidden>' in page  # a toggle that cannot work is not shown


def test_the_page_says_what_was_measured_and_how():
    from gossamer.report.page import render

    run = encoder_run()
    page = render(run)
    text = re.sub(r"<(style|svg|script).*?</\1>", "", page, flags=re.DOTALL)
    for said in (
        "openvino",
        "2.10×",
        "0.70×",
        "8.66 ms",
        "TREC accuracy",
        "Made-up numbers.",
        run.command,
        run.saved_at,
    ):
        assert said in text
    assert "dense was faster on this shape" in text
    assert "encoder.layer.0.attention.self.value" in text
    assert "gossamer.load(&#34;gossamer-demo/minilm-4row80&#34;)" in text
    assert "a processor &lt;of 2 cores&gt;" in text  # escaped
    assert "<of 2 cores>" not in page


def test_ids_are_unique_and_plots_are_named_for_who_cannot_see_them(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    plots = re.findall(r"<svg[^>]*>", page)
    assert len(plots) == 8
    assert all('role="img"' in p and re.search(r'aria-label="[^"]{20,}"', p) for p in plots)


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_each_plot_is_sound_svg_whose_text_is_text(kind, dark):
    for run in (encoder_run(), llm_run()):
        svg = figure(run, kind, dark=dark)
        root = ElementTree.fromstring(svg)
        words = " ".join("".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text"))
        expected = "block 0" if kind.startswith("layer") else run.dense.quality_label
        assert expected in words
        for link in re.findall(r"#([\w-]+)[\")]", re.sub(r"#[0-9a-f]{6}\b", "", svg)):
            assert f'id="{link}"' in svg
    assert figure(run, kind, dark=dark) == svg  # the same run draws the same bytes
    assert figure(run, kind, dark=not dark) != svg


def test_labels_of_a_crowded_plot_do_not_cover_each_other():
    run = encoder_run()
    dense, first = run.settings[0], run.settings[1]
    crowd = [
        replace(first, name=f"setting {i}", bytes_disk=60_000_000 + 900_000 * i, quality={dense.quality_label: 0.8})
        for i in range(5)
    ]
    svg = figure(replace(run, settings=(dense, *crowd), engines=(), layers=()), "size")
    found = re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>(dense|setting \d)</text>', svg)
    assert len(found) == 6
    boxes = [(float(x), float(y), float(x) + 4.5 * len(text), float(y) + 9) for x, y, text in found]
    covered = [
        (found[i][2], found[j][2])
        for i, a in enumerate(boxes)
        for j, b in enumerate(boxes)
        if i < j and a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]
    assert covered == []


def test_figures_refuse_what_they_cannot_draw(tmp_path):
    with pytest.raises(UnknownName, match="'size'"):
        figure(encoder_run(), "sise")
    with pytest.raises(FormatError, match="nothing to draw"):
        figure(replace(encoder_run(), layers=()), "layers")


def test_a_plot_can_be_a_png(tmp_path):
    file = write_png(encoder_run(), "speed", tmp_path / "speed.png", dark=True, dpi=40)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_engines_or_layers_still_makes_a_page(tmp_path):
    bare = replace(encoder_run(), engines=(), layers=(), load_lines=(), notes=())
    page = write_report(bare, tmp_path / "report.html").read_text()
    assert "Layer by layer" not in page
    assert "1.6× smaller on disk" in page


def test_a_dense_engine_that_rounds_to_bf16_is_named_beside_the_fp32_one():
    run = encoder_run()
    rounding = replace(run.engines[5], engine="openvino bf16", precision="bf16", throughput=2000.0)
    run = replace(run, engines=(*run.engines, rounding))
    fast = next(r for r in run.engines if r.engine == "gossamer" and r.threads == 2)
    assert speedup(run, fast) == pytest.approx(2.1, rel=0.01)  # still against fp32
    assert "slower than openvino bf16" in headline(run) and "faster than openvino (" in headline(run)
