"""The machine: devices, processes, signals, files and locks."""
