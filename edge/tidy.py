"""What is tidied in a graph as ``torch.onnx`` gives it: constants folded, shuffles of layout joined, leftovers removed.

A list of passes of our own. ``torch.onnx``'s also drops ``x + c`` for ``|c| <= 1e-8`` and ``x * c`` for
``|c - 1| <= 1e-5`` as if ``c`` were 0 and 1, so that Adam loses its eps; and looking for slices that make up a split
takes it more than half of the time of an export, to find none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_ROUNDS = 2
"""Of folding and rewriting, at most; the second finds what the first laid bare."""
_RULES = (
    "two_reshapes_matmul_reshape_rule", "one_reshape_matmul_reshape_rule", "collapse_slice_rule",
    "collapse_slice2_rule", "materialize_reshape_shape_rule", "successive_relu_rule", "cast_cast_rule",
    "no_op_cast_rule", "no_op_expand_rule", "reshape_reshape_rule", "no_op_transpose_rule", "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule", "squeeze_reshape_1d_rule", "fuse_batchnorm_into_conv_rule",
    "fuse_batchnorm_into_gemm_rule", "remove_optional_bias_from_conv_rule", "remove_optional_bias_from_gemm_rule",
)  # fmt: skip
"""Of ``onnxscript.rewriter.rules.common``, larger patterns first. A release without one gives a graph less tidy."""


def tidy(model: ir.Model) -> None:
    """Fold, rewrite and clean up ``model``, in place."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    kept = [getattr(rules, name) for name in _RULES if hasattr(rules, name)]
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewritten = rewriter.RewritePass(kept)(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten.modified):
            break
    ir.passes.Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
