"""Many ranks in one process: torch.distributed with real collectives between threads, by torch's own threaded group.

That group is an internal of torch, kept behind this one function; tests that need no more than a few ranks have a twin
on processes with gloo.
"""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.multi_threaded_pg as threaded


def run_threads(world: int, fn: Callable[[], object]) -> list:
    """[fn() of rank 0, fn() of rank 1, ...]; the first exception of any rank is raised."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # else "a process group is already registered"
    isolate(True)
    threaded._install_threaded_pg()
    store, out, errors = dist.HashStore(), [None] * world, []

    def body(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            out[rank] = fn()
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    ranks = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    try:
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        isolate(False)
    if errors:
        raise errors[0]
    return out
