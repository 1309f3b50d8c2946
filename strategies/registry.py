"""The strategies by name: frozen records that point at their classes without importing them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from contlearn.errors import unknown_name

Kind = Literal["class-incremental", "test-time", "transfer", "plug-in"]


@dataclass(frozen=True)
class StrategyInfo:
    """One strategy.

    Attributes:
        name: what ``create`` and the command line call it.
        cls: import string of its class; of a plug-in, that of the strategy it is joined to when it is run by its own
            name (plain fine-tuning).
        kind: what it is for.
        description: one line.
        paper: arXiv id or venue.
        implementation: whose code does the method's own work: Avalanche's, or ours and why.
        plugin: import string of the plug-in that does its work; empty for methods that cannot be joined to another.
        excludes: methods that cannot be joined to it.
        exportable: whether its training step can be exported to a device; where it cannot, its class says why
            (``not_exportable``).
        status: ``stable`` once its "must show" figures were seen.
        defaults: method options that differ from the class's own defaults.
        source_of_defaults: where the defaults come from.
    """

    name: str
    cls: str
    kind: Kind
    description: str
    paper: str
    implementation: str
    plugin: str = ""
    excludes: tuple[str, ...] = ()
    exportable: bool = True
    status: str = "stable"
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    source_of_defaults: str = "Avalanche 0.6.0"

    @property
    def is_plugin(self) -> bool:
        """Whether its own name stands for fine-tuning with it."""
        return self.kind in ("plug-in", "transfer")

    @property
    def composes_with(self) -> tuple[str, ...]:
        """Names of the methods that can be joined to it."""
        if self.kind == "test-time":
            return ()
        return tuple(r.name for r in _RECORDS if r.plugin and r.name != self.name and r.name not in self.excludes)

    def load(self) -> type:
        """The strategy's class."""
        return _loaded(self.cls)

    def load_plugin(self) -> type:
        """The plug-in's class; only of a method that can be joined to another."""
        return _loaded(self.plugin)


