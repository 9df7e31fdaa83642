"""Benchmarks: `python -m bench cpu`. Each time is a ratio to a named peer, measured in the same run."""
