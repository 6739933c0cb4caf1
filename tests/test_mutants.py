"""The mutants in tests/mutants apply to the current code."""

from mutants.run import ROOT, read_mutants


def test_every_mutant_can_be_made():
    for mutant in read_mutants():
        assert mutant.text(ROOT)
        assert all((ROOT / test.split("::")[0]).exists() for test in mutant.tests.split()), mutant.tests
