"""The list of wrong versions (tests/mutants) is one of the code as it stands."""

from mutants.run import ROOT, read_mutants


def test_every_mutant_can_be_made():
    for mutant in read_mutants():
        assert mutant.text(ROOT)
        assert all((ROOT / test.split("::")[0]).exists() for test in mutant.tests.split()), mutant.tests
