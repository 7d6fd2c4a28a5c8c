"""Logs: one line per event, as text or as a JSON object; what clients send cannot begin a line of its own."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

_PLAIN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
NAMES = ("pixano_edge", "uvicorn", "uvicorn.error")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _PLAIN and value is not None}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the event's own fields, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level and message, then the event's own fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback if any."""
        moment = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        fields = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items() if key != "color_message")
        text = f"{moment} {record.levelname.lower():7} {_one_line(record.getMessage())}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _one_line(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _quoted(value: Any) -> str:
    text = _one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text


def configure(level: str, as_json: bool, stream: TextIO | None = None) -> None:
    """Sends the logs of this package and of uvicorn to a stream; called by the command, not by `create_app`.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        as_json: JSON lines instead of text.
        stream: stderr if not given.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    for name in NAMES:
        logger = logging.getLogger(name)
        logger.handlers = [] if name == "uvicorn.error" else [handler]
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level.upper())