def _loaded(where: str) -> type:
    module, attribute = where.split(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def _record(
    name: str, where: str, description: str, paper: str, implementation: str, *, plugin: str = "", **more: Any
) -> StrategyInfo:
    return StrategyInfo(
        name,
        f"contlearn.strategies.{where}",
        "class-incremental",
        description,
        paper,
        implementation,
        plugin=f"contlearn.strategies.{plugin}" if plugin else "",
        **more,
    )


def _plugin(
    name: str, where: str, description: str, paper: str, source: str, *, kind: Kind = "plug-in", **more: Any
) -> StrategyInfo:
    return StrategyInfo(
        name,
        "contlearn.strategies.naive:Naive",
        kind,
        description,
        paper,
        "ours",
        plugin=f"contlearn.strategies.{where}",
        source_of_defaults=source,
        **more,
    )


def _adapter(name: str, where: str, description: str, paper: str, **more: Any) -> StrategyInfo:
    source = "ours" if paper == "-" else paper
    return StrategyInfo(
        name,
        f"contlearn.strategies.{where}",
        "test-time",
        description,
        paper,
        "ours",
        source_of_defaults=source,
        **more,
    )


# What a network that grows at every experience cannot take: anchors and teachers of a fixed shape, other networks.
_GROWING = (
    "reset", "adab2n", "ewc", "online_ewc", "feat_kd", "mobiletl", "sherl", "unipt", "lst", "tinytl", "lean",
)  # fmt: skip

_RECORDS = (
    _record("naive", "naive:Naive", "Fine-tuning on each experience; the lower bound.", "-", "ours (the template)"),
    _record(
        "joint", "joint:Joint", "One training on all data at once; the upper bound.", "-", "ours (the template)",
        exportable=False,
    ),
    _record(
        "cumulative", "joint:Cumulative", "Training on all data seen so far.", "-", "ours (the template)",
        exportable=False,
    ),
    _record(
        "replay", "replay:Replay", "Rehearsal from a memory (reservoir, balanced, herding).", "arXiv 1902.10486",
        "Avalanche plug-in and buffers; herding ours (Avalanche re-herds old exemplars)", plugin="replay:ReplayPlugin",
    ),
    _record(
        "er_ace", "er_ace:ERACE", "Replay with an asymmetric cross-entropy.", "arXiv 2104.05025",
        "Avalanche buffer; loop (resumable memory) and criterion (no NaN) ours",
    ),
    _record(
        "der", "der:DER", "Dark experience replay: exemplars matched to the logits they had.", "arXiv 2004.07211",
        "ours (Avalanche's fails once the head grows)", defaults=MappingProxyType({"beta": 0.0}),
        exportable=False,
    ),
    _record(
        "derpp", "der:DER", "Dark experience replay with labels (DER++).", "arXiv 2004.07211",
        "ours (Avalanche's fails once the head grows)", defaults=MappingProxyType({"alpha": 0.1, "beta": 0.5}),
        exportable=False,
    ),
    _record(
        "lwf", "lwf:LwF", "Distillation from the model after the last experience.", "arXiv 1606.09282",
        "Avalanche plug-in, teacher in evaluation mode", plugin="lwf:LwFPlugin",
    ),
    _record(
        "ewc", "ewc:EWC", "Quadratic penalty weighted by the Fisher diagonal.", "arXiv 1612.00796",
        "Avalanche plug-in, batched importance pass", plugin="ewc:EWCPlugin",
    ),
    _record(
        "si", "si:SI", "Penalty from each weight's share in the fall of the loss.", "arXiv 1703.04200",
        "ours (Avalanche's does nothing on the CPU)", plugin="si:SIPlugin",
        source_of_defaults="arXiv 1703.04200; cap of arXiv 1806.08568",
        exportable=False,
    ),
    _record(
        "agem", "agem:AGEM", "Gradients that would hurt the memory are projected.", "arXiv 1812.00420",
        "Avalanche plug-in, batched and resumable memory", plugin="agem:AGEMPlugin",
        exportable=False,
    ),
    _record(
        "gdumb", "gdumb:GDumb", "Train from scratch on a greedy class-balanced memory.", "ECCV 2020 (Prabhu et al.)",
        "Avalanche plug-in", exportable=False, excludes=("reset",),  # it starts afresh by itself
    ),
    _record(
        "icarl", "icarl:ICaRL", "Herded exemplars, distillation, nearest class mean.", "arXiv 1611.07725",
        "ours (Avalanche's needs the deprecated benchmarks)", source_of_defaults="arXiv 1611.07725",
        exportable=False,
    ),
    _record(
        "wa", "wa:WA", "Herded exemplars, distillation, then the head's new rows aligned.", "arXiv 1911.07053",
        "ours", defaults=MappingProxyType({"reset_optimizer": True}), source_of_defaults="arXiv 1911.07053, 2205.13218",
    ),
    _record(
        "memo", "memo:MEMO", "Shared layers and a copy of the last stages per task, a head over all their features.",
        "arXiv 2205.13218", "ours", defaults=MappingProxyType({"reset_optimizer": True}),
        source_of_defaults="the authors' code; train_base off as there", excludes=_GROWING,
    ),
    _record(
        "der_expand", "der_expand:DERExpand", "DER without pruning: a whole backbone per task, one head over all.",
        "arXiv 2103.16788", "ours", defaults=MappingProxyType({"reset_optimizer": True}),
        source_of_defaults="arXiv 2205.13218, as compared there", excludes=_GROWING,
    ),
    _record(
        "rehearsal_free", "rehearsal_free:RehearsalFree",
        "Prediction and feature distillation, EWC and L2 without exemplars, in any combination.", "arXiv 2203.17269",
        "ours", defaults=MappingProxyType({"pred_kd": True, "reset_optimizer": True}),
        source_of_defaults="the authors' code of August 2022; PredKD is its best from scratch",
        excludes=("pred_kd", "feat_kd", "l2", "online_ewc"),  # options of its own
    ),
    _record(
        "prd", "prd:PRD", "Contrastive features, prototypes that follow them, and their relation distilled.",
        "arXiv 2303.14771", "ours", source_of_defaults="the authors' code; crop by image size and epochs ours",
    ),
    _plugin(
        "l2", "penalties:L2Plugin", "Pull of the encoder towards its earlier weights.", "arXiv 2203.17269",
        "the authors' code of August 2022",
    ),
    _plugin(
        "online_ewc", "penalties:OnlineEWCPlugin", "That pull weighted by an accumulated Fisher diagonal.",
        "arXiv 2203.17269", "the authors' code of August 2022",
    ),
    _plugin(
        "pred_kd", "distillation:PredKDPlugin", "Distillation of the last model's predictions on old classes.",
        "arXiv 2203.17269", "the authors' code of August 2022",
    ),
    _plugin(
        "feat_kd", "distillation:FeatKDPlugin", "Distillation of the last model's features.", "arXiv 2203.17269",
        "the authors' code of August 2022",
    ),
    _plugin(
        "adab2n", "adab2n:AdaB2NPlugin", "BatchNorm with statistics balanced between tasks.", "arXiv 2310.08855",
        "the middle of the authors' grid; what they chose is not published",
        excludes=("mobiletl",),  # as host it comes first and replaces the norms that MobileTL looks for
    ),
    _plugin(
        "nap", "nap:NaPPlugin", "Normalisation before every non-linearity, weights projected to their first norms.",
        "arXiv 2407.01800", "arXiv 2407.01800; decay of offsets ours", excludes=("sherl", "unipt", "lst"),
    ),
    _plugin(
        "reset", "reset:ResetPlugin", "The network starts afresh at every experience: a control for plasticity.",
        "-", "ours",
    ),
    _plugin(
        "mobiletl", "mobiletl:MobileTLPlugin",
        "The last inverted residual blocks and the classifier train, at half the activations.", "arXiv 2212.03246",
        "the authors' figures; head layers and the number of blocks ours", kind="transfer",
        excludes=("lean", "tinytl", "sherl", "unipt", "lst"),
    ),
    _plugin(
        "sherl", "sherl:SHERLPlugin", "Frozen backbone, an early route over its features, its last block run again.",
        "arXiv 2407.07523", "the authors' code; width in proportion on other hosts", kind="transfer",
        excludes=("nap", "unipt", "lst"),
    ),
    _plugin(
        "unipt", "unipt:UniPTPlugin", "Frozen backbone, a parallel module over its features.", "arXiv 2308.14316",
        "the authors' code; width in proportion on other hosts", kind="transfer",
        excludes=("nap", "sherl", "lst"),
    ),
    _plugin(
        "lst", "lst:LSTPlugin", "Frozen backbone, a narrow ladder network beside it.", "arXiv 2206.06522",
        "arXiv 2206.06522", kind="transfer", excludes=("nap", "sherl", "unipt"),
    ),
    _plugin(
        "tinytl", "tinytl:TinyTLPlugin", "Biases and small residual branches train beside frozen blocks.",
        "arXiv 2007.11622", "the released code; branches start at random", kind="transfer",
        excludes=("lean", "mobiletl"),
    ),
    _plugin(
        "lean", "lean:LeanPlugin", "Frozen layers keep for backward only what the derivative needs.",
        "arXiv 2404.12406", "ours", kind="transfer", excludes=("tinytl", "mobiletl"),
    ),
    _plugin(
        "mesa", "mesa:MesaPlugin", "What is saved for the backward pass in 8 bits or 1; the forward is exact.",
        "arXiv 2111.11124", "arXiv 2111.11124; groups and ranges of each batch ours",
        exportable=False,
    ),
    _adapter(
        "source", "source:Source", "No adaptation: the source model as it is.", "-",
        exportable=False,
    ),
    _adapter(
        "bn_stats", "bn_stats:BNStats", "BatchNorm statistics of the test batch, mixed with the source's.",
        "arXiv 2006.16971",
    ),
    _adapter("tent", "tent:Tent", "Entropy minimisation on scale and offset of the norms.", "arXiv 2006.10726"),
    _adapter("eata", "eata:EATA", "TENT on samples that are certain and not redundant.", "arXiv 2204.02610"),
    _adapter(
        "cotta", "cotta:CoTTA", "Averaged teacher, averaged augmentations, stochastic restoration.",
        "arXiv 2203.13591",
        exportable=False,
    ),
    _adapter(
        "sar", "sar:SAR", "Sharpness-aware TENT on certain samples, with recovery.", "arXiv 2302.12400",
        exportable=False,
    ),
    _adapter(
        "ecotta", "ecotta:EcoTTA", "Small meta parts adapt a frozen network, partition by partition (patented).",
        "arXiv 2303.01904",
    ),
)  # fmt: skip
STRATEGIES: dict[str, StrategyInfo] = {record.name: record for record in _RECORDS}
assert len(STRATEGIES) == len(_RECORDS), "two strategies share a name"


def describe(name: str) -> StrategyInfo:
    """The record of a strategy.

    Raises:
        ContlearnError: unknown name; the message gives the nearest.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]


def describe_plugin(name: str) -> StrategyInfo:
    """The record of a method that can be joined to another.

    Raises:
        ContlearnError: unknown name, or a method that stands alone; the message gives the nearest that can be joined.
    """
    joinable = [record.name for record in _RECORDS if record.plugin]
    if name not in joinable:
        raise unknown_name("plug-in", name, joinable)
    return STRATEGIES[name]
