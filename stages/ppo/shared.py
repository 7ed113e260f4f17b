"""One rollout of all processes: each draws a part of it, and each minibatch is one of the whole.

So nothing that is learned depends on how many processes there are: a row's random stream goes by its place among all
rows, minibatches are those of one permutation, and a checkpoint holds the whole rollout.
"""

import numpy
import torch

from .rollout import Rollout


def gathered(rollout: Rollout) -> Rollout:
    """The rollouts of all processes, in the order of the processes, on each of them; what one process has as it is."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return rollout
    device = rollout.scores_B.device
    parts: list[dict[str, torch.Tensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, {name: each.cpu() for name, each in rollout.tensors().items()})
    whole = {name: _stacked([part[name] for part in parts]) for name in parts[0]}
    return Rollout.from_tensors(whole, device)


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """One after the other, as wide as the widest; nothing looks at what is beyond a row's length."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.size(1) for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.size(1))) for part in parts])


def own_share(rows: torch.Tensor, rollout: Rollout, process: int, processes: int, group: int = 1) -> torch.Tensor:
    """A process' part of a minibatch: as many rows as every other's, and about as many tokens.

    Args:
        group: so many rows that follow each other answer one prompt and stay together.
    """
    if processes == 1:
        return rows
    rows_PN = rows.view(-1, group)
    order = numpy.argsort(-rollout.episodes.host.total_B[rows_PN.numpy()].sum(1), kind="stable")
    return rows_PN[torch.from_numpy(order)][process::processes].flatten()
