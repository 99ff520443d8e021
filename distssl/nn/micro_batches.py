"""A network that sees a part of the batch at a time: the memory of its activations is that of one part.

The gradient is that of the whole batch all the same, whatever the loss makes of the outputs together, as in GradCache
(Gao, Zhang, Han and Callan, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021,
https://arxiv.org/abs/2101.06983): outputs are computed part by part without their activations, and in the backward
pass, when the gradient of each output is known, once more with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class MicroBatches:
    """How rows [R, ...] fall into `num` parts, R a multiple of `lane_rows`, of which `num` is a divisor.

    A lane's `lane_rows` images of a step go into all parts alike. As a rank holds whole lanes, a part is made of the
    same images, over all ranks, at any number of ranks; so a BatchNorm's statistics, those of a part, are the same too.
    """

    lane_rows: int
    num: int

    def run(self, net: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), float [R, ...] -> [R, ...], part by part. `net`: the modules that `function` runs.

        Raises ValueError where R is no multiple of `lane_rows`.
        """
        if x.shape[0] % self.lane_rows:
            raise ValueError(f"x has {x.shape[0]} rows; a multiple of lane_rows={self.lane_rows} is right")
        if torch.is_grad_enabled():
            outputs = [
                checkpoint(_of_part, self, function, x, nth, use_reentrant=False, context_fn=lambda: _contexts(net))
                for nth in range(self.num)
            ]
        else:
            outputs = [_of_part(self, function, x, nth) for nth in range(self.num)]
        lanes = [output.unflatten(0, (-1, self.lane_rows // self.num)) for output in outputs]  # type: ignore[union-attr]
        return torch.cat(lanes, dim=1).flatten(0, 1)  # [R, ...]

    def part(self, x: Tensor, nth: int) -> Tensor:
        """The rows of a part: [R, ...] -> [R / num, ...]."""
        size = self.lane_rows // self.num
        return x.unflatten(0, (-1, self.lane_rows))[:, nth * size : (nth + 1) * size].flatten(0, 1)


def _of_part(micro: MicroBatches, function: Callable[[Tensor], Tensor], x: Tensor, nth: int) -> Tensor:
    """Cuts the part out by itself: what it is given is kept until the backward pass, and x is there anyway."""
    part = micro.part(x, nth)
    return function(part.contiguous(memory_format=torch.channels_last) if part.dim() == 4 else part)


def _contexts(net: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass, and of its repetition."""
    return nullcontext(), _running_statistics_kept(net)


@contextmanager
def _running_statistics_kept(net: nn.Module) -> Iterator[None]:
    """Within the block no BatchNorm of `net` moves its running statistics: they have seen these images already."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()  # SyncBatchNorm refuses to be without it
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked
