"""A process on its machine: command line, environment, devices, cores, signals, the screen."""
