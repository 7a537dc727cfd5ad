"""One operation, the fused LoRA delta, in several backends with equal results.

Shapes: B rows, T tokens, E experts, R rank, I inputs, O outputs, K experts kept per row.
"""
