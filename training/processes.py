"""What the processes of a run, one a GPU, tell each other. Every process must make each of these calls."""

import torch


def over_processes(loss: float, tokens: int, device: torch.device) -> tuple[float, int]:
    """A step's loss and tokens over all processes: the mean, whose gradient the optimizer follows, and the sum."""
    processes = torch.distributed.get_world_size()
    if processes == 1:
        return loss, tokens
    totals = torch.tensor([loss, tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(totals)
    return totals[0].item() / processes, int(totals[1])


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in one of the processes at least."""
    if torch.distributed.get_world_size() == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return bool(raised)
