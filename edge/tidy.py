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


def tidy(model: ir.Model) -> None:
    """Fold, rewrite and clean up ``model``, in place."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    kept = [
        rules.two_reshapes_matmul_reshape_rule, rules.one_reshape_matmul_reshape_rule, rules.collapse_slice_rule,
        rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule, rules.successive_relu_rule,
        rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.reshape_reshape_rule,
        rules.no_op_transpose_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule, rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_gemm_rule,
        rules.remove_optional_bias_from_conv_rule, rules.remove_optional_bias_from_gemm_rule,
    ]  # fmt: skip
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
