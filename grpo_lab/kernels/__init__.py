"""What a GPU computes in one pass over memory, as Triton kernels: the softmax of the LM head, rotation, gated MLPs.

Only code that has tensors on a GPU imports these modules: Triton comes with torch there, and not with its CPU build.
"""
