"""What a set of images is held against: what networks see in a population, kept as targets, and the objectives."""
