import base64
import hashlib
import html.parser
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
import soundfile

from data.records import EaqaRecord, Event
from eval import curves, drawing, report, results
from tests.eval import browser

HOSTILE = (
    "<think>First <seg>0.5, 1.5</seg> a bell</audio><script>alert(1)</script>&lt;b&gt; "
    "\"'><img src=x onerror=alert(2)> then <seg>3.0, 1.0</seg> ]]></script>\x00\ud800 "
    "<seg>1.0, 9.0</seg></think><answer>a bell</answer>"
)


def make_sample(number, correct, text=HOSTILE):
    record = EaqaRecord(
        id=f"q{number}",
        audio_path=f"audio/{number}.wav",
        duration_s=4.0,
        question="Which <b>sound</b> comes first?",
        choices=("a bell", 'a "dog"', "rain", "a horn"),
        answer="a bell" if correct else "rain",
        cot="",
        kind="order" if number % 2 else "count",
        events=(Event(0.5, 1.5, "<i>bell</i>"), Event(2.0, 3.0, "rain")),
        evidence=((0.5, 1.5),),
        difficulty=2,
        split="test",
        source="synthetic",
    )
    segments = [
        {
            "start_s": float(match[1]),
            "end_s": float(match[2]),
            "begin": match.start(),
            "end": match.end(),
            "valid": float(match[1]) < float(match[2]),
            "reason": "" if float(match[1]) < float(match[2]) else "ends before it starts",
        }
        for match in re.finditer(r"<seg>([\d.]+), ([\d.]+)</seg>", text)
    ]
    response = {
        "id": f"q{number}",
        "text": text,
        "segments": segments,
        "inserted": [[0.5, 1.5]],
        "num_tokens": 12,
        "num_audio_tokens": 25,
        "finish_reason": "end",
    }
    return results.make_sample(record, response)


def make_rows(samples):
    skipped = [{"id": "q99", "audio_path": "audio/<99>.wav", "reason": "empty"}]
    found = results.summarize(samples, skipped)
    return [
        report.Row("D", "Echo", "interleaved", "none", found),
        report.Row("D", "Echo", "interleaved", "silence", results.summarize(samples, [])),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    samples = [make_sample(number, number % 3 != 0) for number in range(40)]
    answers = [
        report.Answer(sample, (0.1 * rng.standard_normal(64_000)).astype(np.float32))
        for sample in report.choose(samples)
    ]
    lines = [
        json.dumps({"step": i, "loss": 4 / i, "kl": 0.01 * i, "ids": ["a"], "odd": float("nan")})
        for i in range(1, 900)
    ]
    (folder / "grpo").mkdir()
    (folder / "grpo" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 900, "lo']))
    path = folder / "report.html"
    size = report.write(
        path,
        "Echo <tiny>",
        make_rows(samples),
        [report.Comparison("D", "B", 20, 3, 0.0004)],
        curves.read({"GRPO": folder / "grpo", "SFT": folder / "nothing"}),
        answers,
        {"config": {"text": "</script><script>alert(3)</script>"}},
    )
    assert size == path.stat().st_size
    return path


class Outline(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the text by the element around it."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "path", "rect", "polyline", "line"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts, self.unbalanced = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.unbalanced.append(tag)
        else:
            self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag, css_class=None):
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and (css_class is None or css_class in attrs.get("class", "").split())
        ]


@pytest.fixture(scope="module")
def outline(page):
    parser = Outline()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return parser


def test_the_page_is_well_formed_and_stands_alone(page, outline):
    assert outline.unbalanced == []
    assert outline.open == []
    assert page.stat().st_size < 20_000_000
    for _, attrs in outline.tags:
        for name in ("src", "href"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#"))
    assert "@import" not in page.read_text(encoding="utf-8")


def test_nothing_that_the_model_wrote_is_markup(outline):
    assert len(outline.named("script")) == 1
    assert all(attrs.get("src", "").startswith("data:") for attrs in outline.named("img"))
    assert not any(name.startswith("on") for _, attrs in outline.tags for name in attrs)
    assert len(outline.named("b")) == 2 * 16  # the two answers, never the question's tag
    said = "".join(text for _, text in outline.texts)
    assert said.count("</audio><script>alert(1)</script>&lt;b&gt; \"'><img src=x") == 16
    assert "</script><script>alert(3)</script>" in said


def test_only_our_script_may_run(page, outline):
    policy = next(a["content"] for a in outline.named("meta") if "http-equiv" in a)
    script = next(text for tag, text in outline.texts if tag == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_answers_have_sound_picture_and_playable_citations(outline):
    assert len(outline.named("article", "answer")) == 16
    verdicts = [attrs["data-verdict"] for attrs in outline.named("article")]
    assert verdicts.count("wrong") == 8
    clips = outline.named("audio", "clip")
    assert len(clips) == 16
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(clips[0]["src"].split(",")[1])))
    assert (len(wav), rate) == (64_000, 16_000)
    segments = outline.named("audio", "segment")
    assert len(segments) == 2 * 16
    # The second citation runs beyond the end of the recording and is cut there.
    assert {(s["data-start"], s["data-end"]) for s in segments} == {
        ("0.5000", "1.5000"),
        ("1.0000", "4.0000"),
    }
    links = [attrs for attrs in outline.named("a") if "data-start" in attrs]
    assert len(links) == 2 * 16
    assert len([1 for tag, text in outline.texts if tag == "del"]) == 16
    assert len(outline.named("rect", "evidence")) == 16
    assert len(outline.named("rect", "cited")) == 32


def test_tables_and_curves(outline):
    said = " ".join(text for _, text in outline.texts)
    assert "audio/<99>.wav" in said
    assert "D – B" in said
    captions = [text for tag, text in outline.texts if tag == "figcaption"]
    assert captions[:2] == ["loss", "kl"]
    assert "odd" not in captions
    assert len(outline.named("polyline", "smooth")) == 2


def test_long_recordings_stop_at_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_BYTES", 1_000_000)
    wave = np.zeros(16_000 * 4, np.float32)
    answers = [report.Answer(make_sample(number, True), wave) for number in range(16)]
    path = tmp_path / "report.html"
    report.write(path, "t", make_rows([a.sample for a in answers]), [], [], answers, {})
    text = path.read_text(encoding="utf-8")
    shown = text.count("<article")
    assert 0 < shown < 16
    assert f"{16 - shown} more were left out" in text


def test_a_report_without_answers_or_curves(tmp_path):
    report.write(tmp_path / "r.html", "t", make_rows([make_sample(1, True)]), [], [], [], {})
    assert "Answers to listen to" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_choose_mixes_and_does_not_depend_on_order():
    samples = [make_sample(number, number > 2) for number in range(30)]
    chosen = report.choose(samples)
    assert len(chosen) == 16
    assert sum(not sample["correct"] for sample in chosen) == 3
    assert [s["id"] for s in report.choose(samples[::-1])] == [s["id"] for s in chosen]
    assert len(report.choose(samples[:5])) == 5


def test_the_picture_is_a_png_of_the_spectrogram():
    log_mel = np.zeros((2_500, 128), np.float32) - 1.0
    log_mel[:, 0] = 1.0  # the lowest band
    png = drawing.spectrogram_png(log_mel)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        body = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind], at = body, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert (width, height) == (drawing.MAX_COLUMNS, 128)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (rows[:, 0] == 0).all()
    assert (rows[-1, 1:] == 255).all()
    assert (rows[:-1, 1:] == 0).all()


def test_a_constant_curve_and_a_single_point_can_be_drawn():
    for points in ([(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]):
        assert "nan" not in drawing.curve_svg("loss", points)


@pytest.fixture
def opened(page, tmp_path):
    if browser.EXECUTABLE is None:
        pytest.skip("no Chromium is installed")
    found = browser.Browser(tmp_path / "profile")
    found.open(page.as_uri(), 1200)
    yield found
    found.close()


@pytest.mark.slow
def test_in_a_browser_players_load_and_filters_work(opened, page):
    # Every whole clip and every cited segment has sound of its own length.
    opened.wait("[...document.querySelectorAll('audio')].every((a) => a.readyState >= 1)")
    lengths = "[...document.querySelectorAll('audio.{}')].map((a) => a.duration.toFixed(2))"
    assert set(opened.evaluate(lengths.format("clip"))) == {"4.00"}
    assert opened.evaluate(lengths.format("segment")) == ["1.00", "3.00"] * 16
    # A citation plays its span and stops.
    opened.evaluate("document.querySelector('a[data-start]').click()")
    clip = "document.querySelector('audio.clip')"
    opened.wait(f"!{clip}.paused && {clip}.currentTime > 0.55")
    assert opened.evaluate("document.querySelectorAll('a.playing').length") == 1
    opened.wait(f"{clip}.paused")
    assert opened.evaluate(f"{clip}.currentTime") == pytest.approx(1.5, abs=0.3)
    assert opened.evaluate("document.querySelectorAll('a.playing').length") == 0
    # Filters.
    opened.evaluate("document.querySelector('input[value=wrong]').click()")
    shown = "[...document.querySelectorAll('.answer')].filter((a) => !a.hidden).length"
    assert opened.evaluate(shown) == 8
    assert opened.evaluate("document.querySelector('output').textContent") == "8 shown"
    opened.evaluate("document.querySelector('input[value=all]').click()")
    assert opened.evaluate(shown) == 16
    # Keys.
    opened.evaluate("document.activeElement.blur()")
    for key, expected in (("j", "answer-1"), ("j", "answer-2"), ("k", "answer-1")):
        opened.press(key)
        assert opened.evaluate("document.activeElement.id") == expected
    # What the model wrote is text, and nothing of it ran.
    assert opened.evaluate("document.scripts.length") == 1
    assert "<script>alert(1)</script>" in opened.evaluate("document.body.innerText")
    assert opened.problems == []
    # A phone: the page itself never scrolls sideways.
    opened.open(page.as_uri() + "?phone", 360)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    assert opened.problems == []
