"""Methods compared: their names, metrics, tables and figures, and how good a generator is."""
