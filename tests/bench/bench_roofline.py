"""Print how far the calibrated roofline is from the shipped tables, on models left out of the fit.

Run: ``python tests/bench/bench_roofline.py``
"""

from __future__ import annotations

import sys

from servingtiers.performance import fit

CLAIMED = {"decode": 4.5, "prefill": 8.0}
"""Median absolute error, per cent, on models left out, for bf16 on the accelerators below."""
CLAIMED_FOR = ("a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb")


def main() -> int:
    """Fit, print, judge."""
    reports = fit.fit_all()
    print(fit.render(reports))
    print("\n".join(fit.unseen()))
    for report in reports:
        if report.weights != "bf16" or report.accelerator not in CLAIMED_FOR:
            continue
        for kind, limit in CLAIMED.items():
            verdict = "met" if report.held_out[kind] <= limit else "MISSED"
            print(
                f"criterion: {report.accelerator} bf16 {kind} <= {limit} %: {report.held_out[kind]} % {verdict}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
