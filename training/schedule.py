"""The learning rate's course, with no step that trains nothing."""

from typing import Any

from arctic_training.scheduler.hf_factory import HFSchedulerFactory
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


class SOAPSchedulerFactory(HFSchedulerFactory):
    """transformers' schedules by name. The warm-up has one step at least, and no step has the rate 0.

    transformers' warm-up begins at 0, so that the first step changes nothing; in a short run `warmup_ratio` may be less
    than one step. Here W warm-up steps have the rates 1/(W+1) ... W/(W+1) of the peak, and the next one the peak.
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
