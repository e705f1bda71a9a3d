"""The process and its machine: command line, environment, devices, cores, signals, the screen."""
