"""What travels to the Hub with a drafter: drafting, verifying, window control.

Imports torch, transformers, numpy and itself, at one level.
"""
