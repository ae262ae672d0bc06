"""GPU kernels tested on a machine without a GPU; README.md says what each rung proves and how a kernel gets on it.

Two rungs, a subfolder each, because Triton's interpreter and its compiler cannot share a process: conftest.py runs each
in a process of its own. What lies beside them are their tools.
"""
