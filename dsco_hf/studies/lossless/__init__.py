"""The smallest number of images that does no worse than all of them, found by few trainings."""
