"""Processes on gloo that run functions of test files; started once, which takes seconds."""

import datetime
import importlib.util
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import distributed

PATIENCE_S = 60.0


class Pool:
    """`run` calls a function on every rank; a rank that fails or hangs fails the test."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returned on each rank.

        It must be at the top of its file, and give what can be pickled without torch.
        """
        if not self._workers:
            self._start()
        task = function.__code__.co_filename, function.__name__, arguments
        for _, pipe in self._workers:
            pipe.send(task)
        results, wrong = [], []
        for rank, (_, pipe) in enumerate(self._workers):
            if not pipe.poll(5.0 if wrong else PATIENCE_S):
                wrong.append(f"rank {rank} gave no answer")
                continue
            try:
                done, result = pipe.recv()
            except EOFError:
                done, result = False, "died"
            results.append(result)
            if not done:
                wrong.append(f"rank {rank}: {result}")
        if wrong:
            self.stop()
            raise AssertionError("\n".join(wrong))
        return results

    def stop(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="blocksched-store-")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            path, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if path not in modules:
                    modules[path] = _load(path)
                reply = True, getattr(modules[path], name)(rank, *arguments)
        except BaseException:
            reply = False, traceback.format_exc()
        pipe.send(reply)


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
