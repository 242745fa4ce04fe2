import json

import pytest

from eval.responses import FIELDS, ResponseLog

RUN = {"model": "a", "choices": (1, 2)}


def response(number, text="é </script>"):
    empty = dict.fromkeys(FIELDS, 0)
    return {**empty, "id": f"q{number}", "text": text}


def test_a_response_without_a_field_is_named(tmp_path):
    path = tmp_path / "responses.jsonl"
    ResponseLog(path, RUN).add([response(1), {"id": "q2"}])
    with pytest.raises(ValueError, match=r"responses.jsonl:3 lacks the field 'text'"):
        ResponseLog(path, RUN)


def test_what_was_added_is_there_again(tmp_path):
    path = tmp_path / "deep" / "responses.jsonl"
    log = ResponseLog(path, RUN)
    log.add([response(1), response(2, "\ud800\u2028\n")])
    log.add([response(3)])
    assert ResponseLog(path, RUN).responses == log.responses
    assert list(log.responses) == ["q1", "q2", "q3"]


@pytest.mark.parametrize("kept", [0, 1, 9, 30])
def test_half_a_line_is_not_trusted(tmp_path, kept):
    path = tmp_path / "responses.jsonl"
    ResponseLog(path, RUN).add([response(1), response(2)])
    whole = path.read_bytes()
    last = whole[: whole[:-1].rfind(b"\n") + 1]
    path.write_bytes(last + whole[len(last) :][:kept])
    log = ResponseLog(path, RUN)
    assert list(log.responses) == ["q1"]
    log.add([response(2)])
    assert path.read_bytes() == whole


def test_a_whole_last_line_without_its_newline_is_not_trusted(tmp_path):
    path = tmp_path / "responses.jsonl"
    ResponseLog(path, RUN).add([response(1), response(2)])
    path.write_bytes(path.read_bytes()[:-1])
    assert list(ResponseLog(path, RUN).responses) == ["q1"]


def test_a_first_line_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_bytes(b'{"run": {"mo')
    log = ResponseLog(path, RUN)
    log.add([response(1)])
    assert list(ResponseLog(path, RUN).responses) == ["q1"]


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    path = tmp_path / "responses.jsonl"
    ResponseLog(path, RUN).add([response(1)])
    with pytest.raises(ValueError, match=r"another run \(model was 'a', now 'b'\)"):
        ResponseLog(path, {**RUN, "model": "b"})
    assert list(ResponseLog(path, RUN).responses) == ["q1"]


def test_damage_before_the_end_is_named(tmp_path):
    path = tmp_path / "responses.jsonl"
    ResponseLog(path, RUN).add([response(1), response(2)])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"responses.jsonl:2 is damaged"):
        ResponseLog(path, RUN)
    path.write_text(json.dumps(response(1)) + "\n")
    with pytest.raises(ValueError, match="is no line of a response file"):
        ResponseLog(path, RUN)
