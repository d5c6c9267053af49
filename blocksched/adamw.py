"""AdamW in one pass over the active blocks, sums included on probes."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blocksched import ops, sharding

_MOMENTS = "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"
_Member = tuple[Tensor, Tensor | None, dict[str, Tensor], int]  # the last is its place


class AdamW(torch.optim.AdamW):
    """A stand-in for torch.optim.AdamW: the same arguments, state and checkpoints.

    Parameters without a gradient are left alone, as in torch. Moments are float32 (float64 for
    float64 parameters) whatever the parameters' dtype, where torch's have the parameters'. Step
    counts live with their parameter. `foreach` and `fused` choose between implementations of torch
    and change nothing here.

    DTensor parameters (FSDP2) are updated where their shards lie; their state is DTensors too.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as torch.optim.AdamW;
            lr and betas may be tensors of one number, on the parameters' device if capturable.
        backend: "auto" is Triton on a GPU (not for float64), C++ on the CPU, else eager torch;
            "triton", "cpp" and "eager" insist.
        master_weights: keep float32 weights behind bfloat16 and float16 parameters, in the state
            as `master_param`.
        moment_dtype: torch.bfloat16 keeps the moments in 2 bytes, rounded stochastically so that
            small changes are not lost; None is float32.
        seed: of that rounding, 0 .. 2^31 - 1; random numbers follow from it, the parameter's place
            in the groups, the index within its shard and its step count, so a resumed run draws the
            same, on as many ranks.

    Raises:
        ValueError: an option out of range, a back end that is not there, `differentiable`, or
            complex parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: ops.Backend = "auto",
        master_weights: bool = False,
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        ops.check_backend(backend)
        if moment_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"moment_dtype must be torch.bfloat16 or torch.float32, got {moment_dtype}: leave "
                "it out for float32"
            )
        self.backend: ops.Backend = backend
        self.master_weights = master_weights
        self.moment_dtype = moment_dtype or torch.float32
        self._seed = seed
        self.set_blocks([])
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._step_supports_amp_scaling = True  # a GradScaler hands over grad_scale and found_inf

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for complex parameters, differentiable and a bad seed."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self.moment_dtype == torch.bfloat16:
            group.setdefault("seed", self._seed)
        try:
            _check_group(group, group.get("seed", self._seed))
        except ValueError:
            self.param_groups.pop()
            raise

    def set_blocks(self, blocks: Sequence[Iterable[Tensor]], stem: Iterable[Tensor] = ()) -> None:
        """Tell which parameters make up each block, in order, and the stem; BlockScheduler does.

        What is active together is then updated in one launch, and `measure` knows what to sum. None
        of it is saved with the state.
        """
        self._blocks = [list(block) for block in blocks]
        self._stem = list(stem)
        self._place = {id(p): -1 for p in self._stem}  # a tensor's own hash takes twice as long
        self._place |= {id(p): b for b, block in enumerate(self._blocks) for p in block}
        self._measure = False
        self.block_sums: Tensor | None = None

    def measure(self) -> None:
        """Have the next step leave `block_sums`: tensor [blocks, 3] of sum |g p|, g^2 and p^2, of
        the gradients as they are used and the parameters before the update; NaN for a step that a
        GradScaler's found_inf skipped; of DTensors the shards that this rank holds. float32 from
        Triton, else float64."""
        self._measure, self.block_sums = True, None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients again; its result is returned.

        Raises:
            RuntimeError: a gradient is sparse, not of its parameter's dtype or not sharded as it
                is, or the step is captured in a CUDA graph without `capturable`.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self._gradients()
        sums, self._measure = self._measure, False
        parts = self._sums_of_the_rest() if sums else []
        index = itertools.count()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, bool], list[_Member]] = {}
            names = _MOMENTS[: 3 if group["amsgrad"] else 2]
            for p, i in zip(group["params"], index, strict=False):
                grad = grads[i]
                if grad is not None or (sums and p in self.state):
                    masters = self.master_weights and self._has_master(p)
                    state = self._start(p, names, masters)
                    alike.setdefault((p.device, masters), []).append((p, grad, state, i))
            for (device, masters), members in alike.items():
                parts.append(self._update(group, members, device, masters, sums))
        if parts and sums:
            self.block_sums = torch.stack([part.to(parts[-1]) for part in parts]).sum(0)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from its checkpoints or ours; moments keep their precision.

        Raises ValueError, with nothing changed, for a group that add_param_group would refuse."""
        saved: dict[str, Any] = {}

        def remember(_optimizer: Any, final: dict[str, Any]) -> None:
            for group in final["param_groups"]:
                _check_options(group, group.get("seed", self._seed))
            saved.update(final)

        def restore(_optimizer: Any) -> None:
            self._restore(saved)

        # Torch casts moments to the parameter's dtype. Other hooks run before the one, after the
        # other, so that they find and leave what they expect.
        handles = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, saved: dict[str, Any]) -> None:
        keys = itertools.chain(*(group["params"] for group in saved["param_groups"]))
        ours = itertools.chain(*(group["params"] for group in self.param_groups))
        for key, p in zip(keys, ours, strict=True):
            state = saved["state"].get(key, {})
            for name in _MOMENTS:
                if name in state:
                    self.state[p][name] = state[name].to(p.device, self._dtype(name, p))
            if "master_param" in state and not self._has_master(p):
                del self.state[p]["master_param"]  # nobody would update it

    def __getstate__(self) -> dict[str, Any]:
        kept = "backend", "master_weights", "moment_dtype", "_seed", "_step_supports_amp_scaling"
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_place" not in self.__dict__:
            self.set_blocks([])
        for group in self.param_groups:
            if self.moment_dtype == torch.bfloat16:
                group.setdefault("seed", self._seed)
        for p, kept in self.state.items():
            if "step" in kept:
                kept["step"] = torch.as_tensor(kept["step"], dtype=torch.float32, device=p.device)

    def _gradients(self) -> list[Tensor | None]:
        """Of all parameters in order. Raises before anything is updated."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    "blocksched.AdamW does not take sparse gradients: use torch.optim.SparseAdam "
                    "for that parameter, or sparse=False in its embedding"
                )
            if grad.dtype != p.dtype:
                raise RuntimeError(
                    f"a gradient must have its parameter's dtype {p.dtype}, got {grad.dtype}: "
                    "leave grad_dtype alone"
                )
        if sharding.any_dtensor(params):
            for p in params:
                sharding.check_gradient(p)
        if self.backend != "auto":
            active = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            ops.choose(self.backend, active)
        return grads

    def _start(self, p: Tensor, names: Sequence[str], masters: bool) -> Any:
        """The state of a parameter, which gets what it lacks of step, `names` and master weight."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self._dtype(name, p))
        if masters and "master_param" not in state:
            state["master_param"] = p.detach().to(torch.float32, copy=True)
        return state

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype.itemsize < 4

    def _dtype(self, name: str, p: Tensor) -> torch.dtype:
        if name in _MOMENTS[:2] and p.dtype != torch.float64:
            return self.moment_dtype
        return torch.promote_types(p.dtype, torch.float32)

    def _update(
        self,
        group: dict[str, Any],
        members: Sequence[_Member],
        device: torch.device,
        masters: bool,
        sums: bool,
    ) -> Tensor:
        """Update parameters of one group on one device; returns their share of the sums."""
        params, grads, states, indices = map(list, zip(*members, strict=True))
        columns = [
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
            [s["master_param"] for s in states] if masters else [],
            [s["step"] for s in states],
        ]
        if sharding.any_dtensor(params):
            columns = [list(map(sharding.local, column)) for column in columns]
        beta1, beta2 = group["betas"]
        compiling = torch.compiler.is_compiling()
        update: Callable[..., Tensor] = ops.adamw_op if compiling else ops.adamw
        return update(
            *columns,
            _scalar(group["lr"]),
            _scalar(beta1),
            _scalar(beta2),
            group["weight_decay"],
            group["eps"],
            group["maximize"],
            self._from_scaler("grad_scale", device),
            self._from_scaler("found_inf", device),
            [group["seed"] << 32 | i for i in indices] if "seed" in group else [],
            [self._place.get(id(p), len(self._blocks)) for p in params],
            len(self._blocks),
            sums,
            self.backend,
        )

    def _sums_of_the_rest(self) -> list[Tensor]:
        """Sums of block parameters that never had a gradient: only their weights count."""
        places = {p: b for b, block in enumerate(self._blocks) for p in block}
        rest = [p for p in places if p.grad is None and p not in self.state]
        if not rest:
            return []
        blocks = [places[p] for p in rest]
        shards = list(map(sharding.local, rest))
        return [ops.block_sums(shards, [None] * len(rest), blocks, len(self._blocks), self.backend)]

    def _from_scaler(self, name: str, device: torch.device) -> Tensor | None:
        """What a GradScaler left here for the time of this step."""
        value = getattr(self, name, None)
        return None if value is None else torch.as_tensor(value, device=device).reshape(())

    def _check_capture(self) -> None:
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "this step is captured in a CUDA graph, which keeps its numbers: build the "
                "optimizer with capturable=True, and pass lr as a tensor if it is to change"
            )


def _check_group(group: dict[str, Any], seed: object) -> None:
    for p in group["params"]:
        if p.is_complex():
            raise ValueError(
                f"blocksched.AdamW takes real parameters, got {p.dtype}: pass "
                "torch.view_as_real(...) or use torch.optim.AdamW"
            )
    _check_options(group, seed)


def _check_options(group: dict[str, Any], seed: object) -> None:
    if group.get("differentiable"):
        raise ValueError(
            "blocksched.AdamW updates in place and has no gradient of its own, got "
            "differentiable=True: use torch.optim.AdamW for that"
        )
    if not (isinstance(seed, int) and 0 <= seed < 2**31):
        raise ValueError(
            f"seed must be an integer, 0 .. {2**31 - 1}, got {seed}: choose one of those"
        )


def _scalar(number: float | Tensor) -> Tensor:
    """A number as the op takes it; a plain one in full precision."""
    if isinstance(number, Tensor):
        return number.detach().reshape(())
    return torch.tensor(number, dtype=torch.float64)
