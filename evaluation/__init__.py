"""Generate notes, judge them, score the verdicts, report."""

import os

# No library may report that it is used, or on what. Read at their import; child processes inherit it.
os.environ.update({"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"})
