"""Show a run's figures: tables for the console, results.json, report.html and comparison.html."""
