"""Triton kernels of the sweep and their launchers; README.md beside this file says what is where.

Importing this package imports no Triton; `launch` does.
"""
