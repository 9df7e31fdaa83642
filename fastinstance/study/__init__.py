"""Data, training and evaluation for the demo and the studies; needs the extra ``demo``."""
