"""Seeing sigma while a model is trained: numbers, faults and a picture."""
