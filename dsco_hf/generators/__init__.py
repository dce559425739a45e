"""Generators: the denoisers that a pipeline takes, the latents they work in, and how they are trained."""
