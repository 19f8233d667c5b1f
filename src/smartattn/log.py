"""The logger ``smartattn`` follows the habits of Transformers: ``TRANSFORMERS_VERBOSITY``."""

from __future__ import annotations

import logging
import os
import sys

#: The variable of Transformers, and the levels that it knows by name.
VARIABLE = "TRANSFORMERS_VERBOSITY"
_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class _Fallback(logging.Handler):
    """Writes to stderr as long as nobody has set logging up."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


def follow_transformers() -> None:
    """Takes the level of ``TRANSFORMERS_VERBOSITY``, unless the logger has one already."""
    logger = logging.getLogger("smartattn")
    level = _LEVELS.get(os.environ.get(VARIABLE, "").lower())
    if level is None or logger.level != logging.NOTSET:
        return
    logger.setLevel(level)
    if level < logging.WARNING and not logger.handlers:
        # Warnings reach stderr by themselves.
        handler = _Fallback()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
