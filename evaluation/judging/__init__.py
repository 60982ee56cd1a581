"""The judge: its cases and verdicts, the controls that check it, and the attacks on it."""
