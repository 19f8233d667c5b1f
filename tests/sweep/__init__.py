"""The architecture sweep: every architecture of Transformers, tiny, under another attention.

`python -m tests.sweep` builds each model class of the auto mappings with random weights, loads the
same weights under eager, sdpa and the implementation under test, and compares the answers at real
(non-padding) positions in every scenario of `scenarios.py`. See `--help`.
"""
