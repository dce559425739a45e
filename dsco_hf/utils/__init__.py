"""Plain things that know nothing of the method: values, names, files, processes, configs, and errors of the Hub."""
