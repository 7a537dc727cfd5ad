"""One operation, the fused LoRA delta, in several backends that agree.

Shapes: B rows, T tokens, E experts, R rank, I inputs, O outputs, K experts kept per row.
"""
