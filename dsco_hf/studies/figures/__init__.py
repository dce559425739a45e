"""Figures of studies, from results files and tensors."""
