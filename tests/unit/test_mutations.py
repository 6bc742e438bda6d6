"""The list of faults stays one that can be tried: each line is still there, once, and so are the tests that find it."""

from mutations import ROOT, listed

FAULTS = listed()


def test_each_fault_has_its_place():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text()
        assert fault.in_place_of(text) != text, fault.name  # refuses what is not there exactly once


def test_each_fault_names_tests_that_there_are():
    for fault in FAULTS:
        assert fault.found_by, fault.name
        for test in fault.found_by:
            file, _, name = test.partition("::")
            assert f"def {name or 'test_'}" in (ROOT / file).read_text(), test
