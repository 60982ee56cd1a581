"""AdamW for bfloat16 weights, with float32 master weights and moments sharded over the processes.

DeepSpeed's stage 0 wrapper casts, joins, measures and scales all gradients in float32 in separate passes, and waits for
the GPU between them. Here gradients move into buckets, which are reduced during the backward pass. One kernel then
updates master weights, moments and weights together. The CPU never waits for the GPU.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from arctic_training.optimizer.adam_factory import FusedAdamOptimizerFactory

if TYPE_CHECKING:
    from arctic_training.config.optimizer import OptimizerConfig

BUCKET = 64 * 2**20  # parameters reduced together: 128 MiB in bfloat16
ALIGNMENT = 128  # each process's shard of a bucket starts at a multiple of this many parameters


class Bucket:
    """Parameters whose gradients are reduced together, and this process's shard of their master weights and moments."""

    def __init__(self, parameters: list[torch.nn.Parameter], group: dict[str, Any], dtype: torch.dtype) -> None:
        """`dtype` is that of the gradient buffer, in which several micro-batches are summed."""
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        count = sum(parameter.numel() for parameter in parameters)
        part = -(-count // (processes * ALIGNMENT)) * ALIGNMENT
        first = parameters[0]
        self.parameters, self.group = parameters, group
        self.weights = first.new_zeros(part * processes)
        self.gradients = torch.zeros_like(self.weights, dtype=dtype)
        self.gradient_views: list[torch.Tensor] = []  # one per parameter
        offset = 0
        for parameter in parameters:
            place = slice(offset, offset + parameter.numel())
            self.weights[place] = parameter.data.flatten()
            parameter.data = self.weights[place].view_as(parameter)
            self.gradient_views.append(self.gradients[place].view_as(parameter))
            offset = place.stop
        own = slice(rank * part, (rank + 1) * part)
        self.own_weights, self.own_gradients = self.weights[own], self.gradients[own]
        self.master = self.own_weights.float()
        self.mean, self.square = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.missing = len(parameters)  # gradients not yet computed in this backward pass
        self.work: torch.distributed.Work | None = None

    def collect_gradients(self, first: bool) -> None:
        """Copy the gradients of all parameters into the buffer, or add them if this is not the `first` micro-batch."""
        gradients = [parameter.grad for parameter in self.parameters]
        if first:
            torch._foreach_copy_(self.gradient_views, gradients)
        else:
            torch._foreach_add_(self.gradient_views, gradients)
        for parameter in self.parameters:
            parameter.grad = None

    def reduce(self) -> None:
        """Start summing the gradients over the processes; each needs only its own shard."""
        if torch.distributed.get_world_size() == 1:
            return
        if self.gradients.is_cuda:
            self.work = torch.distributed.reduce_scatter_tensor(self.own_gradients, self.gradients, async_op=True)
        else:  # gloo has no reduce-scatter
            self.work = torch.distributed.all_reduce(self.gradients, async_op=True)

    def gather(self) -> None:
        """Start gathering the updated weights from all processes."""
        if torch.distributed.get_world_size() == 1:
            return
        own = self.own_weights if self.weights.is_cuda else self.own_weights.clone()
        self.work = torch.distributed.all_gather_into_tensor(self.weights, own, async_op=True)

    def wait(self) -> None:
        """Make the CUDA stream, or on a CPU this process, wait for the started operation."""
        if self.work:
            self.work.wait()
            self.work = None


class MixedAdamW(torch.optim.Optimizer):
    """AdamW with clipping by the global gradient norm, as in DeepSpeed's FusedAdam.

    Call `attach` once the model is on its device, then `begin_backward` before each backward pass. A step with
    non-finite gradients changes nothing. `gradient_norm` is the last step's norm before clipping, as a tensor.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.buckets: list[Bucket] = []
        self.steps = 0
        self.max_norm = 0.0
        self.first = self.last = True

    def attach(self, accumulation: int, max_norm: float) -> None:
        """Move the weights into buckets and hook into the backward pass. A `max_norm` of 0 turns clipping off."""
        self.max_norm = max_norm
        if self.buckets:
            return
        for group in self.param_groups:
            members: list[torch.nn.Parameter] = []
            for parameter in reversed(group["params"]):  # roughly the order of the backward pass
                members.append(parameter)
                if sum(member.numel() for member in members) >= BUCKET:
                    self._add_bucket(members, group, accumulation)
                    members = []
            if members:
                self._add_bucket(members, group, accumulation)
        self.gradient_norm = self.buckets[0].master.new_zeros(())

    def _add_bucket(self, members: list[torch.nn.Parameter], group: dict[str, Any], accumulation: int) -> None:
        bucket = Bucket(members, group, torch.float32 if accumulation > 1 else members[0].dtype)
        self.buckets.append(bucket)
        for parameter in members:
            parameter.register_post_accumulate_grad_hook(self._counter(bucket))

    def _counter(self, bucket: Bucket) -> Callable[[torch.nn.Parameter], None]:
        def count(_: torch.nn.Parameter) -> None:
            bucket.missing -= 1
            if not bucket.missing:
                bucket.collect_gradients(self.first)
                if self.last:
                    bucket.reduce()

        return count

    def begin_backward(self, first: bool, last: bool) -> None:
        """Prepare for the next backward pass; say whether it is the first and the last one of its step."""
        self.first, self.last = first, last
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for bucket in self.buckets:
            if bucket.missing:
                raise RuntimeError("the loss does not depend on all trained weights: set `optimizer.type: fused_adam`")
            bucket.wait()
        self.steps += 1
        scale = self._scale()
        for bucket in self.buckets:
            update(bucket, scale, self.steps)
            bucket.gather()
        for bucket in self.buckets:
            bucket.wait()

    def _scale(self) -> torch.Tensor:
        """Return the factor for the gradients, or NaN if any is not finite, as a tensor to avoid a synchronisation."""
        processes = torch.distributed.get_world_size()
        norms = torch._foreach_norm([bucket.own_gradients for bucket in self.buckets], dtype=torch.float32)
        total = torch.stack(norms).square().sum()
        if processes > 1:
            torch.distributed.all_reduce(total)
        self.gradient_norm = norm = total.sqrt() / processes
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm else torch.ones_like(norm)
        return (scale + (norm - norm)) / processes  # inf - inf is NaN too

    def state_dict(self) -> dict[str, Any]:
        """Return the state shared by all processes; each saves its own `process_state` separately."""
        return {"param_groups": [{**group, "params": []} for group in self.param_groups], "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def process_state(self) -> list[dict[str, torch.Tensor]]:
        """Return this process's master weights and moments, one dict per bucket."""
        return [{"master": bucket.master, "mean": bucket.mean, "square": bucket.square} for bucket in self.buckets]

    def load_process_state(self, state: list[dict[str, torch.Tensor]]) -> None:
        for bucket, saved in zip(self.buckets, state, strict=True):
            for name, tensor in saved.items():
                getattr(bucket, name).copy_(tensor)


def update(bucket: Bucket, scale: torch.Tensor, step: int) -> None:
    """Apply AdamW to this process's shard of a bucket. Multiply gradients by `scale` first; NaN changes nothing."""
    group = bucket.group
    (beta1, beta2), rate = group["betas"], group["lr"]
    corrections = 1 - beta1**step, (1 - beta2**step) ** 0.5
    if bucket.weights.is_cuda or os.environ.get("TRITON_INTERPRET"):
        from training.adamw_kernel import launch

        tensors = bucket.own_weights, bucket.own_gradients, bucket.master, bucket.mean, bucket.square
        launch(*tensors, scale, rate, beta1, beta2, group["eps"], group["weight_decay"], *corrections)
        return
    if scale.isnan():
        return
    gradient = bucket.own_gradients.float() * scale
    bucket.mean.lerp_(gradient, 1 - beta1)
    bucket.square.lerp_(gradient.square(), 1 - beta2)
    denominator = bucket.square.sqrt() / corrections[1] + group["eps"]
    direction = bucket.mean / corrections[0] / denominator + group["weight_decay"] * bucket.master
    bucket.master.sub_(direction, alpha=rate)
    bucket.own_weights.copy_(bucket.master)


class MixedAdamWFactory(FusedAdamOptimizerFactory):
    """`optimizer.type: mixed_adamw`."""

    name = "mixed_adamw"

    def create_optimizer(self, model: Any, optimizer_config: "OptimizerConfig") -> MixedAdamW:
        for parameter in model.parameters():
            if parameter.requires_grad:  # PEFT creates adapters in float32, which the master weights make unnecessary
                parameter.data = parameter.data.to(self.trainer.config.model.dtype.value)
        groups = self.get_optimizer_grouped_params(model, optimizer_config.weight_decay)
        return MixedAdamW(groups, lr=optimizer_config.learning_rate, betas=optimizer_config.betas)
