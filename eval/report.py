"""One HTML file to read and to listen to: figures, training curves, and answers with what was
heard.

The page needs nothing else: pictures and sounds are inside, it opens from disk without a network,
fits a phone and works by keyboard. Whatever a model wrote is escaped where it enters the page and
never reaches the script; a content policy with the script's hash makes sure that nothing else could
run.
"""

import base64
import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from echo_jax.model import frontend
from eval import drawing
from eval.curves import Curve
from eval.results import Sample

NUM_ANSWERS = 16
MAX_BYTES = 19_000_000
"""Answers are added while the page stays below this size."""

_ROOM = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One line of the summary table.

    Attributes:
        letter: its name in the ablation, such as `D`.
        name: what it is, in words.
        format: conditioned, grounded or interleaved.
        control: `none`, or what was done to the audio.
        results: what `results.summarize` returned.
    """

    letter: str
    name: str
    format: str
    control: str
    results: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A paired test of two rows on the same questions."""

    first: str
    second: str
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Answer:
    """An answer to show: its sample and the recording, f32[samples] at 16 kHz."""

    sample: Sample
    waveform: np.ndarray


def choose(samples: Sequence[Sample], count: int = NUM_ANSWERS) -> list[Sample]:
    """Chooses answers without looking at how good they look.

    Order is by a hash of the question's id; right and wrong alternate as long as there are both.
    """
    shuffled = sorted(samples, key=lambda s: hashlib.sha256(s["id"].encode()).digest())
    right = [sample for sample in shuffled if sample["correct"]]
    wrong = [sample for sample in shuffled if not sample["correct"]]
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    right, wrong = right[: count - num_wrong], wrong[:num_wrong]
    mixed: list[Sample] = []
    for position in range(max(len(right), len(wrong))):
        mixed += right[position : position + 1] + wrong[position : position + 1]
    return mixed


def to_listen(
    samples: Sequence[Sample], read: Callable[[str], np.ndarray], count: int = NUM_ANSWERS
) -> list[Answer]:
    """Returns `choose`'s answers with their recordings; `read` gives f32[samples] of an `audio_path`."""
    return [Answer(sample, read(sample["audio_path"])) for sample in choose(samples, count)]


def write(
    path: Path,
    title: str,
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    curves: Sequence[Curve],
    answers: Sequence[Answer],
    facts: Mapping[str, Any],
) -> int:
    """Writes the page; it appears only when it is complete.

    Args:
        path: the file to write.
        title: heading of the page.
        rows: the summary table, the main run first.
        comparisons: paired tests between rows.
        curves: training curves, in the order to show.
        answers: what to listen to; those beyond `MAX_BYTES` are left out, and the page says how
            many.
        facts: config, hashes and versions, printed at the end.

    Returns:
        The size of the file in bytes.
    """
    cards: list[str] = []
    size = 0
    for answer, log_mel in zip(answers, _log_mels(answers), strict=True):
        card = _answer(len(cards) + 1, answer, log_mel)
        size += len(card)
        if size > MAX_BYTES:
            break
        cards.append(card)
    page = _page(
        title,
        _summary(rows)
        + _comparisons(comparisons)
        + _kinds(rows)
        + _skipped(rows)
        + _curves(curves),
        cards,
        [answer.sample for answer in answers[: len(cards)]],
        len(answers) - len(cards),
        facts,
    )
    body = page.encode("utf-8", errors="replace")
    part = path.with_name(path.name + ".part")
    part.write_bytes(body)
    part.replace(path)
    return len(body)


