"""What a model answered, line by line as it answers, so that a killed run goes on where it was.

The first line of the file says which run it is; every other line is one response. A line counts
once its newline is on
disk: what a kill left of a line is cut off, and that question is asked again. No other is.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Response = dict[str, Any]
FIELDS = (
    "id",
    "text",
    "segments",
    "inserted",
    "num_tokens",
    "num_audio_tokens",
    "finish_reason",
)


class ResponseLog:
    """The response file of one run.

    Attributes:
        responses: id of the question -> its response.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]):
        """Opens the file and reads what is there.

        Args:
            path: made if there is none.
            run: everything that decides the answers, JSON values only. A file of another run is
                refused.

        Raises:
            ValueError: the file is of another run or damaged before its last line.
        """
        self._path = path
        self.responses: dict[str, Response] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if lines:
            self._check_run(self._parse(1, lines[0]), run)
        for number, line in enumerate(lines[1:], 2):
            response = self._parse(number, line)
            if missing := [name for name in FIELDS if name not in response]:
                raise ValueError(
                    f"{path}:{number} lacks the field {missing[0]!r}; delete the file to start over"
                )
            self.responses[response["id"]] = response
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        if not lines:
            self._append([{"run": dict(run)}])

    def add(self, responses: Sequence[Response]) -> None:
        """Writes responses; they are on disk when this returns."""
        self._append(responses)
        self.responses.update({response["id"]: response for response in responses})

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
        with self._path.open("ab") as file:
            file.write(text.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self._path}:{number} is damaged ({error.msg}); delete the file to start over"
            ) from None
        if not isinstance(row, dict) or not ("run" in row if number == 1 else "id" in row):
            raise ValueError(
                f"{self._path}:{number} is no line of a response file; give another --output"
            )
        return row

    def _check_run(self, first: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        # Through JSON, as the stored side went: a tuple comes back as a list.
        there, here = first["run"], json.loads(json.dumps(dict(run)))
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{self._path} holds answers of another run ({name} was {there.get(name)!r}, now "
                    f"{here.get(name)!r}); give another --output or delete the file"
                )
