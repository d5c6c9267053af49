"""DistributedDataParallel that reduces only the gradients of what trains now."""

import dataclasses
import itertools

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed import ProcessGroup
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from blocksched.scheduler import BlockScheduler

_WRAP = "wrap it with DistributedDataParallel(model, find_unused_parameters=True)"


@dataclasses.dataclass
class Traffic:
    """What the gradients of one model have cost so far.

    Attributes:
        group: the processes that the gradients are averaged over.
        bytes: of gradients, that this process handed to all-reduce. How many the network carries
            for them is the back end's business (a ring of n processes: 2 (n - 1) / n as many from
            each). Not counted: buffers (BatchNorm), which DistributedDataParallel sends before a
            forward, and its own note of the parameters that a backward used, 4 bytes for each
            parameter tensor, whatever trains.
    """

    group: ProcessGroup
    bytes: int = 0


def prepare_ddp(model: nn.Module, scheduler: BlockScheduler) -> Traffic:
    """Have a DistributedDataParallel all-reduce only the gradients of what trains now.

    Wrap the model while all of it is trainable, then build the scheduler, then call this before the
    first backward; thawed blocks are reduced again without a new wrap. DistributedDataParallel
    reduces in buckets. One in which nothing trains is not sent, one in which everything does is
    sent as ever, with the same bits, and out of a mixed one what trains is packed.

    Args:
        model: the DistributedDataParallel, with find_unused_parameters=True and without a
            communication hook of its own. Prepared already, it stays as it is.
        scheduler: the BlockScheduler of this model.

    Returns:
        The count of what is sent.

    Raises:
        ValueError: another wrap, one that cannot bear blocks that freeze and thaw, a communication
            hook that is there already, or a scheduler of parameters that the wrap does not reduce
            (of another model, or frozen when it was wrapped).
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(f"prepare_ddp takes a wrapped model, got {type(model).__name__}: {_WRAP}")
    _check_wrap(model)
    _check_scheduler(model, scheduler)
    for hook, state in model._comm_hooks:
        if hook is _reduce:
            assert isinstance(state, Traffic)
            return state
        raise ValueError(
            f"the model has the communication hook {hook.__qualname__} already, and takes one: "
            "leave that out, prepare_ddp registers its own"
        )
    traffic = Traffic(model.process_group)
    model.register_comm_hook(traffic, _reduce)
    return traffic


def _reduce(traffic: Traffic, bucket: GradBucket) -> Future[Tensor]:
    """The communication hook: averages, in place, what trains in a bucket."""
    buffer = bucket.buffer()
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    train = [gradient for parameter, gradient in pairs if parameter.requires_grad]
    if not train:
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done
    whole = len(train) == len(bucket.parameters())
    sent = buffer if whole else torch.cat([gradient.flatten() for gradient in train])
    sent.mul_(1 / traffic.group.size())  # not div_: these are the bits of DDP without a hook
    traffic.bytes += sent.nbytes
    work = distributed.all_reduce(sent, group=traffic.group, async_op=True)

    def unpack(reduced: Future[list[Tensor]]) -> Tensor:
        if not whole:
            parts = reduced.value()[0].split([gradient.numel() for gradient in train])
            for gradient, part in zip(train, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return buffer

    future: Future[list[Tensor]] = work.get_future()
    return future.then(unpack)


def _check_wrap(model: DistributedDataParallel) -> None:
    if model.static_graph:
        raise ValueError(
            "the model was wrapped with static_graph=True, which takes the parameters of the first "
            f"backward for those of all: {_WRAP}"
        )
    if not model.find_unused_parameters:
        raise ValueError(
            "the model was wrapped with find_unused_parameters=False, which waits for gradients "
            f"that frozen blocks do not give: {_WRAP}"
        )


def _check_scheduler(model: DistributedDataParallel, scheduler: BlockScheduler) -> None:
    planning = 1 if scheduler.ranks is None else scheduler.ranks.world
    if planning < model.process_group.size():
        raise ValueError(
            f"the model is reduced over {model.process_group.size()} processes, the scheduler "
            f"decides over {planning}: give BlockScheduler the wrap's process group, as group="
        )
    blocks = scheduler.blocks
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    buckets = model.reducer._get_zeros_like_grad_buckets()
    reduced = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    scheduled = itertools.chain(blocks.stem, *blocks.parameters, blocks.head)
    for parameter in scheduled:
        if id(parameter) not in names:
            raise ValueError(
                f"the scheduler has blocks {blocks.names[0]} .. {blocks.names[-1]}, which are not "
                "all in this model: pass the DistributedDataParallel around its model"
            )
        if id(parameter) not in reduced:
            raise ValueError(
                f"the wrap does not reduce {names[id(parameter)]}: it was frozen when the model "
                "was wrapped, or is to be ignored; wrap the model before BlockScheduler is built, "
                "while all that is to train is trainable"
            )