def _log_mels(answers: Sequence[Answer]) -> list[np.ndarray]:
    """Returns the model's own spectrogram of each recording, f32[frames, bands]."""
    if not answers:
        return []
    hop = frontend.HOP_SAMPLES
    longest = -(-max(len(answer.waveform) for answer in answers) // hop) * hop
    log_mel = jax.jit(frontend.log_mel)
    found = []
    for answer in answers:
        samples = len(answer.waveform)
        buffer = np.zeros((1, longest), np.float32)
        buffer[0, :samples] = answer.waveform
        mel = log_mel(buffer, np.array([samples], np.int32))
        found.append(np.asarray(mel)[0, : frontend.num_frames(samples)])
    return found


# ---------------------------------------------------------------- tables and curves


def _text(value: object) -> str:
    """Any value as text of the page, also inside an attribute; a NUL may not stand in HTML at all."""
    return html.escape(str(value).replace("\x00", "\ufffd"), quote=True)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _table(caption: str, head: Sequence[str], body: Sequence[str], words: Set[int]) -> str:
    """A table whose columns `words` hold words; scrolls sideways by itself on a narrow screen."""
    cells = "".join(
        f'<th scope="col"{" class=words" if i in words else ""}>{_text(name)}</th>'
        for i, name in enumerate(head)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _summary(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        found, where = row.results, row.results["grounding"]
        low, high = found["interval"]
        bar = drawing.interval_svg(found["accuracy"] or 0.0, low, high)
        words = "".join(
            f'<td class="words">{_text(name)}</td>' for name in (row.format, row.control, row.name)
        )
        figures = [
            _percent(found["parse_rate"]),
            _number(where["segments_per_answer"]),
            _number(where["mean_length_s"]),
            _number(where["overlap"]),
            _number(where["mean_iou"], 3),
            _number(where["coverage"], 3),
            _number(found["mean_insertions"]),
            _number(found["mean_num_tokens"], 1),
            str(found["num_questions"]),
            str(found["num_skipped"]),
        ]
        kind = "" if row.control == "none" else ' class="control"'
        body.append(
            f'<tr{kind}><th scope="row" class="words">{_text(row.letter)}</th>'
            f"<td>{_percent(found['accuracy'])} {bar}</td>"
            f"<td>[{_percent(low)}, {_percent(high)}]</td>{words}"
            + "".join(f"<td>{figure}</td>" for figure in figures)
            + "</tr>"
        )
    head = ["row", "accuracy %", "95 % interval", "format", "control", "model", "parsed %"]
    head += ["segments", "length s", "overlap", "IoU", "coverage", "insertions", "tokens"]
    head += ["questions", "skipped"]
    return (
        "<h2>Accuracy, and where the model listened</h2>"
        + _table("Summary", head, body, {0, 3, 4, 5})
        + '<p class="dim">An answer that names no choice, and a question whose audio cannot be read, '
        "count as wrong. Intervals are Wilson’s at 95 %. Segments, insertions and tokens are means per "
        "answer; an answer without a valid segment has IoU 0 with the evidence. Rows in italics are "
        "controls: what the model heard was changed.</p>"
    )


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return ""
    body = [
        f'<tr><th scope="row" class="words">{_text(c.first)} – {_text(c.second)}</th>'
        f"<td>{c.only_first}</td><td>{c.only_second}</td><td>{c.p_value:.2g}</td></tr>"
        for c in comparisons
    ]
    head = ["rows", "only the first is right", "only the second is right", "p"]
    return (
        "<h2>The same questions, row against row</h2>"
        + _table("Paired tests", head, body, {0})
        + '<p class="dim">McNemar’s exact test, two-sided.</p>'
    )


def _kinds(rows: Sequence[Row]) -> str:
    kinds = sorted({kind for row in rows for kind in row.results["per_kind"]})
    body = []
    for row in rows:
        cells = []
        for kind in kinds:
            found = row.results["per_kind"].get(kind)
            if found is None:
                cells.append("<td>–</td>")
                continue
            low, high = found["interval"]
            cells.append(
                f"<td>{_percent(found['accuracy'])} <span class=dim>[{_percent(low)}, {_percent(high)}], "
                f"n {found['num_questions']}</span></td>"
            )
        body.append(
            f'<tr><th scope="row" class="words">{_text(row.letter)}</th>{"".join(cells)}</tr>'
        )
    return "<h2>By kind of question</h2>" + _table(
        "By kind of question", ["row", *kinds], body, {0}
    )


def _skipped(rows: Sequence[Row]) -> str:
    # Controls and ablation rows ask the same questions of the same files: each file is named once.
    found = {skip["id"]: skip for row in rows for skip in row.results["skipped"]}
    if not found:
        return ""
    items = "".join(
        f"<li>{_text(s['id'])}: {_text(s['audio_path'])}: {_text(s['reason'])}</li>"
        for s in found.values()
    )
    return f"<h2>Not asked, and counted as wrong: {len(found)}</h2><ul>{items}</ul>"


def _curves(curves: Sequence[Curve]) -> str:
    parts = []
    for stage in dict.fromkeys(curve.stage for curve in curves):
        figures = "".join(
            f"<figure><figcaption>{_text(c.name)}</figcaption>{drawing.curve_svg(c.name, c.points)}</figure>"
            for c in curves
            if c.stage == stage
        )
        parts.append(f'<h3>{_text(stage)}</h3><div class="curves">{figures}</div>')
    return "<h2>Training</h2>" + "".join(parts) if parts else ""


# ---------------------------------------------------------------- one answer


def _answer(number: int, answer: Answer, log_mel: np.ndarray) -> str:
    sample = answer.sample
    duration_s = len(answer.waveform) / frontend.SAMPLE_RATE
    verdict = "right" if sample["correct"] else "wrong"
    picture = drawing.data_uri("image/png", drawing.spectrogram_png(log_mel))
    sound = drawing.data_uri("audio/wav", drawing.wav_bytes(answer.waveform))
    choices = "".join(
        f"<li{' class=true' if choice == sample['answer'] else ''}>{_text(choice)}</li>"
        for choice in sample["choices"]
    )
    given = "no choice" if sample["choice"] is None else f"“{_text(sample['choice'])}”"
    iou = "" if sample["iou"] is None else f" IoU with the evidence {sample['iou']:.2f}."
    return (
        f'<article class="answer" id="answer-{number}" tabindex="-1" data-verdict="{verdict}" '
        f'data-kind="{_text(sample["kind"])}" data-duration="{duration_s:.4f}">'
        f'<h3>{number}. {_text(sample["question"])} <span class="{verdict}">{verdict}</span></h3>'
        f'<ul class="choices">{choices}</ul>'
        + _picture(sample, picture, duration_s)
        + f'<h4>The recording, {duration_s:.1f} s</h4><audio class="clip" controls preload="metadata" src="{sound}" '
        f'aria-label="The whole recording of question {number}"></audio>'
        + _players(sample, duration_s)
        + f'<h4>What the model wrote</h4><div class="reasoning">{_reasoning(sample, number, duration_s)}</div>'
        f"<p>Answer: <b>{given}</b>. Right answer: <b>“{_text(sample['answer'])}”</b>.</p>"
        f'<p class="dim">{_text(sample["why"])}{iou} {_text(sample["id"])}, kind {_text(sample["kind"] or "unnamed")}, '
        f"{sample['num_tokens']} tokens, ended by {_text(sample['finish_reason'])}.</p></article>"
    )


def _picture(sample: Sample, picture: str, duration_s: float) -> str:
    def box(css_class: str, start_s: float, end_s: float, top: int, height: int) -> str:
        start, end = (min(max(t, 0.0), duration_s) / duration_s * 100 for t in (start_s, end_s))
        return (
            f'<rect class="{css_class}" x="{start:.2f}" y="{top}" width="{end - start:.2f}" height="{height}">'
            f"<title>{css_class} {start_s:.1f} to {end_s:.1f} s</title></rect>"
        )

    spans = _playable(sample, duration_s)
    boxes = [box("evidence", start_s, end_s, 2, 46) for start_s, end_s in sample["evidence"]]
    boxes += [box("cited", start_s, end_s, 52, 46) for start_s, end_s, _ in spans]
    said = ", ".join(f"{s:.1f} to {e:.1f} s" for s, e, _ in spans) or "none"
    true = ", ".join(f"{s:.1f} to {e:.1f} s" for s, e in sample["evidence"]) or "not known"
    events = "".join(
        f'<div class="lane"><span style="left:{100 * e["start_s"] / duration_s:.2f}%;'
        f'width:{100 * max(0.0, e["end_s"] - e["start_s"]) / duration_s:.2f}%" '
        f'title="{_text(e["label"])}, {e["start_s"]:.1f} to {e["end_s"]:.1f} s">{_text(e["label"])}</span></div>'
        for e in sample["events"]
    )
    labels = f"<details><summary>What sounds when</summary>{events}</details>" if events else ""
    ticks = "".join(f"<span>{duration_s * i / 5:.1f} s</span>" for i in range(6))
    return (
        f'<div class="picture"><img src="{picture}" alt="Spectrogram. Evidence: {_text(true)}. Cited: {_text(said)}.">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'{"".join(boxes)}<line class="head" x1="0" x2="0" y1="0" y2="100"/></svg></div>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div>'
        '<p class="dim key"><i class="evidence"></i>evidence (upper half)'
        '<i class="cited"></i>cited by the model (lower half)</p>' + labels
    )


def _players(sample: Sample, duration_s: float) -> str:
    players = "".join(
        f'<figure><figcaption>cited {start_s:.1f} to {end_s:.1f} s</figcaption><audio class="segment" controls '
        f'data-start="{start_s:.4f}" data-end="{end_s:.4f}" '
        f'aria-label="Cited segment, {start_s:.1f} to {end_s:.1f} seconds"></audio></figure>'
        for start_s, end_s, _ in _playable(sample, duration_s)
    )
    return f'<h4>The cited segments</h4><div class="players">{players}</div>' if players else ""


def _reasoning(sample: Sample, number: int, duration_s: float) -> str:
    """The response with each citation as a link that plays it, and each invalid one struck out; all of it escaped."""
    text, cursor, parts = sample["text"], 0, []
    for segment in sorted(sample["segments"], key=lambda s: s["begin"]):
        begin, end = max(segment["begin"], cursor), max(segment["end"], cursor)
        parts.append(_text(text[cursor:begin]))
        tag = _text(text[begin:end])
        if segment["valid"]:
            end_s = min(segment["end_s"], duration_s)
            parts.append(
                f'<a href="#answer-{number}" data-start="{segment["start_s"]:.4f}" data-end="{end_s:.4f}" '
                f'aria-label="Play {segment["start_s"]:.1f} to {end_s:.1f} seconds">{tag}</a>'
            )
        else:
            parts.append(f'<del title="{_text(segment["reason"])}">{tag}</del>')
        cursor = end
    return "".join([*parts, _text(text[cursor:])])


def _playable(sample: Sample, duration_s: float) -> list[tuple[float, float, int]]:
    """(start_s, end_s, place in the text) of each valid citation, cut at the end of the recording."""
    return [
        (s["start_s"], min(s["end_s"], duration_s), s["begin"])
        for s in sample["segments"]
        if s["valid"]
    ]


# ---------------------------------------------------------------- the page


def _page(
    title: str,
    figures: str,
    cards: Sequence[str],
    shown: Sequence[Sample],
    left_out: int,
    facts: Mapping[str, Any],
) -> str:
    style = (_ROOM / "report.css").read_text(encoding="utf-8")
    script = (_ROOM / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src data:; media-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An icon of its own: a browser would ask for one, and there is no network to ask.
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{style}</style></head><body>'
        f"<header><h1>{_text(title)}</h1></header><main>{figures}"
        f"{_browser(cards, shown, left_out)}"
        "<h2>How this was made</h2><details><summary>Config, hashes and versions</summary>"
        f"<pre>{_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, default=str))}</pre></details>"
        f"</main><script>{script}</script></body></html>"
    )


def _browser(cards: Sequence[str], shown: Sequence[Sample], left_out: int) -> str:
    if not cards:
        return ""
    right = sum(sample["correct"] for sample in shown)
    kinds = "".join(
        f'<option value="{_text(kind)}">{_text(kind or "unnamed")}</option>'
        for kind in sorted({sample["kind"] for sample in shown})
    )
    verdicts = "".join(
        f'<label><input type="radio" name="verdict" value="{name}"{" checked" if name == "all" else ""}> {name}</label>'
        for name in ("all", "right", "wrong")
    )
    missing = f"{left_out} more were left out to keep the file small." if left_out else ""
    return (
        f"<h2>Answers to listen to</h2><p>{right} right and {len(cards) - right} wrong, chosen by "
        f"a hash of the question’s id. {missing} A citation in the text is a link that plays it. "
        "<kbd>j</kbd> and <kbd>k</kbd> go to the next and the previous answer.</p>"
        f'<div class="filters" role="group" aria-label="Which answers to show">{verdicts}'
        f'<label>kind <select><option value="all">all</option>{kinds}</select></label>'
        f"<output>{len(cards)} shown</output></div>"
        "<noscript><p>Without scripts the players of single segments are empty; the whole "
        "recordings play.</p></noscript>" + "".join(cards)
    )
