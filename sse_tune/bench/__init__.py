"""Measuring this project beside the floor of the machine and beside other implementations."""
