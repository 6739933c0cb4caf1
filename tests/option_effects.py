"""A record of the config fields whose effect a test sees."""

from collections.abc import Callable


class Seen(set[tuple[type, str]]):
    """Pairs of config class and field name. As a decorator, it adds the fields whose effect the test sees."""

    def __call__(self, config_class: type, *names: str) -> Callable:
        self.update((config_class, name) for name in names)
        return lambda test: test
