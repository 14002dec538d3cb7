"""Every scenario renders to the objects beside it.

``UPDATE_GOLDEN=1 pytest tests/render/test_golden.py`` writes them anew; read the difference before you commit it.
"""

from __future__ import annotations

import os

import pytest
import yaml


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def test_a_scenario_renders_to_the_objects_recorded_beside_it(scenario):
    """A change of rendering shows in review as a change of objects."""
    golden = scenario.folder / "objects.yaml"
    text = yaml.dump_all(
        scenario.objects, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=True, allow_unicode=True
    )
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
        pytest.skip(f"{golden} was written, not compared, because UPDATE_GOLDEN is set")
    assert golden.exists(), "record it: UPDATE_GOLDEN=1 pytest tests/render/test_golden.py"
    assert text == golden.read_text(), (
        "read the difference, then UPDATE_GOLDEN=1 pytest tests/render/test_golden.py"
    )
