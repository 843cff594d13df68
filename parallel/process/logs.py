"""How every process of Muster logs: the levels that its commands take, and one format."""

import logging
from enum import StrEnum


class LogLevel(StrEnum):
    """What is logged, and all that weighs more."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def start_logging(level: LogLevel) -> None:
    """Logs to standard error; once, at the process's edge."""
    logging.basicConfig(level=level.value, format="%(asctime)s %(levelname)s %(name)s %(message)s")
