"""Generate notes, judge them, score the verdicts, report."""
