"""Ask the judge: its cases and verdicts, the known answers that check it, and the attacks on it."""
