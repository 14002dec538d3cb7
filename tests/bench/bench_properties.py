"""What must hold for any input: runs the tests that say so, and prints a line for each criterion.

Run: python tests/bench/bench_properties.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CRITERIA = {
    "the compiled engine gives the times of its readable reference on 600 random configurations": (
        "tests/performance/test_engine.py::test_the_kernel_gives_the_reference_s_times_on_random_configurations",
    ),
    "more rate never lowers a latency": (
        "tests/performance/test_analytic.py::test_more_rate_never_lowers_latency",
        "tests/performance/test_planner.py::test_a_curve_rises_and_never_beats_the_roofline",
    ),
    "more rate never takes fewer replicas": (
        "tests/performance/test_planner.py::test_more_load_never_takes_fewer_replicas",
    ),
    "a tighter objective never costs less": (
        "tests/performance/test_planner.py::test_a_tighter_objective_never_costs_less",
        "tests/performance/test_planner.py::test_one_objective_more_never_costs_less",
    ),
    "more bandwidth never slows decode": (
        "tests/performance/test_roofline.py::test_more_bandwidth_never_slows_decode",
    ),
    "throughput never exceeds the roofline": (
        "tests/performance/test_analytic.py::test_throughput_never_exceeds_the_ideal_roofline",
        "tests/performance/test_roofline.py::test_no_roofline_beats_the_ideal_one",
    ),
    "every shipped table loads into a monotone grid": (
        "tests/performance/test_tables.py::test_every_shipped_table_loads_into_a_monotone_grid",
    ),
    "the 1,000-QPS question has three answers in one command": (
        "tests/cli/test_plan.py::test_the_thousand_qps_question_has_three_answers_in_one_command",
    ),
    "bad input is one line that names the mend, exit code 2": (
        "tests/cli/test_predict.py::test_wrong_input_is_one_line_that_names_the_mend",
        "tests/cli/test_predict.py::test_a_file_that_cannot_be_used_is_one_line",
        "tests/cli/test_predict.py::test_a_malformed_profile_names_its_line",
        "tests/cli/test_plan.py::test_wrong_input_is_one_line_that_names_the_mend",
    ),
}


def main() -> int:
    """Run every named test once, and print what became of each criterion."""
    wanted = [name for names in CRITERIA.values() for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header", "-p", "no:cacheprovider", *wanted],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    outcome: dict[str, set[str]] = {name: set() for name in wanted}
    for verdict, test in re.findall(
        r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+?)(?:\[|$| )", result.stdout, re.MULTILINE
    ):
        if test in outcome:
            outcome[test].add(verdict)
    for text, names in CRITERIA.items():
        met = all(outcome[name] == {"PASSED"} for name in names)
        print(
            f"criterion: {text} ({', '.join(name.split('::')[1] for name in names)}): {'met' if met else 'MISSED'}"
        )
    if result.returncode:
        print(result.stdout[-3000:] + result.stderr[-1000:], file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
