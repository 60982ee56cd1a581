from pathlib import Path

import pytest
from kill_and_restart import JOBS, kill_and_restart


@pytest.mark.slow
@pytest.mark.parametrize(("job", "kills"), [("preprocessing", 5), ("training", 2), ("evaluation", 1)])
def test_a_job_killed_at_random_moments_gives_the_uninterrupted_result(
    job: str, kills: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KILL_AND_RESTART", "1")
    tally = kill_and_restart(JOBS[job], tmp_path / job, tiny_model, kills, seed=0)
    assert tally.kills == kills
    assert tally.good, tally
