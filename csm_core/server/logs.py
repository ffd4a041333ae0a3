"""Logs as JSON, one object per line on stderr, each with the id of the request that it belongs to.

The package logs through the standard library; structlog only writes. No text, audio, key or address is logged: lines
carry ids, lengths and timings.
"""

import logging
import sys

import structlog
from structlog.typing import Processor

from csm_core.server.answers import BodyCutError

_BEFORE: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def log_as_json(level: str) -> None:
    """Send everything that this process logs through one handler. ``level`` is a name of logging's."""
    after: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=after, foreign_pre_chain=_BEFORE))
    handler.addFilter(_is_news)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # our own line has the route, not the path


def _is_news(record: logging.LogRecord) -> bool:
    """Not for the exception with which a body is cut: the speech's own line says how it ended."""
    return not (record.exc_info and isinstance(record.exc_info[1], BodyCutError))
