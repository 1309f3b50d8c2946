"""AdaB2N's layer: batch normalisation whose statistics are balanced between tasks, in the batch and over time.

arXiv 2310.08855; the layer as its authors' code has it, with the momentum stored and stale task counts ruled out.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models.dynamic_modules import DynamicModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from contlearn.errors import ContlearnError
from contlearn.strategies.adab2n_function import BalancedNorm, TaskRows, balanced_norm
from contlearn.strategies.step import exporting


class TaskRegister:
    """Which task each class label belongs to; an experience with classes not met before opens a task.

    All pieces of an online stream's experience are one task, whether or not the strategy may know the boundaries: the
    method needs the task of every training sample (the authors compute it as label // classes per task). Where all
    experiences share their classes there is one task.

    Attributes:
        task_of: task by class label.
        count: tasks so far.
        rest: task of labels of no experience yet; -1: there is none, and such a label is an error.
    """

    def __init__(self) -> None:
        self.task_of: dict[int, int] = {}
        self.count = 0
        self.rest = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskRegister:
        return self  # a copy of the model (GDumb's restart, a teacher) is of the same stream

    def copy(self) -> TaskRegister:
        """A register of its own."""
        made = TaskRegister()
        made.task_of, made.count = dict(self.task_of), self.count
        return made

    def take(self, experience: Any) -> None:
        """Register the classes of a training experience; once is enough, more often changes nothing."""
        # The logging view shows an online piece's origin also where a strategy does not get to see it.
        view = experience.logging() if hasattr(experience, "logging") else experience
        whole = getattr(view, "origin_experience", None) or view
        fresh = {int(label) for label in whole.classes_in_this_experience} - self.task_of.keys()
        if fresh:
            self.task_of.update(dict.fromkeys(sorted(fresh), self.count))
            self.count += 1

    def rows(self, targets: Tensor) -> TaskRows | None:
        """The tasks of the samples with these labels ``(batch,)``; ``None`` while there is one task only.

        Raises:
            ContlearnError: a label of no task met in training.
        """
        if self.count < 2:
            return None
        table = torch.full((max(self.task_of) + 2,), self.rest, dtype=torch.int64)
        table[torch.tensor(list(self.task_of))] = torch.tensor(list(self.task_of.values()))
        index = table.to(targets.device)[targets.clamp(0, len(table) - 1)]
        if not exporting() and int(index.min()) < 0:
            label = int(targets[index < 0][0])
            known = f"0..{max(self.task_of)}" if len(self.task_of) > max(self.task_of) else sorted(self.task_of)
            raise ContlearnError(f"adab2n: label {label} is of no experience trained on; expected one of {known}")
        return TaskRows.of(index, self.count)


class TaskBatch:
    """What the layers share during a training step: the task of each row, and the regularisers they hand back.

    Attributes:
        rows: tasks of the rows of the forward pass that runs; ``None`` outside of one.
        collect: whether layers compute their regulariser.
        penalties: the regularisers of this step, one per layer.
        counts_steps: whether someone calls :meth:`AdaB2N.advance` once per step; else every training pass is a step.
    """

    def __init__(self) -> None:
        self.rows: TaskRows | None = None
        self.collect = False
        self.penalties: list[Tensor] = []
        self.counts_steps = False
        self._served: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskBatch:
        return TaskBatch()  # a copied model has nothing to do with this model's batch

    def open(self, rows: TaskRows | None, *, collect: bool) -> None:
        """Begin a forward pass."""
        self.rows, self.collect, self.penalties = rows, collect, []
        self._served.clear()

    def close(self) -> None:
        """End it: counts that stayed would be taken for the next batch's, as happens in the released code."""
        self.rows, self.collect = None, False
        self._served.clear()

    def rows_for(self, layer: nn.Module, x: Tensor) -> TaskRows | None:
        """The rows, for the first pass of each layer if it has as many; a second pass is over other samples."""
        if self.rows is None or len(self.rows) != len(x) or id(layer) in self._served:
            return None
        self._served.add(id(layer))
        return self.rows


class AdaB2N(_BatchNorm, DynamicModule):
    """Base of :class:`AdaB2N1d` and :class:`AdaB2N2d`, which take the place of BatchNorm layers.

    m is BatchNorm's momentum, N_t the number of rows of task t in the batch, t(i) the task of row i:

    (a) eta_1 = m^kappa, eta_t = eta_(t-1) / (eta_(t-1) + (1 - m)^kappa); kappa 1 is m, kappa 0 is 1 / steps.
    (b) c_t = exp(psi_t) + N_t, w_t = c_t / sum_u c_u, s_i = w_t(i) / N_t(i); mean = sum_i s_i mean(x_i) and variance =
        sum_i s_i mean((x_i - mean)^2) over positions, where rows of two tasks or more are known; else BatchNorm's.
    (c) y = (x - mean) / sqrt(variance + eps) * weight + bias.
    (d) running statistics move by eta towards mean and (biased) variance.
    (e) regulariser: mean squared difference of mean and running mean + that of the variances, after (d). The running
        statistics are constants to it, though they have just been moved.

    In evaluation mode it is BatchNorm with the running statistics. Beside BatchNorm's entries (of the same names, so
    that a BatchNorm state dict loads) the state dict holds ``psi`` ``(tasks,)`` and ``eta``, that of the next step.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: m.
        affine: whether there are ``weight`` and ``bias``.
        kappa: adaptivity of the momentum, 0..1.
        renormalise: divide s_i by their sum: tasks the batch has no row of get no weight. As released (``False``),
            they keep theirs and statistics shrink towards 0.
        fused: one autograd function that saves what BatchNorm saves; ``False``: operation by operation.
        register: tasks by label, shared by the layers of a model.
        batch: what layers share during a step.

    Attributes:
        drop: applied to the output, as ``act`` after it: taken over from timm's BatchNormAct2d, else ``None``.
        analysed: compute plain BatchNorm: set for as long as the network's graph is analysed, not run. Scaling the
            input does the same to both.

    Raises:
        ContlearnError: kappa outside 0..1.
    """

    eta: Tensor
    analysed = False

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        kappa: float = 0.4,
        renormalise: bool = False,
        fused: bool = True,
        register: TaskRegister | None = None,
        batch: TaskBatch | None = None,
    ) -> None:
        check_kappa(kappa)
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.kappa = kappa
        self.renormalise = renormalise
        self.fused = fused
        self.register = register if register is not None else TaskRegister()
        self.batch = batch if batch is not None else TaskBatch()
        self.psi = nn.Parameter(torch.zeros(1))
        self.register_buffer("eta", torch.empty(()))
        self.drop: nn.Module | None = None
        self.act: nn.Module | None = None
        self.restart()

    def restart(self) -> None:
        """Set ``eta`` to that of the first step; kappa 0 goes on from the steps BatchNorm has counted."""
        assert self.num_batches_tracked is not None and self.momentum is not None
        if self.kappa == 0:
            self.eta.copy_(1 / (self.num_batches_tracked.to(self.eta) + 1))
        else:
            self.eta.fill_(self.momentum**self.kappa)

    def advance(self) -> None:
        """One training step is over: equation (a). It also gives 1 / steps for kappa 0, and for kappa 1 stays m."""
        if self.kappa != 1:
            assert self.momentum is not None
            self.eta.div_(self.eta + (1 - self.momentum) ** self.kappa)

    def adaptation(self, experience: Any) -> None:
        """Register the experience's classes and give each task an entry of ``psi``, in training mode only."""
        if not self.training:  # Avalanche also adapts before it evaluates
            return
        self.register.take(experience)
        added = self.register.count - len(self.psi)
        if added > 0:
            self.psi = nn.Parameter(F.pad(self.psi.detach(), (0, added)), requires_grad=self.psi.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """The shape of the input: (batch, channels), (batch, channels, length) or (batch, channels, height, width).

        Raises:
            ContlearnError: rows of tasks that ``psi`` has no entry for.
        """
        if self.analysed or not self.training:
            return self._finish(super().forward(input))
        self._check_input_dim(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        rows = self.batch.rows_for(self, input)
        if rows is not None and len(rows.counts) > len(self.psi):
            raise ContlearnError(
                f"adab2n: {len(rows.counts)} tasks, but psi has {len(self.psi)} entries; adapt the model to each "
                "experience in training mode"
            )
        function = BalancedNorm.apply if self.fused else balanced_norm
        y, penalty = function(
            input, self.weight, self.bias, None if rows is None else self.psi[: len(rows.counts)],
            self.running_mean, self.running_var, self.eta.to(self.running_mean.dtype), rows,
            self.eps, self.renormalise, self.batch.collect,
        )  # fmt: skip
        self.num_batches_tracked.add_(1)
        if penalty is not None:
            self.batch.penalties.append(penalty)
        if not self.batch.counts_steps:
            self.advance()
        return self._finish(y)

    def _finish(self, y: Tensor) -> Tensor:
        """What timm's BatchNormAct2d does after the normalisation; nothing where this replaced another BatchNorm."""
        for module in (self.drop, self.act):
            y = y if module is None else module(y)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kappa={self.kappa}, renormalise={self.renormalise}, fused={self.fused}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "psi")
        tasks = 1 if stored is None else len(stored)
        if tasks != len(self.psi):
            self.psi = nn.Parameter(self.psi.detach().new_zeros(tasks), requires_grad=self.psi.requires_grad)
        batchnorms = stored is None and prefix + "eta" not in state_dict and prefix + "running_mean" in state_dict
        if batchnorms:
            state_dict[prefix + "psi"] = torch.zeros_like(self.psi)
            state_dict[prefix + "eta"] = self.eta.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if batchnorms:
            self.restart()


class AdaB2N1d(AdaB2N, nn.BatchNorm1d):
    """For (batch, channels) and (batch, channels, length); options as of :class:`AdaB2N`."""


class AdaB2N2d(AdaB2N, nn.BatchNorm2d):
    """For (batch, channels, height, width); options as of :class:`AdaB2N`."""


def check_kappa(kappa: float) -> None:
    """Raise a :class:`ContlearnError` where kappa is outside 0..1."""
    if not 0 <= kappa <= 1:
        raise ContlearnError(f"kappa: expected 0..1, got {kappa}")
