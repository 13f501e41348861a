"""What `tide verify` found, in words."""

from __future__ import annotations

from teacher_cache.maintenance.check import CheckReport
from teacher_cache.maintenance.verify import VerifyReport


def in_words(report: CheckReport | VerifyReport) -> str:
    """A few lines: whether the shards hold, or how far the values of a sample lie apart."""
    match report:
        case CheckReport(problems=[]):
            lines = [
                f"{report.shards:,} shards, {report.rows:,} rows: checksums, schema, counts and values hold"
            ]
        case CheckReport():
            lines = [
                f"{report.shards:,} shards, {report.rows:,} rows; {len(report.problems)} problems:"
            ]
            lines += [f"  {problem.text}" for problem in report.problems]
        case VerifyReport():
            lines = [
                f"{report.rows} rows, {report.positions:,} positions scored again with {report.engine}"
            ]
            lines += [f"  {'':<14}{'values':>12}{'largest':>12}{'mean':>12}"]
            lines += [
                f"  {d.name:<14}{d.values:>12,}{d.largest:>12.2e}{d.mean:>12.2e}"
                for d in report.deviations
            ]
    if isinstance(report, CheckReport) and report.missing:
        lines.append(f"{report.missing:,} shards are not there yet: `tide cache` computes them")
    return "\n".join(lines)
