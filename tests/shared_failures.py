"""A pytest plugin: shows a failure that several tests share in full once. All of them still fail."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        # pytest caches the exception of a module fixture and raises it again in each test that uses the fixture.
        first = vars(call.excinfo.value).setdefault("first_failure", item.nodeid)
        if first != item.nodeid:
            report.longrepr = f"the same failure as in {first}"
    return report
