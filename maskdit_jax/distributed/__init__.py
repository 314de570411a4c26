"""Devices and processes: the mesh, how processes meet and lose each other; no model, no data."""
