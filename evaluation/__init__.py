"""Generate notes, judge them, score the verdicts, and write the report."""

import os

# Disable the usage statistics of all libraries. They read these variables at import; child processes inherit them.
os.environ.update({"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"})
