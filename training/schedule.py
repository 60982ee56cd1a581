"""Learning-rate schedules in which every step has a rate above 0."""

from typing import Any

from arctic_training.scheduler.hf_factory import HFSchedulerFactory
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


class SOAPSchedulerFactory(HFSchedulerFactory):
    """transformers' schedules by name, with at least one warm-up step and no step at rate 0.

    In transformers the warm-up starts at 0, so the first step changes nothing; in a short run `warmup_ratio` may be
    less than one step. Here the W warm-up steps have 1/(W+1) ... W/(W+1) of the peak rate, and the next step the peak.
    """

    name = "soap"

    def create_scheduler(self, optimizer: Any) -> LambdaLR:
        steps, ratio = self.trainer.training_horizon, self.config.warmup_ratio
        warmup = max(1, round(ratio * steps)) if ratio else 0
        schedule = get_scheduler(
            name=self.config.name,
            optimizer=optimizer,
            num_warmup_steps=warmup + 1,
            num_training_steps=steps + 1,
            scheduler_specific_kwargs=self.config.scheduler_specific_kwargs,
        )
        return LambdaLR(optimizer, [lambda step, rate=rate: rate(step + 1) for rate in schedule.lr_lambdas])
