"""Small datasets: drawn, in memory or in the folder of a run, mixed with real images, and recorded."""
