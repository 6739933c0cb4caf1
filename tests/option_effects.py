"""Which options of a configuration have a test that sees their effect."""

from collections.abc import Callable


class Seen(set[tuple[type, str]]):
    """Class and name of each option; called in front of a test, it adds those whose effects the test sees."""

    def __call__(self, config_class: type, *names: str) -> Callable:
        self.update((config_class, name) for name in names)
        return lambda test: test
