"""JSON with a checksum, so that what is read back is what was written."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content as plain JSON values, beside its checksum."""
    plain = json.loads(json.dumps(content))
    return {"content": plain, "sha256": _digest(plain)}


def unsealed(text: bytes) -> dict[str, Any]:
    """The content of what `sealed` made, written as JSON.

    Raises:
        ValueError: it is no JSON, or not what was written.
    """
    read = json.loads(text)
    if not isinstance(read, dict) or not isinstance(read.get("content"), dict):
        raise ValueError("it holds no content")
    if _digest(read["content"]) != read.get("sha256"):
        raise ValueError("it is not what was written")
    content: dict[str, Any] = read["content"]
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
