"""What every tool uses to talk to its user: errors, command line, progress, interruption, environment."""

from .config_parser import ConfigParser
from .errors import ConfigError, InterruptedRunError, RunError, UserError
from .escapes import visible
from .exits import plain_errors
from .progress import Progress, plain_console

__all__ = [
    "ConfigError",
    "ConfigParser",
    "InterruptedRunError",
    "Progress",
    "RunError",
    "UserError",
    "plain_console",
    "plain_errors",
    "visible",
]
