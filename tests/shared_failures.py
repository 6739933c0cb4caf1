"""A plugin of pytest: a failure that several tests share is shown in full once. They all stay red."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        # pytest keeps the exception of a fixture of a module, and raises it again in each test that wants the fixture.
        first = vars(call.excinfo.value).setdefault("first_failure", item.nodeid)
        if first != item.nodeid:
            report.longrepr = f"the same failure as in {first}"
    return report
