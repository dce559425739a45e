"""Drawing images: the pipeline, the methods that steer its noise, and how it is stored and loaded."""
