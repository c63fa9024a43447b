"""Triton's interpreter as a backend named `cpu`, so that vLLM takes its kernels for usable without a GPU.

Triton finds it by this folder's entry point once the folder is on PYTHONPATH. With TRITON_INTERPRET=1 nothing is ever
compiled: backend and driver are there by name alone.
"""
