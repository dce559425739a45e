"""What is added to a set that is there: chosen real images, and labels that tell more than a class."""
